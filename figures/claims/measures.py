"""How a claim of the paper is measured from the recorded tables, and how its verdict is decided."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.errors import InvalidInput
from figures.collect.paired import (
    accuracy_interval,
    last_evaluations,
    outcome_matrix,
    paired_interval,
)
from figures.collect.regimes import gains
from figures.collect.steps import seed_means
from figures.registry import read_table

AGREES, DIFFERS, UNDECIDED, NOT_TESTABLE = "agrees", "differs", "undecided", "not testable here"
MARGIN = 0.05
"""Accuracies that differ by less count as equal."""


@dataclass(frozen=True)
class ClaimResult:
    """The measurement of a claim and its verdict."""

    measurement: str
    """The measured values, in words."""
    verdict: str
    """AGREES, DIFFERS, UNDECIDED or NOT_TESTABLE."""


class Tables:
    """The recorded tables of a folder, each read once."""

    def __init__(self, folder: Path) -> None:
        """Create an empty cache of the tables in `folder`."""
        self.folder, self._read = folder, dict[str, pd.DataFrame]()
        self._gains = dict[tuple[str, str], pd.DataFrame]()

    def __getitem__(self, name: str) -> pd.DataFrame:
        """Return the table NAME.csv."""
        if name not in self._read:
            path = self.folder / f"{name}.csv"
            self._read[name] = read_table(path)
        return self._read[name]

    def row(self, name: str, **filters: Any) -> tuple[float, float, float]:
        """Return value, low and high of the only row of a study's table with the given values.

        Args:
            name: Name of the table.
            **filters: Values of columns.

        Returns:
            (value, low, high).

        Raises:
            InvalidInput: Not exactly one row matches.
        """
        table = self[name]
        for column, value in filters.items():
            table = table[table[column] == value]
        if len(table) != 1:
            raise InvalidInput(f"{name}: {filters} selects {len(table)} rows, expected 1")
        return tuple(float(table[c].iloc[0]) for c in ("value", "low", "high"))  # type: ignore[return-value]

    def gains(self, regime: str, method: str) -> pd.DataFrame:
        """Return `figures.collect.regimes.gains` of the map's table, which many claims read."""
        if (regime, method) not in self._gains:
            self._gains[regime, method] = gains(self["regimes"], regime, method)
        return self._gains[regime, method]

    def final(self, group: str, task: str = "") -> pd.DataFrame:
        """Return the last evaluation of every run of a group and task."""
        table = self["paper_evaluations"].fillna({"task": ""})
        return last_evaluations(table[(table["group"] == group) & (table["task"] == task)])


Measure = Callable[[Tables], ClaimResult]
Verdict = Callable[[float, float], str]
"""Decides a verdict from the ends of an interval."""


def verdict_positive(low: float, high: float) -> str:
    """Return the verdict on a difference that is claimed to be positive, from its interval."""
    return AGREES if low > 0 else DIFFERS if high < 0 else UNDECIDED


def verdict_equal(low: float, high: float) -> str:
    """Return the verdict on a difference that is claimed to be within MARGIN, from its interval."""
    inside_margin, outside_margin = low > -MARGIN and high < MARGIN, low > MARGIN or high < -MARGIN
    return AGREES if inside_margin else DIFFERS if outside_margin else UNDECIDED


def format_interval(value: float, low: float, high: float) -> str:
    """Format a value and its interval with three significant digits."""
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def format_signed(value: float, low: float, high: float) -> str:
    """Format a signed value and its interval with three decimals."""
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def format_share(value: float, low: float, high: float) -> str:
    """Format a share and its interval with three decimals."""
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def compare_outcomes(
    outcomes: pd.DataFrame, baseline_outcomes: pd.DataFrame, verdict: Verdict
) -> ClaimResult:
    """Compare the accuracies of two methods.

    Args:
        outcomes: (seeds, problems) outcomes of the method that is claimed to be better.
        baseline_outcomes: The same of the other method.
        verdict: Decides from the interval of the paired difference.

    Returns:
        Both accuracies, their paired difference, and the verdict.
    """
    cells = [
        format_share(*accuracy_interval(x.to_numpy(float))) for x in (outcomes, baseline_outcomes)
    ]
    gain = paired_interval(outcomes, baseline_outcomes)
    ends = (gain["low"], gain["high"])
    text = f"{cells[0]} against {cells[1]}: {format_signed(gain['value'], *ends)}, "
    return ClaimResult(text + f"{gain['seeds']:.0f} seeds", verdict(*ends))


def higher_accuracy(
    method: str,
    baseline: str,
    group: str = "single",
    task: str = "",
    verdict: Verdict = verdict_positive,
) -> Measure:
    """Measure the claim that one method ends with a higher held-out accuracy than another."""

    def measure(tables: Tables) -> ClaimResult:
        """Compare the last evaluations of both methods."""
        final = tables.final(group, task)
        return compare_outcomes(
            outcome_matrix(final, method), outcome_matrix(final, baseline), verdict
        )

    return measure


def equal_accuracy(method: str, baseline: str, group: str = "single", task: str = "") -> Measure:
    """Measure the claim that two methods end within MARGIN of each other."""
    return higher_accuracy(method, baseline, group, task, verdict_equal)


def accuracy_change(method: str, improves: bool, group: str = "single", task: str = "") -> Measure:
    """Measure the claim that a student is better, or worse, after training than before."""

    def measure(tables: Tables) -> ClaimResult:
        """Compare the last evaluation with that at step 0."""
        table = tables["paper_evaluations"].fillna({"task": ""})
        evaluations = table[(table["group"] == group) & (table["task"] == task)]
        initial_outcomes = outcome_matrix(evaluations[evaluations["step"] == 0], method)
        outcome_pair = (outcome_matrix(last_evaluations(evaluations), method), initial_outcomes)
        return compare_outcomes(
            *(outcome_pair if improves else outcome_pair[::-1]), verdict_positive
        )

    return measure


def more_games_won(
    method: str, baseline: str = "", group: str = "games", task: str = "rooms"
) -> Measure:
    """Measure the claim that an agent wins more held-out games than another, or than at step 0."""

    def measure(tables: Tables) -> ClaimResult:
        """Compare with `baseline`, or with step 0 if there is none."""
        table = tables["agents"]
        evaluations = table[(table["where"] == "held out") & (table["group"] == group)]
        evaluations = evaluations[evaluations["task"] == task]
        first, final = evaluations[evaluations["step"] == 0], last_evaluations(evaluations)
        baseline_outcomes = (
            outcome_matrix(final, baseline) if baseline else outcome_matrix(first, method)
        )
        return compare_outcomes(outcome_matrix(final, method), baseline_outcomes, verdict_positive)

    return measure


def smaller_mean(
    column: str,
    method: str,
    baseline: str,
    group: str = "single",
    task: str = "",
    verdict: Verdict = verdict_positive,
    steps: int | None = 10,
    direction: int = 1,
) -> Measure:
    """Measure the claim that the mean of a column is smaller for one method than for another.

    Args:
        column: Column of the table of steps.
        method: Method with the smaller mean.
        baseline: Method it is compared with.
        group: Group of both.
        task: Task of both; empty in a group with one task.
        verdict: Decides from the interval of the difference.
        steps: Number of last steps that are averaged; None for all.
        direction: 1 for smaller, -1 for larger.

    Returns:
        The measurement as a function of the tables.
    """

    def measure(tables: Tables) -> ClaimResult:
        """Compare the means by seed."""
        table = tables["paper_steps"].fillna({"task": ""}).dropna(subset=[column])
        table = table[(table["group"] == group) & (table["task"] == task)]
        means = []
        for name in (method, baseline):
            method_rows = table[table["method"] == name]
            last_rows = method_rows[
                method_rows["step"] > method_rows["step"].max() - (steps or len(method_rows))
            ]
            means.append(last_rows.groupby("seed")[column].mean())
        return compare_means(means[0], means[1], verdict, direction)

    return measure


def larger_mean(
    column: str, method: str, baseline: str, group: str = "single", task: str = ""
) -> Measure:
    """Measure the claim that the mean of a column over all steps is larger for one method."""
    return smaller_mean(column, method, baseline, group, task, steps=None, direction=-1)


def compare_means(
    method_means: pd.Series, baseline_means: pd.Series, verdict: Verdict, direction: int = 1
) -> ClaimResult:
    """Compare means by seed.

    Args:
        method_means: Mean by seed of one method.
        baseline_means: The same of the other method.
        verdict: Decides from the interval of the difference.
        direction: 1 if the first is claimed to be smaller, -1 if larger.

    Returns:
        Both means, the difference over the seeds that both have, and the verdict.
    """
    differences = direction * (baseline_means - method_means).dropna()
    table = pd.DataFrame(
        {"step": 0, "seed": differences.index, "difference": differences.to_numpy()}
    )
    interval = seed_means(table, "difference").iloc[0]
    text = (
        f"{method_means.mean():.3g} against {baseline_means.mean():.3g}: "
        f"{'smaller' if direction > 0 else 'larger'} by "
        f"{format_interval(interval['value'], interval['low'], interval['high'])}, "
        f"{interval['seeds']:.0f} seeds"
    )
    return ClaimResult(text, verdict(interval["low"], interval["high"]))


def study_value(name: str, text: str, verdict: Callable[..., str], **filters: Any) -> Measure:
    """Measure a claim about one row of a table of the exact study.

    Args:
        name: Name of the table.
        text: Description with a place for the formatted value.
        verdict: Decides from value, low and high.
        **filters: Values of the columns that select the row.

    Returns:
        The measurement as a function of the tables.
    """

    def measure(tables: Tables) -> ClaimResult:
        """Read the row."""
        interval = tables.row(name, **filters)
        return ClaimResult(text.format(format_interval(*interval)), verdict(*interval))

    return measure


def token_share(kind: str, text: str, verdict: Callable[..., str]) -> Measure:
    """Measure a claim about one of the shares of tokens in the table `scatter`."""

    def measure(tables: Tables) -> ClaimResult:
        """Read the share."""
        interval = tables["scatter"].set_index("kind").loc[kind, ["share", "low", "high"]]
        return ClaimResult(
            text.format(format_interval(*map(float, interval))), verdict(*map(float, interval))
        )

    return measure


def not_testable(reason: str) -> Measure:
    """Record that a claim cannot be tested with these models and data, and why."""
    return lambda _: ClaimResult(reason, NOT_TESTABLE)


def toy_value(quantity: str, text: str, verdict: Callable[..., str], gamma: float = 1.0) -> Measure:
    """Measure a claim about the left task of the toy problem; the right one is its mirror image."""
    filters = {"variant": "default", "quantity": quantity, "gamma": gamma, "task": "left"}
    return study_value("toy", text, verdict, **filters)
