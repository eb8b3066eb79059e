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

from diagnostics.access import Missing, prefix_of
from diagnostics.batch import Scored
from diagnostics.errors import InvalidInput

GAMMAS = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Member:
    """An estimator of the family.

    mean_own: the token's own term is the gradient of its prefix's KL (needs both whole
    distributions); mean_later: later costs are K instead of r; baseline: a name in BASELINES.
    """

    mean_own: bool = False
    mean_later: bool = False
    baseline: str = "none"


FAMILY: dict[str, Member] = {
    "plain": Member(),
    "position_mean": Member(baseline="position_mean"),
    "leave_one_out": Member(baseline="leave_one_out"),
    "local_kl": Member(baseline="local_kl"),
    "rb_immediate": Member(mean_own=True),
    "rb_future": Member(mean_later=True),
    "rb_all": Member(mean_own=True, mean_later=True),
    "rb_all_position_mean": Member(mean_own=True, mean_later=True, baseline="position_mean"),
}
"""Names as in the exact study; the last is the low-noise member with which bias is measured."""


class Grid(Protocol):
    """Whatever holds F = names x gammas members, name by name."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def gammas(self) -> tuple[float, ...]: ...


@dataclass(frozen=True, eq=False)
class Weights:
    """weights (B, T, F) of the scores, local (F,) bool: whether the KL's own gradient is added."""

    names: tuple[str, ...]
    gammas: tuple[float, ...]
    values: Tensor
    local: Tensor


def member_index(at: Grid, name: str, gamma: float) -> int:
    """Where a member at a discount stands along F."""
    return at.names.index(name) * len(at.gammas) + at.gammas.index(gamma)


def weights(batch: Scored, names: Sequence[str], gammas: Sequence[float] = GAMMAS) -> Weights:
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
    return Weights(
        tuple(names),
        tuple(gammas),
        torch.cat(columns, -1),
        torch.tensor(local, device=batch.mask.device),
    )


def available(batch: Scored, teacher_known: bool) -> list[str]:
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


def _weight(batch: Scored, member: Member, gammas: Sequence[float]) -> Tensor:
    """(B, T, G)."""
    mask = batch.mask[..., None]
    sampled = batch.log_ratio.double() * batch.mask
    later = prefix_of(batch).reverse_kl.double() * batch.mask if member.mean_later else sampled
    credit = _later_sums(later, batch.mask, gammas)
    if not member.mean_own:
        credit = credit + sampled[..., None]
    return (credit - BASELINES[member.baseline](batch, credit)) * mask


def _later_sums(cost: Tensor, mask: Tensor, gammas: Sequence[float]) -> Tensor:
    """(B, T, G) sum_{u > t} gamma^(u-t) cost_u; masked positions do not advance the discount."""
    grid = cost.new_tensor(list(gammas))
    ahead = cost.new_zeros(len(cost), len(grid))
    columns = []
    for t in reversed(range(cost.shape[1])):
        columns.append(ahead)
        ahead = torch.where(mask[:, t, None], grid * (cost[:, t, None] + ahead), ahead)
    return torch.stack(columns[::-1], 1) * mask[..., None]


# --- baselines: (B, T, G) credit -> broadcastable -------------------------------------------------


def _none(batch: Scored, credit: Tensor) -> Tensor:
    return torch.zeros_like(credit)


def _position_mean(batch: Scored, credit: Tensor) -> Tensor:
    """Mean credit at the position of *other prompts'* responses that are alive there, else 0.

    Leaving out the own prompt keeps it exactly unbiased; it ties prompts together by O(1/C^2).
    """
    group = batch.prompt.unique(return_inverse=True)[1]
    total = _others(credit * batch.mask[..., None], group, per_prompt=False)
    alive = _others(batch.mask.double()[..., None], group, per_prompt=False)
    return total / alive.clamp(min=1)


def _leave_one_out(batch: Scored, credit: Tensor) -> Tensor:
    """Mean credit at the position of the prompt's other rollouts; an ended one counts as 0."""
    _, group, size = batch.prompt.unique(return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise Missing("a prompt has a single rollout; leave-one-out needs two or more of each")
    own = credit * batch.mask[..., None]
    return _others(own, group, per_prompt=True) / (size[group] - 1)[:, None, None]


def _local_kl(batch: Scored, credit: Tensor) -> Tensor:
    return prefix_of(batch).reverse_kl.double()[..., None]


def _others(x: Tensor, group: Tensor, per_prompt: bool) -> Tensor:
    """Sums over the prompt's other responses, or over all other prompts' responses."""
    part = torch.zeros_like(x).index_add_(0, group, x)[group]
    return part - x if per_prompt else x.sum(0) - part


BASELINES: dict[str, Callable[[Scored, Tensor], Tensor]] = {
    "none": _none,
    "position_mean": _position_mean,
    "leave_one_out": _leave_one_out,
    "local_kl": _local_kl,
}
