"""What the mean of a loss is the gradient of, or why it is the gradient of nothing known."""

from dataclasses import dataclass

from opd.objectives.audit import faults
from opd.objectives.audit.coupled import sampled_means
from opd.objectives.audit.faults import factors_of, world_mean
from opd.objectives.audit.findings import Findings
from opd.objectives.audit.matching import Fit, Mean, find_reversed, find_target
from opd.objectives.audit.structure import Structure
from opd.objectives.audit.world_set import Worlds
from opd.objectives.audit.worlds import World
from opd.objectives.user_loss import UserLoss


@dataclass(frozen=True)
class Estimate:
    """What the means of a loss are."""

    structure: Structure
    """How rows combine."""
    factor: str
    """Factor under which the target was found."""
    match: Fit | None
    """The target."""
    nearest: Fit | None
    """The nearest target."""
    is_wrong: bool = False
    """Whether a fault explains that there is no target."""


def find_estimate(
    loss: UserLoss, worlds: Worlds, structure: Structure, findings: Findings
) -> Estimate:
    """Find the target of a loss, or why it has none.

    Args:
        loss: The loss.
        worlds: The worlds.
        structure: How rows combine.
        findings: Receives faults and warnings.

    Returns:
        The target.
    """
    draws = structure.draws
    if structure.unit == "batch":
        shifted = faults.misaligned(loss, (worlds.random, worlds.equal), draws)
        if shifted is not None:
            add_misaligned(loss, worlds.random, draws, shifted, findings)
            return Estimate(structure, "one", None, shifted[1], is_wrong=True)
        return coupled_estimate(loss, worlds, structure, findings)
    nearest: Fit | None = None
    means_by_factor: dict[str, list[Mean]] = {}
    for factor in factors_of(structure):
        used = worlds.matching if draws == 1 else (worlds.random, worlds.equal)
        means = [world_mean(loss, world, structure, factor) for world in used]
        means_by_factor[factor] = means
        if not all(bool(mean.gradient.isfinite().all()) for mean in means):
            findings.fault(
                "non_finite",
                "some response, or pair of responses, has a gradient that is NaN or infinite",
            )
            return Estimate(structure, factor, None, None, is_wrong=True)
        if all(mean.is_zero for mean in means):
            findings.fault(
                "zero_gradient",
                f"the mean is {float(means[0].gradient.norm()):.1e}, single gradients are "
                f"{means[0].root_mean_square:.3g}, with equal and with random lengths",
            )
            return Estimate(structure, factor, None, None, is_wrong=True)
        usable = [mean for mean in means if not mean.is_zero]
        match, closest = find_target(usable)
        if match is not None:
            remark_on_factor(loss, worlds, structure, factor, match, findings)
            return Estimate(structure, factor, match, closest)
        nearest = closest if nearest is None or closest.cosine > nearest.cosine else nearest
    for factor, means in means_by_factor.items():
        opposite = find_reversed([mean for mean in means if not mean.is_zero])
        if opposite is not None:
            findings.fault("wrong_sign", f"minus the mean estimates {opposite.target.name}")
            return Estimate(structure, factor, None, nearest, is_wrong=True)
    explained = explain_bias(loss, worlds, structure, findings)
    return Estimate(structure, "one", None, nearest, is_wrong=explained)


def explain_bias(loss: UserLoss, worlds: Worlds, structure: Structure, findings: Findings) -> bool:
    """Look for what explains that a loss has no target; the fault `biased` if nothing does.

    Args:
        loss: The loss.
        worlds: The worlds.
        structure: How rows combine.
        findings: Receives faults and warnings.

    Returns:
        Whether another fault or a usual choice explains it.
    """
    shifted = faults.misaligned(loss, (worlds.random, worlds.equal), structure.draws)
    if shifted is not None:
        add_misaligned(loss, worlds.random, structure.draws, shifted, findings)
        return True
    for factor in factors_of(structure):
        means = [world_mean(loss, world, structure, factor) for world in worlds.near]
        match, _ = find_target([mean for mean in means if not mean.is_zero] or means)
        if match is not None:
            findings.warning(
                "clipped",
                f"{match.target.name} where student and teacher are within 0.1 nats, no target "
                "where they are apart",
            )
            return True
    if structure.unit == "group" and faults.ignores_reward_scale(loss, worlds.random):
        findings.warning("group_standardised", "three times the rewards give the same gradient")
        return True
    if {"mask_leak", "non_causal"} & {*findings.faults}:
        return True
    findings.fault("biased", "no target or mixture of two fits within 1e-4 in every world")
    return False


def add_misaligned(
    loss: UserLoss,
    world: World,
    draws: int,
    shifted: tuple[faults.Shift, Fit, int],
    findings: Findings,
) -> None:
    """Add the fault `misaligned`, and take back what the shift alone explains.

    Args:
        loss: The loss.
        world: A world with random lengths.
        draws: Calls to average.
        shifted: The shift that gives a target, the target, and the masked columns on the left.
        findings: Receives the fault.
    """
    shift, match, left = shifted
    if faults.mask_leak(loss, world, draws, layout=shift, left=left) is None:
        for code in ("mask_leak", "padding_dependent", "non_causal"):
            if code in findings.faults:
                findings.faults.remove(code)
                del findings.evidence[code]
    findings.fault("misaligned", shift.describe(match.target.name))


def coupled_estimate(
    loss: UserLoss, worlds: Worlds, structure: Structure, findings: Findings
) -> Estimate:
    """Find the target of a loss whose rows are coupled over the whole batch, by sampling.

    Args:
        loss: The loss.
        worlds: The worlds.
        structure: How rows combine.
        findings: Receives faults and warnings.

    Returns:
        The nearest target.
    """
    means = sampled_means(loss, (worlds.random, worlds.equal), structure.draws)
    if not all(bool(mean.gradient.isfinite().all()) for mean in means):
        findings.fault("non_finite", "some sampled batch has a gradient that is NaN or infinite")
        return Estimate(structure, "one", None, None, is_wrong=True)
    _, nearest = find_target(means)
    if structure.centred:
        findings.warning(
            "batch_whitening",
            "in every batch the scores of tokens or rows have mean 0 or the same mean square; the "
            f"sampled mean has cosine {nearest.cosine:.3f} with {nearest.target.name}",
        )
        return Estimate(structure, "one", None, nearest, is_wrong=True)
    findings.fault(
        "batch_dependent",
        "gradients of micro-batches, weighted by 1, tokens, rows or prompts, do not add up to that "
        "of their batch",
    )
    return Estimate(structure, "one", None, nearest, is_wrong=True)


def remark_on_factor(
    loss: UserLoss,
    worlds: Worlds,
    structure: Structure,
    factor: str,
    match: Fit,
    findings: Findings,
) -> None:
    """Say what it means that the target appears only after a mean was undone.

    Args:
        loss: The loss.
        worlds: The worlds.
        structure: How rows combine.
        factor: Factor under which the target was found.
        match: The target.
        findings: Receives warnings and remarks.
    """
    if factor == "one":
        return
    world = worlds.random
    if factor == "unit_tokens":
        findings.evidence["remark_group"] = (
            "each prompt has equal weight: the target is exact after multiplication by the tokens "
            "of its group"
        )
        return
    raw = world_mean(loss, world, structure, "one").gradient
    probability = world.probabilities(world.student)
    shares = world.visits(probability / world.lengths) / world.visits(probability)
    goal = match.target.gradient(world, world.student, None) * shares[:, None]
    scale = float((raw * goal).sum() / goal.square().sum())
    bias = float((raw - scale * goal).norm() / goal.norm() / max(abs(scale), 1e-300))
    if bias <= 1e-3:
        findings.evidence["remark_rows"] = (
            "each response has equal weight, whatever its length: prefixes of long responses count "
            "less"
        )
        return
    findings.warning(
        "sequence_mean",
        "exact where all lengths are equal; with lengths of 1 to "
        f"{int(world.lengths.max())} the raw mean is off by {bias:.2g} of its size",
    )
