"""The forecasts of a pair for every method of a bank, and what to take: method, K, mask and gamma.

K, mask and gamma are read off the measurements by the rules below, which are rules of thumb: the
bank tests forecasts of gain and collapse, not these rules.

Shapes: d features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from opd.analysis.scout.bank import FEATURES, Array, Bank, pair_features
from opd.analysis.scout.forecast import (
    CollapseModel,
    GainModel,
    fit_collapse,
    fit_gain,
    forecast_collapse,
    forecast_gain,
)
from opd.analysis.scout.measure import PairMeasurements
from opd.analysis.scout.scores import method_averages
from opd.analysis.scout.special_tokens import RuleShare
from opd.analysis.scout.validation import Interval
from opd.analysis.scout.verdict import Verdict, judge

MARGIN = 0.05
"""Share of the bank's range by which a feature may be outside of it."""
MAX_COLLAPSE = 0.5
"""Probability of a collapse from which a method is not taken."""
DEPTHS = (1, 8, 16, 32)
MAX_OUTSIDE = 0.01
"""Student's probability outside of the teacher's top-K that is accepted."""
MIN_SPECIAL_GAP, MIN_SPECIAL_RATIO = 1.0, 3.0
"""Mean log-ratio in nats of a special token, and its share of the signal in units of its share of
the tokens, from which it is masked."""


@dataclass(frozen=True)
class MethodForecast:
    """What a bank says of one method on one pair."""

    method: str
    average_gain: float
    """Gain of the method on an average pair of the bank (`scores.method_averages`)."""
    gain: Interval | None
    """Forecast gain with its interval; None if gains are not forecast."""
    collapse: Interval | None
    """Probability of a collapse with its interval; None if collapses are not forecast."""


@dataclass(frozen=True)
class Choice:
    """A recommended setting and why."""

    value: str
    """The setting as on the command line; empty if nothing is recommended."""
    reason: str


@dataclass(frozen=True)
class TeacherReport:
    """Measurements, forecasts and recommendations of one teacher."""

    teacher: str
    measurements: Mapping[str, float]
    rules: tuple[RuleShare, ...]
    """Special tokens that the student wrote, each by the rule that would mask it."""
    outside: tuple[str, ...]
    """Features outside of the bank, with their range there; nothing is forecast then."""
    forecasts: tuple[MethodForecast, ...]
    """Methods of the bank, best first; empty without a bank."""
    method: Choice
    support_k: Choice
    mask: Choice
    gamma: Choice


@dataclass(frozen=True, eq=False)
class FittedBank:
    """A bank with its models and their test."""

    bank: Bank
    verdict: Verdict
    gain: GainModel
    collapse: CollapseModel


def fit_bank(bank: Bank) -> FittedBank:
    """Fit and test the models of a bank; gains are chosen for families that were left out."""
    many_families = len(np.unique(bank.family)) > 1
    gain = fit_gain(bank, bank.family if many_families else bank.pair)
    return FittedBank(bank, judge(bank), gain, fit_collapse(bank))


def features_outside(bank: Bank, features: Array) -> tuple[str, ...]:
    """Return the features that are outside of a bank's range by more than MARGIN of it.

    Args:
        bank: The runs.
        features: (d,) features of a pair; NaN counts as inside.

    Returns:
        For each, its name, value and range.
    """
    texts = []
    for name, value, column in zip(FEATURES, features, bank.features.T, strict=True):
        present = column[np.isfinite(column)]
        if not len(present) or not math.isfinite(value):
            continue
        low, high = float(present.min()), float(present.max())
        margin = MARGIN * (high - low) + 1e-9
        if not low - margin <= value <= high + margin:
            texts.append(f"{name} {value:.3g} (bank {low:.3g} to {high:.3g})")
    return tuple(texts)


def report_teacher(
    teacher: str, measured_pair: PairMeasurements, fitted: FittedBank | None
) -> TeacherReport:
    """Forecast every method of a bank on a pair, and choose settings.

    Args:
        teacher: Name of the teacher.
        measured_pair: Measurements of the pair.
        fitted: The bank; None if there is none.

    Returns:
        The report.
    """
    measurements, outside = measured_pair.values, tuple[str, ...]()
    forecasts: tuple[MethodForecast, ...] = ()
    method = Choice("", "no bank of runs")
    if fitted is not None:
        features = pair_features(measurements)
        outside = features_outside(fitted.bank, features)
        start = float(measurements["student_accuracy"])
        forecasts = forecast_methods(fitted, features, start, is_inside=not outside)
        method = choose_method(fitted.verdict, forecasts)
    return TeacherReport(
        teacher=teacher,
        measurements=measurements,
        rules=measured_pair.rules,
        outside=outside,
        forecasts=forecasts,
        method=method,
        support_k=choose_support(measurements),
        mask=choose_mask(measured_pair.rules),
        gamma=choose_gamma(measurements),
    )


def forecast_methods(
    fitted: FittedBank, features: Array, start: float, is_inside: bool
) -> tuple[MethodForecast, ...]:
    """Forecast the methods of a bank on a pair.

    Args:
        fitted: The bank.
        features: (d,) features of the pair.
        start: Accuracy of the student.
        is_inside: Whether the features are in the range of the bank; nothing is forecast otherwise.

    Returns:
        One forecast per method: by forecast gain, or average gain where there is none.
    """
    bank, names = fitted.bank, np.array(fitted.bank.methods)
    if not len(names):
        return ()
    queries = np.repeat(features[None], len(names), 0)
    gains = np.stack(forecast_gain(fitted.gain, queries, names, np.full(len(names), start)), 1)
    collapses = np.stack(forecast_collapse(fitted.collapse, queries, names), 1)
    has_gain = is_inside and not fitted.verdict.gain_doubts
    has_collapse = is_inside and not fitted.verdict.collapse_doubts
    averages = method_averages(bank.gain, bank.method, bank.pair)
    forecasts = [
        MethodForecast(
            method=str(name),
            average_gain=averages[str(name)],
            gain=_interval(gains[i]) if has_gain else None,
            collapse=_interval(collapses[i]) if has_collapse else None,
        )
        for i, name in enumerate(names)
    ]
    return tuple(
        sorted(forecasts, key=lambda f: -(f.average_gain if f.gain is None else f.gain[0]))
    )


def _interval(values: Array) -> Interval:
    value, low, high = (float(x) for x in values)
    return value, low, high


def choose_method(verdict: Verdict, forecasts: tuple[MethodForecast, ...]) -> Choice:
    """Choose the method with the best forecast, or the best average where that chooses better.

    Methods that are forecast to collapse with MAX_COLLAPSE or more are left out.

    Args:
        verdict: The test of the bank.
        forecasts: Forecasts of the methods.

    Returns:
        The choice.
    """
    if not forecasts:
        return Choice("", "the bank has no method with enough pairs")
    if all(f.gain is None and f.collapse is None for f in forecasts):
        return Choice("", "neither gain nor collapse is forecast")
    stable = [f for f in forecasts if f.collapse is None or f.collapse[0] < MAX_COLLAPSE]
    if not stable:
        return Choice("", f"every method is forecast to collapse ({MAX_COLLAPSE:.0%} or more)")
    highest_gain = stable[0].gain  # the methods are in the order of their forecast gains
    if verdict.chooses_method and highest_gain is not None:
        return Choice(stable[0].method, f"the highest forecast gain, {highest_gain[0]:+.3f}")
    best = max(stable, key=lambda f: f.average_gain)
    left_out = "" if len(stable) == len(forecasts) else " of those not forecast to collapse"
    return Choice(
        best.method,
        f"the highest average gain in the bank{left_out}, {best.average_gain:+.3f}; forecasts "
        "choose no better in families that were left out",
    )


def choose_support(measurements: Mapping[str, float]) -> Choice:
    """Choose the smallest K of DEPTHS whose teacher list leaves out at most MAX_OUTSIDE of p."""
    for depth in DEPTHS:
        outside = measurements[f"outside_top{depth}"]
        if outside <= MAX_OUTSIDE:
            return Choice(
                str(depth),
                f"the student has {outside:.2%} of its probability outside of the teacher's "
                f"top-{depth}",
            )
    return Choice(
        str(DEPTHS[-1]),
        f"the student still has {measurements[f'outside_top{DEPTHS[-1]}']:.1%} of its probability "
        f"outside of the teacher's top-{DEPTHS[-1]}, which a renormalised loss cannot see; "
        "consider the full vocabulary",
    )


def choose_mask(rules: tuple[RuleShare, ...]) -> Choice:
    """Choose which special tokens are masked, by their gap and their share of the signal."""
    if not rules:
        return Choice("", "the student wrote no special token")
    masked_rules = [
        share
        for share in rules
        if share.gap >= MIN_SPECIAL_GAP and share.signal >= MIN_SPECIAL_RATIO * share.tokens
    ]
    texts = [
        f"{share.rule.removeprefix('string:')} is {share.tokens:.1%} of the tokens and "
        f"{share.signal:.1%} of the signal, with a mean log-ratio of {share.gap:+.2f}"
        for share in masked_rules or rules[:1]
    ]
    return Choice(" ".join(share.rule for share in masked_rules), "; ".join(texts))


def choose_gamma(measurements: Mapping[str, float]) -> Choice:
    """Choose the discount of the estimator with the least error at the measured rollouts."""
    gamma = measurements["best_gamma"]
    if not math.isfinite(gamma):
        return Choice("", "the head is not a single matrix, so that its gradient was not measured")
    return Choice(
        f"{gamma:g}",
        f"its estimator of the sequence gradient has the least error with "
        f"{measurements['responses']:.0f} responses",
    )


def ranking(teachers: tuple[TeacherReport, ...]) -> tuple[tuple[TeacherReport, ...], str]:
    """Rank teachers, best first.

    Args:
        teachers: Reports of the teachers.

    Returns:
        The ranked teachers, and what they are ranked by: the best forecast gain if all have one,
        else the measured continuation gain.
    """

    def best_forecast(report: TeacherReport) -> float:
        return max((f.gain[0] for f in report.forecasts if f.gain is not None), default=math.nan)

    def continuation(report: TeacherReport) -> float:
        gain = report.measurements["continuation_gain"]
        return gain if math.isfinite(gain) else report.measurements["accuracy_gap"]

    if all(math.isfinite(best_forecast(report)) for report in teachers):
        return tuple(sorted(teachers, key=best_forecast, reverse=True)), "best forecast gain"
    return tuple(sorted(teachers, key=continuation, reverse=True)), "measured continuation gain"
