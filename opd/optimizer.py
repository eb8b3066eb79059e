"""The optimizer: AdamW on float32 master weights, with a schedule and steps that may be refused.

A bfloat16 weight of size 1 cannot take a change below 0.004, a thousand learning rates; so the sum
of the gradients, the moments and the weights that are changed are float32, and the network holds
their rounded copies. For a float32 network masters and weights are the same tensors.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Optimizer:
    """live: the network's trainable weights; masters: their float32 originals, in one order."""

    live: list[Tensor]
    masters: list[Tensor]
    adamw: torch.optim.AdamW

    def zero_grad(self) -> None:
        for weight in (*self.live, *self.masters):
            weight.grad = None

    @torch.no_grad()
    def step(self, rate: float, clip: float) -> tuple[Tensor, bool]:
        """Take one step; returns the norm of the gradient before clipping, and if it was taken.

        A gradient with a NaN or an infinity changes nothing, moments included. One host sync.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip)
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

    def state_dict(self) -> dict[str, Any]:
        """Moments, and the masters where they are more than the network's own weights."""
        kept = [m for w, m in zip(self.live, self.masters, strict=True) if w is not m]
        return {"adamw": self.adamw.state_dict(), "masters": kept}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = [m for w, m in zip(self.live, self.masters, strict=True) if w is not m]
        for master, saved in zip(kept, state["masters"], strict=True):
            master.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


def adamw(
    parameters: Iterable[Tensor], betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    """An optimizer of those parameters that need a gradient.

    Raises:
      ValueError: none does.
    """
    live = [p for p in parameters if p.requires_grad]
    if not live:
        raise ValueError("the student has no trainable parameter; is everything frozen?")
    masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in live]
    for weight, master in zip(live, masters, strict=True):
        if weight is not master:
            _sum_into(weight, master)
    inner = torch.optim.AdamW(masters, lr=0.0, betas=betas, weight_decay=weight_decay)
    return Optimizer(live, masters, inner)


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
    """Rate of a step, from 0 on: linear for `warmup` steps, then constant, or half a cosine that
    ends at floor * peak with the last step.

    Raises:
      ValueError: an unknown schedule.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"unknown schedule {schedule!r}; known: constant, cosine")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)
