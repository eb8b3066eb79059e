"""Pooling and pairing of runs: only seeds of one method are averaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagnostics.records import rows
from diagnostics.records.run_groups import distinct_names, group_by_method
from diagnostics.records.run_tables import accuracy_gains, training_table
from diagnostics.stats import gain_interval, unpaired_interval
from figures.collect import steps
from figures.paper import agents


def make_run(
    folder: Path, outcomes: tuple[str, str], problem_set: str = "p", **options: Any
) -> Path:
    """Write a run folder of one step with two evaluations."""
    folder.mkdir(parents=True)
    settings = {"objective": "teacher_topk", "seed": 0, "lr": 1e-4, "student": "pair/student"}
    (folder / "config.json").write_text(json.dumps(settings | {"out": str(folder)} | options))
    rows.append_row(folder / "rows.jsonl", {"step": 0, "loss": 1.0, "grad_norm": 1.0})
    for step, digits in enumerate(outcomes):
        accuracy = digits.count("1") / len(digits)
        row = {"step": step, "accuracy": accuracy, "length": 3.0, "truncated": 0.0}
        row |= {"outcomes": digits, "problems": len(digits), "problem_set": problem_set}
        rows.append_row(folder / "evals.jsonl", row)
    return folder


def by_name(runs: list[Path]) -> dict[str, dict[str, Any]]:
    return {
        row["objective"]: row for row in accuracy_gains(training_table(runs)).to_dict("records")
    }


def test_seeds_of_one_method_are_pooled_over_runs_and_problems(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", ("0011", "1111"), seed=0, eval_every=1, device="cpu"),
        make_run(tmp_path / "b", ("0001", "0111"), seed=1, eval_every=5, device="cuda"),
    ]
    (row,) = accuracy_gains(training_table(runs)).to_dict("records")
    assert (row["objective"], row["seeds"], row["problems"]) == ("teacher_topk", 2, 4)
    assert (row["before"], row["after"], row["gain"]) == pytest.approx((3 / 8, 7 / 8, 1 / 2))
    differences = np.array([[1, 1, 0, 0], [0, 1, 1, 0]])
    assert (row["low"], row["high"]) == gain_interval(differences)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": 1e-3}, "lr 0.001"),
        ({"student": "other/student"}, "student other/student"),
        ({"task": "other.jsonl"}, "task other.jsonl"),
        ({"steps": 7}, "steps 7"),
        ({"tasks": [{"name": "x"}]}, 'tasks [{"name": "x"}]'),
        ({"problem_set": "q"}, "evaluated on 4 problems q"),
        ({"seed": 0}, "run b"),
    ],
)
def test_runs_that_differ_stand_side_by_side_under_what_differs(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    first = make_run(tmp_path / "a", ("0000", "1111"))
    second = make_run(tmp_path / "b", ("0000", "0000"), **{"seed": 1} | options)
    gains = by_name([first, second])
    assert len(gains) == 2
    method = next(key for key in gains if name in key)
    assert (gains[method]["gain"], gains[method]["seeds"]) == (0, 1)
    assert sorted(row["gain"] for row in gains.values()) == [0, 1]
    with pytest.raises(ValueError, match="are not seeds of one method"):
        group_by_method([rename(first, "m-0"), rename(second, f"m-{options.get('seed', 1)}x")])


def rename(run: Path, name: str) -> Path:
    """Copy a run as a seed of the method "m"."""
    folder = run.parent / run.name / name.removesuffix("x")
    folder.mkdir()
    for file in ("config.json", "evals.jsonl", "rows.jsonl"):
        (folder / file).write_bytes((run / file).read_bytes())
    return folder


def test_numbers_of_problems_that_differ_are_no_error(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", ("0" * 8, "1" * 8), problem_set="p"),
        make_run(tmp_path / "b", ("0" * 4, "0" * 4), problem_set="q", seed=1),
    ]
    gains = by_name(runs)
    assert {row["problems"]: row["gain"] for row in gains.values()} == {8: 1, 4: 0}
    assert all(row["low"] < row["high"] for row in gains.values())


def test_other_problems_after_than_before_are_not_paired(tmp_path: Path) -> None:
    """A resumed run whose data changed: equally many problems, but different ones."""
    run = make_run(tmp_path / "a", ("0101", "1111"))
    lines = rows.read_rows(run / "evals.jsonl")
    lines[1]["problem_set"] = "q"
    (run / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (row,) = by_name([run]).values()
    assert not row["paired"]
    want = unpaired_interval(np.array([0, 1, 0, 1]), np.ones(4))
    assert (row["low"], row["high"]) == want


def test_runs_of_one_folder_name_are_two_runs(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "x" / "run", ("0011", "0011"), seed=0),
        make_run(tmp_path / "y" / "run", ("0000", "1111"), seed=1),
    ]
    table = training_table(runs)
    assert set(table["run"]) == {"x/run", "y/run"}
    (row,) = accuracy_gains(table).to_dict("records")
    assert (row["seeds"], row["before"], row["gain"]) == (2, 0.25, 0.5)


def test_contents_count_where_they_are_known(tmp_path: Path) -> None:
    """A rebuilt pair with the same name is another pair; a copied pair is the same."""
    same_pair = [
        make_run(tmp_path / "a", ("01", "11"), seed=0, student="here/student"),
        make_run(tmp_path / "b", ("01", "11"), seed=1, student="there/student"),
    ]
    for run in same_pair:
        (run / "identities.json").write_text('{"student": "f00d"}')
    assert distinct_names(same_pair, ["m", "m"]) == ["m", "m"]
    other_pair = make_run(tmp_path / "c", ("01", "11"), seed=2, student="here/student")
    (other_pair / "identities.json").write_text('{"student": "beef"}')
    # a different third run does not separate the two seeds, although it repeats a seed
    third_run = make_run(tmp_path / "d", ("01", "11"), seed=0, lr=1.0)
    (third_run / "identities.json").write_text('{"student": "f00d"}')
    names = distinct_names([*same_pair, third_run], ["m", "m", "m"])
    assert names[0] == names[1] != names[2]
    assert distinct_names([same_pair[0], other_pair], ["m", "m"]) == [
        "m (student here/student f00d)",
        "m (student here/student beef)",
    ]


def test_tables_by_method_refuse_what_is_no_seed_of_it(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "g" / f"m-{seed}", ("01", "11"), seed=seed, lr=lr)
        for seed, lr in ((0, 1e-4), (1, 1e-3))
    ]
    message = r"g/m are not seeds of one method: lr is '0\.0001' in .*m-0 and '0\.001' in .*m-1"
    for collect in (steps.steps_table, steps.evaluations_table, agents.collect):
        with pytest.raises(ValueError, match=message):
            collect(runs)
    duplicates = [runs[0], make_run(tmp_path / "again" / "g" / "m-0", ("01", "11"))]
    with pytest.raises(ValueError, match="have the same seed"):
        steps.evaluations_table(duplicates)
