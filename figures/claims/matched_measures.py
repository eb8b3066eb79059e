"""Measurements on tables of matched runs: what a teacher reads, controls, a pretrained model."""

from collections.abc import Callable

import pandas as pd

from figures.claims.measures import (
    AGREES,
    DIFFERS,
    UNDECIDED,
    ClaimResult,
    Measure,
    Tables,
    Verdict,
    compare_outcomes,
    verdict_equal,
    verdict_positive,
)
from figures.collect.matched import (
    collapsed_seeds,
    common_budget,
    learning_curves,
    step_within,
)
from figures.collect.paired import last_evaluations, outcome_matrix


def view_accuracy(method: str, baseline: str = "", verdict: Verdict = verdict_positive) -> Measure:
    """Measure a claim about the last accuracy under a view.

    Args:
        method: Method of the group "views".
        baseline: Method that it is compared with; "" for the students before training.
        verdict: Decides from the interval of the difference.

    Returns:
        The measurement as a function of the tables.
    """

    def measure(tables: Tables) -> ClaimResult:
        """Compare the last evaluations, or the last with the first."""
        table = tables["views"]
        final = last_evaluations(table)
        first = table[table["step"] == 0]
        reference = outcome_matrix(final, baseline) if baseline else outcome_matrix(first, method)
        return compare_outcomes(outcome_matrix(final, method), reference, verdict)

    return measure


def equal_view_accuracy(method: str, baseline: str) -> Measure:
    """Measure the claim that two views lead to accuracies that are as good as equal."""
    return view_accuracy(method, baseline, verdict_equal)


def collapse_of(*methods: str, horizon: int = 0) -> Measure:
    """Measure the claim that runs of these methods collapse (`figures.collect.matched`).

    Args:
        *methods: Methods of the group "views".
        horizon: Steps after which the claim expects it; shorter runs do not refute it.

    Returns:
        The measurement as a function of the tables.
    """

    def measure(tables: Tables) -> ClaimResult:
        """Count the runs that collapse."""
        table = tables["views"]
        counts = [
            (len(collapsed_seeds(table, name)), table[table["method"] == name]["seed"].nunique())
            for name in methods
        ]
        parts = [
            f"{name.replace('_', ', ')}: {count} of {total} runs"
            for name, (count, total) in zip(methods, counts, strict=True)
        ]
        num_steps = int(table["step"].max())
        text = f"collapsed within {num_steps} steps of two updates: {'; '.join(parts)}"
        refuted = DIFFERS if num_steps >= horizon else UNDECIDED
        return ClaimResult(text, AGREES if any(count for count, _ in counts) else refuted)

    return measure


def control_accuracy(method: str, baseline: str, cost: str, share: float = 1.0) -> Measure:
    """Measure the claim that one control is better than another at equal cost.

    Args:
        method: Method that is claimed to be better.
        baseline: Method that it is compared with.
        cost: "tokens" or "seconds", of which both have the common budget of the figure.
        share: Share of that budget.

    Returns:
        The measurement as a function of the tables.
    """

    def measure(tables: Tables) -> ClaimResult:
        """Compare the last evaluations within the budget."""
        outcomes = outcomes_within_budget(tables["controls"], cost, share)
        return compare_outcomes(outcomes(method), outcomes(baseline), verdict_positive)

    return measure


def pretrained_accuracy(method: str, baseline: str = "") -> Measure:
    """Measure a claim about the last accuracy of the pretrained model.

    Args:
        method: Method of the group "pretrained".
        baseline: Method that it is compared with; "" for the student before training.

    Returns:
        The measurement as a function of the tables.
    """

    def measure(tables: Tables) -> ClaimResult:
        """Compare the last evaluations, or the last with the first."""
        table = tables["pretrained"]
        evaluations = table[table["where"] == "held out"]
        final, first = last_evaluations(evaluations), evaluations[evaluations["step"] == 0]
        reference = outcome_matrix(final, baseline) if baseline else outcome_matrix(first, method)
        return compare_outcomes(outcome_matrix(final, method), reference, verdict_positive)

    return measure


def outcomes_within_budget(
    evaluations: pd.DataFrame, cost: str, share: float
) -> Callable[[str], pd.DataFrame]:
    """Return the function from a method to its outcomes within a share of the common budget."""
    curves = learning_curves(evaluations, evaluations["method"].unique())
    budget = share * common_budget(curves, cost)

    def outcomes(method: str) -> pd.DataFrame:
        """Return the (seeds, problems) outcomes of the last evaluation within the budget."""
        step = step_within(curves[method], cost, budget)
        return outcome_matrix(evaluations[evaluations["step"] == step], method)

    return outcomes
