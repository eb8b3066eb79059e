"""Training many shared-parameter students at once on sampled trajectories.

The gradients come from the objectives of `opd.objectives.factory`, all runs in one batch and one backward
pass; runs share nothing but the time.

Shapes: R runs, D parameters, B trajectories a run, S states, A actions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd.objectives.factory import Objective
from synthetic.learning.students import Task
from synthetic.sampling.monte_carlo import batch_gradient
from synthetic.sampling.trajectories import Trajectories, looked_up, walk, with_support

Optimizer = Callable[[Tensor], Tensor]
"""Gradients (R, D) -> changes (R, D)."""


def sgd(rates: Tensor) -> Optimizer:
    """-rate g; rates (R,)."""
    return lambda gradient: -rates[:, None] * gradient


def adam(rates: Tensor, size: int) -> Optimizer:
    """Adam's change, elementwise, so that runs do not interact; rates (R,), D = size."""
    change = torch.zeros(len(rates), size, dtype=torch.float64, requires_grad=True)
    unit = torch.optim.Adam([change], lr=1.0)

    def step(gradient: Tensor) -> Tensor:
        with torch.no_grad():
            change.zero_()
        change.grad = gradient.clone()
        unit.step()
        return rates[:, None] * change.detach()

    return step


def clipped(gradient: Tensor, norm: float) -> Tensor:
    """(R, D) each run's gradient scaled down to at most `norm`."""
    sizes = gradient.norm(dim=1, keepdim=True)
    return gradient * (norm / sizes.clamp(min=1e-300)).clamp(max=1)


def sampled_gradient(
    task: Task,
    parameters: Tensor,
    objective: Objective,
    batch: int,
    generator: torch.Generator,
    k: int | None = None,
) -> Tensor:
    """(R, D) gradient of each run's mean loss over `batch` trajectories of its own student.

    A run's trajectories are rollouts of one prompt.
    """
    live = parameters.detach().requires_grad_()
    logits = task.student.logits(live)
    table = logits.detach()
    at = drawn(task, table, batch, generator)
    wide = task.teacher.repeat(len(table), 1)
    at = with_support(at, table.flatten(0, 1), wide, objective.support, k)
    each = torch.full((len(at.batch),), float(batch), dtype=torch.float64)
    gradient = batch_gradient(at, table.flatten(0, 1), objective, each)
    return torch.autograd.grad(logits, live, gradient.view_as(logits))[0]


def drawn(task: Task, table: Tensor, batch: int, generator: torch.Generator) -> Trajectories:
    """`batch` trajectories of each student (R, S, A), its states numbered from r * S on."""
    student = table.log_softmax(-1)
    states, tokens, _ = walk(task.mdp, student.exp(), batch, generator)
    run = torch.arange(len(table)).repeat_interleave(batch)
    at = looked_up(
        student.flatten(0, 1),
        task.teacher.log_softmax(-1).repeat(len(table), 1),
        student.exp().flatten(0, 1),
        task.mdp.active.repeat(len(table)),
        states + run[:, None] * task.mdp.num_states,
        tokens,
    )
    return replace(at, batch=replace(at.batch, prompt=run))


def train(
    task: Task,
    parameters: Tensor,
    objective: Objective,
    optimizer: Optimizer,
    iterations: int,
    batch: int,
    clip: float,
    marks: Sequence[int],
    generator: torch.Generator,
    k: int | None = None,
) -> dict[int, Tensor]:
    """{iteration: parameters (R, D) before it} at the marked iterations.

    A run whose gradient is not finite stops where it is.
    """
    path = {}
    for iteration in range(iterations + 1):
        if iteration in marks:
            path[iteration] = parameters
        if iteration == iterations:
            break
        gradient = sampled_gradient(task, parameters, objective, batch, generator, k)
        fine = gradient.isfinite().all(1, keepdim=True)
        change = optimizer(clipped(torch.where(fine, gradient, 0.0), clip))
        parameters = parameters + torch.where(fine, change, 0.0)
    return path
