"""AdamW on float32 master weights, with a learning-rate schedule and skipped non-finite steps.

bfloat16 has 8 significant bits: an update smaller than 0.4 % of a weight is rounded away, and a
typical learning rate is a thousand times smaller. Therefore gradient sums, moments and updated
weights are float32, and the network holds rounded copies. For a float32 or sharded network the
master weights and the model weights are the same tensors.
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
    """AdamW with master weights; `model_weights` and `master_weights` have the same order."""

    model_weights: list[Tensor]
    """Trainable weights of the network."""
    master_weights: list[Tensor]
    """Their float32 originals."""
    adamw: torch.optim.AdamW
    rounded: bool
    """Whether the saved network has lower precision than the master weights."""

    def zero_grad(self) -> None:
        """Remove the gradients of model and master weights."""
        for weight in (*self.model_weights, *self.master_weights):
            weight.grad = None

    def all_reduce_gradients(self) -> None:
        """Sum gradients over ranks; FSDP has already reduced those of sharded weights."""
        if distributed.world_size() == 1:
            return
        pending = []
        for master in self.master_weights:
            if isinstance(master, DTensor):
                continue
            if master.grad is None:  # this rank has no token, but the other ranks wait for it
                master.grad = torch.zeros_like(master)
            pending.append(dist.all_reduce(master.grad, async_op=True))
        for reduction in pending:
            reduction.wait()

    @torch.no_grad()
    def step(self, rate: float, clip: float) -> tuple[Tensor, bool]:
        """Take one step, unless the gradient has a NaN or an infinity.

        A skipped step changes nothing, moments included. Costs one host synchronisation.

        Args:
            rate: Learning rate.
            clip: Largest norm of the gradient.

        Returns:
            The gradient norm before clipping, and whether the step was applied.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.master_weights, clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not bool(norm.isfinite()):
            return norm, False
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.copy_to_model()
        return norm, True

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the master weights into the model weights."""
        for weight, master in zip(self.model_weights, self.master_weights, strict=True):
            if weight is not master:
                weight.copy_(master)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything the next step depends on besides the saved network.

        Returns:
            Moments, step counters, and the master weights if they have more precision than the
            saved network. Keys start with the index of the weight.
        """
        tensors = {}
        for i, master in enumerate(self.master_weights):
            if self.rounded:
                tensors[f"{i}.master"] = master.detach()
            tensors |= {f"{i}.{name}": tensor for name, tensor in self.adamw.state[master].items()}
        return tensors


def make_optimizer(
    parameters: Iterable[Tensor],
    betas: tuple[float, float],
    weight_decay: float,
    rounded: bool = False,
) -> Optimizer:
    """Build an optimizer for the parameters that require a gradient.

    Args:
        parameters: Parameters of the network; frozen ones are ignored.
        betas: AdamW's betas.
        weight_decay: AdamW's weight decay.
        rounded: Whether float32 weights are saved in lower precision, as with FSDP in bfloat16.

    Returns:
        The optimizer, with its state allocated.

    Raises:
        InvalidInput: No parameter requires a gradient.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise InvalidInput(
            "the student has no trainable parameter; set requires_grad on some weights"
        )
    masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in trainable]
    for weight, master in zip(trainable, masters, strict=True):
        if weight is not master:
            _accumulate_in_float32(weight, master)
    # on a CPU one pass over the weights in place of eight; elsewhere torch chooses
    is_cpu = all(m.device.type == "cpu" and not isinstance(m, DTensor) for m in masters)
    inner_adamw = torch.optim.AdamW(
        masters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True if is_cpu else None
    )
    for master in masters:  # allocated now, so that a checkpoint can be loaded into the state
        inner_adamw.state[master] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(master, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
        }
    has_masters = any(w is not m for w, m in zip(trainable, masters, strict=True))
    return Optimizer(trainable, masters, inner_adamw, rounded or has_masters)


def _accumulate_in_float32(weight: Tensor, master: Tensor) -> None:
    """Move each backward pass's gradient from the model weight into the master's float32 sum."""

    def add_to_master(tensor: Tensor) -> None:
        if tensor.grad is None:
            return
        gradient = tensor.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        tensor.grad = None

    weight.register_post_accumulate_grad_hook(add_to_master)


def learning_rate(
    peak: float, step: int, steps: int, warmup: int, schedule: str, floor: float = 0.0
) -> float:
    """Compute the learning rate of a step: linear warm-up, then constant or cosine decay.

    During warm-up the rate is peak (step + 1) / (warmup + 1): every step trains, and step `warmup`
    has the peak. The cosine after it is peak (floor + (1 - floor) (1 + cos(pi (step - warmup) /
    (steps - warmup))) / 2), which would reach floor * peak in the step after the last.

    Args:
        peak: Largest rate.
        step: Index of the step, from 0.
        steps: Number of steps of the run.
        warmup: Number of warm-up steps.
        schedule: "constant" or "cosine".
        floor: Final rate of the cosine, relative to the peak.

    Returns:
        The learning rate.

    Raises:
        InvalidInput: The schedule is unknown.
    """
    if schedule not in ("constant", "cosine"):
        raise InvalidInput(f"unknown schedule {schedule!r}; known: constant, cosine")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
