"""Loss and gradient from hidden states, on K head rows per token or on the vocabulary in chunks.

An objective that needs no log-normaliser reads only the head rows of its support, forward and
backward. Other objectives read all V logits for one chunk of tokens at a time. The loss is a sum
over tokens, so the gradient of a chunk is computed as soon as its logits exist and no chunk is
computed twice.

Shapes: B responses, T positions, N flat supervised tokens, n tokens of a chunk, D hidden size, R
rows of the head, V vocabulary, K support ids.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, OperationFailed
from opd.models.forward import log_probabilities
from opd.models.lm_head import (
    Head,
    apply_temperature,
    chunk_slices,
)
from opd.objectives.factory import Objective
from opd.objectives.surrogates import VisitedTokens
from opd.teachers.pair import ModelPair

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""Function of the (n, R) products of a chunk and its slice of the tokens that returns a scalar."""


def loss_from_hidden(
    pair: ModelPair,
    objective: Objective,
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    batch: ScoredRollouts,
    credit: Tensor,
    weight: Tensor,
    *,
    max_logits_per_chunk: int,
) -> Tensor:
    """Return the sum over supervised tokens of weight x surrogate, with gradient.

    The gradient flows to hidden states and head and is computed in the forward pass. Call
    `backward` once and soon: until then a float32 gradient of the head is held in memory.

    Args:
        pair: Student and teacher.
        objective: The objective.
        hidden: (N, D) student states.
        teacher_hidden: (N, D') teacher states, for objectives on the full vocabulary; else None.
        batch: Scored rollouts of the micro-batch.
        credit: (B, T) credit of the same rows.
        weight: (N,) importance ratio / loss denominator.
        max_logits_per_chunk: Logits over all V that exist at once; ignored for a loss on K head
            rows.

    Returns:
        Scalar loss.

    Raises:
        InvalidInput: The batch lacks the objective's support, or teacher states are missing.
    """
    inputs = token_inputs(objective, batch, credit)
    head, temperature = pair.student.head, batch.score_temperature
    if not objective.normalised and inputs.ids is not None:
        ids = inputs.ids
        if objective.sampled:
            ids = torch.cat([ids, inputs.tokens[:, None]], 1)
        logits = apply_temperature(head.gather(hidden, ids), temperature)
        logp = logits[:, -1] if objective.sampled else None
        visited = inputs.visited_tokens(slice(None), logp, logits[:, : inputs.ids.shape[1]])
        return (objective.surrogate(visited) * weight).sum()
    chunk_loss = make_chunk_loss(pair, objective, teacher_hidden, inputs, weight, temperature)
    return chunked_loss(hidden, head, chunk_loss, max_logits_per_chunk)


def make_chunk_loss(
    pair: ModelPair,
    objective: Objective,
    teacher_hidden: Tensor | None,
    inputs: "TokenInputs",
    weight: Tensor,
    temperature: float,
) -> ChunkLoss:
    """Build the loss of a chunk of tokens as a function of the products of all head rows.

    Args:
        pair: Student and teacher.
        objective: The objective.
        teacher_hidden: (N, D') teacher states, for objectives on the full vocabulary; else None.
        inputs: Constants of the N supervised tokens.
        weight: (N,) importance ratio / loss denominator.
        temperature: Temperature of the log-probabilities.

    Returns:
        The loss function.

    Raises:
        InvalidInput: The objective compares full distributions and teacher states are missing.
    """
    head = pair.student.head
    if objective.support == "full" and teacher_hidden is None:
        raise InvalidInput(
            "the objective compares full distributions, but teacher_hidden is None; score the "
            "batch with requirements of this objective"
        )

    def chunk_loss(z: Tensor, c: slice) -> Tensor:
        logits = apply_temperature(head.shape_products(z[:, : head.vocabulary]), temperature)
        y = inputs.tokens[c, None]
        if teacher_hidden is not None and objective.support == "full":
            p = logits.log_softmax(-1)
            with torch.no_grad():
                q = log_probabilities(pair.teacher.model, teacher_hidden[c], temperature)
            visited = inputs.visited_tokens(c, p.gather(-1, y)[:, 0], p, q)
        else:
            support_ids = y if inputs.ids is None else torch.cat([y, inputs.ids[c]], 1)
            logp = logits.gather(-1, support_ids) - logits.logsumexp(-1, keepdim=True)
            visited = inputs.visited_tokens(
                c, logp[:, 0], None if inputs.ids is None else logp[:, 1:]
            )
        return (objective.surrogate(visited) * weight[c]).sum()

    return chunk_loss


def product_gradients(
    pair: ModelPair,
    objective: Objective,
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    batch: ScoredRollouts,
    credit: Tensor,
    weight: Tensor,
    *,
    max_logits_per_chunk: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the gradient of `loss_from_hidden` by the products <h, W_v>, chunk by chunk.

    The gradient of the head's weight is the sum over tokens of their outer products with `hidden`.

    Args:
        pair: Student and teacher.
        objective: The objective.
        hidden: (N, D) student states.
        teacher_hidden: (N, D') teacher states, for objectives on the full vocabulary; else None.
        batch: Scored rollouts of the micro-batch.
        credit: (B, T) credit of the same rows.
        weight: (N,) importance ratio / loss denominator.
        max_logits_per_chunk: Logits over all V that exist at once.

    Yields:
        A slice of the tokens and their (n, V) gradients.
    """
    inputs, head = token_inputs(objective, batch, credit), pair.student.head
    loss = make_chunk_loss(pair, objective, teacher_hidden, inputs, weight, batch.score_temperature)
    for c in chunk_slices(len(hidden), head.vocabulary, max_logits_per_chunk):
        with torch.enable_grad():
            z = head.products(hidden[c]).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(z, c), z)
        yield c, gradient[:, : head.vocabulary]


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """Constants of N supervised tokens; fields as in `VisitedTokens`."""

    tokens: Tensor
    credit: Tensor
    teacher_logp: Tensor
    old_logp: Tensor
    ids: Tensor | None = None
    """(N, K) long, ids of the support."""
    teacher_support_logp: Tensor | None = None
    present: Tensor | None = None
    inside: Tensor | None = None

    def visited_tokens(
        self,
        c: slice,
        logp: Tensor | None,
        support_logp: Tensor | None,
        teacher_support_logp: Tensor | None = None,
    ) -> VisitedTokens:
        """Return the tokens of a slice together with the student's log-probabilities.

        Args:
            c: Slice of the N tokens.
            logp: (n,) student log-probabilities of the sampled tokens, with gradient.
            support_logp: (n, K) student log-probabilities on the support, with gradient.
            teacher_support_logp: (n, K) teacher log-probabilities; None for those of the batch.

        Returns:
            Inputs of a surrogate.
        """

        def select(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[c]

        return VisitedTokens(
            logp=logp,
            credit=self.credit[c],
            teacher_logp=self.teacher_logp[c],
            old_logp=self.old_logp[c],
            support_logp=support_logp,
            teacher_support_logp=select(self.teacher_support_logp)
            if teacher_support_logp is None
            else teacher_support_logp,
            present=select(self.present),
            inside=select(self.inside),
        )


def token_inputs(objective: Objective, batch: ScoredRollouts, credit: Tensor) -> TokenInputs:
    """Collect the constants of a micro-batch's supervised tokens, with the support if there is one.

    Args:
        objective: The objective.
        batch: Scored rollouts of the micro-batch.
        credit: (B, T) credit of the same rows.

    Returns:
        Constants of the N supervised tokens.

    Raises:
        InvalidInput: The batch lacks the objective's support.
    """
    mask, support = batch.mask, batch.support
    common_fields = (
        batch.tokens[mask],
        credit[mask],
        batch.teacher_logp[mask],
        batch.student_logp[mask],
    )
    if objective.support in ("none", "full"):
        return TokenInputs(*common_fields)
    if support is None or support.source != objective.support:
        source_name = "none" if support is None else repr(support.source)
        raise InvalidInput(
            f"the objective needs a {objective.support!r} support, but the batch has "
            f"{source_name}; score it with the objective's requirements"
        )
    present = None if support.present is None else support.present[mask]
    inside = support.contains(batch.tokens)[mask]
    return TokenInputs(
        *common_fields, support.ids[mask], support.teacher_logp[mask], present, inside
    )


def chunked_loss(hidden: Tensor, head: Head, loss: ChunkLoss, max_elements: int) -> Tensor:
    """Return the sum of `loss` over chunks of tokens, with gradient to hidden states and head.

    Neither forward nor backward keeps (N, R) values; gradients of the head are summed in float32.
    The result cannot be differentiated twice, and `backward` can run once only.

    Args:
        hidden: (N, D) student states.
        head: The student's head.
        loss: Loss of a chunk.
        max_elements: Products that exist at once.

    Returns:
        Scalar loss.
    """
    total: Tensor = _ChunkedLoss.apply(head, loss, max_elements, hidden, *head.parameters)
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        loss: ChunkLoss,
        max_elements: int,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wants_hidden, *wanted = ctx.needs_input_grad[3:]
        hidden_gradient = torch.zeros_like(hidden) if wants_hidden else None
        sums = [
            torch.zeros_like(x, dtype=_sum_dtype(x)) if wants_gradient else None
            for x, wants_gradient in zip(parameters, wanted, strict=True)
        ]
        total = hidden.new_zeros((), dtype=_sum_dtype(hidden))
        for c in chunk_slices(len(hidden), head.num_products(hidden), max_elements):
            z = head.products(hidden[c])
            if not any((wants_hidden, *wanted)):
                total += loss(z, c)
                continue
            with torch.enable_grad():
                value = loss(z.requires_grad_(), c)
            (dz,) = torch.autograd.grad(value, z)
            total += value.detach()
            if hidden_gradient is not None:
                hidden_gradient[c] = head.backproject(dz, hidden.shape[1])
            head.add_parameter_gradients(sums, dz, hidden[c])
        ctx.gradients = [hidden_gradient, *sums]
        ctx.dtypes = [x.dtype for x in (hidden, *parameters)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise OperationFailed(
                "backward was already called on this loss; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if x is None else x.mul_(scale).to(dtype)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (None, None, None, *scaled)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
