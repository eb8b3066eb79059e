"""Whether a bank forecasts gains and collapses, by its test with families left out."""

from dataclasses import dataclass

import numpy as np

from opd.analysis.scout.bank import PREDICTORS, Bank
from opd.analysis.scout.validation import (
    FORECAST,
    MIN_FAMILIES,
    MIN_REMAINING,
    RESAMPLES,
    Validation,
    is_testable,
    validate,
)

MIN_PAIRS, MIN_COLLAPSED = 8, 5
"""Fewest pairs of a bank that forecasts; fewest pairs with a collapse, and without."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """Whether a bank forecasts, by its test with families left out."""

    validation: Validation | None
    """The test; None for a bank that is too small for it."""
    gain_doubts: tuple[str, ...]
    """Why gains are not forecast; empty if they are."""
    collapse_doubts: tuple[str, ...]
    """Why collapses are not forecast; empty if they are."""

    @property
    def chooses_method(self) -> bool:
        """Whether the forecast chooses methods better than their average gains do."""
        if self.validation is None or self.gain_doubts:
            return False
        return self.validation.regret[0] < self.validation.average_regret[0]


def judge(bank: Bank, seed: int = 0, resamples: int = RESAMPLES) -> Verdict:
    """Decide whether a bank forecasts.

    Gains are forecast if, with each family left out, the rank correlation of forecast and gain
    within methods has a 95 % interval above 0 and exceeds that of every single predictor, and the
    forecast's mean error is below that of each method's average gain. Collapses are forecast if the
    area under the ROC curve has a 95 % interval above 1/2 and exceeds that of every single
    predictor, and MIN_COLLAPSED pairs or more have a run that collapsed and as many have none. Both
    need MIN_PAIRS pairs of MIN_FAMILIES seeds in MIN_FAMILIES families, of which each has
    MIN_REMAINING others of another family and seed.

    Args:
        bank: The runs.
        seed: Seed of the bootstrap.
        resamples: Bootstrap samples.

    Returns:
        The verdict.
    """
    counts = (
        (len(np.unique(bank.pair)), MIN_PAIRS, "pairs"),
        (len(np.unique(bank.family)), MIN_FAMILIES, "families"),
        (len(np.unique(bank.seed)), MIN_FAMILIES, "seeds"),
    )
    too_small = tuple(
        f"the bank has {count} {noun}; {fewest} are needed"
        for count, fewest, noun in counts
        if count < fewest
    )
    if not too_small:
        count = len(np.unique(bank.pair[is_testable(bank, "family")]))
        if count < MIN_PAIRS:
            too_small = (
                f"{count} pairs have {MIN_REMAINING} others of another family and seed; "
                f"{MIN_PAIRS} are needed",
            )
    if too_small:
        return Verdict(None, too_small, too_small)
    validation = validate(bank, "family", seed, resamples)
    return Verdict(validation, gain_doubts(validation), collapse_doubts(validation))


def gain_doubts(validation: Validation) -> tuple[str, ...]:
    """Return why gains are not forecast, by the rule of `judge`."""
    doubts = []
    value, low, high = validation.spearman[FORECAST]
    if not low > 0:
        doubts.append(
            f"the rank correlation of forecast and gain in families that were left out is "
            f"{value:.2f} [{low:.2f}, {high:.2f}], not clear of 0"
        )
    if not validation.spearman_lead[0] > 0:
        best = max(PREDICTORS, key=lambda name: validation.spearman[name][0])
        doubts.append(
            f"{best} alone orders runs as well: {validation.spearman[best][0]:.2f} against "
            f"{value:.2f}"
        )
    if not validation.error_lead[0] > 0:
        doubts.append(
            f"the forecast's mean error is {validation.error[0]:.3f}, and that of each method's "
            f"average gain {validation.error[0] + validation.error_lead[0]:.3f}"
        )
    return tuple(doubts)


def collapse_doubts(validation: Validation) -> tuple[str, ...]:
    """Return why collapses are not forecast, by the rule of `judge`."""
    num_collapsed = validation.num_collapsed_pairs
    num_stable = validation.num_pairs - num_collapsed
    if min(num_collapsed, num_stable) < MIN_COLLAPSED:
        return (
            f"the bank has {num_collapsed} pairs with a collapse and {num_stable} without; "
            f"{MIN_COLLAPSED} of each are needed",
        )
    doubts = []
    value, low, high = validation.auroc[FORECAST]
    if not low > 0.5:
        doubts.append(
            f"the area under the ROC curve of collapses in families that were left out is "
            f"{value:.2f} [{low:.2f}, {high:.2f}], not clear of 0.5"
        )
    if not validation.auroc_lead[0] > 0:
        best = max(PREDICTORS, key=lambda name: validation.auroc[name][0])
        doubts.append(
            f"{best} alone tells collapses as well: {validation.auroc[best][0]:.2f} against "
            f"{value:.2f}"
        )
    return tuple(doubts)
