"""Loss and gradient from hidden states, on K head rows per token or on the vocabulary in chunks.

An objective that needs no log-normaliser reads only the head rows of its support, forward and
backward. Other objectives read all V logits for one chunk of tokens at a time. The loss is a sum
over tokens, so the gradient of a chunk is computed as soon as its logits exist and no chunk is
computed twice.

Shapes: B responses, T positions, N flat supervised tokens, n tokens of a chunk, D hidden size, R
rows of the head, V vocabulary, K support ids.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.models.forward import (
    micro_batches,
    product_logits,
    product_logp,
    response_hidden_states,
)
from opd.models.lm_head import apply_temperature, cached_elements, chunk_elements, chunk_slices
from opd.models.model import CausalLM
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective, token_weights, weighted_losses
from opd.objectives.reduction import DENOMINATORS
from opd.scoring.chunked_loss import BlockLoss, ChunkLoss, chunked_loss
from opd.scoring.score import ScoredBatch
from opd.scoring.user_loss import user_loss_from_hidden
from opd.teachers.teacher import Teacher

Observe = Callable[[slice, Tensor, Tensor], None]
"""Gets a block of tokens and (n, V) log-probabilities of student and teacher, without gradient."""


def policy_loss(
    student: CausalLM,
    batch: ScoredBatch,
    objective: Objective,
    *,
    teacher: Teacher | None = None,
    denominator: str = "token_mean",
    max_tokens_per_microbatch: int | None = None,
    max_logits_per_chunk: int = 1 << 24,
) -> Tensor:
    """Return the loss of an optimizer step on a scored batch, with gradient to the student.

    For a training loop of your own. The sum of `policy_losses`, which holds the activations of all
    micro-batches until `backward`; call `backward` on each of `policy_losses` to hold one only. A
    loss of your own (`opd.objectives.user_loss`) is one forward pass and divides by itself.

    Args:
        student: The student.
        batch: Scored batch of the whole optimizer step.
        objective: The objective.
        teacher: The teacher, for an objective on the full vocabulary; else unused.
        denominator: One of `opd.objectives.reduction.DENOMINATORS`.
        max_tokens_per_microbatch: Padded tokens of a forward pass; None for a single pass.
        max_logits_per_chunk: Logits over all V that exist at once.

    Returns:
        Scalar loss.

    Raises:
        InvalidInput: The batch lacks what the objective reads, the teacher is missing, or the
            denominator is unknown.
    """
    losses = policy_losses(
        student,
        batch,
        objective,
        teacher=teacher,
        denominator=denominator,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        max_logits_per_chunk=max_logits_per_chunk,
    )
    return torch.stack(list(losses)).sum()


def policy_losses(
    student: CausalLM,
    batch: ScoredBatch,
    objective: Objective,
    *,
    teacher: Teacher | None = None,
    denominator: str = "token_mean",
    max_tokens_per_microbatch: int | None = None,
    max_logits_per_chunk: int = 1 << 24,
) -> Iterator[Tensor]:
    """Yield the loss of each micro-batch; their sum is `policy_loss`, whatever the split.

    Credit, ratio and denominator are computed once, on the whole batch. A loss of your own is not
    split.

    Args:
        student: The student.
        batch: Scored batch of the whole optimizer step.
        objective: The objective.
        teacher: The teacher, for an objective on the full vocabulary; else unused.
        denominator: One of `opd.objectives.reduction.DENOMINATORS`.
        max_tokens_per_microbatch: Padded tokens of a forward pass; None for a single pass.
        max_logits_per_chunk: Logits over all V that exist at once.

    Yields:
        Scalar losses with gradient.

    Raises:
        InvalidInput: As `policy_loss`.
    """
    scored = batch.scored
    if denominator not in DENOMINATORS:
        known_names = ", ".join(DENOMINATORS)
        raise InvalidInput(f"unknown denominator {denominator!r}; known: {known_names}")
    credit = objective.credit(scored)
    weight = token_weights(objective.ratio(scored), DENOMINATORS[denominator](scored))
    groups = [list(range(len(scored)))]
    if max_tokens_per_microbatch is not None and objective.user_loss is None:
        groups = micro_batches(batch.prompts, scored, max_tokens_per_microbatch)
    for rows in groups:
        yield micro_batch_loss(
            student,
            objective,
            batch,
            rows,
            credit,
            weight,
            teacher=teacher,
            max_logits_per_chunk=max_logits_per_chunk,
        )


def micro_batch_loss(
    student: CausalLM,
    objective: Objective,
    batch: ScoredBatch,
    rows: list[int],
    credit: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    teacher: Teacher | None,
    max_logits_per_chunk: int,
) -> Tensor:
    """Return the loss of some rows of a batch, with gradient to the student.

    Args:
        student: The student.
        objective: The objective.
        batch: Scored batch of B responses.
        rows: The rows.
        credit: (B, T) credit of every token.
        weight: (B, T) weight of every token; unused by a loss of the user's own.
        scale: Factor of the loss.
        teacher: The teacher, for an objective that reads its logits; else unused.
        max_logits_per_chunk: Logits over all V that exist at once.

    Returns:
        Scalar loss.
    """
    part = batch.rows(rows)
    scored, teacher_hidden = part.scored, part.teacher_hidden
    columns = slice(scored.mask.shape[1])
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden[scored.mask[scored.sampled]]
    teacher_model = None if teacher_hidden is None or teacher is None else teacher.model
    hidden = response_hidden_states(student, part.prompts, scored)
    if objective.user_loss is not None:
        return scale * user_loss_from_hidden(
            student,
            objective.user_loss,
            hidden,
            scored,
            teacher=teacher_model,
            teacher_hidden=teacher_hidden,
            k=objective.support_k,
        )
    return loss_from_hidden(
        student,
        objective,
        hidden,
        TokenInputs.of(
            scored,
            objective.support,
            credit[rows][:, columns],
            scale * weight[rows][:, columns],
        ),
        teacher=teacher_model,
        teacher_hidden=teacher_hidden,
        temperature=scored.score_temperature,
        max_logits_per_chunk=max_logits_per_chunk,
    )


def loss_from_hidden(
    student: CausalLM,
    objective: Objective,
    hidden: Tensor,
    inputs: TokenInputs,
    *,
    teacher: CausalLM | None = None,
    teacher_hidden: Tensor | None = None,
    temperature: float,
    max_logits_per_chunk: int,
    observe: Observe | None = None,
) -> Tensor:
    """Return the sum of the weighted losses of N supervised tokens, with gradient.

    The gradient flows to hidden states and head and is computed in the forward pass. Call
    `backward` once and soon: until then a float32 gradient of the head is held in memory.

    Args:
        student: The student.
        objective: The objective.
        hidden: (N, D) student states.
        inputs: Constants of the N tokens.
        teacher: The teacher, for objectives on the full vocabulary; else unused.
        teacher_hidden: (N, D') teacher states, for objectives on the full vocabulary; else unused.
        temperature: Temperature of the log-probabilities.
        max_logits_per_chunk: Logits over all V that exist at once; ignored for a loss on K head
            rows.
        observe: Called with the distributions that an objective on the full vocabulary compares.

    Returns:
        Scalar loss.

    Raises:
        InvalidInput: Teacher states are missing.
    """
    head, needs = student.head, objective.requirements
    if not needs.normalised and inputs.ids is not None:
        ids, k = inputs.ids, inputs.ids.shape[1]
        if needs.sampled_logp:
            ids = torch.cat([ids, _tokens(inputs)[:, None]], 1)
        logits = apply_temperature(head.gather(hidden, ids), temperature)
        logp = logits[:, -1] if needs.sampled_logp else None
        return weighted_losses(
            objective, replace(inputs, logp=logp, support_logp=logits[:, :k])
        ).sum()
    chunk_loss = make_chunk_loss(
        student, objective, inputs, teacher, teacher_hidden, temperature, observe
    )
    size = chunk_elements(max_logits_per_chunk, head.num_products(hidden), hidden.device)
    return chunked_loss(hidden, head, chunk_loss, size, cached_elements(hidden.device))


def make_chunk_loss(
    student: CausalLM,
    objective: Objective,
    inputs: TokenInputs,
    teacher: CausalLM | None,
    teacher_hidden: Tensor | None,
    temperature: float,
    observe: Observe | None = None,
) -> ChunkLoss:
    """Build the loss of chunks of tokens as a function of the products of all head rows.

    Args:
        student: The student.
        objective: The objective.
        inputs: Constants of the N tokens.
        teacher: The teacher, for objectives on the full vocabulary; else unused.
        teacher_hidden: (N, D') teacher states, for objectives on the full vocabulary; else unused.
        temperature: Temperature of the log-probabilities.
        observe: As for `loss_from_hidden`.

    Returns:
        The loss function.

    Raises:
        InvalidInput: The objective compares full distributions and teacher states are missing.
    """
    head, is_full, tokens = student.head, objective.support == "full", _tokens(inputs)
    if is_full and (teacher is None or teacher_hidden is None):
        raise InvalidInput(
            "the objective compares full distributions, but the teacher's hidden states are "
            "missing; pass the teacher and keep its states when the batch is scored"
        )

    def chunk_loss(chunk: slice) -> BlockLoss:
        teacher_products: Tensor | None = None
        if is_full and teacher is not None and teacher_hidden is not None:
            teacher_products = teacher.head.products(teacher_hidden[chunk])

        def block_loss(z: Tensor, block: slice) -> Tensor:
            logits = product_logits(head, z, temperature)
            y, part = tokens[block, None], inputs.part(block)
            if teacher is not None and teacher_products is not None:
                p = logits.log_softmax(-1)
                rows = slice(block.start - chunk.start, block.stop - chunk.start)
                with torch.no_grad():
                    q = product_logp(teacher.head, teacher_products[rows], temperature)
                    if observe is not None:
                        observe(block, p.detach(), q)
                logp = p.gather(-1, y)[:, 0]
                part = replace(part, logp=logp, support_logp=p, teacher_support_logp=q)
            else:
                support_ids = y if part.ids is None else torch.cat([y, part.ids], 1)
                logp = logits.gather(-1, support_ids) - logits.logsumexp(-1, keepdim=True)
                support_logp = None if part.ids is None else logp[:, 1:]
                part = replace(part, logp=logp[:, 0], support_logp=support_logp)
            return weighted_losses(objective, part).sum()

        return block_loss

    return chunk_loss


def product_gradients(
    student: CausalLM,
    objective: Objective,
    hidden: Tensor,
    inputs: TokenInputs,
    *,
    teacher: CausalLM | None = None,
    teacher_hidden: Tensor | None = None,
    temperature: float,
    max_logits_per_chunk: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the gradient of `loss_from_hidden` by the products <h, W_v>, chunk by chunk.

    The gradient of the head's weight is the sum over tokens of their outer products with `hidden`.

    Args:
        student: The student.
        objective: The objective.
        hidden: (N, D) student states.
        inputs: Constants of the N tokens.
        teacher: The teacher, for objectives on the full vocabulary; else unused.
        teacher_hidden: (N, D') teacher states, for objectives on the full vocabulary; else unused.
        temperature: Temperature of the log-probabilities.
        max_logits_per_chunk: Logits over all V that exist at once.

    Yields:
        A slice of the tokens and their (n, V) gradients.
    """
    head = student.head
    loss = make_chunk_loss(student, objective, inputs, teacher, teacher_hidden, temperature)
    for c in chunk_slices(len(hidden), head.vocabulary, max_logits_per_chunk):
        with torch.enable_grad():
            z = head.products(hidden[c]).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(c)(z, c), z)
        yield c, gradient[:, : head.vocabulary]


def _tokens(inputs: TokenInputs) -> Tensor:
    """Return the sampled tokens, which `TokenInputs.of` sets."""
    if inputs.tokens is None:
        raise InvalidInput("the inputs have no tokens; build them with TokenInputs.of")
    return inputs.tokens
