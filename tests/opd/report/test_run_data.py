"""The record of a run as the page shows it: curves, alarms, positions, and what is refused."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diagnostics.alarms.alarms import replay
from diagnostics.alarms.rules import RULES
from diagnostics.errors import InvalidInput
from diagnostics.records import rows
from opd.report import run_data
from opd.report.server import data_version


def test_curves_alarms_and_accuracy_are_those_of_the_record(run: Path) -> None:
    entry = run_data.run_page_data(run_data.read_run(run))
    run_rows = rows.read_rows(run / "rows.jsonl")
    part = entry["tasks"][0]
    step_list, values, errors = part["curves"]["divergence/k1"]
    assert part["steps"][step_list] == [0, 1, 2]
    for row, value, error in zip(run_rows, values, errors, strict=True):
        assert value == pytest.approx(row["divergence/k1"], rel=1e-4)
        assert error == pytest.approx(row["divergence/k1_se"], rel=1e-4)
    curve_columns = {
        k for row in run_rows for k in row if not set("@%") & set(k) and not k.endswith("_se")
    }
    assert curve_columns - {"step"} - set(part["curves"]) == {
        k
        for k in curve_columns - {"step"}
        if not any(isinstance(row.get(k), int | float) for row in run_rows)
    }
    assert entry["done"] == 3
    assert [x["accuracy"] for x in entry["evals"]] == [
        x["accuracy"] for x in rows.read_rows(run / "evals.jsonl")
    ]


def test_of_rows_with_one_step_the_last_counts(tmp_path: Path) -> None:
    file_rows = [{"step": s, "loss": float(i)} for i, s in enumerate((0, 2, 3, 2, 1))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in file_rows))
    entry = run_data.run_page_data(run_data.read_run(tmp_path))
    part = entry["tasks"][0]
    assert part["steps"] == [[0, 1, 2, 3]]
    assert part["curves"]["loss"] == [0, [0.0, 4.0, 3.0, 2.0], None]
    assert entry["done"] == 4


def test_rows_of_another_trainer_may_have_any_file_name(tmp_path: Path) -> None:
    panel = tmp_path / "panel.jsonl"
    (tmp_path / "evals.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="nor exactly one other"):
        run_data.read_run(tmp_path)
    panel.write_text('{"step": 3, "loss": 1.5}\n')
    assert run_data.read_run(tmp_path).rows == [{"step": 3, "loss": 1.5}]
    version_before = data_version([tmp_path])
    with open(panel, "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n')
    assert data_version([tmp_path]) != version_before
    (tmp_path / "other.jsonl").write_text('{"step": 9}\n')
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        run_data.read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"pass its folder, {re.escape(str(tmp_path))}$"):
        run_data.read_run(panel)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rows.jsonl").write_text('{"step": 0}\n')
    run = re.escape(str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match=f"a monitor; it contains run folders: {run}$"):
        run_data.read_run(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"step": 7}\n')
    assert run_data.read_run(tmp_path).rows == [{"step": 7}]


GRADED = {"step": 0, "accuracy": 0.5, "problems": 2, "outcomes": "01"}


IMPOSSIBLE: dict[str, tuple[str, Any, str]] = {
    "text as a metric": (
        "rows.jsonl",
        {"step": 0, "divergence/k1": "x"},
        "row 1, field divergence/k1: 'x'",
    ),
    "list as a loss": (
        "rows.jsonl",
        {"step": 0, "loss": [1]},
        "row 1, field loss: .1. is not a nu",
    ),
    "beyond floats": ("rows.jsonl", {"step": 0, "loss": 10**400}, "row 1, field loss: 1000"),
    "truth as a metric": (
        "rows.jsonl",
        {"step": 0, "divergence/k1": True},
        "row 1, field divergence/k1: True is not a number",
    ),
    "step before the first": ("rows.jsonl", {"step": -1}, "line 1, field step: -1 is no step"),
    "step beyond counting": ("rows.jsonl", {"step": 10**30}, "line 1, field step: 1000"),
    "step of an evaluation": ("evals.jsonl", GRADED | {"step": -1}, "line 1, field step: -1"),
    "accuracy above 1": ("evals.jsonl", GRADED | {"accuracy": 1.5}, "row 1, field accuracy: 1.5"),
    "negative accuracy": ("evals.jsonl", GRADED | {"accuracy": -0.1}, "field accuracy: -0.1"),
    "accuracy that is none": ("evals.jsonl", GRADED | {"accuracy": math.nan}, "accuracy: nan"),
    "negative length": ("evals.jsonl", GRADED | {"length": -2}, "row 1, field length: -2"),
    "list as a task": (
        "rows.jsonl",
        {"step": 0, "task": [1]},
        "row 1, field task: .1. is not text",
    ),
    "outcomes of another kind": (
        "evals.jsonl",
        GRADED | {"outcomes": "0x"},
        "field outcomes: '0x'",
    ),
    "outcomes of others": (
        "evals.jsonl",
        GRADED | {"outcomes": "011"},
        "'011' does not fit 2 problems",
    ),
    "no problems": ("evals.jsonl", GRADED | {"problems": 0}, "row 1, field problems: 0"),
    "length": ("evals.jsonl", GRADED | {"length": [1]}, "row 1, field length: .1."),
    "tasks": ("config.json", {"tasks": 3}, "field tasks: 3 is not a list"),
    "task": ("config.json", {"tasks": [1]}, r"tasks\[0\]: 1 is not an object"),
    "nameless": ("config.json", {"tasks": [{}]}, r"tasks\[0\]: the field 'name'"),
    "no path": ("config.json", {"student": "a\0"}, "is not a folder or the name of a model"),
    "too long": ("config.json", {"teacher": "a" * 5000}, "is not a folder or the name of a model"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_values_of_a_record_are_named(name: str, tmp_path: Path) -> None:
    settings = {"student": "s", "teacher": "t", "objective": "k3", "seed": 0}
    contents = {
        "config.json": settings,
        "rows.jsonl": {"step": 0, "loss": None},
        "evals.jsonl": GRADED,
    }
    file, changes, message = IMPOSSIBLE[name]
    for path, value in (contents | {file: contents[file] | changes}).items():
        (tmp_path / path).write_text(json.dumps(value) + "\n")
    with pytest.raises(InvalidInput, match=f"{file}.*{message}") as raised:
        run_data.read_run(tmp_path)
    assert len(str(raised.value)) < 400


def test_alarms_are_those_that_a_replay_raises(run: Path) -> None:
    bad = [{"step": s, "loss": None, "repetition/repeated_share": 0.9} for s in range(9)]
    part_entry = run_data.task_page_data("", bad)
    alarms, replayed = part_entry["alarms"], replay(bad)
    assert [(a["rule"], a["step"]) for a in alarms] == [(a.rule.name, a.step) for a in replayed]
    assert [(a["means"], a["remedy"]) for a in alarms] == [
        (a.rule.means, a.rule.remedy) for a in replayed
    ]
    assert {a["rule"] for a in alarms} == {"not_finite", "repetition"}
    assert all(a["on"] for a in alarms)
    watched_rules = {
        rule.name for rule in RULES if rule.metric in ("loss", "repetition/repeated_share")
    }
    assert set(part_entry["unwatched"]) == {rule.name for rule in RULES} - watched_rules
    longer_rows = [
        *bad,
        *({"step": s, "loss": 1.0, "repetition/repeated_share": 0.0} for s in range(9, 20)),
    ]
    assert not any(a["on"] for a in run_data.task_page_data("", longer_rows)["alarms"])


def test_tasks_that_take_turns_have_curves_of_their_own(run: Path) -> None:
    record = run_data.read_run(run)
    alternating_rows = [row | {"task": "ab"[i % 2]} for i, row in enumerate(record.rows)]
    entry = run_data.run_page_data(replace(record, rows=alternating_rows))
    assert [part["task"] for part in entry["tasks"]] == ["a", "b"]
    assert [part["steps"][part["curves"]["loss"][0]] for part in entry["tasks"]] == [[0, 2], [1]]


def test_long_curves_keep_their_ends_extremes_gaps_and_alarms() -> None:
    points = [(i, float((i * 7919) % 2003), None) for i in range(20_000)]
    points[12_345] = (12_345, 1e6, None)
    points[777] = (777, None, None)
    points[9_999] = (9_999, -1e6, None)
    thinned = run_data.thin_points(points, 400, {4_321})
    assert len(thinned) <= 404
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    for step in (12_345, 9_999, 777, 4_321):
        assert points[step] in thinned
    assert thinned == sorted(thinned)
    assert run_data.thin_points(points[:100], 100) == points[:100]
    rising_rows = [
        {"step": s, "loss": 1.0, "repetition/repeated_share": s / 4000} for s in range(2000)
    ]
    part_entry = run_data.task_page_data("", rising_rows)
    (alarm,) = part_entry["alarms"]
    assert (
        alarm["step"] in part_entry["steps"][part_entry["curves"]["repetition/repeated_share"][0]]
    )


def test_heat_maps_and_breakdown_are_the_columns_by_position(run: Path) -> None:
    run_rows = rows.read_rows(run / "rows.jsonl")
    part_entry = run_data.task_page_data("", run_rows)
    assert {"divergence/k1", "divergence/reverse_kl", "consistency/z_H"} <= set(part_entry["maps"])
    for name in ("divergence/k1", "consistency/z_H"):
        heat_map = part_entry["maps"][name]
        assert heat_map["steps"] == [0, 1, 2]
        for i, row in enumerate(run_rows):
            for j, (low, high) in enumerate(heat_map["bins"]):
                value, count = row[f"{name}@{low}-{high}"], row[f"divergence/tokens@{low}-{high}"]
                assert heat_map["values"][i][j] == (
                    None if value is None else pytest.approx(value, 1e-4)
                )
                assert heat_map["tokens"][i][j] == count
    last_breakdown = part_entry["anatomy"]["rows"][-1]
    for k, name in enumerate(run_data.BREAKDOWN_METRICS):
        for j, (low, high) in enumerate(part_entry["anatomy"]["bins"]):
            value = run_rows[-1][f"{name}@{low}-{high}"]
            if value is not None:
                assert last_breakdown["parts"][k][j] == pytest.approx(value, rel=1e-4, abs=1e-9)
    assert run_data.task_page_data("", [*run_rows, {"step": 3}])["maps"] == part_entry["maps"]
    long_rows = [run_rows[i % 3] | {"step": i} for i in range(500)]
    thinned_steps = run_data.heat_maps(long_rows, run_data.position_bins(long_rows), 50)[
        "divergence/k1"
    ]["steps"]
    assert (len(thinned_steps), thinned_steps[0], thinned_steps[-1]) == (50, 0, 499)
