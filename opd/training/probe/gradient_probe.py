"""The gradient probe during training: signal, noise and bias of gradients at the current weights.

Shapes: B responses, N supervised tokens, F estimators, D and D' hidden sizes of student and
teacher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField
from diagnostics.errors import InvalidInput
from diagnostics.gradients.distributed import (
    all_gather_loss_gradients,
    all_gather_sketches,
    gather_batch,
)
from diagnostics.gradients.estimators import GAMMAS
from diagnostics.gradients.layers import make_block
from diagnostics.gradients.probe import (
    GradientSketches,
    LossGradients,
    gradient_row,
    sketch_gradients,
)
from diagnostics.gradients.sketch import Projection, outer_sketches, random_projection
from diagnostics.ragged import flat_index
from diagnostics.records.rows import Row
from opd.data.prompts import Prompts
from opd.models.forward import (
    log_probabilities,
    micro_batches,
    response_hidden_states,
)
from opd.models.lm_head import (
    LogitsHead,
    chunk_slices,
)
from opd.models.model import CausalLM
from opd.objectives.inputs import TokenInputs
from opd.runtime import distributed
from opd.scoring.loss import product_gradients
from opd.scoring.score import ScoredBatch
from opd.teachers.pair import ModelPair
from opd.training.probe.block_gradients import (
    block_gradient_sketches,
    block_loss_gradients,
    hidden_state_gradients,
)
from opd.training.update import PreparedLoss


@torch.no_grad()
def probe_gradients(
    pair: ModelPair,
    batch: ScoredBatch,
    trained_loss: PreparedLoss,
    *,
    gamma: float,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
    blocks: Sequence[str] = (),
) -> Row:
    """Compute `diagnostics.gradients.probe.gradient_row` for a batch.

    Signal, variance, signal-to-noise ratio and noise scale are those of the training loss, with its
    objective, credit, mask, ratio and denominator. Each estimator of the gamma family has columns
    under its own name. Columns of the LM head start with "gradient/", those of a block
    (`diagnostics.gradients.layers`) with "gradient/blocks/PATTERN/". With several ranks every rank
    returns the row of all sequences.

    Args:
        pair: Student and teacher.
        batch: Batch for the gamma family, sampled from the student with top_p = 1 at the
            temperature of the scores.
        trained_loss: Loss of the update, on its own batch.
        gamma: Discount of the objective; replaced by the nearest one of the probe's grid.
        max_tokens_per_microbatch: Limit on tokens, padding included, of a forward pass.
        max_logits_per_chunk: Limit on logits held in memory at a time.
        blocks: Patterns of blocks below the head that are measured too.

    Returns:
        The row; empty if the batch has too few prompts.

    Raises:
        InvalidInput: `blocks` is given and there are several ranks, or the LM head of the student
            is not a single matrix.
    """
    is_distributed = distributed.world_size() > 1
    prompts, scored = batch.prompts, batch.scored
    if blocks and is_distributed:
        raise InvalidInput(
            f"probe_blocks is {blocks}, which needs a single process; remove probe_blocks (the "
            "gradient of the LM head is still measured), or start one process"
        )
    family = family_gradients(
        pair,
        batch,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        max_logits_per_chunk=max_logits_per_chunk,
    )
    sketches, projection = family.sketches, family.projection
    sketches = all_gather_sketches(sketches) if is_distributed else sketches
    loss, hidden_gradients = loss_gradients(
        pair,
        trained_loss,
        projection,
        max_tokens_per_microbatch,
        max_logits_per_chunk,
        bool(blocks),
    )
    loss = all_gather_loss_gradients(loss) if is_distributed else loss
    reference = ("plain", min(GAMMAS, key=lambda g: abs(g - gamma)))
    block_results: dict[str, tuple[GradientSketches, LossGradients]] = {}
    if hidden_gradients is not None:
        selected_blocks = [make_block(pair.student.network, pattern) for pattern in blocks]
        token_gradients = hidden_state_gradients(
            pair, scored, family.student_hidden, family.teacher_hidden, family.chunk_tokens
        )
        sketches_by_block = block_gradient_sketches(
            pair.student,
            prompts,
            scored,
            token_gradients,
            selected_blocks,
            reference[1],
            max_tokens_per_microbatch,
        )
        losses_by_block = block_loss_gradients(
            pair.student, trained_loss, hidden_gradients, selected_blocks, max_tokens_per_microbatch
        )
        block_results = {
            name: (sketches_by_block[name], losses_by_block[name]) for name in sketches_by_block
        }
    try:
        row = gradient_row(sketches, reference, loss=loss)
        for pattern, (block_sketches, block_loss) in block_results.items():
            row |= gradient_row(
                block_sketches, reference, prefix=f"gradient/blocks/{pattern}", loss=block_loss
            )
    except MissingField:
        return {}
    return dict(row)


@dataclass(frozen=True, kw_only=True, eq=False)
class FamilyGradients:
    """Gradients of the gamma family on a batch, with what further gradients of it are made from."""

    sketches: GradientSketches
    """Gradients of the LM head by estimator and discount, for the responses of this rank."""
    projection: Projection
    """Random projection of the sketches."""
    student_hidden: Tensor
    """(N, D) hidden states of the student at the supervised tokens."""
    teacher_hidden: Tensor
    """(N, D') hidden states of the teacher."""
    chunk_tokens: int
    """Tokens whose log-probabilities are held at a time."""


@torch.no_grad()
def family_gradients(
    pair: ModelPair,
    batch: ScoredBatch,
    *,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
) -> FamilyGradients:
    """Sketch the gradients of the LM head for every estimator of the gamma family.

    Args:
        pair: Student and teacher.
        batch: Batch sampled from the student with top_p = 1 at the temperature of the scores.
        max_tokens_per_microbatch: Limit on tokens, padding included, of a forward pass.
        max_logits_per_chunk: Limit on logits held in memory at a time.

    Returns:
        The gradients of this rank's responses.

    Raises:
        InvalidInput: The LM head of the student is not a single matrix.
    """
    head, scored, teacher = pair.student.head, batch.scored, pair.teacher.model
    if isinstance(head, LogitsHead):
        raise InvalidInput(
            "the gradient probe needs an LM head with a single weight matrix, which this student "
            "does not have; set probe_every to 0"
        )
    student_hidden, teacher_hidden = (
        supervised_hidden_states(model, model_prompts, scored, max_tokens_per_microbatch)
        for model, model_prompts in (
            (pair.student, batch.prompts),
            (teacher, batch.prompts.teacher_prompts),
        )
    )
    temperature, vocabulary = scored.score_temperature, pair.student.vocabulary
    projection = random_projection(vocabulary, student_hidden.shape[1], seed=0).to(
        student_hidden.device
    )

    def logp(chunk: slice) -> tuple[Tensor, Tensor]:
        return (
            log_probabilities(pair.student, student_hidden[chunk], temperature),
            log_probabilities(teacher, teacher_hidden[chunk], temperature),
        )

    def product_derivatives(chunk: slice) -> Tensor:
        return head.derivatives(head.logits(student_hidden[chunk]))

    chunk_tokens = chunk_slices(len(student_hidden), vocabulary, max_logits_per_chunk)[0].stop
    sketches = sketch_gradients(
        scored,
        student_hidden,
        logp,
        projection,
        chunk_tokens=chunk_tokens,
        gathered=gather_batch(scored) if distributed.world_size() > 1 else None,
        logit_derivatives=None if head.is_linear else product_derivatives,
    )
    return FamilyGradients(
        sketches=sketches,
        projection=projection,
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden,
        chunk_tokens=chunk_tokens,
    )


def mean_token_weight(loss: PreparedLoss) -> Tensor:
    """Return the (B, T) weight of each token in its response's loss.

    The weights of each update, before ratios, are scaled to a mean of 1 over its tokens: with equal
    weights, a response's loss is the sum over its tokens. The scale changes neither the
    signal-to-noise ratio nor the noise scale.

    Args:
        loss: Loss of the update.

    Returns:
        The weights.
    """
    mask, weight = loss.batch.scored.mask, torch.zeros_like(loss.weight)
    for rows in loss.rows:
        tokens = mask[rows].sum(1).to(weight.dtype)
        shares_of_loss = tokens / loss.denominator[rows]
        total, loss_total = (distributed.all_reduce_sum(x.sum()) for x in (tokens, shares_of_loss))
        weight[rows] = loss.weight[rows] * total / loss_total
    return weight


def loss_gradients(
    pair: ModelPair,
    trained_loss: PreparedLoss,
    projection: Projection,
    max_tokens_per_microbatch: int,
    max_logits_per_chunk: int,
    with_hidden_gradients: bool,
) -> tuple[LossGradients, Tensor | None]:
    """Compute the LM-head gradient of the training loss per response.

    Args:
        pair: Student and teacher.
        trained_loss: Loss of the update.
        projection: Random projection of the gradient sketches.
        max_tokens_per_microbatch: Limit on tokens of a forward pass.
        max_logits_per_chunk: Limit on logits held in memory at a time.
        with_hidden_gradients: Whether to return gradients with respect to hidden states too.

    Returns:
        The gradient sketches, and the (N, D) gradients of the loss with respect to the hidden
        states, or None without `with_hidden_gradients`.
    """
    batch, head = trained_loss.batch.scored, pair.student.head
    mask, teacher_hidden = batch.mask, trained_loss.batch.teacher_hidden
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden[mask[batch.sampled]]
    hidden = supervised_hidden_states(
        pair.student, trained_loss.batch.prompts, batch, max_tokens_per_microbatch
    )
    weight = mean_token_weight(trained_loss)
    inputs = TokenInputs.of(batch, trained_loss.objective.support, trained_loss.credit, weight)
    hidden_gradients: list[Tensor] = []

    def iterate_product_gradients() -> Iterator[tuple[slice, Tensor]]:
        for chunk, product_gradient in product_gradients(
            pair.student,
            trained_loss.objective,
            hidden,
            inputs,
            teacher=None if teacher_hidden is None else pair.teacher.model,
            teacher_hidden=teacher_hidden,
            temperature=batch.score_temperature,
            max_logits_per_chunk=max_logits_per_chunk,
        ):
            if with_hidden_gradients:
                hidden_gradients.append(head.backproject(product_gradient, hidden.shape[1]))
            yield chunk, product_gradient

    sketches = outer_sketches(iterate_product_gradients(), hidden, mask, projection)
    gradients = LossGradients(sketches=sketches, prompt=batch.prompt)
    return gradients, torch.cat(hidden_gradients) if with_hidden_gradients else None


def supervised_hidden_states(
    model: CausalLM, prompts: Prompts, scored: ScoredRollouts, max_tokens_per_microbatch: int
) -> Tensor:
    """Compute the hidden states of all supervised tokens.

    Args:
        model: Student or teacher.
        prompts: Prompts of `scored`.
        scored: Rollouts with their mask.
        max_tokens_per_microbatch: Limit on tokens of a forward pass.

    Returns:
        (N, D) hidden states, in row-major order of the mask.

    Raises:
        InvalidInput: The batch has no supervised token.
    """
    slot = flat_index(scored.mask)
    hidden: Tensor | None = None
    for rows in micro_batches(prompts, scored, max_tokens_per_microbatch):
        micro_batch = scored.rows(rows).trim()
        row_hidden = response_hidden_states(model, prompts.rows(rows), micro_batch)
        if hidden is None:
            hidden = row_hidden.new_zeros((int(scored.mask.sum()), row_hidden.shape[1]))
        hidden[slot[rows][:, : micro_batch.mask.shape[1]][micro_batch.mask]] = row_hidden
    if hidden is None:
        raise InvalidInput("the batch has no supervised token, so there is no gradient to probe")
    return hidden
