"""The audit: everything that is asked of a loss, in order, and the verdict.

It never trains and never loads a model: the loss is called on small worlds whose responses are all
enumerated (`opd.objectives.audit.worlds`).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.objectives.audit import faults
from opd.objectives.audit.behaviour import find_behaviour
from opd.objectives.audit.card import AuditCard
from opd.objectives.audit.estimate import Estimate, find_estimate
from opd.objectives.audit.findings import Findings
from opd.objectives.audit.gradients import NOISY, argument_values, call_loss, loss_gradients
from opd.objectives.audit.noise import find_noise
from opd.objectives.audit.rest import MOVES, Rest, find_rest
from opd.objectives.audit.structure import Structure, find_structure
from opd.objectives.audit.units import with_fast_calls
from opd.objectives.audit.verdict import check_claim, judge
from opd.objectives.audit.world_set import Worlds, make_worlds
from opd.objectives.audit.worlds import World
from opd.objectives.user_loss import UserLoss, as_user_loss

CALL_SECONDS = 3.0
"""Duration of one small call beyond which a loss cannot be judged in reasonable time."""
RANDOM_DRAWS = (100, 200, 400, 800, 1600)
"""Calls that are averaged for a loss that draws random numbers: as few as give a stable mean."""
VOCABULARIES = (4, 9, 33, 129)
"""Vocabularies that are tried until the loss accepts one: it may take a top-K of its own."""


def audit(
    loss: Callable[..., Any] | UserLoss,
    *,
    claims: str | None = None,
    full: bool = False,
    faults_only: bool = False,
) -> AuditCard:
    """Say what a distillation loss estimates, how noisily, and which known faults it has.

    Args:
        loss: A function that asks by parameter name for what it needs
            (`opd.objectives.user_loss.PARAMETERS`) and returns a scalar to be minimised.
        claims: Target that its author says it estimates; None for no claim.
        full: Whether more worlds are used.
        faults_only: Whether to stop where it is known if there is a fault: noise, rest and
            behaviour are left out.

    Returns:
        The card.

    Raises:
        InvalidInput: The loss cannot be judged: it fails, returns no scalar, changes its arguments,
            or takes too long; or the claim names no target.
    """
    start = time.perf_counter()
    if claims is not None:
        check_claim(claims)
    if not isinstance(loss, UserLoss):
        loss = as_user_loss(loss, getattr(loss, "__qualname__", type(loss).__name__))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        card = _audit(loss, claims, full, faults_only)
    return replace(card, seconds=time.perf_counter() - start)


def _audit(loss: UserLoss, claims: str | None, full: bool, faults_only: bool) -> AuditCard:
    """Return the card without its duration."""
    worlds = acceptable_worlds(loss, full)
    draws = check_call(loss, worlds.random)
    findings = Findings()
    if draws > 1:
        findings.caveats.append("random")
        findings.evidence["random"] = (
            f"two calls on the same batch differ; gradients are means of {draws} calls"
        )
    base = loss_gradients(loss, faults.sample_batch(worlds.random), draws=draws)
    if not base.has_graph or is_rounding(loss, worlds.random, base.student, draws):
        reason = "every gradient is 0" if base.has_graph else "no graph reaches student_logits"
        findings.fault("no_student_gradient", reason)
        return judge(loss, findings, claims, match=None, nearest=None)
    if not bool(base.student.isfinite().all()):
        findings.fault("non_finite", "an ordinary batch: the gradient is NaN or infinite")
        return judge(loss, findings, claims, match=None, nearest=None)
    for code, check in (
        ("mask_leak", faults.mask_leak),
        ("teacher_gradient", faults.teacher_gradient),
    ):
        findings.fault(code, check(loss, worlds.random, draws))
    structure = find_structure(loss, worlds.random, draws)
    if structure.unit == "group":  # pairs of responses are enumerated
        worlds = make_worlds(worlds.vocabulary, full=full, length=2)
    findings.fault("padding_dependent", padding_evidence(loss, worlds.random, draws, findings))
    if structure.unit != "batch":
        structure = with_fast_calls(loss, worlds.random, structure)
        findings.fault("non_causal", faults.non_causal(loss, worlds.random, draws))
    estimate = find_estimate(loss, worlds, structure, findings)
    if "misaligned" in findings.faults:
        return judge(loss, findings, claims, match=None, nearest=estimate.nearest)
    target = None if estimate.match is None else estimate.match.target
    bad = list(faults.non_finite(loss, worlds.random, target))
    if "non_finite" not in findings.faults:
        findings.fault("non_finite", "; ".join(bad) or None)
    elif estimate.nearest is None:  # some response has no gradient, so that nothing can be computed
        return judge(loss, findings, claims, match=None, nearest=None)
    parts: dict[str, Any] = {}
    wanted = not faults_only or (estimate.match is None and not findings.faults)
    if wanted and structure.unit != "batch" and "zero_gradient" not in findings.faults:
        parts = quantities(loss, worlds, estimate, findings)
    return judge(
        loss,
        findings,
        claims,
        match=estimate.match,
        nearest=estimate.nearest,
        weighting=describe_weighting(structure, estimate.factor),
        unit=structure.unit,
        divisor=structure.weighting,
        **parts,
    )


def is_rounding(loss: UserLoss, world: World, gradient: Tensor, draws: int) -> bool:
    """Return whether a gradient is 0, or tiny and another one after a tiny change of the student.

    Args:
        loss: The loss.
        world: The world of `faults.sample_batch`.
        gradient: (B, T, V) gradient of the batch of `faults.sample_batch`.
        draws: Calls to average.

    Returns:
        Whether there is nothing but rounding.
    """
    largest = float(gradient.abs().max())
    if largest == 0 or largest > 1e-6:
        return largest == 0
    batch = faults.sample_batch(world)
    close = replace(batch, student_logits=batch.student_logits * (1 + 1e-5))
    other = loss_gradients(loss, close, draws=draws).student
    return float((other - gradient).norm()) > 0.1 * float(gradient.norm())


def padding_evidence(loss: UserLoss, world: World, draws: int, findings: Findings) -> str | None:
    """Return the evidence of `padding_dependent`, unless garbage would be compared with garbage."""
    if "mask_leak" in findings.faults:
        return None
    return faults.padding_dependent(loss, world, draws)


def quantities(
    loss: UserLoss, worlds: Worlds, estimate: Estimate, findings: Findings
) -> dict[str, Any]:
    """Return noise, rest and behaviour, and add what they decide.

    Args:
        loss: The loss.
        worlds: The worlds.
        estimate: What the loss estimates.
        findings: Receives faults and caveats.

    Returns:
        Parts of the card by name.
    """
    structure, factor, match = estimate.structure, estimate.factor, estimate.match
    parts: dict[str, Any] = {}
    parts["noise"] = find_noise(loss, worlds.random, structure, factor, match)
    if structure.draws == 1 and any(x.startswith("teacher") for x in loss.asks):
        parts["rest"] = find_rest(loss, worlds.small, structure, factor)
        check_rest(parts["rest"], estimate, findings)
    if structure.draws == 1 and match is not None:
        behaviour = find_behaviour(loss, worlds.random, structure, factor, match)
        parts["behaviour"] = behaviour
        if behaviour.stale:
            findings.caveats.append("stale_biased")
            findings.evidence["stale_biased"] = (
                f"rollouts one update old: relative bias {behaviour.one_update:.2g}"
            )
    return parts


def acceptable_worlds(loss: UserLoss, full: bool) -> Worlds:
    """Return worlds with the smallest vocabulary that the loss accepts.

    Args:
        loss: The loss.
        full: Whether there are more worlds.

    Returns:
        The worlds.

    Raises:
        InvalidInput: The loss fails with every vocabulary; the message is that of the first.
    """
    first_error: InvalidInput | None = None
    for vocabulary in VOCABULARIES:
        worlds = make_worlds(vocabulary, full=full)
        batch = faults.sample_batch(worlds.random)
        student, teacher = batch.student_logits, batch.arguments["teacher_logits"]
        try:
            call_loss(loss, argument_values(loss, batch, student.clone(), teacher.clone()))
        except InvalidInput as error:
            first_error = first_error or error
            continue
        return worlds
    assert first_error is not None
    raise first_error


def check_call(loss: UserLoss, world: World) -> int:
    """Call a loss twice on one batch: is it pure, fast and deterministic?

    Args:
        loss: The loss.
        world: A world.

    Returns:
        Calls whose gradients are to be averaged: 1 for a deterministic loss.

    Raises:
        InvalidInput: It changes its arguments in place, or takes too long.
    """
    batch = faults.sample_batch(world)
    student = batch.student_logits.clone().requires_grad_()
    values = argument_values(loss, batch, student, batch.arguments["teacher_logits"].clone())
    before = {k: x.detach().clone() for k, x in values.items() if isinstance(x, Tensor)}
    start = time.perf_counter()
    call_loss(loss, values)
    seconds = time.perf_counter() - start
    if seconds > CALL_SECONDS:
        raise InvalidInput(
            f"one call of the loss {loss.name} on {len(batch.student_logits)} rows took "
            f"{seconds:.1f} s; an audit needs about a thousand calls, so give it a loss that takes "
            f"less than {CALL_SECONDS:g} s"
        )
    changed = [k for k, x in before.items() if not torch.equal(x, values[k].detach())]
    if changed:
        raise InvalidInput(
            f"the loss {loss.name} changes its argument {', '.join(changed)} in place; work on a "
            "copy, such as tokens.clone(), because the trainer reads it afterwards"
        )
    first, second = (loss_gradients(loss, batch).student for _ in range(2))
    if torch.equal(first.nan_to_num(), second.nan_to_num()):
        return 1
    for draws in RANDOM_DRAWS:
        first, second = (loss_gradients(loss, batch, draws=draws).student for _ in range(2))
        if float((first - second).norm()) <= NOISY / 4 * float(first.norm()):
            break
    return draws


def check_rest(rest: Rest, estimate: Estimate, findings: Findings) -> None:
    """Add the fault `off_teacher_fixed_point` where nothing else explains the place of rest.

    A loss without a known target may have many minima besides the teacher, as a loss on a support
    has; it is at fault where it moves the teacher, or a student close by further away.

    Args:
        rest: Where descent ends.
        estimate: What the loss estimates.
        findings: Receives the fault.
    """
    if estimate.match is not None or {"wrong_sign", "batch_dependent"} & {*findings.faults}:
        return
    if rest.mean_at_teacher > 1e-4:
        findings.fault(
            "off_teacher_fixed_point",
            f"at teacher = student the mean is {rest.mean_at_teacher:.3g} of that at the start; "
            f"descent ends at KL {rest.smallest_kl:.3g} to {rest.largest_kl:.3g}, where the "
            f"student has {rest.student_mass:.4f} on the teacher's top-K of "
            f"{rest.teacher_mass:.4f}",
        )
    elif rest.repels and rest.moves < MOVES and "clipped" not in findings.warnings:
        findings.fault(
            "off_teacher_fixed_point",
            f"from a student at KL {rest.near_start_kl:.3g} descent ends at KL {rest.near_kl:.3g} "
            "from the teacher",
        )


def describe_weighting(structure: Structure, factor: str) -> str:
    """Return what a loss divides by, in words."""
    divided = {
        "one": "divides by nothing",
        "tokens": "divides by the supervised tokens",
        "rows": "divides by the rows",
        "prompts": "divides by the prompts",
    }[structure.weighting]
    undone = {"one": "", "length": ", a mean over each response undone"}.get(
        factor, ", a mean over each group undone"
    )
    return divided + undone
