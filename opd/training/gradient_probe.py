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
from diagnostics.gradients.bias import REFERENCES, response_cost
from diagnostics.gradients.distributed import (
    all_gather_loss_gradients,
    all_gather_sketches,
    gather_batch,
)
from diagnostics.gradients.estimators import GAMMAS, available_estimators, estimator_weights
from diagnostics.gradients.layers import Block, make_block, sequence_gradients
from diagnostics.gradients.probe import (
    GradientSketches,
    LossGradients,
    check_on_policy,
    gradient_row,
    sketch_gradients,
)
from diagnostics.gradients.sketch import Projection, outer_sketches, random_projection
from diagnostics.ragged import flat_index, scatter_to_mask
from diagnostics.records.rows import Row
from opd.data.prompts import Prompts
from opd.models.forward import (
    log_probabilities,
    micro_batches,
    response_hidden_states,
)
from opd.models.lm_head import (
    LmHead,
    apply_scale_and_softcap,
    apply_temperature,
    chunk_slices,
    full_logits,
    head_products,
    logit_derivatives,
)
from opd.models.model import CausalLM
from opd.objectives.factory import Objective
from opd.runtime import distributed
from opd.scoring.loss import product_gradients
from opd.teachers.pair import ModelPair


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedLoss:
    """The training loss as a sum over responses, with everything that the update uses."""

    objective: Objective
    prompts: Prompts
    """Prompts of the responses in `batch`."""
    batch: ScoredRollouts
    """Scored rollouts with the loss mask applied and the support that the objective needs."""
    credit: Tensor
    """(B, T) credit per token, as passed to `opd.scoring.loss.loss_from_hidden`."""
    weight: Tensor
    """(B, T) weight per token: importance ratio / loss denominator, up to a factor per update."""
    teacher_hidden: Tensor | None = None
    """(N, D') teacher hidden states at the supervised tokens, for full-vocabulary objectives."""


@torch.no_grad()
def probe_gradients(
    pair: ModelPair,
    prompts: Prompts,
    scored: ScoredRollouts,
    trained_loss: TrainedLoss,
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
        prompts: Prompts of `scored`.
        scored: Batch for the gamma family, sampled from the student with top_p = 1 at the
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
    is_distributed, head = distributed.world_size() > 1, pair.student.head
    if blocks and is_distributed:
        raise InvalidInput(
            f"probe_blocks is {blocks}, which needs a single process; remove probe_blocks (the "
            "gradient of the LM head is still measured), or start one process"
        )
    if head.weight is None:
        raise InvalidInput(
            "the gradient probe needs an LM head with a single weight matrix, which this student "
            "does not have; set probe_every to 0"
        )
    student_hidden, teacher_hidden = (
        supervised_hidden_states(model, prompts, scored, max_tokens_per_microbatch)
        for model in (pair.student, pair.teacher)
    )
    temperature, vocabulary = scored.score_temperature, pair.student.vocabulary
    projection = random_projection(vocabulary, student_hidden.shape[1], seed=0).to(
        student_hidden.device
    )

    def logp(chunk: slice) -> tuple[Tensor, Tensor]:
        return (
            log_probabilities(pair.student, student_hidden[chunk], temperature),
            log_probabilities(pair.teacher, teacher_hidden[chunk], temperature),
        )

    def product_derivatives(chunk: slice) -> Tensor:
        return logit_derivatives(full_logits(student_hidden[chunk], head), head)

    logit_shaping = product_derivatives if head.softcap is not None or head.scale != 1 else None
    chunk_tokens = chunk_slices(len(student_hidden), vocabulary, max_logits_per_chunk)[0].stop
    rank_gather = gather_batch(scored) if is_distributed else None
    sketches = sketch_gradients(
        scored,
        student_hidden,
        logp,
        projection,
        chunk_tokens=chunk_tokens,
        gathered=rank_gather,
        logit_derivatives=logit_shaping,
    )
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
            pair, scored, student_hidden, teacher_hidden, chunk_tokens
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


def loss_gradients(
    pair: ModelPair,
    trained_loss: TrainedLoss,
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
    batch, head, mask = trained_loss.batch, pair.student.head, trained_loss.batch.mask
    hidden = supervised_hidden_states(
        pair.student, trained_loss.prompts, batch, max_tokens_per_microbatch
    )
    hidden_gradients: list[Tensor] = []

    def iterate_product_gradients() -> Iterator[tuple[slice, Tensor]]:
        for chunk, product_gradient in product_gradients(
            pair,
            trained_loss.objective,
            hidden,
            trained_loss.teacher_hidden,
            batch,
            trained_loss.credit,
            trained_loss.weight[mask],
            max_logits_per_chunk=max_logits_per_chunk,
        ):
            if with_hidden_gradients:
                hidden_gradients.append(
                    backproject_to_hidden(product_gradient, head, hidden.shape[1])
                )
            yield chunk, product_gradient

    sketches = outer_sketches(iterate_product_gradients(), hidden, mask, projection)
    gradients = LossGradients(sketches=sketches, prompt=batch.prompt)
    return gradients, torch.cat(hidden_gradients) if with_hidden_gradients else None


def block_loss_gradients(
    student: CausalLM,
    trained_loss: TrainedLoss,
    hidden_gradients: Tensor,
    blocks: Sequence[Block],
    max_tokens_per_microbatch: int,
) -> dict[str, LossGradients]:
    """Compute the training-loss gradient per response for blocks below the LM head.

    Costs one forward and one backward pass.

    Args:
        student: The student.
        trained_loss: Loss of the update.
        hidden_gradients: (N, D) gradients of the loss with respect to the hidden states of
            supervised tokens.
        blocks: Blocks to measure.
        max_tokens_per_microbatch: Limit on tokens of a forward pass.

    Returns:
        Gradient sketches by name of the block.
    """
    prompts, batch = trained_loss.prompts, trained_loss.batch
    padded_gradients = scatter_to_mask(hidden_gradients, batch.mask)
    parts: dict[str, list[tuple[list[int], Tensor, Tensor]]] = {b.name: [] for b in blocks}
    for rows in micro_batches(prompts, batch, max_tokens_per_microbatch):
        micro_batch = batch.rows(rows).trim()
        micro_batch_gradients = padded_gradients[rows][:, : micro_batch.mask.shape[1]][
            micro_batch.mask
        ]

        def forward(rows: list[int] = rows, micro_batch: ScoredRollouts = micro_batch) -> Tensor:
            return response_hidden_states(student, prompts.rows(rows), micro_batch)

        for name, (sketch, squared_norm) in sequence_gradients(
            blocks, forward, [micro_batch_gradients]
        ).items():
            parts[name].append((rows, sketch[:, 0], squared_norm[:, 0]))
    gradients = {}
    for name, block_parts in parts.items():
        order = torch.tensor([i for rows, _, _ in block_parts for i in rows]).argsort()
        order = order.to(hidden_gradients.device)
        gradients[name] = LossGradients(
            sketches=torch.cat([sketch for _, sketch, _ in block_parts])[order],
            squares=torch.cat([squared_norm for _, _, squared_norm in block_parts])[order],
            prompt=batch.prompt,
        )
    return gradients


def hidden_state_gradients(
    pair: ModelPair,
    scored: ScoredRollouts,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Compute gradients of log p(y) and of KL(p || q) with respect to the student's hidden states.

    Args:
        pair: Student p and teacher q.
        scored: Scored rollouts.
        student_hidden: (N, D) hidden states of the student at supervised tokens.
        teacher_hidden: (N, D') hidden states of the teacher at supervised tokens.
        chunk_tokens: Number of tokens per chunk.

    Returns:
        Two (N, D) tensors: gradients of each token's log-probability, and of its KL divergence.
    """
    tokens, temperature, head = (
        scored.tokens[scored.mask],
        scored.score_temperature,
        pair.student.head,
    )
    chunk_gradients = []
    for start in range(0, len(student_hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        teacher_logp = log_probabilities(pair.teacher, teacher_hidden[chunk], temperature)
        with torch.enable_grad():
            logits = head_products(student_hidden[chunk], head)[
                ..., : head.vocabulary
            ].requires_grad_()
            logp = apply_temperature(
                apply_scale_and_softcap(logits, head), temperature
            ).log_softmax(-1)
            log_ratio = torch.where(logp > -torch.inf, logp - teacher_logp, 0.0)
            token_logp = logp.gather(1, tokens[chunk, None]).sum()
            logit_gradients = torch.autograd.grad(token_logp, logits, retain_graph=True)
            logit_gradients += torch.autograd.grad((logp.exp() * log_ratio).sum(), logits)
        chunk_gradients.append(
            [
                backproject_to_hidden(logit_gradient, head, student_hidden.shape[1])
                for logit_gradient in logit_gradients
            ]
        )
    score_gradients, local_gradients = zip(*chunk_gradients, strict=True)
    return torch.cat(score_gradients), torch.cat(local_gradients)


def backproject_to_hidden(product_gradient: Tensor, head: LmHead, width: int) -> Tensor:
    """Map (n, V) gradients of the head's raw logits to (n, D) gradients of its hidden states."""
    if head.weight is None:
        return torch.nn.functional.pad(product_gradient, (0, width - product_gradient.shape[1]))
    return product_gradient.to(head.weight.dtype) @ head.weight[: head.vocabulary]


def block_gradient_sketches(
    student: CausalLM,
    prompts: Prompts,
    scored: ScoredRollouts,
    token_gradients: tuple[Tensor, Tensor],
    blocks: Sequence[Block],
    gamma: float,
    max_tokens_per_microbatch: int,
) -> dict[str, GradientSketches]:
    """Compute gradient sketches of estimators for blocks below the LM head.

    Measures the plain estimator and the one of least variance at the discounts 0, `gamma` and 1.
    The LM head is differentiated once for all of them (`hidden_state_gradients`). Further cost: one
    forward pass of the student and 4 backward passes without weight gradients (6 if gamma is
    neither 0 nor 1).

    Args:
        student: The student.
        prompts: Prompts of `scored`.
        scored: On-policy scored rollouts.
        token_gradients: Pair of (N, D) tensors from `hidden_state_gradients`.
        blocks: Blocks to measure.
        gamma: Discount of the objective.
        max_tokens_per_microbatch: Limit on tokens of a forward pass.

    Returns:
        Sketches by name of the block.
    """
    check_on_policy(scored)
    available_names = available_estimators(scored, has_teacher=True)
    names = ("plain", next(name for name in REFERENCES if name in available_names))
    member_weights = estimator_weights(
        scored, tuple(dict.fromkeys(names)), sorted({0.0, gamma, 1.0})
    )
    token_score, token_local = (scatter_to_mask(sketch, scored.mask) for sketch in token_gradients)
    num_members = member_weights.values.shape[-1]
    parts: dict[str, list[tuple[list[int], Tensor, Tensor]]] = {b.name: [] for b in blocks}
    for rows in micro_batches(prompts, scored, max_tokens_per_microbatch):
        micro_batch = scored.rows(rows).trim()
        positions = slice(micro_batch.mask.shape[1])
        coefficients = member_weights.values[rows][:, positions][micro_batch.mask].to(
            token_score.dtype
        )
        score, local = (
            sketch[rows][:, positions][micro_batch.mask] for sketch in (token_score, token_local)
        )

        def forward(rows: list[int] = rows, micro_batch: ScoredRollouts = micro_batch) -> Tensor:
            return response_hidden_states(student, prompts.rows(rows), micro_batch)

        members = (
            coefficients[:, member, None] * score + member_weights.local[member] * local
            for member in range(num_members)
        )
        for name, (sketch, squared_norm) in sequence_gradients(blocks, forward, members).items():
            parts[name].append((rows, sketch, squared_norm))
    sketches = {}
    for name, block_parts in parts.items():
        order = torch.tensor([i for rows, _, _ in block_parts for i in rows]).argsort()
        sketches[name] = GradientSketches(
            sketches=torch.cat([sketch for _, sketch, _ in block_parts])[
                order.to(token_score.device)
            ],
            squares=torch.cat([sketch for _, _, sketch in block_parts])[
                order.to(token_score.device)
            ],
            prompt=scored.prompt,
            cost=response_cost(scored),
            names=member_weights.names,
            gammas=member_weights.gammas,
        )
    return sketches


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
