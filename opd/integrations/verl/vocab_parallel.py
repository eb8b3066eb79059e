"""Log-probabilities from logits of which this process holds all, or a shard of the vocabulary.

Under tensor parallelism every rank of a group has the same N tokens and R of the V logits, and
computes the same loss from what is gathered here; the gradient of a rank is that of its own logits.
Shapes: N tokens, R logits held here (all V without a group), K ids a token.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shard:
    """Logits of the ids start, start + 1, ... of which the ranks of `group` hold the rest."""

    start: int
    group: Any


def picked(logits: Tensor, ids: Tensor, shard: Shard | None = None) -> Tensor:
    """(N, K) float32 logits at `ids` (N, K) long, with gradient; each id on exactly one rank."""
    if shard is None:
        return logits.gather(-1, ids).float()
    own = ids - shard.start
    here = (own >= 0) & (own < logits.shape[-1])
    found = logits.gather(-1, own.clamp(0, logits.shape[-1] - 1)).float()
    return _Sum.apply(torch.where(here, found, torch.zeros_like(found)), shard.group)


def log_normaliser(logits: Tensor, shard: Shard | None = None, *, elements: int) -> Tensor:
    """(N,) float32 log sum_v exp(logit), with gradient.

    elements: logits in float32 that exist at once. Chunks are computed again in the backward pass,
    so that beside the gradient of the logits nothing of the vocabulary's width is kept.
    """
    step = max(1, elements // logits.shape[-1])
    held = torch.cat(
        [checkpoint(_log_sum, part, use_reentrant=False) for part in logits.split(step)]
    )
    if shard is None:
        return held
    top = held.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    total: Tensor = _Sum.apply((held - top).exp(), shard.group)
    return top + total.log()


def _log_sum(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(-1)


class _Sum(torch.autograd.Function):
    """The sum over a group's ranks; a rank's gradient is the result's, which is alike on all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
