"""What is recommended, when nothing is forecast, and how teachers are ranked."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diagnostics.errors import InvalidInput
from opd.analysis.scout import recommend
from opd.analysis.scout.bank import FEATURES, pair_features
from opd.analysis.scout.forecast import fit_collapse, fit_gain, forecast_collapse, forecast_gain
from opd.analysis.scout.measure import PairMeasurements
from opd.analysis.scout.recommend import FittedBank, MethodForecast, fit_bank, report_teacher
from opd.analysis.scout.report import ScoutReport, format_report, read_report, write_report
from opd.analysis.scout.special_tokens import RuleShare
from opd.analysis.scout.validation import validate
from opd.analysis.scout.verdict import Verdict
from tests.helpers.records.scout_banks import START, measurements, synthetic_bank

EFFECTS = {"continuation_gain": 0.5, "log_reverse_kl": -0.1}
OTHERS = {
    "best_gamma": 0.9,
    "responses": 64.0,
    "outside_top1": 0.1,
    "outside_top8": 0.02,
    "outside_top32": 0.001,
}


RULES = (RuleShare("string:<s>", 0.02, 0.4, 6.0), RuleShare("string:<e>", 0.01, 0.02, 3.0))


def measured(values: dict[str, float]) -> PairMeasurements:
    return PairMeasurements(values, RULES)


@pytest.fixture(scope="module")
def bank():
    """A bank whose features are those of measurements, as of a real one."""
    raw = synthetic_bank(0, effects={}, families=4, pairs=5, methods=3)
    features = np.stack([pair_features(measurements(x)) for x in raw.features])
    weights = np.array([EFFECTS.get(name, 0.0) for name in FEATURES])
    return replace(raw, features=features, gain=raw.gain + (features - features.mean(0)) @ weights)


@pytest.fixture(scope="module")
def fitted(bank) -> FittedBank:
    verdict = Verdict(validate(bank, "family", resamples=20), (), ())
    return FittedBank(bank, verdict, fit_gain(bank, bank.family), fit_collapse(bank))


@pytest.fixture(scope="module")
def values() -> dict[str, float]:
    return {**measurements(np.full(len(FEATURES), 0.2)), **OTHERS}


def test_a_pair_is_forecast_for_every_method_best_first(fitted: FittedBank, values) -> None:
    report = report_teacher("teacher", measured(values), fitted)
    assert report.outside == ()
    features = pair_features(values)[None]
    gains = [f.gain[0] for f in report.forecasts if f.gain is not None]
    assert gains == sorted(gains, reverse=True)
    assert len(gains) == 3
    for forecast in report.forecasts:
        method = np.array([forecast.method])
        expected = forecast_gain(fitted.gain, features, method, np.array([START]))
        assert forecast.gain == pytest.approx([float(x[0]) for x in expected])
        collapse = forecast_collapse(fitted.collapse, features, method)
        assert forecast.collapse == pytest.approx([float(x[0]) for x in collapse])
        runs = fitted.bank.method == forecast.method
        assert forecast.average_gain == pytest.approx(fitted.bank.gain[runs].mean())
    higher = report_teacher("b", measured({**values, "continuation_gain": 0.35}), fitted)
    assert higher.forecasts[0].gain[0] > report.forecasts[0].gain[0]  # type: ignore[index]


def test_methods_are_in_the_order_of_this_pair_and_not_of_the_average(bank, values) -> None:
    """The method with the lowest average gain is the one that a high accuracy gap helps."""
    column = bank.features[:, list(FEATURES).index("accuracy_gap")]
    is_first = bank.method == "method-0"
    slope = 2.0 * (column - column.mean())
    crossed = replace(bank, gain=bank.gain + np.where(is_first, slope, 0.0))
    verdict = Verdict(validate(crossed, "family", resamples=20), (), ())
    crossed_fit = FittedBank(
        crossed, verdict, fit_gain(crossed, crossed.family), fit_collapse(crossed)
    )
    high = {**values, "accuracy_gap": float(column.max())}
    report = report_teacher("teacher", measured(high), crossed_fit)
    assert report.outside == ()
    averages = {f.method: f.average_gain for f in report.forecasts}
    assert min(averages, key=averages.__getitem__) == "method-0"
    assert report.forecasts[0].method == "method-0"


def test_a_bank_of_many_families_is_fitted_for_families_that_are_left_out() -> None:
    """Where the choices of covariance differ, and by pairs where there is one family."""
    banks = [
        synthetic_bank(s, effects={"accuracy_gap": 0.03}, families=3, pairs=3, methods=2)
        for s in range(12)
    ]
    both = [(fit_gain(b, b.family), fit_gain(b, b.pair), b) for b in banks]
    by_family, by_pair, chosen = next(
        x for x in both if (x[0].shape, x[0].penalty) != (x[1].shape, x[1].penalty)
    )
    fit = fit_bank(chosen).gain
    assert (fit.shape, fit.penalty) == (by_family.shape, by_family.penalty)
    single = replace(chosen, family=np.full(len(chosen), "one"))
    fit = fit_bank(single).gain
    assert (fit.shape, fit.penalty) == (by_pair.shape, by_pair.penalty)


def test_a_pair_outside_of_the_bank_is_not_forecast(fitted: FittedBank, values) -> None:
    report = report_teacher("teacher", measured({**values, "reverse_kl": 90.0}), fitted)
    low, high = np.sort(fitted.bank.features[:, list(FEATURES).index("log_reverse_kl")])[[0, -1]]
    assert report.outside == (f"log_reverse_kl 4.5 (bank {low:.3g} to {high:.3g})",)
    assert all(f.gain is None and f.collapse is None for f in report.forecasts)
    assert report.method.value == ""
    edge = math.exp(high + 0.9 * recommend.MARGIN * (high - low))
    assert report_teacher("teacher", measured({**values, "reverse_kl": edge}), fitted).outside == ()
    undefined = report_teacher("teacher", measured({**values, "special_gap": math.nan}), fitted)
    assert undefined.outside == ()
    assert undefined.forecasts[0].gain is not None


@pytest.mark.parametrize("what", ["gain", "collapse"])
def test_doubts_withhold_a_forecast_and_say_so(fitted: FittedBank, values, what: str) -> None:
    verdict = replace(fitted.verdict, **{f"{what}_doubts": ("for a reason",)})
    report = report_teacher("teacher", measured(values), replace(fitted, verdict=verdict))
    assert all(getattr(f, what) is None for f in report.forecasts)
    other = {"gain": "collapse", "collapse": "gain"}[what]
    assert all(getattr(f, other) is not None for f in report.forecasts)
    text = format_report(scout_report([report], **{f"{what}_doubts": ("for a reason",)}))
    assert f"{what} is not forecast: for a reason" in text


def test_a_method_is_chosen_by_forecast_only_if_that_chooses_better(fitted: FittedBank) -> None:
    forecasts = (
        MethodForecast("a", 0.1, (0.3, 0.2, 0.4), (0.7, 0.5, 0.9)),
        MethodForecast("b", 0.0, (0.2, 0.1, 0.3), (0.1, 0.0, 0.2)),
        MethodForecast("c", 0.2, (0.1, 0.0, 0.2), (0.1, 0.0, 0.2)),
    )
    validation = fitted.verdict.validation
    assert validation is not None
    regrets = {"regret": (0.01, 0.0, 0.02), "average_regret": (0.02, 0.01, 0.03)}
    better = Verdict(replace(validation, **regrets), (), ())
    worse = Verdict(replace(validation, **(regrets | {"regret": (0.03, 0.0, 0.1)})), (), ())
    assert recommend.choose_method(better, forecasts).value == "b"
    assert recommend.choose_method(worse, forecasts).value == "c"
    doubtful = Verdict(better.validation, ("no",), ())
    assert recommend.choose_method(doubtful, forecasts).value == "c"
    unstable = (*forecasts[:2], replace(forecasts[2], collapse=(0.6, 0.4, 0.8)))
    assert recommend.choose_method(worse, unstable).value == "b"
    collapsing = (forecasts[0], replace(forecasts[1], collapse=(0.5, 0.1, 0.9)))
    choice = recommend.choose_method(better, collapsing)
    assert (choice.value, "every method is forecast to collapse" in choice.reason) == ("", True)
    assert recommend.choose_method(better, ()).value == ""


def test_k_is_the_smallest_list_that_leaves_little_outside(values) -> None:
    assert recommend.choose_support(values).value == "16"
    assert recommend.choose_support({**values, "outside_top8": 0.01}).value == "8"
    depths = dict.fromkeys([f"outside_top{k}" for k in recommend.DEPTHS], 0.3)
    choice = recommend.choose_support({**values, **depths})
    assert (choice.value, "full vocabulary" in choice.reason) == ("32", True)


def test_special_tokens_are_masked_where_they_carry_the_signal(values) -> None:
    assert recommend.choose_mask(RULES).value == "string:<s>"
    assert "6.00" in recommend.choose_mask(RULES).reason
    both = (*RULES, RuleShare("string:<t>", 0.01, 0.03, 1.0))
    assert recommend.choose_mask(both).value == "string:<s> string:<t>"
    assert recommend.choose_mask(RULES[1:]).value == ""
    assert recommend.choose_mask((replace(RULES[0], gap=0.9),)).value == ""
    assert recommend.choose_mask(()).value == ""
    assert recommend.choose_gamma(values).value == "0.9"
    assert recommend.choose_gamma({**values, "best_gamma": math.nan}).value == ""


def test_teachers_are_ranked_by_forecast_or_else_by_what_was_measured(fitted, values) -> None:
    better = {**values, "continuation_gain": 0.3}
    reports = tuple(
        report_teacher(name, measured(x), fitted)
        for name, x in (("weak", values), ("strong", better))
    )
    teachers, ranked_by = recommend.ranking(reports)
    assert [x.teacher for x in teachers] == ["strong", "weak"]
    assert ranked_by == "best forecast gain"
    odd = report_teacher(
        "odd", measured({**values, "reverse_kl": 90.0, "continuation_gain": 0.25}), fitted
    )
    teachers, ranked_by = recommend.ranking((odd, *reports))
    assert [x.teacher for x in teachers] == ["strong", "odd", "weak"]
    assert ranked_by == "measured continuation gain"


def scout_report(teachers, **doubts: tuple[str, ...]) -> ScoutReport:
    fields = {"gain_doubts": (), "collapse_doubts": (), **doubts}
    return ScoutReport(
        student="student",
        task="lab",
        settings={"rollouts": 64},
        bank="60 runs",
        teachers=tuple(teachers),
        ranked_by="best forecast gain",
        refused={"other": "its tokenizer differs"},
        **fields,
    )


def test_a_report_can_be_read_again_and_printed_the_same(fitted, values, tmp_path: Path) -> None:
    undefined = {**values, "special_gap": math.nan}
    outside = {**values, "reverse_kl": 90.0}
    teachers = [
        report_teacher(n, measured(x), fitted) for n, x in (("a", undefined), ("b", outside))
    ]
    report = scout_report(teachers, gain_doubts=("a reason",))
    write_report(report, tmp_path / "scout.json")
    again = read_report(tmp_path / "scout.json")
    assert format_report(again) == format_report(report)
    assert again.teachers[0].forecasts == report.teachers[0].forecasts
    assert repr(again.teachers[1]) == repr(report.teachers[1])
    text = format_report(report)
    for expected in ("other cannot be used", "outside of the bank: log_reverse_kl", "  1. a"):
        assert expected in text
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(InvalidInput, match="not a report"):
        read_report(tmp_path / "no.json")
    (tmp_path / "no.json").write_text('{"format": "opdlab-scout-1"}')
    with pytest.raises(InvalidInput, match="damaged"):
        read_report(tmp_path / "no.json")
