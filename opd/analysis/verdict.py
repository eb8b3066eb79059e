"""What a file of rollouts shows: the alarms that it raises, and ten numbers beside healthy ones.

A file is a single reading. Rules of a level apply to it: an alarm is raised if the reading is
outside the healthy range by more than z of its standard errors, without the persistence that a run
asks for. Rules that compare with the start of a run need several steps.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from diagnostics.alarms.alarms import Alarm, Alarms, replay
from diagnostics.alarms.rules import RULES, AlarmRule
from diagnostics.errors import InvalidInput
from diagnostics.records.row_columns import COLUMNS
from diagnostics.records.rows import Row

RUN_COLUMNS = tuple(name for names, _ in COLUMNS for name in names.split(", "))
"""Patterns of the columns that a training run adds to the metrics of a batch."""

TREND = "they compare with the first steps of a run"
TEXT = "the text was tokenised again, and the tokens are not exactly those that were sampled"
NO_COLUMN = "their columns are missing here"
RUN_ONLY = "their columns come from the trainer"
"""Why a rule is not applied."""

SAMPLER_TESTS = ("sampler_mismatch", "teacher_mismatch", "special_tokens")
"""Rules that presume that the tokens are exactly those that were sampled."""


MAX_NAMES = 12
"""Rules that are named for each reason."""


@dataclass(frozen=True)
class Headline:
    """One of the ten numbers of a verdict."""

    column: str
    """Column of the row."""
    title: str
    """The quantity in words of the field."""
    healthy: str
    """What it reads in a healthy run."""


HEADLINES = (
    Headline("divergence/k1", "cost per token, log student - log teacher", "falls over training"),
    Headline("divergence/reverse_kl", "reverse KL per token, exact", "falls over training"),
    Headline(
        "divergence/outside_topk",
        "sampled tokens outside the support (top-K)",
        "small, does not grow along the response",
    ),
    Headline("divergence/topk_teacher_mass", "teacher's probability of the support", "near 1"),
    Headline(
        "signal/signal_top1_share",
        "share of the signal in 1 % of the tokens",
        "steady, below 0.5",
    ),
    Headline("tokens/one_id_signal", "share of the signal on one token id", "0.05 to 0.3"),
    Headline("repetition/repeated_share", "tokens that repeat an 8-gram", "near 0"),
    Headline("response/length", "response length in tokens", "steady, below the budget"),
    Headline("response/truncated_share", "truncated responses", "small and steady, below 0.5"),
    Headline(
        "consistency/sampler_log_ratio_square",
        "squared log-ratio of student and sampler",
        "1e-6 in float32, 1e-3 in bfloat16",
    ),
)
"""The ten numbers, in the order in which they are printed."""


@dataclass(frozen=True)
class Verdict:
    """The alarms of a file or log, and which rules were applied."""

    alarms: tuple[Alarm, ...]
    """Alarms that were raised."""
    applied: tuple[str, ...]
    """Names of the rules that were applied."""
    not_applied: Mapping[str, tuple[AlarmRule, ...]]
    """Why rules were not applied, and these rules."""
    headlines: tuple[tuple[Headline, float, float], ...] = ()
    """Headlines with value and standard error, NaN where the file does not have it."""
    has_steps: bool = False
    """The alarms are of the steps of a log, not of a single file."""


def judge_row(row: Row, is_text: bool = False, rules: Sequence[AlarmRule] = RULES) -> Verdict:
    """Return the verdict of a single reading.

    Args:
        row: The metrics of a file.
        is_text: The tokens are not exactly those that were sampled, so that tests of the sampler do
            not apply.
        rules: Rules to apply.

    Returns:
        The verdict.
    """
    reasons: dict[str, list[AlarmRule]] = {}
    usable: list[AlarmRule] = []
    for rule in rules:
        value = row.get(rule.metric)
        if rule.num_reference:
            reasons.setdefault(TREND, []).append(rule)
        elif is_text and rule.name in SAMPLER_TESTS:
            reasons.setdefault(TEXT, []).append(rule)
        elif value is None or (not math.isfinite(value) and not rule.nan_is_outside):
            reasons.setdefault(_why_missing(rule), []).append(rule)
        else:
            usable.append(replace(rule, min_outside=1, window=1, num_pooled=1, min_readings=0))
    alarms = Alarms(usable).update({"step": 0, **row})
    not_applied = {reason: tuple(group) for reason, group in reasons.items()}
    return Verdict(
        tuple(alarms), tuple(rule.name for rule in usable), not_applied, headline_values(row)
    )


def judge_log(rows: Sequence[Row], rules: Sequence[AlarmRule] = RULES) -> Verdict:
    """Return the verdict of the rows of a run, with the rules as they are.

    Args:
        rows: Rows with "step".
        rules: Rules to apply.

    Returns:
        The verdict; its headlines are those of the last row that has them.

    Raises:
        InvalidInput: No rule and no headline reads any of the columns.
    """
    columns = {name for row in rows for name, value in row.items() if value is not None}
    usable = [rule for rule in rules if rule.metric in columns]
    if not usable and columns.isdisjoint(headline.column for headline in HEADLINES):
        others = sorted(columns - {"step", "task"})
        raise InvalidInput(
            f"no alarm rule and no headline number reads any of the {len(others)} columns "
            f"({', '.join(others[:4])}{', ...' if len(others) > 4 else ''}); map them with "
            "--rename COLUMN=NAME, such as kl=divergence/k1, or draw them with `opd report`"
        )
    reasons: dict[str, list[AlarmRule]] = {}
    for rule in rules:
        if rule.metric not in columns:
            reasons.setdefault(NO_COLUMN, []).append(rule)
    last: Row = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if value is not None}
    return Verdict(
        tuple(replay(rows, usable)),
        tuple(rule.name for rule in usable),
        {reason: tuple(group) for reason, group in reasons.items()},
        headline_values(last),
        has_steps=True,
    )


def _why_missing(rule: AlarmRule) -> str:
    is_run_column = any(fnmatch(rule.metric, pattern) for pattern in RUN_COLUMNS)
    return RUN_ONLY if is_run_column else NO_COLUMN


def headline_values(row: Row) -> tuple[tuple[Headline, float, float], ...]:
    """Return the ten numbers of a row with their standard errors; NaN where it lacks them."""
    values = []
    for headline in HEADLINES:
        value, error = row.get(headline.column), row.get(f"{headline.column}_se")
        values.append(
            (
                headline,
                math.nan if value is None else float(value),
                math.nan if error is None else float(error),
            )
        )
    return tuple(values)


def format_verdict(verdict: Verdict) -> str:
    """Return the verdict as text: alarms, rules that were not applied, and the ten numbers."""
    num_alarms, num_rules = len(verdict.alarms), len(verdict.applied)
    summary = {0: "no alarm", 1: "1 alarm"}.get(num_alarms, f"{num_alarms} alarms")
    rules_text = f"{num_rules} rule{'' if num_rules == 1 else 's'}"
    applied = f" ({', '.join(verdict.applied)})" if verdict.applied else ""
    lines = textwrap.wrap(
        f"verdict: {summary} from {rules_text}{applied}",
        100,
        initial_indent=" ",
        subsequent_indent="    ",
    )
    for alarm in verdict.alarms:
        text = str(alarm) if verdict.has_steps else str(alarm).removeprefix("step 0, ")
        lines += textwrap.wrap(f"ALARM {text}", 100, initial_indent="  ", subsequent_indent="    ")
    for reason, rules in verdict.not_applied.items():
        names = [
            rule.name if reason == RUN_ONLY else f"{rule.name} ({rule.metric})" for rule in rules
        ]
        if len(names) > MAX_NAMES:
            names[MAX_NAMES:] = [f"and {len(names) - MAX_NAMES} more, which --json lists"]
        count = f"{len(rules)} rule{'' if len(rules) == 1 else 's'}"
        text = f"{count} not applied, {reason}: {', '.join(names)}"
        lines += textwrap.wrap(
            text, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    lines.append("")
    lines.append(f"  {'number':46} {'value':>10}              healthy")
    for headline, value, error in verdict.headlines:
        number = f"{'-':>10}" if math.isnan(value) else f"{value:10.4g}"
        spread = f" ± {error:<8.2g}" if error > 0 else " " * 11
        lines.append(f"  {headline.title:46} {number}{spread}   {headline.healthy}")
    return "\n".join(lines)
