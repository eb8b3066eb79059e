"""Monte Carlo gradients, computed with the objectives that train a language model.

They validate `synthetic.exact.moments` and train the study's students.

Shapes: B trajectories, T steps, S states, A actions, E objectives compared on common trajectories.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.objective import Objective, batch_losses
from synthetic.sampling.trajectories import Trajectories, sample, with_baseline, with_support
from synthetic.worlds.mdp import TabularMDP


def visit_gradients(
    trajectories: Trajectories, student_logits: Tensor, objective: Objective, credit: Tensor
) -> Tensor:
    """Compute the gradient of each visited token's loss with respect to the logits at that visit.

    Args:
        trajectories: Scored trajectories.
        student_logits: (S, A).
        objective: The objective.
        credit: (B, T) weight of each token.

    Returns:
        (B, T, A) gradients.
    """
    rows = torch.arange(trajectories.states.numel()).view_as(trajectories.states)
    states = trajectories.states.flatten()
    gradient = _row_gradients(trajectories, student_logits, objective, credit, None, rows, states)
    return gradient.view(*trajectories.states.shape, -1)


def trajectory_gradients(
    trajectories: Trajectories,
    student_logits: Tensor,
    objective: Objective,
    denominator: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of each trajectory's loss with respect to the student's table.

    Args:
        trajectories: Scored trajectories.
        student_logits: (S, A).
        objective: The objective.
        denominator: (B,) denominator of each trajectory's loss; 1 if None.

    Returns:
        (B, S, A) gradients.
    """
    count, num_states = len(trajectories.batch), len(student_logits)
    rows = trajectories.states + num_states * torch.arange(count)[:, None]
    states = torch.arange(num_states).repeat(count)
    credit = objective.credit(trajectories.batch)
    gradient = _row_gradients(
        trajectories, student_logits, objective, credit, denominator, rows, states
    )
    return gradient.view(count, num_states, -1)


def batch_gradient(
    trajectories: Trajectories, student_logits: Tensor, objective: Objective, denominator: Tensor
) -> Tensor:
    """Compute the gradient of the batch's loss: the sum of `trajectory_gradients`, in less memory.

    Args:
        trajectories: Scored trajectories.
        student_logits: (S, A).
        objective: The objective.
        denominator: (B,) denominator of each trajectory's loss.

    Returns:
        (S, A) gradient.
    """
    credit, states = objective.credit(trajectories.batch), torch.arange(len(student_logits))
    return _row_gradients(
        trajectories, student_logits, objective, credit, denominator, trajectories.states, states
    )


@torch.enable_grad()
def _row_gradients(
    trajectories: Trajectories,
    student_logits: Tensor,
    objective: Objective,
    credit: Tensor,
    denominator: Tensor | None,
    rows: Tensor,
    states: Tensor,
) -> Tensor:
    """Sum the gradients of all visits that belong to the same row.

    The log-probabilities that the loss reads are its leaves, so one backward pass serves all
    trajectories. The derivative of the log-softmax is the same at every visit to a state and is
    applied once, after the sum.

    Args:
        trajectories: Scored trajectories.
        student_logits: (S, A).
        objective: The objective.
        credit: (B, T) weight of each token.
        denominator: (B,) denominator of each trajectory's loss; 1 if None.
        rows: (B, T) index of the row that a visit belongs to.
        states: (R,) state of each row.

    Returns:
        (R, A) gradients.
    """
    batch, table = trajectories.batch, student_logits.detach().to(torch.float64).log_softmax(-1)
    logp = table[trajectories.states, batch.tokens].requires_grad_()
    leaves, leaf_indices = [logp], [rows * table.shape[1] + batch.tokens]
    if objective.support != "none" and batch.support is not None:
        leaves.append(table[trajectories.states[..., None], batch.support.ids].requires_grad_())
        leaf_indices.append(rows[..., None] * table.shape[1] + batch.support.ids)
    support_logp = leaves[1] if leaves[1:] else None
    losses = batch_losses(
        objective, batch, logp, support_logp, denominator=denominator, credit=credit
    )
    leaf_gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    gradient = torch.zeros(len(states) * table.shape[1], dtype=torch.float64)
    for positions, leaf_gradient in zip(leaf_indices, leaf_gradients, strict=True):
        if leaf_gradient is not None:
            gradient.index_add_(0, positions.flatten(), leaf_gradient.flatten())
    gradient = gradient.view(len(states), -1)
    return gradient - table.exp()[states] * gradient.sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class MonteCarlo:
    """Mean and total variance of a trajectory's gradient, of E objectives on common samples."""

    mean: Tensor
    """(E, S, A) mean."""
    mean_se: Tensor
    """(E, S, A) standard error of the mean."""
    variance: Tensor
    """(E,) unbiased total variance, 1/(n-1) sum |g_i - mean|^2."""
    variance_covariance: Tensor
    """(E, E) covariance of the variance estimates; gives their standard errors and those of paired
    differences.
    """
    count: int
    """Number n of trajectories."""

    @property
    def variance_se(self) -> Tensor:
        """(E,) standard error of each variance."""
        return self.variance_covariance.diagonal().sqrt()

    @property
    def norm2(self) -> Tensor:
        """(E,) unbiased estimate of |E g|^2, by the U-statistic |mean|^2 - variance / n."""
        return self.mean.square().sum((-1, -2)) - self.variance / self.count


def monte_carlo(
    mdp: TabularMDP,
    student_logits: Tensor,
    teacher_logits: Tensor,
    objectives: Mapping[str, Objective],
    count: int,
    generator: torch.Generator,
    k: int | None = None,
    sampler: Tensor | None = None,
    baselines: Mapping[str, Tensor] | None = None,
    chunk: int = 2048,
) -> MonteCarlo:
    """Estimate moments from `count` sampled trajectories, with memory set by `chunk`.

    Deviations are taken from the first chunk's mean, which keeps the running sums accurate. The
    covariance of the variances is that of |g_i - pivot|^2, up to a relative error of order 1/chunk.

    Args:
        mdp: The world.
        student_logits: (S, A).
        teacher_logits: (S, A).
        objectives: Compared on common random numbers, in this order along axis E.
        count: Number of trajectories, at least 2.
        generator: Source of randomness.
        k: Size of the support, for the objectives that need one.
        sampler: (S, A) probabilities of the sampling policy; the student's if None.
        baselines: (T, S) tables for the objectives whose baseline is `given`, by name.
        chunk: Number of trajectories sampled at a time.

    Returns:
        Means, variances and their standard errors.

    Raises:
        InvalidInput: If count is below 2 or chunk is below 1.
    """
    if count < 2:
        raise InvalidInput(f"count is {count}; a variance needs at least 2 trajectories")
    if chunk < 1:
        raise InvalidInput(f"chunk is {chunk}, expected at least 1 trajectory per chunk")
    e, (s, a) = len(objectives), student_logits.shape
    pivot = torch.zeros(e, s, a, dtype=torch.float64)
    deviation_sum, square_sum = torch.zeros_like(pivot), torch.zeros_like(pivot)
    norm_sum, norm_products = pivot.new_zeros(e), pivot.new_zeros(e, e)
    tables = (student_logits.to(torch.float64), teacher_logits.to(torch.float64))
    for begin in range(0, count, chunk):
        size = min(chunk, count - begin)
        trajectories = sample(mdp, *tables, size, generator, sampler)
        gradients = []
        for name, objective in objectives.items():
            supported = with_support(trajectories, *tables, objective.support, k)
            if baselines is not None and name in baselines:
                supported = with_baseline(supported, baselines[name])
            gradients.append(trajectory_gradients(supported, tables[0], objective))
        if begin == 0:
            pivot = torch.stack([x.mean(0) for x in gradients])
        norms = torch.empty(e, size, dtype=torch.float64)
        for i, gradient in enumerate(gradients):
            deviation = gradient - pivot[i]
            deviation_sum[i] += deviation.sum(0)
            square_sum[i] += deviation.square().sum(0)
            norms[i] = deviation.square().sum((1, 2))
        norm_sum += norms.sum(1)
        norm_products += norms @ norms.T
    mean_shift = deviation_sum / count
    entry_variance = ((square_sum - count * mean_shift.square()) / (count - 1)).clamp(min=0)
    mean_square = norm_sum / count
    covariance = (norm_products / count - mean_square[:, None] * mean_square) / (count - 1)
    return MonteCarlo(
        mean=pivot + mean_shift,
        mean_se=(entry_variance / count).sqrt(),
        variance=entry_variance.sum((1, 2)),
        variance_covariance=covariance,
        count=count,
    )
