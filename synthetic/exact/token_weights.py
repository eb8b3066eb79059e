"""Exact weights and costs of single tokens in a drift chain, and moments with one token masked."""

from dataclasses import replace

import torch
from torch import Tensor

from synthetic.estimators import ESTIMATORS, terms
from synthetic.exact import moments
from synthetic.exact.baselines import table
from synthetic.exact.recursion import Rows, Table, propagate
from synthetic.worlds.drift_chain import DriftChain


def token_weights(chain: DriftChain) -> tuple[Tensor, Tensor]:
    """Probability (T, S, A) of being at a state at a step and drawing a token, and its cost (S, A).

    The probabilities of a step sum to the share of responses that are still going.
    """
    at = moments.sequence_kl(chain.mdp, chain.student, chain.teacher)
    p, going = chain.student.log_softmax(-1), at.occupancy * chain.mdp.active
    return going[..., None] * p.exp(), p - chain.teacher.log_softmax(-1)


def quantiles(weight: Tensor, value: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Weighted quantiles: the least value whose cumulative weight reaches the level."""
    order = value.flatten().argsort()
    reached = weight.flatten()[order].cumsum(0) / weight.sum()
    index = torch.searchsorted(reached, torch.tensor(levels, dtype=reached.dtype))
    return value.flatten()[order][index.clamp(max=len(order) - 1)].tolist()


def top_share(weight: Tensor, value: Tensor, share: float) -> float:
    """Share of the total of `value` >= 0 that the largest `share` of the weight carries."""
    order = value.flatten().argsort(descending=True)
    mass, size = weight.flatten()[order] / weight.sum(), value.flatten()[order]
    before = mass.cumsum(0) - mass
    kept = (share - before).clamp(min=0).minimum(mass)
    return float((kept * size).sum() / (mass * size).sum())


def masked_moments(
    chain: DriftChain, estimator: str, gamma: float, token: int
) -> tuple[Tensor, Tensor]:
    """`exact.moments` with one token masked wherever it occurs: no cost, no loss, no score.

    As in training with the mask scope "cost"; the token advances gamma.
    """
    grid = torch.tensor([gamma], dtype=torch.float64)
    at = terms(chain.mdp, chain.student, chain.teacher, ESTIMATORS[estimator].objective(1.0), grid)
    kept = torch.ones(chain.mdp.num_actions, dtype=torch.float64)
    kept[token] = 0
    masked = replace(
        at,
        own=at.own * kept,
        later=at.later * kept,
        step=at.step * kept[:, None],
        score=at.score * kept[:, None],
    )
    space = Table(chain.mdp.num_states, chain.mdp.num_actions)
    rows = Rows.of([(masked, table("none", masked, space))])
    ones = torch.ones(chain.mdp.horizon + 1, dtype=torch.float64)
    mean, square = propagate(chain.mdp, at.acting, rows, ones, space)
    return mean[0], square[0] - mean[0].square().sum()
