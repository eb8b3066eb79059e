"""Distil the toy's two teachers into one student, and measure its gradients.

The loss is that of the objective "sampled_token", which also trains the language model.

Shapes: R runs (one per discount), B trajectories, T steps. float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives.factory import make_objective
from opd.objectives.objective import batch_losses
from opd.objectives.reduction import sequence_sum
from synthetic.toy.control import (
    HORIZON,
    MICRO,
    Adam,
    DistillationConfig,
    Networks,
    as_batch,
    gaussian_kl,
    log_density,
    rollouts,
    visited_inputs,
)

MAX_LOG_RATIO = 1e6
"""Log-ratio in nats beyond which a run counts as diverged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradient:
    """Gradients and metrics of the losses of R runs."""

    weights: list[Tensor]
    """Gradient of each weight, shaped as in `Networks`."""
    micro: Tensor
    """(R,) the published variance metric."""
    largest: Tensor
    """(R,) largest |log-ratio|."""
    cost: Tensor
    """(R,) mean over trajectories of the sum of log-ratios."""


def gradient(
    students: Networks,
    teacher: Networks,
    task: int,
    gammas: Sequence[float],
    noise: Tensor,
    config: DistillationConfig,
) -> Gradient:
    """Compute the gradients of R students, each with its discount, on rollouts from common noise.

    Args:
        students: R networks.
        teacher: The task's teacher.
        task: Index of the task.
        gammas: R discounts.
        noise: (B, T) standard normal noise.
        config: Gives the scale of positions.

    Returns:
        Gradients and metrics.
    """
    positions, actions = rollouts(students, task, noise, config)
    inputs = visited_inputs(task, positions, config)
    live_networks = Networks(
        tuple(w.detach().requires_grad_() for w in students.weights), students.sigma_floor
    )
    *layers, outputs = live_networks.layer_outputs(inputs)
    logp = log_density(actions, *live_networks.gaussian(outputs.view(*actions.shape, 2)))
    target_logp = teacher_logp(teacher, inputs, actions)
    losses = []
    for i, gamma in enumerate(gammas):
        batch = as_batch(logp[i], target_logp[i])
        objective = make_objective("sampled_token", gamma=gamma)
        denominator = sequence_sum(batch)
        losses.append(batch_losses(objective, batch, logp[i], denominator=denominator).sum())
    total = torch.stack(losses).sum()
    output_gradient, *weights = torch.autograd.grad(total, [outputs, *live_networks.weights])
    log_ratio = (logp - target_logp).detach()
    return Gradient(
        weights=list(weights),
        micro=micro_variance(layers[-1].detach(), output_gradient, len(noise)),
        largest=log_ratio.abs().amax((1, 2)),
        cost=log_ratio.sum(-1).mean(-1),
    )


def teacher_logp(teacher: Networks, inputs: Tensor, actions: Tensor) -> Tensor:
    """Return the (R, B, T) log-density of the students' actions under the teacher."""
    with torch.no_grad():
        outputs = teacher.layer_outputs(inputs.reshape(1, -1, 3))[-1].view(*actions.shape, 2)
        return log_density(actions, *teacher.gaussian(outputs))


def micro_variance(hidden: Tensor, output_gradient: Tensor, batch: int) -> Tensor:
    """Compute the published variance metric, (1/M) sum_m |g_m - mean|^2 over M micro-batches.

    g_m is the gradient of the output layer. The published divisor is M, not M - 1.

    Args:
        hidden: (R, B * T, H + 1) inputs of the output layer.
        output_gradient: (R, B * T, 2) gradient of the mean loss of B trajectories with respect to
            the outputs.
        batch: Number of trajectories B.

    Returns:
        (R,) metric.
    """
    count = len(hidden)
    micro_batches = (x.view(count, MICRO, -1, x.shape[-1]) for x in (hidden, output_gradient))
    gradients = MICRO * torch.einsum("rmnh,rmno->rmho", *micro_batches)
    deviation = gradients - gradients.mean(1, keepdim=True)
    return deviation.square().sum((2, 3)).mean(1)


@torch.no_grad()
def trajectory_gradients(
    student: Networks,
    teacher: Networks,
    task: int,
    gammas: Sequence[float],
    noise: Tensor,
    config: DistillationConfig,
) -> list[tuple[Tensor, ...]]:
    """Compute every trajectory's gradient of each layer, for each discount.

    All discounts use the same rollouts. The gradients of the losses with respect to the outputs
    come from autograd; those of the layers follow by the chain rule, with one einsum per layer over
    all trajectories.

    Args:
        student: One network (R = 1).
        teacher: The task's teacher.
        task: Index of the task.
        gammas: Discounts.
        noise: (B, T) standard normal noise.
        config: Gives the scale of positions.

    Returns:
        For each discount, a tensor (B, in + 1, out) per layer.
    """
    positions, actions = rollouts(student, task, noise, config)
    inputs = visited_inputs(task, positions, config)
    *layers, outputs = student.layer_outputs(inputs)
    target_logp = teacher_logp(teacher, inputs, actions)[0]
    by_gamma = []
    for gamma in gammas:
        with torch.enable_grad():
            live_outputs = outputs.detach().requires_grad_()
            logp = log_density(actions, *student.gaussian(live_outputs.view(*actions.shape, 2)))[0]
            batch = as_batch(logp, target_logp)
            loss = batch_losses(make_objective("sampled_token", gamma=gamma), batch, logp)
            (output_gradient,) = torch.autograd.grad(loss.sum(), live_outputs)
        gradients = []
        for i in reversed(range(len(layers))):
            factors = (x[0].view(len(noise), -1, x.shape[-1]) for x in (layers[i], output_gradient))
            gradients.append(torch.einsum("bth,bto->bho", *factors))
            if i:
                input_gradient = (output_gradient @ student.weights[i].mT)[..., :-1]
                output_gradient = input_gradient * (1 - layers[i][..., :-1].square())
        by_gamma.append(tuple(gradients[::-1]))
    return by_gamma


def total_variance(gradients: Tensor) -> Tensor:
    """Return the unbiased total variance of (n, ...) gradients, 1/(n-1) sum |g_i - mean|^2."""
    return gradients.flatten(1).var(0).sum()


def squared_mean(gradients: Tensor) -> Tensor:
    """Return the unbiased estimate of |E g|^2, the U-statistic |mean|^2 - variance / n."""
    return gradients.flatten(1).mean(0).square().sum() - total_variance(gradients) / len(gradients)


@dataclass(frozen=True, kw_only=True, eq=False)
class DistillationRun:
    """Result of training R students."""

    students: Networks
    """Students after the last iteration."""
    snapshots: dict[int, Networks]
    """Students before each recorded iteration, by iteration."""
    metric: Tensor
    """(I, R) the published metric at each of I iterations."""
    diverged: Tensor
    """(R,) first diverged iteration, -1 for none."""


def distill(
    students: Networks,
    teachers: tuple[Networks, Networks],
    gammas: Sequence[float],
    iterations: int,
    snapshot_iterations: Sequence[int],
    batch: int,
    config: DistillationConfig,
    generator: torch.Generator,
) -> DistillationRun:
    """Train R students in parallel on alternating tasks.

    Odd iterations (counted from 1) are on the left task, even ones on the right. A run diverges
    when its gradient is not finite or a log-ratio exceeds `MAX_LOG_RATIO`. It stops there, its last
    finite weights are kept, and its metric is infinite from then on.

    Args:
        students: R networks.
        teachers: The left and the right teacher.
        gammas: R discounts.
        iterations: Number of updates.
        snapshot_iterations: Iterations whose students are recorded.
        batch: Trajectories per update.
        config: Settings of the optimizer.
        generator: Source of randomness.

    Returns:
        The trained students, snapshots and metrics.
    """
    adam = Adam(students.weights, config.rate)
    diverged = torch.full((len(gammas),), -1)
    metric, snapshots = [], {}
    for iteration in range(iterations):
        if iteration in snapshot_iterations:
            snapshots[iteration] = students
        task = iteration % 2  # iteration 0 is the first, odd one
        noise = torch.randn(batch, HORIZON, generator=generator, dtype=torch.float64)
        step_gradient = gradient(students, teachers[task], task, gammas, noise, config)
        finite = torch.stack([w.flatten(1).isfinite().all(1) for w in step_gradient.weights]).all(0)
        finite &= step_gradient.largest < MAX_LOG_RATIO
        diverged[(diverged < 0) & ~finite] = iteration
        running = diverged < 0
        squared_norm = torch.stack(
            [w.nan_to_num().square().sum((1, 2)) for w in step_gradient.weights]
        )
        scale = (config.clip / squared_norm.sum(0).sqrt()).clamp(max=1)
        weights = [
            torch.where(running[:, None, None], w, 0.0) * scale[:, None, None]
            for w in step_gradient.weights
        ]
        if config.optimizer == "adam":
            changes = adam.change(weights)
        else:
            changes = [-config.rate * w for w in weights]
        changes = [torch.where(running[:, None, None], x, 0.0) for x in changes]
        students = students.updated(changes)
        metric.append(torch.where(running, step_gradient.micro, torch.inf))
    if iterations in snapshot_iterations:
        snapshots[iterations] = students
    return DistillationRun(
        students=students, snapshots=snapshots, metric=torch.stack(metric), diverged=diverged
    )


@torch.no_grad()
def evaluate_students(
    students: Networks, teacher: Networks, task: int, noise: Tensor, config: DistillationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Roll out R students and compute their exact local KLs to the teacher.

    Args:
        students: R networks.
        teacher: The task's teacher.
        task: Index of the task.
        noise: (B, T) standard normal noise.
        config: Gives the scale of positions.

    Returns:
        (R, B, T + 1) positions, (R,) mean local KL, and (R,) J as the sum of local KLs.
    """
    positions, _ = rollouts(students, task, noise, config)
    inputs = visited_inputs(task, positions, config)
    student_gaussian = students.gaussian(students.layer_outputs(inputs)[-1])
    outputs = teacher.layer_outputs(inputs.reshape(1, -1, 3))[-1].view(*inputs.shape[:2], 2)
    local_kl = gaussian_kl(*student_gaussian, *teacher.gaussian(outputs))
    return positions, local_kl.mean(1), local_kl.sum(1) / noise.shape[0]
