"""Train many shared-parameter students at once on sampled trajectories.

Gradients come from the objectives of `opd.objectives.factory`. All runs are one batch with one
backward pass, but they do not interact.

Shapes: R runs, D parameters, B trajectories per run, S states, A actions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd.objectives.objective import Objective
from synthetic.learning.students import LearningProblem
from synthetic.sampling.monte_carlo import batch_gradient
from synthetic.sampling.trajectories import (
    Trajectories,
    score_with_tables,
    simulate,
    with_statistics,
    with_support,
)

Optimizer = Callable[[Tensor], Tensor]
"""Function from gradients (R, D) to parameter updates (R, D)."""


def sgd(rates: Tensor) -> Optimizer:
    """Return plain gradient descent, -rate g, with a rate per run (R,)."""
    return lambda gradient: -rates[:, None] * gradient


def adam(rates: Tensor, size: int) -> Optimizer:
    """Return Adam's update, elementwise, so that runs do not interact.

    Args:
        rates: (R,) learning rate of each run.
        size: Number of parameters D.

    Returns:
        The optimizer.
    """
    change = torch.zeros(len(rates), size, dtype=torch.float64, requires_grad=True)
    unit_rate_adam = torch.optim.Adam([change], lr=1.0)

    def step(gradient: Tensor) -> Tensor:
        with torch.no_grad():
            change.zero_()
        change.grad = gradient.clone()
        unit_rate_adam.step()
        return rates[:, None] * change.detach()

    return step


def clip_gradient(gradient: Tensor, norm: float) -> Tensor:
    """Scale each run's gradient (R, D) down to a norm of at most `norm`."""
    sizes = gradient.norm(dim=1, keepdim=True)
    return gradient * (norm / sizes.clamp(min=1e-300)).clamp(max=1)


def sampled_gradient(
    problem: LearningProblem,
    parameters: Tensor,
    objective: Objective,
    batch: int,
    generator: torch.Generator,
    k: int | None = None,
) -> Tensor:
    """Compute the gradient of each run's mean loss over `batch` trajectories of its own student.

    A run's trajectories are rollouts of one prompt.

    Args:
        problem: World, student and teacher.
        parameters: (R, D).
        objective: The objective.
        batch: Trajectories per run.
        generator: Source of randomness.
        k: Size of the support, for top-K objectives.

    Returns:
        (R, D) gradients.
    """
    live_parameters = parameters.detach().requires_grad_()
    logits = problem.student.logits(live_parameters)
    table = logits.detach()
    trajectories = sample_for_students(problem, table, batch, generator)
    tables = table.flatten(0, 1), problem.teacher.repeat(len(table), 1)
    trajectories = with_support(trajectories, *tables, objective.support, k)
    if objective.requirements.distributions:
        trajectories = with_statistics(trajectories, *(x.log_softmax(-1) for x in tables))
    denominators = torch.full((len(trajectories.batch),), float(batch), dtype=torch.float64)
    gradient = batch_gradient(trajectories, tables[0], objective, denominators)
    return torch.autograd.grad(logits, live_parameters, gradient.view_as(logits))[0]


def sample_for_students(
    problem: LearningProblem, table: Tensor, batch: int, generator: torch.Generator
) -> Trajectories:
    """Sample `batch` trajectories of each student; the states of run r are numbered from r * S on.

    Args:
        problem: World, student and teacher.
        table: (R, S, A) logits of the students.
        batch: Trajectories per run.
        generator: Source of randomness.

    Returns:
        The scored trajectories, run by run.
    """
    student = table.log_softmax(-1)
    states, tokens, _ = simulate(problem.mdp, student.exp(), batch, generator)
    run_index = torch.arange(len(table)).repeat_interleave(batch)
    trajectories = score_with_tables(
        student.flatten(0, 1),
        problem.teacher.log_softmax(-1).repeat(len(table), 1),
        student.exp().flatten(0, 1),
        problem.mdp.active.repeat(len(table)),
        states + run_index[:, None] * problem.mdp.num_states,
        tokens,
    )
    return replace(trajectories, batch=replace(trajectories.batch, prompt=run_index))


def train(
    problem: LearningProblem,
    parameters: Tensor,
    objective: Objective,
    optimizer: Optimizer,
    iterations: int,
    batch: int,
    clip: float,
    recorded_iterations: Sequence[int],
    generator: torch.Generator,
    k: int | None = None,
) -> dict[int, Tensor]:
    """Train R students and record their parameters at some iterations.

    A run whose gradient is not finite keeps its parameters.

    Args:
        problem: World, student and teacher.
        parameters: (R, D) initial parameters.
        objective: The objective.
        optimizer: Function from gradients to updates.
        iterations: Number of updates.
        batch: Trajectories per run and update.
        clip: Largest gradient norm of a run.
        recorded_iterations: Iterations whose parameters are recorded.
        generator: Source of randomness.
        k: Size of the support, for top-K objectives.

    Returns:
        Parameters (R, D) before each recorded iteration, by iteration.
    """
    snapshots = {}
    for iteration in range(iterations + 1):
        if iteration in recorded_iterations:
            snapshots[iteration] = parameters
        if iteration == iterations:
            break
        gradient = sampled_gradient(problem, parameters, objective, batch, generator, k)
        finite = gradient.isfinite().all(1, keepdim=True)
        change = optimizer(clip_gradient(torch.where(finite, gradient, 0.0), clip))
        parameters = parameters + torch.where(finite, change, 0.0)
    return snapshots
