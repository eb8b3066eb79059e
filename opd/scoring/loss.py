"""From hidden states to the loss: a pass over K head rows a token, or over V in chunks.

An objective that needs no log-normaliser reads the head rows of its support alone, forward and
backward. The others see all of V for one chunk of tokens at a time; the loss is a sum over tokens,
so a chunk's gradient is taken as soon as its logits are there, and no chunk is computed twice.

Shapes: B responses, T positions, N flat supervised tokens, n tokens of a chunk, D hidden size,
R rows of the head, V vocabulary, K support ids.
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
    LmHead,
    chunks,
    cooled,
    gathered_logits,
    half_on_gpu,
    products,
    shaped,
)
from opd.objectives.factory import Objective
from opd.objectives.surrogates import VisitedTokens
from opd.teachers.pair import ModelPair

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""(n, R) products of a chunk, its slice of the tokens -> scalar."""


def loss_from_hidden(
    pair: ModelPair,
    objective: Objective,
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    part: ScoredRollouts,
    credit: Tensor,
    weight: Tensor,
    *,
    max_logits_per_chunk: int,
) -> Tensor:
    """Scalar sum over supervised tokens of weight x surrogate, with gradient to hidden and head.

    Args:
      hidden: (N, D) student states; teacher_hidden: (N, D') for objectives on the full vocabulary.
      part: the micro-batch; credit: (B, T) of the same rows; weight: (N,) one over denominator.
      max_logits_per_chunk: logits, of all V, that exist at once; immaterial to a loss on K head rows.

    The gradient is ready when this returns, so call `backward` on the result once and no later
    than needed: until then a float32 gradient of the head is kept.

    Raises:
      ValueError: the batch lacks the objective's support, or teacher states are missing.
    """
    known = visits(objective, part, credit)
    head, temperature = pair.student.head, part.score_temperature
    if not objective.normalised and known.ids is not None:
        ids = known.ids
        if objective.sampled:
            ids = torch.cat([ids, known.tokens[:, None]], 1)
        found = cooled(gathered_logits(hidden, head, ids), temperature)
        logp = found[:, -1] if objective.sampled else None
        at = known.at(slice(None), logp, found[:, : known.ids.shape[1]])
        return (objective.surrogate(at) * weight).sum()
    chunk = chunk_loss(pair, objective, teacher_hidden, known, weight, temperature)
    return chunked_loss(hidden, head, chunk, max_logits_per_chunk)


def chunk_loss(
    pair: ModelPair,
    objective: Objective,
    teacher_hidden: Tensor | None,
    known: "TokenInputs",
    weight: Tensor,
    temperature: float,
) -> ChunkLoss:
    """The loss of a chunk of tokens, from the products of all head rows.

    Raises:
      ValueError: the objective compares whole vocabularies and teacher states are missing.
    """
    head = pair.student.head
    if objective.support == "full" and teacher_hidden is None:
        raise InvalidInput("the objective compares whole vocabularies; no teacher states")

    def chunk(z: Tensor, c: slice) -> Tensor:
        logits = cooled(shaped(z[:, : head.vocabulary], head), temperature)
        y = known.tokens[c, None]
        if teacher_hidden is not None and objective.support == "full":
            p = logits.log_softmax(-1)
            with torch.no_grad():
                q = log_probabilities(pair.teacher, teacher_hidden[c], temperature)
            at = known.at(c, p.gather(-1, y)[:, 0], p, q)
        else:
            some = y if known.ids is None else torch.cat([y, known.ids[c]], 1)
            found = logits.gather(-1, some) - logits.logsumexp(-1, keepdim=True)
            at = known.at(c, found[:, 0], None if known.ids is None else found[:, 1:])
        return (objective.surrogate(at) * weight[c]).sum()

    return chunk


def product_gradients(
    pair: ModelPair,
    objective: Objective,
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    part: ScoredRollouts,
    credit: Tensor,
    weight: Tensor,
    *,
    max_logits_per_chunk: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Gradients (n, V) of the loss of `loss_from_hidden` by the products <h, W_v>, by chunk.

    That of the head's weight is their sum over tokens of the outer products with `hidden`.
    Arguments as there.
    """
    known, head = visits(objective, part, credit), pair.student.head
    loss = chunk_loss(pair, objective, teacher_hidden, known, weight, part.score_temperature)
    for c in chunks(len(hidden), head.vocabulary, max_logits_per_chunk):
        with torch.enable_grad():
            z = products(hidden[c], head).requires_grad_()
            (slope,) = torch.autograd.grad(loss(z, c), z)
        yield c, slope[:, : head.vocabulary]


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """The constants of N visited tokens, as `VisitedTokens` has them; ids: (N, K) long."""

    tokens: Tensor
    credit: Tensor
    teacher_logp: Tensor
    old_logp: Tensor
    ids: Tensor | None = None
    theirs: Tensor | None = None
    present: Tensor | None = None
    inside: Tensor | None = None

    def at(
        self, c: slice, logp: Tensor | None, ours: Tensor | None, theirs: Tensor | None = None
    ) -> VisitedTokens:
        """The tokens of a slice with the student's (n,) and (n, K) log-probabilities."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[c]

        return VisitedTokens(
            logp=logp,
            credit=self.credit[c],
            teacher_logp=self.teacher_logp[c],
            old_logp=self.old_logp[c],
            support_logp=ours,
            teacher_support_logp=cut(self.theirs) if theirs is None else theirs,
            present=cut(self.present),
            inside=cut(self.inside),
        )


def visits(objective: Objective, part: ScoredRollouts, credit: Tensor) -> TokenInputs:
    """The supervised tokens of a micro-batch, with the support if the objective has one."""
    mask, support = part.mask, part.support
    always = (part.tokens[mask], credit[mask], part.teacher_logp[mask], part.student_logp[mask])
    if objective.support in ("none", "full"):
        return TokenInputs(*always)
    if support is None or support.source != objective.support:
        found = "none" if support is None else repr(support.source)
        raise InvalidInput(
            f"the objective needs the support {objective.support!r}, the batch has {found}; give "
            "`score` that source"
        )
    present = None if support.present is None else support.present[mask]
    inside = support.contains(part.tokens)[mask]
    return TokenInputs(*always, support.ids[mask], support.teacher_logp[mask], present, inside)


def chunked_loss(hidden: Tensor, head: LmHead, loss: ChunkLoss, elements: int) -> Tensor:
    """Sum of `loss` over chunks of tokens, with gradient to hidden, weight and bias.

    Neither forward nor backward keeps (N, R); gradients of the head add up in float32. Twice
    differentiable it is not, and `backward` runs once.
    """
    total: Tensor = _ChunkedLoss.apply(hidden, head.weight, head.bias, head, loss, elements)
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: LmHead,
        loss: ChunkLoss,
        elements: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        sums = (hidden.dtype, *(None if x is None else _sum_dtype(x) for x in (weight, bias)))
        gradients = [
            torch.zeros_like(x, dtype=dtype) if x is not None and wants else None
            for x, dtype, wants in zip((hidden, weight, bias), sums, wanted, strict=True)
        ]
        total = hidden.new_zeros((), dtype=_sum_dtype(hidden))
        width = hidden.shape[1] if weight is None else len(weight)
        for c in chunks(len(hidden), width, elements):
            z = products(hidden[c], head)
            if not any(wanted):
                total += loss(z, c)
                continue
            with torch.enable_grad():
                value = loss(z.requires_grad_(), c)
            (dz,) = torch.autograd.grad(value, z)
            total += value.detach()
            _add(gradients, dz, hidden[c], weight, c)
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise OperationFailed(
                "the gradient of this loss was taken before; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if x is None else x.mul_(scale).to(dtype)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _add(
    gradients: list[Tensor | None], dz: Tensor, hidden: Tensor, weight: Tensor | None, c: slice
) -> None:
    """Add a chunk's share to the gradients of hidden, weight and bias, given dz (n, R)."""
    dh, dw, db = gradients
    if dh is not None:
        dh[c] = dz if weight is None else dz.to(weight.dtype) @ weight
    if db is not None:
        db += dz.sum(0)
    if dw is None:
        return
    if half_on_gpu(hidden):
        torch.addmm(dw, dz.to(hidden.dtype).T, hidden, out_dtype=torch.float32, out=dw)
    else:
        dw.addmm_(dz.T, hidden.to(dz.dtype))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
