"""The verdict of an audit: from faults, warnings, the target and the claim to three sentences."""

import math
from typing import Any

from diagnostics.errors import InvalidInput
from opd.objectives.audit.card import FAULTS, WARNINGS, AuditCard, TargetMatch
from opd.objectives.audit.findings import Findings
from opd.objectives.audit.matching import Fit
from opd.objectives.user_loss import UserLoss

TARGET_KINDS = (
    *("sequence_reverse_kl", "token_reverse_kl", "token_forward_kl", "token_jsd"),
    *("topk_reverse_kl", "discounted_reverse_kl", "expected_reward", "mixture", "none"),
)
"""Names of targets without their parameters."""


def judge(
    loss: UserLoss,
    findings: Findings,
    claims: str | None,
    *,
    match: Fit | None,
    nearest: Fit | None,
    weighting: str = "",
    **parts: Any,
) -> AuditCard:
    """Put a card together.

    Args:
        loss: The loss.
        findings: Faults, warnings, caveats and evidence.
        claims: Target that its author claims, or None.
        match: The target, or None.
        nearest: The nearest target, or None.
        weighting: What the loss divides by, in words.
        **parts: Noise, rest and behaviour of the card.

    Returns:
        The card.
    """
    target = target_match(match, nearest, weighting)
    if "zero_gradient" in findings.faults or "no_student_gradient" in findings.faults:
        target = TargetMatch(name="none", cosine=None, relative_bias=None, scale=None)
    refuted = claims is not None and not same_target(claims, target.name)
    if refuted:
        findings.evidence["remark_claim"] = f"claimed {claims}, found {target.name}"
    verdict = "ok"
    if findings.faults or refuted:
        verdict = "faulty"
    elif findings.warnings:
        verdict = "warn"
    fit = match if match is not None else nearest
    instead = None if verdict == "ok" or fit is None else suggestion(fit, claims)
    return AuditCard(
        loss=loss.name,
        verdict=verdict,
        faults=findings.faults,
        warnings=findings.warnings,
        caveats=findings.caveats,
        target=target,
        claimed=claims,
        evidence=findings.evidence,
        sentences=sentences(verdict, findings, target, claims if refuted else None, instead),
        instead=instead,
        **parts,
    )


def target_match(match: Fit | None, nearest: Fit | None, weighting: str) -> TargetMatch:
    """Return the target as the card shows it."""
    if match is not None:
        return TargetMatch(
            name=match.target.name,
            cosine=match.cosine,
            relative_bias=match.relative_bias,
            scale=match.scale,
            weighting=weighting,
        )
    return TargetMatch(
        name="none",
        cosine=None if nearest is None else nearest.cosine,
        relative_bias=None if nearest is None else nearest.relative_bias,
        scale=None,
        nearest=None if nearest is None else nearest.target.name,
        weighting=weighting,
    )


def check_claim(claim: str) -> None:
    """Refuse a claim that names no target.

    Args:
        claim: Name of a target, with or without its parameters.

    Raises:
        InvalidInput: The name is unknown.
    """
    kind = claim.partition("(")[0].strip()
    if kind not in TARGET_KINDS:
        raise InvalidInput(
            f"claims is {claim!r}, which names no target; known: {', '.join(TARGET_KINDS)}, with "
            "or without parameters, such as token_jsd(0.5)"
        )


def same_target(claim: str, name: str) -> bool:
    """Return whether a claim names a target; parameters that the claim leaves open fit.

    Args:
        claim: Name of a target, with or without its parameters.
        name: Name of the target that was found, its numbers with three digits.

    Returns:
        Whether they agree; numbers may differ by one per cent.
    """
    (kind, values), (other_kind, other_values) = (_parsed(x) for x in (claim, name))
    if kind != other_kind or not values:
        return kind == other_kind
    return len(values) == len(other_values) and all(
        a == b
        if isinstance(a, str) or isinstance(b, str)
        else math.isclose(a, b, rel_tol=0.01, abs_tol=1e-3)
        for a, b in zip(values, other_values, strict=True)
    )


def _parsed(name: str) -> tuple[str, list[str | float]]:
    """Return the kind of a target and its parameters, numbers as numbers."""
    kind, _, rest = name.partition("(")
    values: list[str | float] = []
    for text in filter(None, (x.strip() for x in rest.strip().removesuffix(")").split(","))):
        try:
            values.append(float(text))
        except ValueError:
            values.append(text)
    return kind.strip(), values


def suggestion(fit: Fit, claims: str | None) -> str | None:
    """Return our composition of the claimed or the nearest target, as a command."""
    by_claim = {
        "sequence_reverse_kl": "full_reverse_kl,gamma=1",
        "token_reverse_kl": "full_reverse_kl",
        "token_forward_kl": "full_forward_kl",
    }
    name = by_claim.get(claims or "", fit.target.composition)
    if name is None:
        return None
    objective, *settings = name.split(",")
    flags = "".join(
        f" --{key.replace('_', '-')} {value}"
        for key, _, value in (setting.partition("=") for setting in settings)
    )
    return f"opd train --objective {objective}{flags}"


def sentences(
    verdict: str,
    findings: Findings,
    target: TargetMatch,
    refuted_claim: str | None,
    instead: str | None,
) -> tuple[str, ...]:
    """Return the verdict in three plain sentences."""
    if target.name != "none":
        first = f"Its mean gradient is a positive multiple of that of {target.name}."
    elif target.nearest is not None:
        first = (
            f"Its mean gradient belongs to no known target; the nearest is {target.nearest} "
            f"(cosine {target.cosine:.3f})."
        )
    else:
        first = "It has no mean gradient that could be compared with a target."
    if refuted_claim is not None:
        second = f"It does not estimate {refuted_claim}, as claimed."
    elif findings.faults:
        second = f"Fault: {'; '.join(FAULTS[code] for code in findings.faults)}."
    elif findings.warnings:
        second = f"Warning: {'; '.join(WARNINGS[code] for code in findings.warnings)}."
    else:
        second = "None of the known faults was found."
    third = {
        "ok": "It can be trained with as it is.",
        "warn": "It can be trained with, if the warning is what you want.",
        "faulty": "Mend it before training with it"
        + (f", or use `{instead}`." if instead else "."),
    }[verdict]
    return first, second, third
