"""What counts as a run folder, and what is read from one."""

import json
from pathlib import Path

import pytest

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.records import run_tables
from diagnostics.records.rows import append_row
from diagnostics.records.run_folder import RunFolder
from figures.collect import steps

SETTINGS = {"seed": 3, "student": "pair/student", "teacher": "pair/teacher", "own_end": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "single" / "lsm-3"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(SETTINGS))
    return path


def test_settings_or_rows_make_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"is not a run folder: it has neither config\.json"):
        RunFolder(tmp_path)
    (tmp_path / "evals.jsonl").write_text("")
    (tmp_path / "starts.jsonl").write_text("")
    with pytest.raises(MissingFile, match="is not a run folder"):
        RunFolder(tmp_path)
    (tmp_path / "panel.jsonl").write_text('{"step": 2}\n')
    assert RunFolder(tmp_path).rows() == [{"step": 2}]
    assert RunFolder(tmp_path).settings() == {}
    (tmp_path / "rows.jsonl").write_text('{"step": 4}\n')
    assert RunFolder(tmp_path).rows() == [{"step": 4}]
    with pytest.raises(InvalidInput, match=r"config\.json: the field 'seed'"):
        assert RunFolder(tmp_path).seed


def test_a_parent_names_its_run_folders(folder: Path) -> None:
    append_row(folder / "rows.jsonl", {"step": 0})
    with pytest.raises(MissingFile, match=f"it contains run folders: {folder}$"):
        RunFolder(folder.parent)
    with pytest.raises(MissingFile, match=f"it is a file: pass its folder, {folder}$"):
        RunFolder(folder / "rows.jsonl")


def test_the_parts_of_a_record_are_read(folder: Path) -> None:
    run = RunFolder(folder)
    assert (run.name, run.group, run.method, run.seed) == ("lsm-3", "single", "lsm", 3)
    assert run.settings()["map_eos"] is True, "settings have their present names"
    assert (run.rows(), run.evaluations(), run.starts(), run.batches()) == ([], [], [], {})
    append_row(folder / "rows.jsonl", {"step": 0, "drift/k1": 1.0})
    (row,) = run.rows()
    assert row["divergence/k1"] == 1.0
    with pytest.raises(InvalidInput, match="lsm-3: the row of step 0 has no 'loss'"):
        assert row["loss"]
    append_row(folder / "evals.jsonl", {"step": 0, "accuracy": 0.5})
    assert run.evaluations({"step": int}) == [{"step": 0, "accuracy": 0.5}]
    with pytest.raises(InvalidInput, match=r"evals\.jsonl line 1: the field 'outcomes'"):
        run.evaluations()
    (folder / "code.txt").write_text("commit abc\nversion 1\n")
    assert run.commit() == "commit abc"
    for name in ("batches/step_000010.safetensors", "batches/step_000002.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert list(run.batches()) == [2, 10]
    assert run.batches()[10] == run.batch_path(10)
    (folder.parents[1] / "pair" / "student").mkdir(parents=True)
    assert run.model_folder("student") == folder.parents[1] / "pair" / "student"
    assert run.model_folder("teacher") == Path("pair/teacher"), "a hub name stays a name"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "3"}, "field seed: '3' is not an integer"),
        ({"student": 5}, "field student: 5 is not text"),
        ({"tasks": 3}, "field tasks: 3 is not a list"),
        ({"tasks": [{}]}, r"tasks\[0\]: the field 'name'"),
        ({"teacher": "a" * 5000}, "is not a folder or the name of a model"),
    ],
)
def test_unusable_settings_are_named(folder: Path, changes: dict, message: str) -> None:
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))
    with pytest.raises(InvalidInput, match=message):
        RunFolder(folder).settings()


def test_the_configuration_of_another_program_is_no_setting(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "student": 1}))
    assert RunFolder(folder).settings() == {}


def test_tables_keep_one_list_of_columns() -> None:
    assert set(steps.PAPER_METRICS.values()) <= set(run_tables.STEP_METRICS)
    assert len(set(run_tables.STEP_METRICS)) == len(run_tables.STEP_METRICS)
