"""The report of a scout: as text, and as a JSON file that can be read again."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.files import read_object
from opd.analysis.scout.forecast import LEVEL
from opd.analysis.scout.recommend import Choice, MethodForecast, TeacherReport
from opd.analysis.scout.special_tokens import RuleShare
from opd.analysis.scout.validation import Interval, Validation

FORMAT = "opdlab-scout-1"
WIDTH = 100

SHOWN = {
    "student_accuracy": "accuracy of the student",
    "teacher_accuracy": "accuracy of the teacher",
    "accuracy_gap": "gap of the accuracies",
    "continuation_gain": "teacher's gain from half of the student's response",
    "reverse_kl": "KL(student || teacher) per token, nats",
    "forward_kl": "KL(teacher || student) per token, nats",
    "topk_overlap": "overlap of both top-16 lists",
    "teacher_mass": "teacher's probability of the student's top-16",
    "outside_top16": "student's probability outside of the teacher's top-16",
    "entropy_gap": "teacher's minus student's entropy, nats",
    "special_share": "special tokens among the student's",
    "special_signal": "their share of the signal",
    "special_gap": "log student - log teacher of special tokens",
    "plain_gap": "log student - log teacher of the other tokens",
    "one_id_signal": "largest share of the signal on one id",
    "impossible_signal": "signal on tokens the teacher excludes",
    "snr": "signal-to-noise of one response, sampled token",
    "snr_full_vocabulary": "the same, whole distributions",
    "snr_sequence": "the same, discount 1",
    "length": "response length, tokens",
    "truncated_share": "truncated responses",
    "repeated_share": "tokens that repeat an 8-gram",
}
"""Measurements in the table, with their titles."""


@dataclass(frozen=True)
class ScoutReport:
    """What a scout measured and forecasts."""

    student: str
    task: str
    settings: Mapping[str, Any]
    """Lengths, number of rollouts and seed."""
    bank: str
    """The bank of runs, in words; empty if there is none."""
    gain_doubts: tuple[str, ...]
    """Why gains are not forecast; empty if they are."""
    collapse_doubts: tuple[str, ...]
    """Why collapses are not forecast; empty if they are."""
    teachers: tuple[TeacherReport, ...]
    """Reports of the teachers, best first."""
    ranked_by: str
    """What the teachers are ranked by."""
    refused: Mapping[str, str]
    """Teachers that cannot be used, and why."""


def write_report(report: ScoutReport, path: Path) -> None:
    """Write a report as JSON; NaN becomes null."""
    write_text(path, json.dumps({"format": FORMAT, **_without_nan(asdict(report))}, indent=1))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_report(path: Path) -> ScoutReport:
    """Read a report that `write_report` wrote.

    Args:
        path: The file.

    Returns:
        The report; limits that were infinite are NaN.

    Raises:
        MissingFile: There is no such file.
        InvalidInput: Another file.
    """
    data = read_object(path)
    if data.get("format") != FORMAT:
        raise InvalidInput(f"{path} is not a report of `opd scout --out`; make one with it")
    try:
        return ScoutReport(
            student=data["student"],
            task=data["task"],
            settings=data["settings"],
            bank=data["bank"],
            gain_doubts=tuple(data["gain_doubts"]),
            collapse_doubts=tuple(data["collapse_doubts"]),
            teachers=tuple(_teacher_from_json(teacher) for teacher in data["teachers"]),
            ranked_by=data["ranked_by"],
            refused=data["refused"],
        )
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{path} is damaged ({error}); run the scout again") from error


def _teacher_from_json(data: Mapping[str, Any]) -> TeacherReport:
    return TeacherReport(
        teacher=data["teacher"],
        measurements={
            name: math.nan if value is None else float(value)
            for name, value in data["measurements"].items()
        },
        rules=tuple(RuleShare(**rule) for rule in data["rules"]),
        outside=tuple(data["outside"]),
        forecasts=tuple(
            MethodForecast(
                forecast["method"],
                forecast["average_gain"],
                _interval_from_json(forecast["gain"]),
                _interval_from_json(forecast["collapse"]),
            )
            for forecast in data["forecasts"]
        ),
        method=Choice(**data["method"]),
        support_k=Choice(**data["support_k"]),
        mask=Choice(**data["mask"]),
        gamma=Choice(**data["gamma"]),
    )


def _interval_from_json(values: Sequence[float | None] | None) -> Interval | None:
    if values is None:
        return None
    value, low, high = (math.nan if x is None else x for x in values)
    return value, low, high


def format_report(report: ScoutReport) -> str:
    """Return a report as text: a table of measurements, forecasts and choices for each teacher."""
    lines = [f"student {report.student}, task {report.task}"]
    lines.append(f"bank    {report.bank or 'none: nothing is forecast'}")
    for what, doubts in (("gain", report.gain_doubts), ("collapse", report.collapse_doubts)):
        for doubt in doubts if report.bank else ():
            lines += _wrap(f"{what} is not forecast: {doubt}", "  ")
    several = len(report.teachers) > 1
    if several:
        lines.append(f"teachers by {report.ranked_by}:")
        lines += [f"  {i}. {x.teacher}" for i, x in enumerate(report.teachers, 1)]
    for teacher, reason in report.refused.items():
        lines += _wrap(f"{teacher} cannot be used: {reason}", "  ")
    for teacher_report in report.teachers:
        lines += ["", f"teacher {teacher_report.teacher}", ""]
        lines += _measurement_lines(teacher_report.measurements)
        lines += ["", *_forecast_lines(teacher_report), ""]
        choices = (
            ("method", teacher_report.method),
            ("K", teacher_report.support_k),
            ("mask", teacher_report.mask),
            ("gamma", teacher_report.gamma),
        )
        for name, choice in choices:
            lines += _wrap(f"{name:7} {choice.value or 'none'}: {choice.reason}", "  ")
    return "\n".join(lines)


def _measurement_lines(measurements: Mapping[str, float]) -> list[str]:
    lines = [f"  {'measurement':52} {'value':>9}  95 %"]
    for name, title in SHOWN.items():
        value = measurements.get(name, math.nan)
        if not math.isfinite(value):
            lines.append(f"  {title:52} {'-':>9}")
            continue
        low = measurements.get(f"{name}_low", math.nan)
        high = measurements.get(f"{name}_high", math.nan)
        error = measurements.get(f"{name}_se", math.nan)
        if math.isfinite(error):
            low, high = value - 1.96 * error, value + 1.96 * error
        interval = f"  [{low:.4g}, {high:.4g}]" if math.isfinite(low) else ""
        lines.append(f"  {title:52} {value:9.4g}{interval}")
    return lines


def _forecast_lines(report: TeacherReport) -> list[str]:
    if report.outside:
        return _wrap(
            f"nothing is forecast, because the pair is outside of the bank: "
            f"{', '.join(report.outside)}",
            "  ",
        )
    if not any(f.gain or f.collapse for f in report.forecasts):
        return ["  nothing is forecast"]
    lines = [
        f"  {'method':32} {'gain':>7} {LEVEL:.0%} interval    {'collapse':>9} {LEVEL:.0%} "
        f"interval   average gain"
    ]
    for forecast in report.forecasts:
        gain = " " * 25 if forecast.gain is None else _format_interval(forecast.gain, "+.3f")
        collapse = (
            " " * 25 if forecast.collapse is None else _format_interval(forecast.collapse, ".2f")
        )
        lines.append(f"  {forecast.method:32} {gain:25} {collapse:24} {forecast.average_gain:+.3f}")
    return lines


def _format_interval(interval: Interval, form: str) -> str:
    value, low, high = (format(x, form) for x in interval)
    return f"{value:>7} [{low}, {high}]"


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def format_validation(validations: Sequence[Validation]) -> str:
    """Return the scores of tests as text, a block for each unit that was left out."""
    lines: list[str] = []
    for v in validations:
        lines += [
            f"leave one {v.unit} out: {v.num_runs} runs, {v.num_pairs} pairs, {v.num_families} "
            f"families, {v.num_collapsed_pairs} pairs with a collapse",
            f"  {'predictor':18} {'Spearman with gain':26} AUROC of collapse",
        ]
        for name in v.spearman:
            spearman, area = (
                _format_interval(scores[name], ".2f") for scores in (v.spearman, v.auroc)
            )
            lines.append(f"  {name:18} {spearman:26} {area}")
        lines += [
            f"  {'lead of forecast':18} {_format_interval(v.spearman_lead, '+.2f'):26} "
            f"{_format_interval(v.auroc_lead, '+.2f')}",
            f"  coverage of {LEVEL:.0%} intervals {_format_interval(v.coverage, '.2f')}, mean "
            f"width {v.width:.3f}",
            f"  mean error {_format_interval(v.error, '.3f')}, less than each method's average by "
            f"{_format_interval(v.error_lead, '+.3f')}",
            f"  loss of gain by the method with the best forecast "
            f"{_format_interval(v.regret, '.3f')}, with the best average "
            f"{_format_interval(v.average_regret, '.3f')}",
            "",
        ]
    return "\n".join(lines[:-1])
