"""Noise of a loss, compared with the least noisy estimator of the same target that we have."""

from dataclasses import dataclass
from typing import Any

from opd.objectives.audit.matching import Fit
from opd.objectives.audit.ours import objective_loss
from opd.objectives.audit.structure import Structure
from opd.objectives.audit.units import enumerate_units, mean_gradient, total_variance
from opd.objectives.audit.worlds import World
from opd.objectives.factory import make_objective
from opd.objectives.objective import Objective
from opd.objectives.user_loss import UserLoss


@dataclass(frozen=True)
class Noise:
    """Variance of a loss's gradient."""

    total_variance: float
    """Sum of the variances over all parameters, relative to the square of the mean: of one row, or
    of a group of two rows.
    """
    group_variance: float
    """The same of a group of two rows of one prompt."""
    unit: str
    """What `total_variance` is of: "row" or "group"."""
    best: str | None
    """Composition of ours that is the least noisy for the same target; None without one."""
    best_variance: float | None
    """Its variance of the same unit."""

    @property
    def ratio_to_best(self) -> float | None:
        """Variance over that of the best estimator at the same batch; None without one."""
        if self.best_variance is None:
            return None
        return self.total_variance / self.best_variance if self.best_variance else None


def find_noise(
    loss: UserLoss, world: World, structure: Structure, factor: str, fit: Fit | None
) -> Noise:
    """Compute the exact variance of a unit's gradient.

    Args:
        loss: The loss.
        world: A world.
        structure: How rows combine; the unit is "row" or "group".
        factor: One of `opd.objectives.audit.gradients.FACTORS`.
        fit: The target, or None.

    Returns:
        The variance, and that of the best estimator.
    """
    variance = relative_variance(loss, world, structure, factor)
    group = variance
    if structure.unit == "row":
        group = variance_of_two_rows(variance, world.num_prompts)
    name = None if fit is None else fit.target.composition
    if name is None:
        return Noise(variance, group, structure.unit, None, None)
    best = objective_loss(name, composition(name), "token_mean")
    own = relative_variance(best, world, Structure("row", "tokens"), "one")
    if structure.unit == "group":
        own = variance_of_two_rows(own, world.num_prompts)
    return Noise(variance, group, structure.unit, name, own)


def variance_of_two_rows(variance: float, num_prompts: int) -> float:
    """Return the relative variance of a group of two rows of one prompt from that of one row.

    Rows of a group are independent given their prompt. Prompts are equally likely and share no
    parameter, so that the squared mean given a prompt is on average `num_prompts` times that of the
    mean: Var(g1 + g2) = 2 Var(g) + 2 (num_prompts - 1) |m|^2, over |2 m|^2.

    Args:
        variance: Total variance of one row over the squared mean m of a row.
        num_prompts: Number of prompts.

    Returns:
        Total variance of two rows over the squared mean of two.
    """
    return (variance + num_prompts - 1) / 2


def relative_variance(loss: UserLoss, world: World, structure: Structure, factor: str) -> float:
    """Return the total variance of a unit's gradient over the square of its mean."""
    units = enumerate_units(loss, world, structure)
    nodes = len(world.student)
    square = float(mean_gradient(units, nodes, factor).square().sum())
    return max(0.0, total_variance(units, nodes, factor)) / max(square, 1e-300)


def composition(text: str) -> Objective:
    """Return the objective of NAME[,setting=value...]."""
    name, *settings = text.split(",")
    options: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        options[key] = int(value) if key == "support_k" else float(value)
    return make_objective(name, **options)
