"""The gamma family of gradient estimators (E-3): the weight of every token's score, from one batch.

All estimators estimate the same mean at a given discount and differ in noise:
  g = sum_t [own_t + sum_{u > t} gamma^(u-t) later_u - b_t] grad log p(y_t), where own and later are
  the sampled cost r or its mean K at the prefix; the own term with K is the gradient of K itself.
  gamma = 1 is unbiased for the gradient of the sequence KL. All of this requires that tokens are
  sampled from the scored student itself.

Shapes: B responses, T positions, G discounts, F = estimators * G, estimator-major.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField, require_distribution_stats
from diagnostics.errors import InvalidInput
from diagnostics.gradients.credit import discounted, leave_one_out, position_mean

GAMMAS = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)
"""Default discounts."""


@dataclass(frozen=True)
class GradientEstimator:
    """An estimator of the family."""

    mean_own: bool = False
    """The token's own term is the gradient of its prefix's KL (needs both full distributions)."""
    mean_later: bool = False
    """Later costs are K instead of r."""
    baseline: str = "none"
    """A name in BASELINES."""


FAMILY: dict[str, GradientEstimator] = {
    "plain": GradientEstimator(),
    "position_mean": GradientEstimator(baseline="position_mean"),
    "leave_one_out": GradientEstimator(baseline="leave_one_out"),
    "local_kl": GradientEstimator(baseline="local_kl"),
    "rb_immediate": GradientEstimator(mean_own=True),
    "rb_future": GradientEstimator(mean_later=True),
    "rb_all": GradientEstimator(mean_own=True, mean_later=True),
    "rb_all_position_mean": GradientEstimator(
        mean_own=True, mean_later=True, baseline="position_mean"
    ),
}
"""Names as in training; the last is the low-noise estimator with which bias is measured. (The exact
study's `position_value` is the limit of `position_mean` as prompts are added.)"""


class EstimatorGrid(Protocol):
    """Anything with F = names x gammas estimators, name by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the estimators."""
        ...

    @property
    def gammas(self) -> tuple[float, ...]:
        """Discounts."""
        ...


@dataclass(frozen=True, eq=False)
class EstimatorWeights:
    """Weights of the token scores under each estimator."""

    names: tuple[str, ...]
    """Names of the estimators."""
    gammas: tuple[float, ...]
    """Discounts."""
    values: Tensor
    """(B, T, F) weights of the scores."""
    local: Tensor
    """(F,) bool: the gradient of the KL itself is added."""


def estimator_index(grid: EstimatorGrid, name: str, gamma: float) -> int:
    """Return the index in F of an estimator at a discount."""
    return grid.names.index(name) * len(grid.gammas) + grid.gammas.index(gamma)


def estimator_weights(
    batch: ScoredRollouts, names: Sequence[str], gammas: Sequence[float] = GAMMAS
) -> EstimatorWeights:
    """Compute the weights of the named estimators of FAMILY at each discount.

    Args:
        batch: Scored rollouts.
        names: Names in FAMILY.
        gammas: Discounts in [0, 1].

    Returns:
        The weights.

    Raises:
        InvalidInput: An unknown name, or a discount outside [0, 1].
        MissingField: An estimator needs distribution stats, or two rollouts a prompt, that the
            batch lacks.
    """
    unknown = [name for name in names if name not in FAMILY]
    out_of_range = [gamma for gamma in gammas if not 0 <= gamma <= 1]
    if unknown or out_of_range or not gammas:
        raise InvalidInput(
            f"unknown estimators {unknown}; discounts {list(gammas)} must be in [0, 1]"
        )
    columns = [_credit_weights(batch, FAMILY[name], gammas) for name in names]
    local = [FAMILY[name].mean_own for name in names for _ in gammas]
    return EstimatorWeights(
        tuple(names),
        tuple(gammas),
        torch.cat(columns, -1),
        torch.tensor(local, device=batch.mask.device),
    )


def available_estimators(batch: ScoredRollouts, has_teacher: bool) -> list[str]:
    """Return the names of the estimators that the batch and the teacher's distributions allow.

    Args:
        batch: Scored rollouts.
        has_teacher: The teacher's full distributions are available.

    Returns:
        Names in FAMILY.
    """
    has_siblings = bool((batch.prompt.unique(return_counts=True)[1] > 1).all())
    names = []
    for name, estimator in FAMILY.items():
        needs_stats = estimator.mean_later or estimator.baseline == "local_kl"
        if (
            (batch.prefix is not None or not needs_stats)
            and (has_teacher or not estimator.mean_own)
            and (has_siblings or estimator.baseline != "leave_one_out")
        ):
            names.append(name)
    return names


def _credit_weights(
    batch: ScoredRollouts, estimator: GradientEstimator, gammas: Sequence[float]
) -> Tensor:
    """Return the (B, T, G) weights of one estimator."""
    sampled = batch.log_ratio.double() * batch.mask
    later = (
        require_distribution_stats(batch).reverse_kl.double() * batch.mask
        if estimator.mean_later
        else sampled
    )
    credit = torch.stack([discounted(later, batch.sampled, g) - later for g in gammas], -1)
    if not estimator.mean_own:
        credit = credit + sampled[..., None]
    return (credit - BASELINES[estimator.baseline](batch, credit)) * batch.mask[..., None]


def _no_baseline(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    return torch.zeros_like(credit)


def _position_mean(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """Return the baseline as in training; 0 for a micro-batch of one prompt, which has no other."""
    if len(batch.prompt.unique()) < 2:
        return torch.zeros_like(credit)
    return position_mean(batch, credit)


def _leave_one_out(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    try:
        return leave_one_out(batch, credit)
    except InvalidInput as error:  # treated like missing distribution stats
        raise MissingField(str(error)) from error


def _local_kl(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    return require_distribution_stats(batch).reverse_kl.double()[..., None]


BASELINES: dict[str, Callable[[ScoredRollouts, Tensor], Tensor]] = {
    "none": _no_baseline,
    "position_mean": _position_mean,
    "leave_one_out": _leave_one_out,
    "local_kl": _local_kl,
}
"""(B, T, G) credit -> the baseline, broadcast against it, as in training."""
