"""What a loss estimates where its assumptions fail: other samplers, older policies, long rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives.audit.faults import world_mean
from opd.objectives.audit.matching import Fit, compare
from opd.objectives.audit.structure import Structure
from opd.objectives.audit.targets import sequence_gradient
from opd.objectives.audit.units import enumerate_units, mean_gradient
from opd.objectives.audit.worlds import World, make_world
from opd.objectives.user_loss import UserLoss

STEP = 0.1
"""Largest change of a logit by one update of a policy."""


@dataclass(frozen=True)
class Behaviour:
    """Bias of a loss off its assumptions."""

    top_p: float
    """Relative bias under rollouts with top-p 0.9."""
    temperature: float
    """Relative bias under rollouts at temperature 0.8."""
    one_update: float
    """Relative bias where the rollouts are one update old."""
    four_updates: float
    """Relative bias where they are four updates old."""
    lengths: float | None
    """Relative bias in a world with responses of very different length, without undoing a mean;
    None for rows that are coupled by their prompt.
    """
    longest: int
    """Tokens of its longest response."""
    stale: bool
    """Whether it is off for a sampler mildly off, over the student's prefixes and the sampler's."""


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return logits with -inf outside the fewest tokens of mass at least top_p."""
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


def older_policy(world: World, updates: int) -> Tensor:
    """Return the logits of the student before so many updates towards the teacher."""
    table = world.student
    for _ in range(updates):
        gradient = sequence_gradient(world, table, None)
        table = table + STEP * gradient / gradient.abs().max()
    return table


def find_behaviour(
    loss: UserLoss, world: World, structure: Structure, factor: str, fit: Fit
) -> Behaviour:
    """Compute the bias of a loss with a known target off its assumptions.

    Args:
        loss: The loss.
        world: A world.
        structure: How rows combine; the unit is "row" or "group".
        factor: Factor under which it has its target.
        fit: Its target.

    Returns:
        Relative biases: distance of the mean from the target's gradient at the student, relative to
        that gradient, with the scale that is right on policy.
    """
    student = world.student
    exact = fit.target.gradient(world, student, None)
    on_policy = world_mean(loss, world, structure, factor).gradient
    scale = float((on_policy * exact).sum() / exact.square().sum())

    def bias(sampler: Tensor, over_sampler: bool = False) -> float:
        units = enumerate_units(loss, world, structure, sampler=sampler)
        mean = mean_gradient(units, len(student), factor) / scale
        goal = fit.target.gradient(world, student, sampler) if over_sampler else exact
        return float((mean - goal).norm() / goal.norm())

    mild = older_policy(world, 1)
    vocabulary = student.shape[1]
    length = 5 if vocabulary < 9 else 3 if vocabulary < 33 else 2
    long = make_world(
        "long",
        vocabulary=vocabulary,
        length=length,
        random_lengths=True,
        seed=31,
        num_prompts=1,
    )
    raw = world_mean(loss, long, structure, "one") if structure.unit == "row" else None
    return Behaviour(
        top_p=bias(nucleus(student, 0.9)),
        temperature=bias(student / 0.8),
        one_update=bias(mild),
        four_updates=bias(older_policy(world, 4)),
        lengths=None if raw is None else compare(fit.target, [raw]).relative_bias,
        longest=length,
        stale=min(bias(mild), bias(mild, over_sampler=True)) > 1e-3,
    )
