"""Sampled gradients, through the very objectives that train a language model.

Monte Carlo here validates `synthetic.exact.moments` and trains the study's students.

Shapes: B trajectories, T steps, S states, A actions, E objectives compared on common trajectories.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.factory import Objective, reduce
from synthetic.sampling.trajectories import Trajectories, sample, with_baseline, with_support
from synthetic.worlds.mdp import TabularMDP


def visit_gradients(
    at: Trajectories, student_logits: Tensor, objective: Objective, credit: Tensor
) -> Tensor:
    """(B, T, A) gradient of each visited token's loss with respect to the logits at that visit.

    Args:
      credit: (B, T).
    """
    visit = torch.arange(at.states.numel()).view_as(at.states)
    states = at.states.flatten()
    gradient = _gathered(at, student_logits, objective, credit, None, visit, states)
    return gradient.view(*at.states.shape, -1)


def trajectory_gradients(
    at: Trajectories,
    student_logits: Tensor,
    objective: Objective,
    denominator: Tensor | None = None,
) -> Tensor:
    """(B, S, A) gradient of each trajectory's loss with respect to the student's table."""
    count, num_states = len(at.batch), len(student_logits)
    own = at.states + num_states * torch.arange(count)[:, None]
    states = torch.arange(num_states).repeat(count)
    credit = objective.credit(at.batch)
    gradient = _gathered(at, student_logits, objective, credit, denominator, own, states)
    return gradient.view(count, num_states, -1)


def batch_gradient(
    at: Trajectories, student_logits: Tensor, objective: Objective, denominator: Tensor
) -> Tensor:
    """(S, A) gradient of the batch's loss: the sum of `trajectory_gradients` in less memory."""
    credit, states = objective.credit(at.batch), torch.arange(len(student_logits))
    return _gathered(at, student_logits, objective, credit, denominator, at.states, states)


@torch.enable_grad()
def _gathered(
    at: Trajectories,
    student_logits: Tensor,
    objective: Objective,
    credit: Tensor,
    denominator: Tensor | None,
    row: Tensor,
    states: Tensor,
) -> Tensor:
    """(R, A) gradients of the visits whose `row` (B, T) it is, added up; states (R,) of the rows.

    The log-probabilities that the loss reads are its leaves, so one backward pass serves all
    trajectories; the derivative of the log-softmax is the same at every visit to a state and
    follows once, after the sum.
    """
    batch, table = at.batch, student_logits.detach().to(torch.float64).log_softmax(-1)
    logp = table[at.states, batch.tokens].requires_grad_()
    leaves, index = [logp], [row * table.shape[1] + batch.tokens]
    if objective.support != "none" and batch.support is not None:
        leaves.append(table[at.states[..., None], batch.support.ids].requires_grad_())
        index.append(row[..., None] * table.shape[1] + batch.support.ids)
    loss = objective.local_loss(logp, leaves[1] if leaves[1:] else None, batch, credit)
    ones = torch.ones(len(batch), dtype=loss.dtype)
    whole = reduce(loss, batch.mask, ones if denominator is None else denominator)
    found = torch.autograd.grad(whole, leaves, allow_unused=True)
    gradient = torch.zeros(len(states) * table.shape[1], dtype=torch.float64)
    for where, value in zip(index, found, strict=True):
        if value is not None:
            gradient.index_add_(0, where.flatten(), value.flatten())
    gradient = gradient.view(len(states), -1)
    return gradient - table.exp()[states] * gradient.sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class MonteCarlo:
    """Mean and total variance of one trajectory's gradient, of E objectives on the same draws.

    mean, mean_se (E, S, A); variance (E,) = 1/(n-1) sum |g_i - mean|^2, unbiased;
    variance_covariance (E, E) of these estimates, so that standard errors and those of paired
    differences follow; norm2 (E,) unbiased estimate of |E g|^2, by the U-statistic
    |mean|^2 - variance / n; count n.
    """

    mean: Tensor
    mean_se: Tensor
    variance: Tensor
    variance_covariance: Tensor
    count: int

    @property
    def variance_se(self) -> Tensor:
        """(E,) standard error of each variance."""
        return self.variance_covariance.diagonal().sqrt()

    @property
    def norm2(self) -> Tensor:
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
    """Moments of `count` sampled trajectories; memory is set by `chunk`, not by `count`.

    Deviations are taken from the first chunk's mean, which keeps the running sums accurate. The
    covariance of the variances is that of |g_i - pivot|^2, up to a relative error of order 1/chunk.

    Args:
      objectives: compared on common random numbers, in this order along axis E.
      k: size of the support, for the objectives that need one.
      sampler: (S, A) probabilities of the policy that acts; the student's if None.
      baselines: (T, S) tables for the objectives whose baseline is `given`, by name.
    """
    if count < 2:
        raise InvalidInput(f"count is {count}, expected at least 2 trajectories for a variance")
    if chunk < 1:
        raise InvalidInput(f"chunk is {chunk}, expected at least 1 trajectory at a time")
    e, (s, a) = len(objectives), student_logits.shape
    pivot = torch.zeros(e, s, a, dtype=torch.float64)
    first, second = torch.zeros_like(pivot), torch.zeros_like(pivot)
    squares, products = pivot.new_zeros(e), pivot.new_zeros(e, e)
    tables = (student_logits.to(torch.float64), teacher_logits.to(torch.float64))
    for begin in range(0, count, chunk):
        size = min(chunk, count - begin)
        drawn = sample(mdp, *tables, size, generator, sampler)
        gradients = []
        for name, objective in objectives.items():
            seen = with_support(drawn, *tables, objective.support, k)
            if baselines is not None and name in baselines:
                seen = with_baseline(seen, baselines[name])
            gradients.append(trajectory_gradients(seen, tables[0], objective))
        if begin == 0:
            pivot = torch.stack([x.mean(0) for x in gradients])
        norms = torch.empty(e, size, dtype=torch.float64)
        for i, gradient in enumerate(gradients):
            away = gradient - pivot[i]
            first[i] += away.sum(0)
            second[i] += away.square().sum(0)
            norms[i] = away.square().sum((1, 2))
        squares += norms.sum(1)
        products += norms @ norms.T
    drift = first / count
    per_entry = ((second - count * drift.square()) / (count - 1)).clamp(min=0)
    about = squares / count
    covariance = (products / count - about[:, None] * about) / (count - 1)
    return MonteCarlo(
        mean=pivot + drift,
        mean_se=(per_entry / count).sqrt(),
        variance=per_entry.sum((1, 2)),
        variance_covariance=covariance,
        count=count,
    )
