"""The figures `controls` and `views`: costs, budgets, collapses and alarms by plain numbers."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.errors import InvalidInput
from figures import style
from figures.claims.matched_measures import (
    collapse_of,
    control_accuracy,
    equal_view_accuracy,
    view_accuracy,
)
from figures.collect.matched import collapsed_seeds, matched_table
from figures.paper import controls, views
from tests.figures.in_memory_tables import InMemoryTables
from tests.helpers.records.written_runs import write_run

SECONDS = {"on_policy_topk": 4.0, "sft": 1.0}
"""Seconds of a step; half of it is generation."""
OUTCOMES = {
    ("on_policy_topk", 0): {0: "0001", 2: "0011", 4: "0111"},
    ("on_policy_topk", 1): {0: "0000", 2: "0011", 4: "1111"},
    ("sft", 0): {0: "0001", 2: "0001", 4: "0001", 8: "0011"},
    ("sft", 1): {0: "0000", 2: "0001", 4: "0011", 8: "0011"},
}


@pytest.fixture(scope="module")
def control_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("paper") / "controls"
    return [
        write_run(root / f"{method}-{seed}", outcomes, seed=seed, seconds=SECONDS[method])
        for (method, seed), outcomes in OUTCOMES.items()
    ]


def test_costs_are_those_of_the_steps_before_an_evaluation(control_runs: list[Path]) -> None:
    table = matched_table(control_runs).set_index(["method", "seed", "step"])
    for (method, seed), outcomes in OUTCOMES.items():
        for step in outcomes:
            row = table.loc[(method, seed, step)]
            assert row["seconds"] == pytest.approx(SECONDS[method] * step)
            assert row["tokens"] == pytest.approx(sum(100 + 10 * i for i in range(step)))
            assert row["alarm"] == ""
            assert np.isnan(row["alarm_step"])


def test_seeds_may_have_students_of_their_own_and_nothing_else(
    control_runs: list[Path], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "controls" / "sft-2", {0: "0001", 1: "0001"}, seed=2, seconds=1.0)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "lr": 1.0}))
    with pytest.raises(InvalidInput, match="not seeds of one method: lr"):
        matched_table([*control_runs, run])


def test_methods_are_compared_at_equal_cost(control_runs: list[Path]) -> None:
    table = controls.collect(control_runs)
    results = controls.summary(table)
    # in a quarter of the budget, 115 tokens or 2 seconds, only SFT has been evaluated again
    quarter = results[results["share"] == 0.25]
    assert quarter["accuracy"].tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 8, 2 / 8])
    assert quarter["step"].tolist() == [0, 0, 0, 2]
    summary = results[results["share"] == 1].set_index(["budget", "method"])
    # 4 steps of on-policy distillation have as many tokens as 4 of SFT; in the 8 seconds that SFT
    # took in all, on-policy distillation took 2 steps
    steps = {key: int(row["step"]) for key, row in summary.iterrows()}
    assert steps == {
        ("tokens", "on_policy_topk"): 4,
        ("tokens", "sft"): 4,
        ("seconds", "on_policy_topk"): 2,
        ("seconds", "sft"): 8,
    }
    accuracy = summary["accuracy"].to_dict()
    assert accuracy["tokens", "on_policy_topk"] == pytest.approx(7 / 8)
    assert accuracy["tokens", "sft"] == pytest.approx(3 / 8)
    assert accuracy["seconds", "on_policy_topk"] == pytest.approx(4 / 8)
    assert accuracy["seconds", "sft"] == pytest.approx(4 / 8)
    assert summary.loc[("tokens", "sft"), "away"] == pytest.approx(-4 / 8)
    assert summary.loc[("seconds", "sft"), "away"] == 0
    assert summary["before"].unique() == pytest.approx([1 / 8])
    assert np.isnan(summary.loc[("tokens", "on_policy_topk"), "away"])
    text = controls.markdown(controls.summary(table))
    assert "### At equal tokens" in text
    assert "| SFT | 2 | 8 | 1,080 | 8.0 | 0.500 [" in text


def test_the_curves_are_drawn_against_their_cost(control_runs: list[Path]) -> None:
    with style.style_context():
        axes = controls.draw(controls.collect(control_runs)).axes
    lines = {line.get_label(): line for line in axes[1].lines}
    assert list(map(float, lines["SFT"].get_xdata())) == [0, 2, 4, 8]
    assert list(map(float, lines["SFT"].get_ydata())) == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    budget = axes[1].lines[-1].get_xdata()
    assert list(map(float, budget)) == [8, 8]
    assert list(map(float, axes[1].lines[-2].get_xdata())) == [2, 2]


def test_controls_need_what_they_are_compared_with(control_runs: list[Path]) -> None:
    with pytest.raises(InvalidInput, match="no run of controls/on_policy_topk"):
        controls.draw(controls.collect(control_runs[2:]))


@pytest.fixture(scope="module")
def view_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("paper") / "views"
    improving, falling = {0: "0001", 3: "0011", 8: "0111"}, {0: "0011", 3: "1111", 8: "1000"}
    return [
        write_run(root / "frozen_solution-0", improving, seed=0, seconds=1.0),
        write_run(root / "frozen_solution-1", improving, seed=1, seconds=1.0),
        write_run(root / "frozen_another-0", falling, seed=0, seconds=1.0, truncated_from=2),
        write_run(root / "frozen_another-1", improving, seed=1, seconds=1.0),
    ]


def test_collapses_and_first_alarms_are_counted(view_runs: list[Path]) -> None:
    table = views.collect(view_runs)
    assert collapsed_seeds(table, "frozen_another") == [0]
    assert collapsed_seeds(table, "frozen_solution") == []
    summary = views.summary(table).set_index("view")
    another, solution = summary.loc["another"], summary.loc["solution"]
    assert (another["collapsed"], solution["collapsed"]) == (1, 0)
    # truncated from step 2 on: the third reading outside is that of step 4
    assert (another["alarm"], another["alarms"], another["alarm_step"]) == ("budget", 1, 4)
    assert (solution["alarm"], solution["alarms"]) == ("", 0)
    assert another["accuracy"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert (another["best"], another["best_step"]) == (pytest.approx(3 / 4), 3)
    assert another["away"] == pytest.approx((1 / 4 - 3 / 4) / 2)
    # the evaluation at step 3 is the nearest to half of 8 steps
    assert another["late"] == pytest.approx((1 / 4 - 4 / 4 + 3 / 4 - 2 / 4) / 2)
    assert np.isnan(solution["away"])
    text = views.markdown(views.summary(table))
    assert "| 1 of 2 | budget, 1 runs, 4 |" in text
    assert text.rstrip().count("\n| frozen copy") == 2


def test_views_need_their_runs(control_runs: list[Path]) -> None:
    with pytest.raises(InvalidInput, match="no run of the group views"):
        views.draw(views.collect(control_runs))


def test_claims_are_measured_at_the_end_or_within_the_budget(
    control_runs: list[Path], view_runs: list[Path]
) -> None:
    tables = InMemoryTables(views=views.collect(view_runs), controls=controls.collect(control_runs))
    improves = view_accuracy("frozen_solution")(tables)
    assert improves.measurement.startswith("0.750 [")
    assert "against 0.250 [" in improves.measurement
    assert "+0.500 [" in improves.measurement
    another = equal_view_accuracy("frozen_another", "frozen_solution")(tables)
    assert "0.500 [" in another.measurement
    assert "-0.250 [" in another.measurement
    collapse = collapse_of("frozen_solution", "frozen_another")(tables)
    assert collapse.verdict == "agrees"
    assert "frozen, solution: 0 of 2 runs; frozen, another: 1 of 2 runs" in collapse.measurement
    assert "within 8 steps" in collapse.measurement
    assert collapse_of("frozen_solution", horizon=8)(tables).verdict == "differs"
    assert collapse_of("frozen_solution", horizon=9)(tables).verdict == "undecided"
    gains = {
        cost: control_accuracy("on_policy_topk", "sft", cost)(tables).measurement
        for cost in ("tokens", "seconds")
    }
    assert "+0.500 [" in gains["tokens"]
    assert "+0.000 [" in gains["seconds"]
    early = control_accuracy("sft", "on_policy_topk", "seconds", share=0.25)(tables)
    assert early.measurement.startswith("0.250 [")
    assert "+0.125 [" in early.measurement


@pytest.mark.parametrize(
    ("accuracies", "collapses"),
    [((0.4, 1.0, 0.6, 0.4), True), ((0.4, 1.0, 0.6, 0.5), False), ((0.1, 0.2, 0.9), False)],
)
def test_a_collapse_is_a_fall_below_half_of_the_best(
    accuracies: tuple[float, ...], collapses: bool
) -> None:
    rows = [
        {"method": "a", "seed": 7, "step": step, "accuracy": accuracy}
        for step, accuracy in enumerate(accuracies)
    ]
    assert collapsed_seeds(pd.DataFrame(rows[::-1]), "a") == [7] * collapses
