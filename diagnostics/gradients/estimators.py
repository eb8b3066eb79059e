"""The gamma family (E-3): the weight of every token's score under each estimator, from one batch.

Every member estimates the same mean at a given discount and differs in noise:
  g = sum_t [own_t + sum_{u > t} gamma^(u-t) later_u - b_t] grad log p(y_t),
own and later being the sampled cost r or its mean K at the prefix; the own term with K is the
gradient of K itself. gamma = 1 is unbiased for the gradient of the sequence KL. All of this asks
that tokens are sampled from the scored student itself.

Shapes: B responses, T positions, G discounts, F = members * G, member-major.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.optional_fields import MissingField, prefix_of
from diagnostics.errors import InvalidInput
from diagnostics.gradients.credit import discounted, leave_one_out, position_mean

GAMMAS = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class GradientEstimator:
    """An estimator of the family.

    mean_own: the token's own term is the gradient of its prefix's KL (needs both whole
    distributions); mean_later: later costs are K instead of r; baseline: a name in BASELINES.
    """

    mean_own: bool = False
    mean_later: bool = False
    baseline: str = "none"


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
"""Names as in training; the last is the low-noise member with which bias is measured. (The exact
study's `position_value` is what `position_mean` tends to as prompts are added.)"""


class Grid(Protocol):
    """Whatever holds F = names x gammas members, name by name."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def gammas(self) -> tuple[float, ...]: ...


@dataclass(frozen=True, eq=False)
class EstimatorWeights:
    """weights (B, T, F) of the scores, local (F,) bool: whether the KL's own gradient is added."""

    names: tuple[str, ...]
    gammas: tuple[float, ...]
    values: Tensor
    local: Tensor


def member_index(at: Grid, name: str, gamma: float) -> int:
    """Where a member at a discount stands along F."""
    return at.names.index(name) * len(at.gammas) + at.gammas.index(gamma)


def weights(
    batch: ScoredRollouts, names: Sequence[str], gammas: Sequence[float] = GAMMAS
) -> EstimatorWeights:
    """Weights of the named members of FAMILY at each discount.

    Raises:
      ValueError: an unknown name, or a discount outside [0, 1].
      Missing: a member needs prefix functionals, or two rollouts a prompt, that the batch lacks.
    """
    unknown = [name for name in names if name not in FAMILY]
    wrong = [gamma for gamma in gammas if not 0 <= gamma <= 1]
    if unknown or wrong or not gammas:
        raise InvalidInput(f"unknown members {unknown}, discounts {list(gammas)} must be in [0, 1]")
    columns = [_weight(batch, FAMILY[name], gammas) for name in names]
    local = [FAMILY[name].mean_own for name in names for _ in gammas]
    return EstimatorWeights(
        tuple(names),
        tuple(gammas),
        torch.cat(columns, -1),
        torch.tensor(local, device=batch.mask.device),
    )


def available(batch: ScoredRollouts, teacher_known: bool) -> list[str]:
    """The members that this batch and the presence of the teacher's distributions allow."""
    repeated = bool((batch.prompt.unique(return_counts=True)[1] > 1).all())
    found = []
    for name, member in FAMILY.items():
        exact = member.mean_later or member.baseline == "local_kl"
        if (
            (batch.prefix is not None or not exact)
            and (teacher_known or not member.mean_own)
            and (repeated or member.baseline != "leave_one_out")
        ):
            found.append(name)
    return found


def _weight(batch: ScoredRollouts, member: GradientEstimator, gammas: Sequence[float]) -> Tensor:
    """(B, T, G)."""
    sampled = batch.log_ratio.double() * batch.mask
    later = prefix_of(batch).reverse_kl.double() * batch.mask if member.mean_later else sampled
    credit = torch.stack([discounted(later, batch.sampled, g) - later for g in gammas], -1)
    if not member.mean_own:
        credit = credit + sampled[..., None]
    return (credit - BASELINES[member.baseline](batch, credit)) * batch.mask[..., None]


def _none(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    return torch.zeros_like(credit)


def _position_mean(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    """As in training; 0 for a micro-batch of one prompt, which has no other to compare with."""
    if len(batch.prompt.unique()) < 2:
        return torch.zeros_like(credit)
    return position_mean(batch, credit)


def _leave_one_out(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    try:
        return leave_one_out(batch, credit)
    except InvalidInput as error:  # lacking, like prefix functionals
        raise MissingField(str(error)) from error


def _local_kl(batch: ScoredRollouts, credit: Tensor) -> Tensor:
    return prefix_of(batch).reverse_kl.double()[..., None]


BASELINES: dict[str, Callable[[ScoredRollouts, Tensor], Tensor]] = {
    "none": _none,
    "position_mean": _position_mean,
    "leave_one_out": _leave_one_out,
    "local_kl": _local_kl,
}
"""(B, T, G) credit -> what is broadcast against it, as in training."""
