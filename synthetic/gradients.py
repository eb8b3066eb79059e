"""Sampled gradients, through the very objectives that train a language model.

Monte Carlo here validates `synthetic.exact` and trains the study's students.

Shapes: B trajectories, T steps, S states, A actions, E objectives compared on common trajectories.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives import Objective, reduce
from synthetic.mdp import TabularMDP
from synthetic.sample import Trajectories, sample, with_baseline, with_support


@torch.enable_grad()
def visit_gradients(
    at: Trajectories,
    student_logits: Tensor,
    objective: Objective,
    credit: Tensor,
    denominator: Tensor | None = None,
) -> Tensor:
    """(B, T, A) gradient of each visited token's loss with respect to the logits at that visit.

    The logits of every visit are leaves of their own, so that one backward pass serves all.

    Args:
      credit: (B, T); denominator: (B,), 1 if None.
    """
    batch = at.batch
    leaves = student_logits.detach().to(torch.float64)[at.states].requires_grad_()
    every = leaves.log_softmax(-1)
    logp = every.gather(-1, batch.tokens[..., None])[..., 0]
    support_logp = None if batch.support is None else every.gather(-1, batch.support.ids)
    loss = objective.local_loss(logp, support_logp, batch, credit)
    ones = torch.ones(len(batch), dtype=loss.dtype)
    whole = reduce(loss, batch.mask, ones if denominator is None else denominator)
    return torch.autograd.grad(whole, leaves)[0]


def trajectory_gradients(
    at: Trajectories,
    student_logits: Tensor,
    objective: Objective,
    denominator: Tensor | None = None,
) -> Tensor:
    """(B, S, A) gradient of each trajectory's loss with respect to the student's table."""
    num_states, num_actions = student_logits.shape
    credit = objective.credit(at.batch)
    visits = visit_gradients(at, student_logits, objective, credit, denominator)
    block = at.states + num_states * torch.arange(len(at.batch))[:, None]
    gradient = visits.new_zeros(len(at.batch) * num_states, num_actions)
    gradient.index_add_(0, block.flatten(), visits.flatten(0, 1))
    return gradient.view(-1, num_states, num_actions)


def batch_gradient(
    at: Trajectories, student_logits: Tensor, objective: Objective, denominator: Tensor
) -> Tensor:
    """(S, A) gradient of the batch's loss: the sum of `trajectory_gradients` in less memory."""
    credit = objective.credit(at.batch)
    visits = visit_gradients(at, student_logits, objective, credit, denominator)
    gradient = torch.zeros_like(student_logits, dtype=torch.float64)
    return gradient.index_add_(0, at.states.flatten(), visits.flatten(0, 1))


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
        raise ValueError(f"count is {count}, expected at least 2 trajectories for a variance")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1 trajectory at a time")
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
            seen = with_support(mdp, drawn, *tables, objective.support, k)
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
