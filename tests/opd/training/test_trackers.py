"""The installed trackers, run for real, with their files read back."""

import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diagnostics.records.headline import RUN_COLUMNS
from diagnostics.records.rows import Row, append_row, read_rows
from opd.training import trackers
from opd.training.trackers import numeric_values, open_trackers, with_eval_prefix
from tests.helpers.warm_process import run_process

CONFIG = {"lr": 1e-3, "betas": (0.9, 0.99), "task": "lab"}
EVALUATION = {"step": 2, "accuracy": 0.5, "outcomes": "01", "problem_set": "abc"}


def run(folder: Path, names: tuple[str, ...], first: int, last: int) -> None:
    """Steps `first` to `last` as the trainer takes them: rewind the record, then append rows."""
    folder.mkdir(exist_ok=True)
    for name in ("rows.jsonl", "evals.jsonl"):
        kept_rows = [
            row for row in read_rows(folder / name) if row["step"] < first + (name[0] == "e")
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in kept_rows))
    with open_trackers(names, folder, CONFIG) as log:
        for step in range(first, last):
            row: Row = {"step": step, "loss": step / 4, "signal/n": 7, "none": None}
            append_row(folder / "rows.jsonl", row)
            log(step, row)
            if step + 1 == EVALUATION["step"]:
                append_row(folder / "evals.jsonl", EVALUATION)
                log(2, with_eval_prefix(EVALUATION))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of every event file, without TensorBoard's purging of overwritten steps."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    values_by_tag: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    values_by_tag.setdefault(value.tag, []).append(
                        (event.step, value.tensor.float_val[0])
                    )
    return values_by_tag


def test_tensorboard_holds_each_step_once_after_a_kill(tmp_path: Path) -> None:
    run(tmp_path, ("tensorboard",), 0, 4)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [0, 1, 2, 3]
    run(tmp_path, ("tensorboard",), 2, 6)  # the last checkpoint was at step 2
    values_by_tag = scalars(tmp_path)
    assert values_by_tag["loss"] == [(i, i / 4) for i in range(6)]
    assert values_by_tag["eval/accuracy"] == [(2, 0.5)]
    assert set(values_by_tag) == {"loss", "signal/n", "eval/accuracy"}


def test_a_logger_that_is_named_late_gets_the_whole_record(tmp_path: Path) -> None:
    run(tmp_path, (), 0, 3)
    assert not (tmp_path / "tensorboard").exists()
    run(tmp_path, ("tensorboard",), 3, 4)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [0, 1, 2, 3]
    assert scalars(tmp_path)["eval/accuracy"] == [(2, 0.5)]


def finished_records(file: Path) -> list[Any]:
    """The records of a finished run; wandb's own process writes the last ones a moment later."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = wandb_records(file)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} holds no end of the run")


def wandb_records(file: Path) -> list[Any]:
    """Records of a .wandb file: LevelDB's log format, blocks of 32 KiB, 7-byte headers."""
    from wandb.proto import wandb_internal_pb2

    data, offset, record_bytes, records = file.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        if offset + 7 + length > len(data):
            break  # still being written
        record_bytes += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            records.append(wandb_internal_pb2.Record.FromString(record_bytes))
            record_bytes = b""
    return records


def test_wandb_runs_offline_and_keeps_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "first"
    run(folder, ("wandb",), 0, 4)
    time.sleep(1.1)  # wandb names an offline folder by the second, and would write over the first
    run(folder, ("wandb",), 2, 6)
    identity = (folder / "wandb_id.txt").read_text()
    files = sorted((folder / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
    assert len(files) == 2, "two processes' worth of one run"
    steps: list[list[int]] = []
    for file in files:
        history: dict[int, dict[str, float]] = {}
        for record in finished_records(file):
            if record.WhichOneof("record_type") == "run":
                run_record = record.run
                assert (run_record.run_id, run_record.project) == (identity, "opdlab")
                assert run_record.display_name == "first"
                settings = {item.key: item.value_json for item in run_record.config.update}
                assert settings["lr"] == "0.001"
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
                history.setdefault(record.history.step.num, {}).update(values)
        steps.append(sorted(history))
        for step, values in history.items():
            assert values["loss"] == step / 4
            assert values["signal/n"] == 7
            assert ("eval/accuracy" in values) == (step == 2 and file == files[0])
            assert "none" not in values
    assert steps == [[0, 1, 2, 3], [2, 3, 4, 5]]


def record_in_trackio(folder: Path) -> None:
    """Record four steps, go on from the second as after a kill, and print what trackio holds."""
    os.environ.pop("TRACKIO_PROJECT", None)
    run(folder, ("trackio",), 0, 4)
    run(folder, ("trackio",), 2, 6)
    import trackio

    (record,) = trackio.Api().runs("opdlab")
    logs = trackio.SQLiteStorage.get_logs("opdlab", record.name, run_id=record.id)
    print("FOUND" + json.dumps([record.config, logs]))


def test_trackio_holds_each_step_once_after_a_kill(tmp_path: Path) -> None:
    """In a separate process: trackio reads TRACKIO_DIR when it is imported."""
    environment = {"TRACKIO_DIR": str(tmp_path / "store")}
    process = run_process(tmp_path, record_in_trackio, tmp_path / "run", environment=environment)
    assert process.exit_code == 0, process.stderr
    (output,) = [x for x in process.stdout.splitlines() if x.startswith("FOUND")]
    config, logs = json.loads(output.removeprefix("FOUND"))
    assert config["lr"] == 1e-3
    assert [(x["step"], x["loss"]) for x in logs if "loss" in x] == [(i, i / 4) for i in range(6)]
    assert [(x["step"], x["eval/accuracy"]) for x in logs if "eval/accuracy" in x] == [(2, 0.5)]


def test_a_logger_that_fails_is_left_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    calls: list[int] = []

    def broken(folder: Path, config: dict[str, Any]) -> trackers.TrackerHandles:
        def log(step: int, row: Row) -> None:
            calls.append(step)
            if step == 1:
                raise OSError("No space left on device")

        def close() -> None:
            raise OSError("still none")

        return log, close

    loggers = {**trackers.TRACKERS, "broken": broken}
    monkeypatch.setattr(trackers, "TRACKERS", loggers)
    run(tmp_path, ("broken", "tensorboard"), 0, 4)
    assert calls == [0, 1], "no row after the failure"
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [0, 1, 2, 3]
    assert len(read_rows(tmp_path / "rows.jsonl")) == 4
    messages = [str(w.message) for w in recwarn if "logger broken" in str(w.message)]
    assert len(messages) == 1
    assert "OSError: No space left on device" in messages[0]


def test_an_error_of_the_run_is_not_swallowed(tmp_path: Path) -> None:
    def fails() -> None:
        with open_trackers(("tensorboard",), tmp_path, CONFIG) as log:
            log(0, {"step": 0, "loss": 1.0})
            raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        fails()
    assert scalars(tmp_path)["loss"] == [(0, 1.0)]


def test_unknown_and_missing_loggers_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"unknown loggers \['mlflow'\]; known: tensorboard, wandb, trackio"
    with pytest.raises(ValueError, match=words), open_trackers(("mlflow",), tmp_path, CONFIG):
        pass
    monkeypatch.setitem(sys.modules, "trackio", None)
    with (
        pytest.raises(ImportError, match=r"pip install 'opdlab\[trackio\]'"),
        open_trackers(("trackio",), tmp_path, CONFIG),
    ):
        pass


def test_only_numbers_are_sent() -> None:
    row = {"step": 3, "a": 1, "b": None, "c": "x", "d": [1], "e": True, "f": float("nan")}
    values = numeric_values(row)
    assert values.pop("f") != 0
    assert values == {"a": 1.0, "e": 1.0}
    assert with_eval_prefix({"step": 3, "accuracy": 1}) == {"step": 3, "eval/accuracy": 1}


def test_a_tracker_gets_the_headline_and_after_a_resume_too(tmp_path: Path) -> None:
    row: Row = {"step": 0, "loss": 1.0, "divergence/k1": 2.0, "divergence/k1@0-7": 3.0}
    row |= {"task=a/divergence/k1": 4.0, "task=a/mask/all/tokens": 5.0, "mask/all/tokens": 6.0}
    selected = {"loss", "divergence/k1", "task=a/divergence/k1"}
    with open_trackers(("tensorboard",), tmp_path, CONFIG, RUN_COLUMNS) as log:
        append_row(tmp_path / "rows.jsonl", row)
        log(0, row)
        log(0, with_eval_prefix({"step": 0, "accuracy": 0.5, "anything": 1}))
    assert set(scalars(tmp_path)) == {*selected, "eval/accuracy", "eval/anything"}
    with open_trackers(("tensorboard",), tmp_path, CONFIG, RUN_COLUMNS):
        pass
    assert set(scalars(tmp_path)) == selected
    with open_trackers(("tensorboard",), tmp_path, CONFIG):  # a setting that may change on resume
        pass
    assert set(scalars(tmp_path)) == row.keys() - {"step"}
