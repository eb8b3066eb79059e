"""Which target a mean gradient belongs to: comparison, families with a parameter, mixtures.

Shapes: N prefixes, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from scipy.optimize import minimize_scalar, nnls
from torch import Tensor

from opd.objectives.audit.targets import (
    BASIC,
    Target,
    discounted_target,
    exact_gradient,
    jsd_target,
    support_targets,
)
from opd.objectives.audit.worlds import World

MATCH = 1e-4
"""Relative difference up to which a mean is a target's gradient: a loss may be in float32."""
FAR = 0.8
"""Relative difference from every value that is tried first beyond which no search is made."""
LARGE_VOCABULARY = 16
"""Vocabulary beyond which no mixtures with a support are tried."""
ZERO = 1e-6
"""Mean, relative to the root mean square of a single gradient, up to which it is zero."""


@dataclass(frozen=True, eq=False)
class Mean:
    """Mean gradient of a loss in a world."""

    world: World
    """The world."""
    gradient: Tensor
    """(N, V) mean."""
    root_mean_square: float
    """Root mean square norm of the contribution of a single unit."""
    tolerance: float = MATCH
    """Relative difference that its computation may cause."""

    @property
    def is_zero(self) -> bool:
        """Whether the mean vanishes, compared with single contributions."""
        limit = ZERO if self.tolerance == MATCH else 0.1 * self.tolerance
        return float(self.gradient.norm()) <= limit * self.root_mean_square


@dataclass(frozen=True)
class Fit:
    """A target, compared with the mean gradients of all worlds."""

    target: Target
    """The target."""
    cosine: float
    """Smallest cosine over the worlds."""
    relative_bias: float
    """Largest distance from the best multiple, relative to that multiple."""
    scale: float
    """Mean of the factors of the best multiples."""
    tolerance: float = MATCH
    """Relative difference that the computation of the means may cause."""

    @property
    def matches(self) -> bool:
        """Whether the means are positive multiples of the target's gradient."""
        return self.relative_bias <= self.tolerance and self.scale > 0


def compare(target: Target, means: Sequence[Mean]) -> Fit:
    """Compare the mean gradients of several worlds with the gradients of a target.

    Args:
        target: The target.
        means: Mean gradients.

    Returns:
        The comparison; a sign that differs between worlds counts as a relative bias of 1 or more.
    """
    cosines, biases, scales = [], [], []
    for mean in means:
        exact = exact_gradient(target, mean.world)
        square = float(exact.square().sum())
        product = float((mean.gradient * exact).sum())
        norm = float(mean.gradient.norm())
        if square < 1e-24 or norm == 0:
            return Fit(target, 0.0, float("inf"), 0.0)
        scale = product / square
        distance = float((mean.gradient - scale * exact).norm())
        cosines.append(product / (norm * square**0.5))
        biases.append(distance / max(abs(scale) * square**0.5, 1e-300))
        scales.append(scale)
    if min(scales) < 0 < max(scales):
        biases.append(1.0 + max(biases))
    tolerance = max(mean.tolerance for mean in means)
    return Fit(target, min(cosines), max(biases), sum(scales) / len(scales), tolerance)


def find_target(means: Sequence[Mean]) -> tuple[Fit | None, Fit]:
    """Find the target that the means are positive multiples of.

    Args:
        means: Mean gradients in several worlds, none of them zero.

    Returns:
        The match, or None; and the nearest target, by cosine.
    """
    nearest: Fit | None = None
    for fit in candidate_fits(means):
        if fit.matches:
            return fit, fit
        if nearest is None or fit.cosine > nearest.cosine:
            nearest = fit
    assert nearest is not None
    return None, nearest


def find_reversed(means: Sequence[Mean]) -> Fit | None:
    """Return the target whose gradient is minus the means, or None."""
    opposite = [replace(mean, gradient=-mean.gradient) for mean in means]
    match, _ = find_target(opposite)
    return match


def candidate_fits(means: Sequence[Mean]) -> Iterator[Fit]:
    """Yield the comparison with every target, the plainest first.

    Args:
        means: Mean gradients in several worlds.

    Yields:
        Comparisons; later ones are computed only if they are asked for.
    """
    for target in BASIC:
        yield compare(target, means)
    vocabulary = min(mean.world.student.shape[1] for mean in means)
    supports = support_targets(vocabulary)
    for target in supports:
        yield compare(target, means)
    yield fit_parameter(discounted_target, means, (0.05, 0.5, 0.95))
    yield fit_parameter(jsd_target, means, (0.02, 0.2, 0.5, 0.8, 0.98))
    if vocabulary > LARGE_VOCABULARY:  # a search over pairs of hundreds of supports takes minutes
        supports = []
    yield from mixture_fits(means, [*BASIC, jsd_target(0.5), *supports])


def fit_parameter(
    family: Callable[[float], Target], means: Sequence[Mean], starts: Sequence[float]
) -> Fit:
    """Fit the parameter in (0, 1) of a family of targets, in the first world.

    Args:
        family: Function from the parameter to a target.
        means: Mean gradients.
        starts: Values that are tried first; the search is around the best one.

    Returns:
        The best comparison, of all worlds.
    """
    grid = sorted({0.0, *starts, 1.0})
    biases = {x: compare(family(x), means[:1]).relative_bias for x in grid[1:-1]}
    best = min(biases, key=biases.__getitem__)
    if biases[best] > FAR:
        return compare(family(best), means)
    index = grid.index(best)
    result = minimize_scalar(
        lambda x: compare(family(float(x)), means[:1]).relative_bias,
        bounds=(grid[index - 1], grid[index + 1]),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return compare(family(float(result.x)), means)


def mixture_fits(means: Sequence[Mean], targets: Sequence[Target]) -> Iterator[Fit]:
    """Yield the best mixture of each pair of targets.

    The weights are fitted once for all worlds, up to a factor of each world, which the weighting of
    its rows may bring along.

    Args:
        means: Mean gradients.
        targets: Targets to mix.

    Yields:
        Comparisons of those mixtures of which both weights are positive.
    """
    exact = {
        target.name + str(i): [exact_gradient(target, m.world) for m in means]
        for i, target in enumerate(targets)
    }
    names = list(exact)
    near = pairs_that_span([parts[0] for parts in exact.values()], means[0])
    for (i, first), (j, second) in combinations(enumerate(targets), 2):
        if not near[i, j]:
            continue
        parts = exact[names[i]], exact[names[j]]
        weights = mixture_weights(means, parts)
        if weights is None:
            continue
        yield compare(mixture(first, second, *weights), means)


def pairs_that_span(gradients: Sequence[Tensor], mean: Mean) -> Tensor:
    """Return (M, M) bool: may any weighted sum of two of M gradients be as near as a mixture is?

    The least squares distance of each pair, from inner products, is a lower bound of that with
    nonnegative weights; pairs that are nearly parallel are kept.

    Args:
        gradients: M gradients in the first world.
        mean: Mean of the loss in it.

    Returns:
        False for pairs that `mixture_weights` would refuse.
    """
    columns = torch.stack([x.flatten() for x in gradients])
    columns = columns / columns.norm(dim=1, keepdim=True).clamp(min=1e-300)
    goal = mean.gradient.flatten() / mean.gradient.norm()
    cosine, inner = columns @ columns.T, columns @ goal
    independent = 1 - cosine.square()
    square = inner.square()
    explained = square[:, None] + square - 2 * cosine * torch.outer(inner, inner)
    limit = 10 * mean.tolerance
    residual = 1 - explained / independent.clamp(min=1e-300)
    return (residual <= (2 * limit) ** 2 + 1e-9) | (independent < 1e-6) | ~residual.isfinite()


def mixture_weights(
    means: Sequence[Mean], parts: tuple[list[Tensor], list[Tensor]]
) -> tuple[float, float] | None:
    """Return the nonnegative weights, 1 in total, that mix two gradients into the means.

    Args:
        means: Mean gradients.
        parts: Gradients of both targets in the same worlds.

    Returns:
        The weights, or None if the first world needs no mixture, or none fits it.
    """
    columns = torch.stack([parts[0][0].flatten(), parts[1][0].flatten()], 1)
    goal = means[0].gradient.flatten()
    weights, distance = nnls(columns.numpy(), goal.numpy())
    total = float(weights.sum())
    fits = distance <= 10 * means[0].tolerance * float(goal.norm())
    if not fits or total == 0 or min(weights) < 1e-3 * total:
        return None
    return float(weights[0]) / total, float(weights[1]) / total


def mixture(first: Target, second: Target, weight: float, other_weight: float) -> Target:
    """Return the weighted sum of two targets."""

    def gradient(world: World, student: Tensor, sampler: Tensor | None) -> Tensor:
        return weight * first.gradient(world, student, sampler) + other_weight * second.gradient(
            world, student, sampler
        )

    name = f"mixture({weight:.3g} {first.name}, {other_weight:.3g} {second.name})"
    both = first.minimum_is_teacher and second.minimum_is_teacher
    return Target(name, gradient, minimum_is_teacher=both)
