"""Whether a bank forecasts: the rule on synthetic banks of a known truth."""

from dataclasses import replace

import pytest

from diagnostics.errors import InvalidInput
from opd.analysis.scout.bank import PREDICTORS
from opd.analysis.scout.forecast import LEVEL
from opd.analysis.scout.validation import (
    FORECAST,
    validate,
)
from opd.analysis.scout.verdict import collapse_doubts, gain_doubts, judge
from tests.helpers.records.scout_banks import EFFECTS, synthetic_bank


def test_a_linear_truth_is_forecast_with_nominal_coverage() -> None:
    bank = synthetic_bank(0, effects=EFFECTS, families=6, pairs=6, methods=4)
    verdict = judge(bank, resamples=100)
    assert verdict.gain_doubts == verdict.collapse_doubts == ()
    validation = verdict.validation
    assert validation is not None
    assert validation.spearman[FORECAST][0] > 0.7
    assert validation.auroc[FORECAST][0] > 0.8
    value, low, high = validation.coverage
    assert low <= LEVEL <= high
    assert value > 0.8
    counts = (validation.num_runs, validation.num_pairs, validation.num_families)
    assert counts == (144, 36, 6)


def test_noise_is_not_forecast() -> None:
    """Whatever the seed: a false alarm has a probability of a few percent."""
    verdicts = [
        judge(synthetic_bank(s, effects={}, families=4, pairs=4, methods=3), s, resamples=60)
        for s in range(8)
    ]
    assert sum(not verdict.gain_doubts for verdict in verdicts) <= 1
    assert not any(verdict.chooses_method for verdict in verdicts if verdict.gain_doubts)
    assert all("not clear of 0" in " ".join(v.gain_doubts) for v in verdicts if v.gain_doubts)


def test_a_collapse_that_may_be_by_chance_is_not_forecast() -> None:
    bank = synthetic_bank(0, effects={}, families=4, pairs=5, methods=2, pair_noise=0.12)
    verdict = judge(bank, resamples=60)
    assert verdict.validation is not None
    value, low, _ = verdict.validation.auroc[FORECAST]
    assert low < 0.5 < value, "the test needs an area above 1/2 by chance"
    assert verdict.validation.num_collapsed_pairs == len(set(bank.pair[bank.collapsed])) > 5
    assert verdict.validation.num_collapsed_pairs < bank.collapsed.sum()
    assert "not clear of 0.5" in verdict.collapse_doubts[0]
    assert verdict.validation.unit == "family", "a bank is judged by families that were left out"


def test_a_lead_over_single_predictors_and_averages_is_needed() -> None:
    bank = synthetic_bank(0, effects=EFFECTS, families=4, pairs=4, methods=2)
    clear = replace(
        validate(bank, "family", resamples=20),
        spearman={FORECAST: (0.6, 0.4, 0.8), **dict.fromkeys(PREDICTORS, (0.5, 0.2, 0.8))},
        spearman_lead=(0.1, -0.1, 0.2),
        error=(0.05, 0.04, 0.06),
        error_lead=(0.01, -0.01, 0.02),
    )
    assert gain_doubts(clear) == ()
    (doubt,) = gain_doubts(replace(clear, spearman_lead=(0.0, -0.1, 0.1)))
    assert "alone orders runs as well: 0.50 against 0.60" in doubt
    (doubt,) = gain_doubts(replace(clear, error_lead=(-0.01, -0.02, 0.01)))
    assert "mean error is 0.050, and that of each method's average gain 0.040" in doubt
    clear = replace(
        clear,
        num_collapsed_pairs=8,
        auroc={FORECAST: (0.8, 0.7, 0.9), **dict.fromkeys(PREDICTORS, (0.7, 0.6, 0.8))},
        auroc_lead=(0.1, -0.1, 0.2),
    )
    assert collapse_doubts(clear) == ()
    (doubt,) = collapse_doubts(replace(clear, auroc_lead=(-0.05, -0.1, 0.1)))
    assert "alone tells collapses as well: 0.70 against 0.80" in doubt


def test_a_small_bank_does_not_forecast_and_says_how_many_are_needed() -> None:
    small = synthetic_bank(5, effects=EFFECTS, families=2, pairs=3, methods=2)
    verdict = judge(small)
    assert verdict.validation is None
    assert verdict.gain_doubts == (
        "the bank has 6 pairs; 8 are needed",
        "the bank has 2 families; 3 are needed",
    )
    assert verdict.collapse_doubts == verdict.gain_doubts
    assert not verdict.chooses_method
    with pytest.raises(InvalidInput, match="2 different values of family"):
        validate(small, "family")
    calm = synthetic_bank(6, effects={}, families=3, pairs=3, methods=2)
    assert judge(calm, resamples=20).collapse_doubts == (
        "the bank has 0 pairs with a collapse and 9 without; 5 of each are needed",
    )
