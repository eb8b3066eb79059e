"""An observed TRL run that is killed and resumed: rows, alarms, and the cost of a failing sink."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.adapters.trl import observe_trl
from diagnostics.alarms.alarms import Alarms
from diagnostics.alarms.rules import AlarmRule
from diagnostics.catalogue import PANEL
from diagnostics.monitor import Monitor
from diagnostics.records import rows as row_files
from diagnostics.records.sinks import to_file
from tests.helpers.trl_trainers import Spy, by_hand, distillation, gkd, load_pair
from tests.helpers.warm_process import run_process

LENGTH_RULE = AlarmRule(
    name="long",
    metric="response/length",
    null="0",
    means="any response at all",
    remedy="none",
    high=0.5,
    z=0,
    min_outside=1,
    window=1,
)
SMALL_PANEL = {name: PANEL[name] for name in ("length", "exact_divergence", "tokens_by_position")}


def checkpointed(pair: Any, folder: Path, **changes: Any) -> Any:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | changes
    return distillation(pair, folder, **changes)


def monitor_of(folder: Path) -> Monitor:
    return Monitor(
        SMALL_PANEL, sinks=[to_file(folder / "panel.jsonl")], alarms=Alarms([LENGTH_RULE])
    )


def train_until_killed(student: Path, teacher: Path, folder: Path) -> None:
    """Observe a run and kill this process in its fourth step."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = checkpointed(load_pair((student, teacher)), folder)
    trainer.add_callback(Kill())
    with observe_trl(trainer, monitor_of(folder)):
        trainer.train()


def test_a_killed_run_goes_on_with_its_rows_and_its_alarms(
    pair: Any, tiny_pair: Any, tmp_path: Path
) -> None:
    uninterrupted = checkpointed(pair, tmp_path / "whole")
    with observe_trl(uninterrupted, monitor_of(tmp_path / "whole")) as expected:
        uninterrupted.train()
    folder = tmp_path / "killed"
    process = run_process(tmp_path, train_until_killed, *tiny_pair, folder)
    assert process.exit_code == -signal.SIGKILL, process.stderr
    panel = folder / "panel.jsonl"
    assert [row["step"] for row in row_files.read_rows(panel)] == [1, 2, 3]
    with open(panel, "a") as file:
        file.write('{"step": 4, "colla')  # as if killed while writing a row
    monitor = monitor_of(folder)
    trainer = checkpointed(pair, folder)
    raised: list[Any] = []
    monitor.sinks.append(lambda step, row: raised.append(monitor.raised))
    with observe_trl(trainer, monitor) as rows:
        trainer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in rows] == [3, 4]
    file_rows = row_files.read_rows(panel)
    assert [row["step"] for row in file_rows] == [1, 2, 3, 4]
    numbers = [{k: math.nan if x is None else x for k, x in row.items()} for row in file_rows]
    for row, expected_row in zip(numbers, [*expected[:2], *rows], strict=True):
        assert row == pytest.approx(expected_row, nan_ok=True)
    assert raised == [[], []]  # the alarm was already active and is not raised again
    assert monitor.alarms is not None
    assert monitor.alarms.active["long"].step == 1
    assert not list(folder.glob("panel.jsonl.*"))


def test_an_earlier_runs_rows_are_set_aside_where_another_begins(pair: Any, tmp_path: Path) -> None:
    panel = tmp_path / "panel.jsonl"
    panel.write_text('{"step": 9, "loss": 1.5}\n')
    trainer = distillation(pair, tmp_path, max_steps=1)
    with (
        pytest.warns(UserWarning, match=r"panel.jsonl held the rows of an earlier run"),
        observe_trl(trainer, monitor_of(tmp_path)),
    ):
        trainer.train()
    assert row_files.read_rows(tmp_path / "panel.jsonl.1") == [{"step": 9, "loss": 1.5}]
    assert [row["step"] for row in row_files.read_rows(panel)] == [1]


def test_a_run_that_was_not_observed_can_be_resumed_observed(pair: Any, tmp_path: Path) -> None:
    checkpointed(pair, tmp_path, max_steps=2).train()
    trainer = checkpointed(pair, tmp_path, max_steps=4)
    with observe_trl(trainer, monitor_of(tmp_path)) as rows:
        trainer.train(resume_from_checkpoint=True)  # saves a checkpoint at the end
    assert [row["step"] for row in rows] == [3, 4]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["OpdlabMonitor"]["attributes"]["saved"]
    assert saved["alarms"]["active"]["long"][0] == 3
    checkpointed(pair, tmp_path, max_steps=5).train(resume_from_checkpoint=True)  # not observed
    restored = {"restore_callback_states_from_checkpoint": True, "max_steps": 6}
    resumed = checkpointed(pair, tmp_path, **restored)
    monitor = monitor_of(tmp_path)
    with observe_trl(resumed, monitor) as rows:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [row["step"] for row in rows] == [5, 6]
    assert monitor.alarms is not None
    assert monitor.alarms.active["long"].step == 3
    assert not [
        x for x in resumed.callback_handler.callbacks if type(x).__name__ == "OpdlabMonitor"
    ]


def test_the_log_is_over_all_tokens_of_its_window(pair: Any, tmp_path: Path) -> None:
    trainer = distillation(pair, tmp_path, max_steps=5, logging_steps=2)
    spy = Spy(trainer, pair[0])
    with observe_trl(trainer, Monitor(interval={"length": 2}), k=5, log_columns=None) as rows:
        trainer.train()
    log = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["step"] for x in log] == [2, 4]
    for line in log:
        steps = (line["step"] - 1, line["step"])
        dense = [list(spy.dense(step, pair[1], 0.8)) for step in steps]
        expected = by_hand([*dense[0], *dense[1]])
        for name in (
            "divergence/k1",
            "divergence/reverse_kl",
            "divergence/outside_topk",
            "divergence/overlap_ratio",
        ):
            assert line[name] == pytest.approx(expected[name], rel=2e-4), name
        assert line["divergence/tokens"] == pytest.approx(expected["divergence/tokens"] / 2)
        second_step = by_hand(dense[1])  # due only at every second step
        assert line["response/length"] == pytest.approx(second_step["response/length"])
        window_rows = [row for row in rows if row["step"] in steps]
        sums = [sum(row[f"divergence/tokens{b}"] for row in window_rows) for b in ("@0-1", "@2-3")]
        assert [line["divergence/tokens@0-1"], line["divergence/tokens@2-3"]] == [
            x / 2 for x in sums
        ]
        assert line["trl/observed_steps"] == 2
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_a_failing_sink_or_a_loss_without_numbers_costs_rows_and_not_the_training(
    pair: Any, tmp_path: Path
) -> None:
    def failing_sink(step: int, row: Any) -> None:
        if step == 2:
            raise OSError("No space left on device")

    trainer = distillation(pair, tmp_path, max_steps=3, logging_steps=3)
    divergence = trainer._compute_loss

    def diverging_loss(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            with torch.no_grad():
                trainer.model.lm_head.weight.fill_(torch.nan)
        return divergence(*args, **kwargs)

    trainer._compute_loss = diverging_loss
    with (
        pytest.warns(RuntimeWarning) as warnings,
        observe_trl(trainer, Monitor(SMALL_PANEL, sinks=[failing_sink])) as rows,
    ):
        trainer.train()
    assert trainer.state.global_step == 3
    assert [row["step"] for row in rows] == [1]
    texts = [str(w.message) for w in warnings if "has no row" in str(w.message)]
    assert texts[0] == "step 2 has no row: OSError: No space left on device (training continues)"
    assert texts[1].startswith("step 3 has no row: InvalidInput: ")
    assert trainer.state.log_history[0]["trl/observed_steps"] == 1


def test_a_loss_that_is_computed_elsewhere_is_an_error(pair: Any, tmp_path: Path) -> None:
    trainer = distillation(pair, tmp_path)
    loss = trainer._compute_loss

    def separate_loss(model: Any, inputs: Any, *_: Any, **kwargs: Any) -> Any:
        return loss(model, inputs, kwargs.get("num_items_in_batch"))[0]

    trainer.compute_loss = separate_loss
    with (
        pytest.raises(RuntimeError, match="step 1: the loss of DistillationTrainer did not call"),
        observe_trl(trainer, Monitor(SMALL_PANEL)),
    ):
        trainer.train()


def test_losses_without_gradients_are_not_of_the_training(pair: Any, tmp_path: Path) -> None:
    trainer = gkd(pair, tmp_path, max_steps=1)
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any) -> Any:
        with torch.no_grad():
            trainer.compute_loss(model, inputs)
        return step(model, inputs, *args)

    trainer.training_step = training_step
    with observe_trl(trainer, Monitor(SMALL_PANEL)) as rows:
        trainer.train()
    assert rows[0]["divergence/tokens"] / rows[0]["response/length"] == pytest.approx(4)
