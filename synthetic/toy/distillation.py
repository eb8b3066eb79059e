"""Distilling the toy's two teachers into one student, and measuring its gradients.

The loss is `opd.objectives.factory.sampled_token(gamma)`, the one that trains the language model.

Shapes: R runs (one a discount), B trajectories, T steps. float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives import factory
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
    visited,
)

LIMIT = 1e6
"""Nats; a log-ratio beyond it counts as divergence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradient:
    """Of R runs' losses: weights as in `Networks`; micro (R,), the published metric; largest (R,)
    |log-ratio|; cost (R,), the mean sum of log-ratios of a trajectory.
    """

    weights: list[Tensor]
    micro: Tensor
    largest: Tensor
    cost: Tensor


def gradient(
    students: Networks,
    teacher: Networks,
    task: int,
    gammas: Sequence[float],
    noise: Tensor,
    choices: DistillationConfig,
) -> Gradient:
    """Gradients of R students, each with its discount, on rollouts from common noise (B, T)."""
    positions, actions = rollouts(students, task, noise, choices)
    seen = visited(task, positions, choices)
    live = Networks(
        tuple(w.detach().requires_grad_() for w in students.weights), students.sigma_floor
    )
    *layers, out = live.layers(seen)
    logp = log_density(actions, *live.gaussian(out.view(*actions.shape, 2)))
    theirs = teacher_logp(teacher, seen, actions)
    losses = []
    for i, gamma in enumerate(gammas):
        batch = as_batch(logp[i], theirs[i])
        loss = factory.sampled_token(gamma).loss(logp[i], None, batch)
        losses.append(factory.reduce(loss, batch.mask, factory.sequence_sum(batch)))
    total = torch.stack(losses).sum()
    slope, *weights = torch.autograd.grad(total, [out, *live.weights])
    ratio = (logp - theirs).detach()
    return Gradient(
        weights=list(weights),
        micro=micro_variance(layers[-1].detach(), slope, len(noise)),
        largest=ratio.abs().amax((1, 2)),
        cost=ratio.sum(-1).mean(-1),
    )


def teacher_logp(teacher: Networks, seen: Tensor, actions: Tensor) -> Tensor:
    """(R, B, T) log-density of the students' actions under the teacher."""
    with torch.no_grad():
        out = teacher.layers(seen.reshape(1, -1, 3))[-1].view(*actions.shape, 2)
        return log_density(actions, *teacher.gaussian(out))


def micro_variance(hidden: Tensor, slope: Tensor, batch: int) -> Tensor:
    """(R,) (1/M) sum_m |g_m - mean|^2 of the output layer's gradients of M micro-batches.

    hidden (R, B * T, H + 1), slope (R, B * T, 2): gradient of the mean loss of B trajectories with
    respect to the outputs. The published divisor is M, not M - 1.
    """
    count = len(hidden)
    parts = (x.view(count, MICRO, -1, x.shape[-1]) for x in (hidden, slope))
    each = MICRO * torch.einsum("rmnh,rmno->rmho", *parts)
    away = each - each.mean(1, keepdim=True)
    return away.square().sum((2, 3)).mean(1)


@torch.no_grad()
def trajectory_gradients(
    student: Networks,
    teacher: Networks,
    task: int,
    gammas: Sequence[float],
    noise: Tensor,
    choices: DistillationConfig,
) -> list[tuple[Tensor, ...]]:
    """For each discount, every trajectory's gradient of each layer (B, in + 1, out).

    One network (R = 1), the same rollouts for all discounts. The losses' slopes with respect to the
    outputs come from autograd; layers follow by the chain rule, a trajectory at a time in one
    einsum.
    """
    positions, actions = rollouts(student, task, noise, choices)
    seen = visited(task, positions, choices)
    *layers, out = student.layers(seen)
    theirs = teacher_logp(teacher, seen, actions)[0]
    found = []
    for gamma in gammas:
        with torch.enable_grad():
            leaf = out.detach().requires_grad_()
            logp = log_density(actions, *student.gaussian(leaf.view(*actions.shape, 2)))[0]
            batch = as_batch(logp, theirs)
            loss = factory.sampled_token(gamma).loss(logp, None, batch)
            (slope,) = torch.autograd.grad(loss.sum(), leaf)
        gradients = []
        for i in reversed(range(len(layers))):
            parts = (x[0].view(len(noise), -1, x.shape[-1]) for x in (layers[i], slope))
            gradients.append(torch.einsum("bth,bto->bho", *parts))
            if i:
                back = (slope @ student.weights[i].mT)[..., :-1]
                slope = back * (1 - layers[i][..., :-1].square())
        found.append(tuple(gradients[::-1]))
    return found


def total_variance(gradients: Tensor) -> Tensor:
    """() unbiased total variance, 1/(n-1) sum |g_i - mean|^2, of (n, ...) gradients."""
    return gradients.flatten(1).var(0).sum()


def squared_mean(gradients: Tensor) -> Tensor:
    """() unbiased estimate of |E g|^2, the U-statistic |mean|^2 - variance / n."""
    return gradients.flatten(1).mean(0).square().sum() - total_variance(gradients) / len(gradients)


@dataclass(frozen=True, kw_only=True, eq=False)
class Distilled:
    """students after the last iteration; path {iteration: students before it}; metric (I, R), the
    published one at each iteration; diverged (R,): first bad iteration, -1 for none.
    """

    students: Networks
    path: dict[int, Networks]
    metric: Tensor
    diverged: Tensor


def distil(
    students: Networks,
    teachers: tuple[Networks, Networks],
    gammas: Sequence[float],
    iterations: int,
    kept: Sequence[int],
    batch: int,
    choices: DistillationConfig,
    generator: torch.Generator,
) -> Distilled:
    """Train R students side by side, odd iterations (from 1) on the left task, even on the right.

    A run diverges with a non-finite gradient or a log-ratio beyond LIMIT: it stops there, its last
    finite weights are kept, and its metric is infinite from then on.
    """
    adam = Adam(students.weights, choices.rate)
    diverged = torch.full((len(gammas),), -1)
    metric, path = [], {}
    for iteration in range(iterations):
        if iteration in kept:
            path[iteration] = students
        task = iteration % 2  # iteration 0 is the first, odd one
        noise = torch.randn(batch, HORIZON, generator=generator, dtype=torch.float64)
        found = gradient(students, teachers[task], task, gammas, noise, choices)
        fine = torch.stack([w.flatten(1).isfinite().all(1) for w in found.weights]).all(0)
        fine &= found.largest < LIMIT
        diverged[(diverged < 0) & ~fine] = iteration
        running = diverged < 0
        norm = torch.stack([w.nan_to_num().square().sum((1, 2)) for w in found.weights])
        scale = (choices.clip / norm.sum(0).sqrt()).clamp(max=1)
        weights = [
            torch.where(running[:, None, None], w, 0.0) * scale[:, None, None]
            for w in found.weights
        ]
        if choices.optimizer == "adam":
            changes = adam.change(weights)
        else:
            changes = [-choices.rate * w for w in weights]
        changes = [torch.where(running[:, None, None], x, 0.0) for x in changes]
        students = students.stepped(changes)
        metric.append(torch.where(running, found.micro, torch.inf))
    if iterations in kept:
        path[iterations] = students
    return Distilled(students=students, path=path, metric=torch.stack(metric), diverged=diverged)


@torch.no_grad()
def outcome(
    students: Networks, teacher: Networks, task: int, noise: Tensor, choices: DistillationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(R, B, T + 1) positions, (R,) mean local KL to the teacher, (R,) J by the local KLs' sum."""
    positions, _ = rollouts(students, task, noise, choices)
    seen = visited(task, positions, choices)
    mine = students.gaussian(students.layers(seen)[-1])
    out = teacher.layers(seen.reshape(1, -1, 3))[-1].view(*seen.shape[:2], 2)
    local = gaussian_kl(*mine, *teacher.gaussian(out))
    return positions, local.mean(1), local.sum(1) / noise.shape[0]
