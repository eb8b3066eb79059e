"""What `train` returns, and what it leaves behind when an exception ends it in the middle."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm.auto import tqdm

from diagnostics.records.rows import read_rows
from opd.models.loading import load_model
from opd.rollouts.hf_engine import HfEngine
from opd.training import checkpoint, trackers
from opd.training.train import train
from tests.helpers.runs import rows, settings


def final_weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was closed."""
    names, close = list[str](), HfEngine.close

    def recording_close(self: HfEngine) -> None:
        names.append("engine")
        close(self)

    monkeypatch.setattr(HfEngine, "close", recording_close)
    return names


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt; a process started in the background ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exception_between_two_steps_releases_everything(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[str], error: type
) -> None:
    """Raised by a tracker, which is called between a step's row and its checkpoint."""
    faults = [2]

    def open_faulty(folder: Path, config: dict[str, Any]) -> trackers.TrackerHandles:
        def log(step: int, row: dict[str, Any]) -> None:
            if step in faults and "loss" in row:
                faults.remove(step)
                raise error

        return log, lambda: events.append("tracker")

    monkeypatch.setitem(trackers.TRACKERS, "faulty", open_faulty)  # type: ignore[arg-type]
    config = settings(tiny_pair, tmp_path / "cut", loggers=("faulty",), save_every=1)
    threads = set(threading.enumerate())
    with pytest.raises(error):
        train(config)
    assert set(events) == {"engine", "tracker"}
    assert set(threading.enumerate()) == threads
    assert not tqdm._instances
    assert len(rows(tmp_path / "cut")) == 3  # the row of step 2 is there, its checkpoint is not
    resumed = train(config).folder
    whole = train(settings(tiny_pair, tmp_path / "whole", save_every=1)).folder
    assert rows(resumed) == rows(whole)
    assert read_rows(resumed / "evals.jsonl") == read_rows(whole / "evals.jsonl")
    assert final_weights(resumed) == final_weights(whole)


def test_a_signal_at_any_moment_leaves_a_run_that_resumes(
    tiny_pair, tmp_path: Path, events: list[str], ctrl_c: None
) -> None:
    """Ctrl-C in a notebook: the signal arrives somewhere in the third step or later."""
    config = settings(tiny_pair, tmp_path / "cut", steps=6, save_every=1)
    record = tmp_path / "cut" / "rows.jsonl"

    def interrupt() -> None:
        while not (record.exists() and len(record.read_text().splitlines()) >= 2):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    sender.join()
    assert events[0] == "engine"
    resumed = train(config).folder
    whole = train(settings(tiny_pair, tmp_path / "whole", steps=6, save_every=1)).folder
    assert rows(resumed) == rows(whole)
    assert final_weights(resumed) == final_weights(whole)


def test_an_interrupt_while_a_checkpoint_is_written_stays_an_interrupt(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.distributed.checkpoint wraps it in an error of its own."""
    config = settings(tiny_pair, tmp_path / "run", steps=2, save_every=1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*[0-9]"))
    assert len(rows(train(config).folder)) == 2


def test_the_result_has_the_numbers_and_the_trained_model(tiny_pair, tmp_path: Path) -> None:
    config = settings(tiny_pair, tmp_path / "run", steps=2)
    result, again = train(config), train(config)
    assert result.folder == again.folder == tmp_path / "run"
    last = read_rows(result.folder / "rows.jsonl")[-1]
    assert result.row == again.row == last
    assert last["step"] == 1
    assert [row["step"] for row in result.evaluations] == [0, 2]
    start = dict(load_model(str(tiny_pair[0]), "cpu", "float32")[1].named_parameters())
    trained, loaded = (dict(x.student.network.named_parameters()) for x in (result, again))
    for name, weight in trained.items():
        assert torch.equal(weight, loaded[name])
    assert any(not torch.equal(weight, start[name]) for name, weight in trained.items())
