"""The optimizer: AdamW on float32 master weights, with a schedule and steps that may be refused.

A bfloat16 weight of size 1 cannot take a change below 0.004, a thousand learning rates; so the sum
of the gradients, the moments and the weights that are changed are float32, and the network holds
their rounded copies. For a float32 or sharded network masters and weights are the same tensors.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from diagnostics.errors import InvalidInput
from opd.runtime import distributed


@dataclass(frozen=True, eq=False)
class Optimizer:
    """live: the network's trainable weights; masters: their float32 originals, in one order.

    rounded: what is saved of the network is less than the masters.
    """

    live: list[Tensor]
    masters: list[Tensor]
    adamw: torch.optim.AdamW
    rounded: bool

    def zero_grad(self) -> None:
        for weight in (*self.live, *self.masters):
            weight.grad = None

    def gather(self) -> None:
        """Add up the gradients of all processes; those of sharded weights are already."""
        if distributed.size() == 1:
            return
        pending = []
        for master in self.masters:
            if isinstance(master, DTensor):
                continue
            if master.grad is None:  # no token here; the others have some
                master.grad = torch.zeros_like(master)
            pending.append(dist.all_reduce(master.grad, async_op=True))
        for work in pending:
            work.wait()

    @torch.no_grad()
    def step(self, rate: float, clip: float) -> tuple[Tensor, bool]:
        """Take one step; returns the norm of the gradient before clipping, and if it was taken.

        A gradient with a NaN or an infinity changes nothing, moments included. One host sync.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not bool(norm.isfinite()):
            return norm, False
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.publish()
        return norm, True

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the network."""
        for weight, master in zip(self.live, self.masters, strict=True):
            if weight is not master:
                weight.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on beside the saved network, by number of weight.

        Moments, numbers of steps, and masters if they are more than was saved.
        """
        found = {}
        for i, master in enumerate(self.masters):
            if self.rounded:
                found[f"{i}.master"] = master.detach()
            found |= {f"{i}.{name}": x for name, x in self.adamw.state[master].items()}
        return found


def adamw(
    parameters: Iterable[Tensor],
    betas: tuple[float, float],
    weight_decay: float,
    rounded: bool = False,
) -> Optimizer:
    """An optimizer of those parameters that need a gradient.

    rounded: float32 weights that are saved in less, as those of a sharded bfloat16 network.

    Raises:
      ValueError: none does.
    """
    live = [p for p in parameters if p.requires_grad]
    if not live:
        raise InvalidInput("the student has no trainable parameter; is everything frozen?")
    masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in live]
    for weight, master in zip(live, masters, strict=True):
        if weight is not master:
            _sum_into(weight, master)
    inner = torch.optim.AdamW(masters, lr=0.0, betas=betas, weight_decay=weight_decay)
    for master in masters:  # now, and not in the first step, so that a checkpoint has a place
        inner.state[master] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(master, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
        }
    apart = any(w is not m for w, m in zip(live, masters, strict=True))
    return Optimizer(live, masters, inner, rounded or apart)


def _sum_into(weight: Tensor, master: Tensor) -> None:
    """Add each backward pass's gradient to the master's in float32, and drop the rounded one."""

    def move(tensor: Tensor) -> None:
        if tensor.grad is None:
            return
        here = tensor.grad.float()
        master.grad = here if master.grad is None else master.grad.add_(here)
        tensor.grad = None

    weight.register_post_accumulate_grad_hook(move)


def learning_rate(
    peak: float, step: int, steps: int, warmup: int, schedule: str, floor: float = 0.0
) -> float:
    """Rate of a step, from 0 on: linear for `warmup` steps, then constant, or half a cosine.

    In the warm-up peak (step + 1) / (warmup + 1), so that every step trains and that of index
    `warmup` has the peak; from then on with the cosine
    peak (floor + (1 - floor) (1 + cos(pi (step - warmup) / (steps - warmup))) / 2), which would be
    floor * peak in the step after the last.

    Raises:
      ValueError: an unknown schedule.
    """
    if schedule not in ("constant", "cosine"):
        raise InvalidInput(f"unknown schedule {schedule!r}; known: constant, cosine")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)
