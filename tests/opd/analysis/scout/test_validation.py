"""The test of forecasts on banks with a known truth, on noise, and on features that leak a pair."""

import math
from dataclasses import replace

import numpy as np
import pytest

from diagnostics.errors import InvalidInput
from diagnostics.stats import bootstrap_interval
from opd.analysis.scout.bank import FEATURES, PREDICTORS
from opd.analysis.scout.forecast import fit_gain, forecast_gain
from opd.analysis.scout.scores import auroc, spearman_within
from opd.analysis.scout.validation import (
    FORECAST,
    LeftOutForecasts,
    all_scores,
    best_signs,
    is_testable,
    leave_out,
    pair_regrets,
    validate,
)
from tests.helpers.records.scout_banks import EFFECTS, synthetic_bank


def test_features_that_identify_a_pair_do_not_help_when_it_is_left_out() -> None:
    """The runs of a pair share most of their gain; a code of the pair would give it away."""
    bank = synthetic_bank(
        1, effects={}, families=4, pairs=5, methods=4, pair_noise=0.1, features="codes"
    )
    peers = (bank.features[:, None, 0] == bank.features[None, :, 0]) & ~np.eye(
        len(bank), dtype=bool
    )
    nearest = peers @ bank.gain / peers.sum(1)
    once = np.ones((1, len(bank)))
    assert spearman_within(nearest, bank.gain, bank.method, once)[0] > 0.8, (
        "the code gives the pair away"
    )
    for unit in ("pair", "family"):
        value, low, _ = validate(bank, unit, resamples=100).spearman[FORECAST]
        assert low <= 0, (unit, value)


@pytest.mark.parametrize("unit", ["pair", "family"])
def test_outcomes_that_are_left_out_do_not_change_their_forecasts(unit: str) -> None:
    effects = {name: effect / 4 for name, effect in EFFECTS.items()}
    bank = synthetic_bank(2, effects=effects, families=4, pairs=4, methods=2)
    forecasts = leave_out(bank, unit)
    label = getattr(bank, unit)[5]
    rows = getattr(bank, unit) == label
    changed_bank = replace(
        bank,
        gain=np.where(rows, -bank.gain, bank.gain),
        collapsed=np.where(rows, ~bank.collapsed, bank.collapsed),
    )
    changed_forecasts = leave_out(changed_bank, unit)
    for name, column in vars(forecasts).items():
        assert np.array_equal(column[rows], getattr(changed_forecasts, name)[rows]), name
        assert not np.array_equal(column[~rows], getattr(changed_forecasts, name)[~rows]), name
    model = fit_gain(bank.rows(~rows), getattr(bank, unit)[~rows])
    expected = forecast_gain(model, bank.features[rows], bank.method[rows], bank.start[rows])
    columns = (forecasts.gain, forecasts.gain_low, forecasts.gain_high)
    for column, values in zip(columns, expected, strict=True):
        assert column[rows] == pytest.approx(values)
    for row in np.flatnonzero(rows):
        peers = ~rows & (bank.method == bank.method[row])
        assert forecasts.method_average[row] == pytest.approx(bank.gain[peers].mean())


@pytest.mark.parametrize("unit", ["pair", "family"])
def test_pairs_that_may_share_models_are_left_out_together(unit: str) -> None:
    effects = {name: effect / 4 for name, effect in EFFECTS.items()}
    bank = synthetic_bank(2, effects=effects, families=4, pairs=4, methods=2, shared_seeds=True)
    forecasts = leave_out(bank, unit)
    for row in (0, 13, 30):
        known = bank.seed != bank.seed[row]
        if unit == "family":
            known &= bank.family != bank.family[row]
        groups = bank.seed if unit == "pair" else bank.family
        model = fit_gain(bank.rows(known), groups[known])
        expected = forecast_gain(model, bank.features[[row]], bank.method[[row]], bank.start[[row]])
        columns = (forecasts.gain, forecasts.gain_low, forecasts.gain_high)
        assert [column[row] for column in columns] == pytest.approx([x[0] for x in expected])
        peers = known & (bank.method == bank.method[row])
        assert forecasts.method_average[row] == pytest.approx(bank.gain[peers].mean())


def test_runs_with_too_few_others_are_not_part_of_the_test() -> None:
    """Of family-0 with seed 0 there are three pairs of other families and seeds, of others five."""
    bank = synthetic_bank(2, effects=EFFECTS, families=4, pairs=4, methods=2, shared_seeds=True)
    is_first = bank.family == "family-0"
    thin = bank.rows(is_first | np.isin(bank.seed, ["0", "1"]))
    tested = ~((thin.family == "family-0") & np.isin(thin.seed, ["0", "1"]))
    assert np.array_equal(is_testable(thin, "family"), tested)
    validation = validate(thin, "family", resamples=20)
    assert (validation.num_runs, validation.num_pairs) == (16, 8)
    forecasts = leave_out(thin, "family")
    assert np.array_equal(np.isfinite(forecasts.gain), tested)
    error = np.abs(forecasts.gain - thin.gain)[tested].mean()
    assert validation.error[0] == pytest.approx(error)
    single = bank.rows(is_first | (bank.seed == "0"))
    with pytest.raises(InvalidInput, match="fewer than 5 pairs remain, for every run"):
        validate(single, "family")


def test_scores_beside_single_predictors_with_their_best_sign() -> None:
    bank = synthetic_bank(3, effects=EFFECTS, families=3, pairs=4, methods=3, pair_noise=0.1)
    forecasts, signs = leave_out(bank, "pair"), best_signs(bank)
    once = np.ones((1, len(bank)))
    all_columns = all_scores(bank, forecasts, signs, np.ones((1, 12)))
    scores = {name: float(column[0]) for name, column in all_columns.items()}
    for name, feature in PREDICTORS.items():
        column = bank.features[:, list(FEATURES).index(feature)]
        rho = spearman_within(column, bank.gain, bank.method, once)[0]
        area = auroc(column, bank.collapsed, once)[0]
        assert scores[f"spearman {name}"] == pytest.approx(abs(rho))
        assert scores[f"auroc {name}"] == pytest.approx(max(area, 1 - area))
    rho = spearman_within(forecasts.feature_effect, bank.gain, bank.method, once)[0]
    assert scores["spearman forecast"] == pytest.approx(rho)
    best = max(scores[f"spearman {name}"] for name in PREDICTORS)
    assert scores["spearman lead"] == pytest.approx(rho - best)
    best = max(scores[f"auroc {name}"] for name in PREDICTORS)
    area = auroc(forecasts.collapse, bank.collapsed, once)[0]
    assert scores["auroc lead"] == pytest.approx(area - best)
    errors = [np.abs(x - bank.gain).mean() for x in (forecasts.gain, forecasts.method_average)]
    assert scores["error"] == pytest.approx(errors[0])
    assert scores["error lead"] == pytest.approx(errors[1] - errors[0])
    is_covered = [
        low <= gain <= high
        for low, gain, high in zip(forecasts.gain_low, bank.gain, forecasts.gain_high, strict=True)
    ]
    assert scores["coverage"] == pytest.approx(np.mean(is_covered))
    above = replace(forecasts, gain_low=bank.gain + 0.1, gain_high=bank.gain + 0.2)
    assert all_scores(bank, above, signs, np.ones((1, 12)))["coverage"].tolist() == [0.0]


def test_regret_is_the_gain_that_the_choice_of_a_method_loses() -> None:
    pair = np.array(["a", "a", "a", "b", "b", "c"])
    method = np.array(["x", "x", "y", "x", "y", "x"])
    gain = np.array([0.1, 0.3, 0.5, 0.4, 0.2, 9.0])
    forecast = np.array([0.6, 0.4, 0.3, 0.2, 0.1, 0.0])
    regrets = pair_regrets(forecast, gain, method, pair)
    assert regrets.tolist() == pytest.approx([0.5 - 0.2, 0.0, math.nan], nan_ok=True)
    regrets = pair_regrets(-forecast, gain, method, pair)
    assert regrets.tolist() == pytest.approx([0.0, 0.4 - 0.2, math.nan], nan_ok=True)


def test_scores_of_a_resample_are_those_of_a_bank_of_copies() -> None:
    bank = synthetic_bank(3, effects=EFFECTS, families=3, pairs=4, methods=3, pair_noise=0.1)
    bank = bank.rows(np.delete(np.arange(len(bank)), [0, 1, 7]))  # of one pair, one method is left
    forecasts, signs = leave_out(bank, "pair"), best_signs(bank)
    copies = np.random.default_rng(0).integers(0, 4, (3, 12))
    resampled = all_scores(bank, forecasts, signs, copies)
    names = np.unique(bank.pair)
    for i, row in enumerate(copies):
        drawn = [(name, k) for name, count in zip(names, row, strict=True) for k in range(count)]
        rows = np.concatenate([np.flatnonzero(bank.pair == name) for name, _ in drawn])
        pair = [f"{name} {k}" for name, k in drawn for _ in range((bank.pair == name).sum())]
        copied_bank = replace(bank.rows(rows), pair=np.array(pair))
        columns = {name: column[rows] for name, column in vars(forecasts).items()}
        once = np.ones((1, len(drawn)))
        expected = all_scores(copied_bank, LeftOutForecasts(**columns), signs, once)
        for name, column in expected.items():
            assert resampled[name][i] == pytest.approx(column[0]), name


def test_intervals_are_those_of_the_bootstrap_over_pairs() -> None:
    bank = synthetic_bank(4, effects=EFFECTS, families=3, pairs=3, methods=2)
    bank = bank.rows(np.delete(np.arange(len(bank)), [0, 3]))
    forecasts = leave_out(bank, "pair")
    errors, pairs = np.abs(forecasts.gain - bank.gain), np.unique(bank.pair)

    def error(drawn_pairs: np.ndarray) -> np.ndarray:
        rows = np.concatenate([np.flatnonzero(bank.pair == pairs[int(i)]) for i in drawn_pairs])
        return errors[rows].mean()

    generator = np.random.default_rng(5)
    expected = bootstrap_interval(np.arange(9), error, generator, resamples=60)
    validation = validate(bank, "pair", seed=5, resamples=60)
    assert validation.width == pytest.approx((forecasts.gain_high - forecasts.gain_low).mean())
    assert validation.error == pytest.approx((errors.mean(), *expected))


def test_resamples_without_a_collapse_are_by_chance_and_have_no_lead() -> None:
    bank = synthetic_bank(4, effects=EFFECTS, families=3, pairs=3, methods=2)
    only_pair = replace(bank, collapsed=bank.pair == "pair-1-1")
    validation = validate(only_pair, "pair", resamples=300)
    assert min(validation.auroc[FORECAST][1:]) <= 0.5 <= max(validation.auroc[FORECAST][1:])
    lead, low, high = validation.auroc_lead
    assert lead < 0, "the test needs a forecast without a lead"
    assert (low < 0, high) == (True, 0.0)


def test_a_pair_is_resampled_with_all_of_its_runs() -> None:
    """Copies of every run change no interval: pairs are the sampling unit, and not runs."""
    bank = synthetic_bank(4, effects=EFFECTS, families=3, pairs=3, methods=2)
    twice = bank.rows(np.repeat(np.arange(len(bank)), 2))
    intervals = []
    for runs in (bank, twice):
        low, high = validate(runs, "pair", resamples=80).error_lead[1:]
        intervals.append(high - low)
    assert intervals[1] == pytest.approx(intervals[0], rel=0.3)
