"""Exact weights and costs of single tokens in a drift chain, and moments with one token masked."""

from dataclasses import replace

import torch
from torch import Tensor

from synthetic.estimators import ESTIMATORS, terms, token_batch
from synthetic.exact import moments
from synthetic.exact.baselines import baseline_table
from synthetic.exact.parameters import TableParameters
from synthetic.exact.recursion import EstimatorRows, propagate_moments
from synthetic.worlds.drift_chain import DriftChain


def token_weights(chain: DriftChain) -> tuple[Tensor, Tensor]:
    """Return the probability of each token at each step, and its cost.

    Args:
        chain: The drift chain.

    Returns:
        (T, S, A) probability of being at a state at a step and sampling a token, and its cost
        (S, A). The probabilities of a step sum to the fraction of responses that have not ended.
    """
    divergence = moments.sequence_kl(chain.mdp, chain.student, chain.teacher)
    student_logp, active_visits = (
        chain.student.log_softmax(-1),
        divergence.occupancy * chain.mdp.active,
    )
    return active_visits[..., None] * student_logp.exp(), student_logp - chain.teacher.log_softmax(
        -1
    )


def weighted_quantiles(weight: Tensor, value: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Return weighted quantiles: the smallest value whose cumulative weight reaches each level."""
    order = value.flatten().argsort()
    cumulative = weight.flatten()[order].cumsum(0) / weight.sum()
    index = torch.searchsorted(cumulative, torch.tensor(levels, dtype=cumulative.dtype))
    return value.flatten()[order][index.clamp(max=len(order) - 1)].tolist()


def top_share(weight: Tensor, value: Tensor, share: float) -> float:
    """Return the fraction of the total of `value` >= 0 in the largest `share` of the weight."""
    order = value.flatten().argsort(descending=True)
    mass, size = weight.flatten()[order] / weight.sum(), value.flatten()[order]
    preceding_mass = mass.cumsum(0) - mass
    kept_mass = (share - preceding_mass).clamp(min=0).minimum(mass)
    return float((kept_mass * size).sum() / (mass * size).sum())


def masked_moments(
    chain: DriftChain, estimator: str, gamma: float, token: int
) -> tuple[Tensor, Tensor]:
    """Compute `exact.moments` with one token masked wherever it occurs: no cost, no loss, no score.

    This matches training with the mask scope "cost"; the token still advances the discount.

    Args:
        chain: The drift chain.
        estimator: A name in `ESTIMATORS`.
        gamma: Discount.
        token: Id of the masked token.

    Returns:
        (S, A) mean and () total variance of one trajectory's gradient.
    """
    gammas = torch.tensor([gamma], dtype=torch.float64)
    tokens = token_batch(chain.mdp, chain.student, chain.teacher)
    token_terms = terms(tokens, ESTIMATORS[estimator].discounted(1.0), gammas)
    unmasked = torch.ones(chain.mdp.num_actions, dtype=torch.float64)
    unmasked[token] = 0
    masked_terms = replace(
        token_terms,
        own=token_terms.own * unmasked,
        later=token_terms.later * unmasked,
        step=token_terms.step * unmasked[:, None],
        score=token_terms.score * unmasked[:, None],
    )
    space = TableParameters(chain.mdp.num_states, chain.mdp.num_actions)
    rows = EstimatorRows.from_terms([(masked_terms, baseline_table("none", masked_terms, space))])
    length_weights = torch.ones(chain.mdp.horizon + 1, dtype=torch.float64)
    mean, square = propagate_moments(chain.mdp, token_terms.acting, rows, length_weights, space)
    return mean[0, 0], square[0, 0] - mean[0, 0].square().sum()
