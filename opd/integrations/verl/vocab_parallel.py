"""Log-probabilities from logits of the whole vocabulary, or of this process's shard of it.

Under tensor parallelism every rank of a group has the same N tokens and R of the V logits, and
computes the same loss from what is gathered here; the gradient of a rank is that of its own logits.

Shapes: N tokens, R logits on this rank (all V without a group), K ids per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shard:
    """This rank's contiguous part of the vocabulary."""

    start: int
    """First id on this rank."""
    group: Any
    """Process group that holds the other ids."""


def gather_logits(logits: Tensor, ids: Tensor, shard: Shard | None = None) -> Tensor:
    """Return (N, K) float32 logits at `ids`, with gradient; each id is on exactly one rank."""
    if shard is None:
        return logits.gather(-1, ids).float()
    local_ids = ids - shard.start
    is_local = (local_ids >= 0) & (local_ids < logits.shape[-1])
    local_logits = logits.gather(-1, local_ids.clamp(0, logits.shape[-1] - 1)).float()
    return _AllReduceSum.apply(
        torch.where(is_local, local_logits, torch.zeros_like(local_logits)), shard.group
    )


def log_normaliser(logits: Tensor, shard: Shard | None = None, *, elements: int) -> Tensor:
    """Return (N,) float32 log sum_v exp(logit), with gradient.

    Chunks are recomputed in the backward pass, so that apart from the gradient of the logits
    nothing of the vocabulary's width is kept.

    Args:
        logits: (N, R) logits, with gradient.
        shard: Which R of the V logits these are; None for all.
        elements: Float32 logits that exist at once.

    Returns:
        (N,) log-normalisers.
    """
    step = max(1, elements // logits.shape[-1])
    local_normaliser = torch.cat(
        [checkpoint(_log_sum, part, use_reentrant=False) for part in logits.split(step)]
    )
    if shard is None:
        return local_normaliser
    max_normaliser = local_normaliser.detach().clone()
    dist.all_reduce(max_normaliser, op=dist.ReduceOp.MAX, group=shard.group)
    total: Tensor = _AllReduceSum.apply((local_normaliser - max_normaliser).exp(), shard.group)
    return max_normaliser + total.log()


def _log_sum(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(-1)


class _AllReduceSum(torch.autograd.Function):
    """Sum over a group's ranks; a rank's gradient is that of the result, equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
