"""Measurements of claims about methods across the regimes of the map (`opd map`)."""

import pandas as pd

from diagnostics.stats import gain_interval
from figures.claims.measures import (
    AGREES,
    DIFFERS,
    UNDECIDED,
    ClaimResult,
    Measure,
    Tables,
    Verdict,
    format_signed,
    verdict_equal,
    verdict_positive,
)
from figures.collect.regimes import MIN_PAIRS, paired_gains


def higher_gain(
    method: str, baseline: str = "", verdict: Verdict = verdict_positive, direction: int = 1
) -> Measure:
    """Measure the claim that a method gains more than another, regime by regime.

    A regime counts with an interval that holds together with those of all other regimes
    (Bonferroni), so that a claim does not agree because there are many of them.

    Args:
        method: The method.
        baseline: The method that it is compared with; "" for the student before training.
        verdict: Decides from the interval of the difference.
        direction: -1 if the method is claimed to gain less.

    Returns:
        The measurement as a function of the tables.
    """

    def measure(tables: Tables) -> ClaimResult:
        """Compare the gains in every regime that has runs of both."""
        table = tables["regimes"]
        differences = {
            regime: direction * of_regime
            for regime in regimes_by_share(table)
            for of_regime in (
                paired_gains(tables.gains(regime, method), tables.gains(regime, baseline))
                if baseline
                else tables.gains(regime, method),
            )
            if len(of_regime) >= MIN_PAIRS
        }
        return summarize_verdicts(differences, verdict, nearest_to_paper(table))

    return measure


def equal_gain(method: str, baseline: str) -> Measure:
    """Measure the claim that two methods gain the same, within MARGIN, regime by regime."""
    return higher_gain(method, baseline, verdict_equal)


def regimes_by_share(table: pd.DataFrame) -> list[str]:
    """Return the regimes in increasing order of their share of foreign tokens."""
    shares = table.groupby("group", sort=False)["foreign_share"].mean()
    return [str(regime) for regime in shares.sort_values(kind="stable").index]


def nearest_to_paper(table: pd.DataFrame) -> str:
    """Return the regime of the family density with the fewest foreign tokens that has any."""
    rows = table[(table["family"] == "density") & (table["foreign_share"] > 0)]
    return next(iter(regimes_by_share(rows)), "")


def summarize_verdicts(
    differences: dict[str, pd.DataFrame], verdict: Verdict, nearest: str
) -> ClaimResult:
    """Decide a claim in every regime.

    Args:
        differences: Regime to its (pairs, problems) differences.
        verdict: Decides from an interval.
        nearest: The regime whose interval is written.

    Returns:
        Where the claim agrees, differs and is open, each with the difference. It agrees if some
        regime agrees, and differs if none does and some regime differs.
    """
    regimes: dict[str, list[str]] = {AGREES: [], DIFFERS: [], UNDECIDED: []}
    detail = ""
    for regime, of_regime in differences.items():
        values = of_regime.to_numpy(float)
        mean, ends = float(values.mean()), gain_interval(values, comparisons=len(differences))
        regimes[verdict(*ends)].append(f"{regime} {mean:+.2f}")
        if regime == nearest:
            detail = f"; {regime}, nearest to the paper: {format_signed(mean, *ends)}"
    parts = [f"{name} in {', '.join(names)}" for name, names in regimes.items() if names]
    outcome = AGREES if regimes[AGREES] else DIFFERS if regimes[DIFFERS] else UNDECIDED
    text = "; ".join(parts) or f"no regime has {MIN_PAIRS} pairs of models with both methods"
    return ClaimResult(text + detail, outcome)
