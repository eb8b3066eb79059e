"""Observed evaluations, the callback, what the log shows, the report of the documented folder."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.adapters.trl import LOG_COLUMNS, observe_trl, trl_callback
from diagnostics.alarms.alarms import Alarms
from diagnostics.catalogue import FULL
from diagnostics.monitor import Monitor
from diagnostics.records.headline import HEADLINE
from diagnostics.records.rows import read_rows
from diagnostics.records.sinks import to_file
from tests.helpers.trl_trainers import (
    Spy,
    by_hand,
    distillation,
    gkd,
    gold,
    grpo,
    iw_opd,
    load_pair,
    rloo,
    sdft,
    sdpo,
)

pytestmark = pytest.mark.filterwarnings("error:.* has no row:RuntimeWarning")


def evaluated(make: Any, pair: Any, folder: Path, size: int = 2) -> Any:
    """Make a trainer that evaluates after every step on the first problems of its data."""
    from transformers.trainer_utils import IntervalStrategy

    batch_size = 4 if make is sdpo else 2
    trainer = make(pair, folder, per_device_eval_batch_size=batch_size)
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
    trainer.eval_dataset = trainer.train_dataset.select(range(size))
    return trainer


@pytest.fixture(scope="module")
def pair(tiny_pair) -> tuple[Any, Any, Any]:
    return load_pair(tiny_pair)


class EvaluationSpy(Spy):
    """What went into the losses of evaluations; a step is the number of updates so far."""

    def __init__(self, trainer: Any, student: Any) -> None:
        super().__init__(trainer, student)
        compute = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            step, inputs, then = self.losses.pop()
            self.losses.append((step if trainer.model.training else 1 - step, inputs, then))
            return loss

        trainer.compute_loss = compute_loss


def train(trainer: Any, monitor: Monitor, **settings: Any) -> Any:
    torch.manual_seed(11)
    with observe_trl(trainer, monitor, k=5, **settings) as rows:
        trainer.train()
    return rows


@pytest.mark.parametrize(
    ("make", "temperature"),
    [(distillation, 0.8), (grpo, 1.0), (rloo, 1.0), (sdpo, 0.8), (sdft, 0.8)],
)
def test_an_evaluation_has_a_row_of_its_own(
    pair: Any, tmp_path: Path, make: Any, temperature: float
) -> None:
    default_trainer = evaluated(make, pair, tmp_path / "default", 3)
    default = train(default_trainer, Monitor())
    assert default.evaluation == []
    trainer = evaluated(make, pair, tmp_path / "run", 3)
    spy = EvaluationSpy(trainer, pair[0])
    monitor = Monitor(sinks=[to_file(tmp_path / "panel.jsonl")], alarms=Alarms())
    rows = train(trainer, monitor, evaluation=True)
    for key, value in default_trainer.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key]), key
    # training rows are the same to the bit, and hold nothing of the evaluation
    assert [json.dumps(row) for row in rows] == [json.dumps(row) for row in default]
    assert not [name for row in rows for name in row if name.startswith("eval")]
    assert [row["step"] for row in rows.evaluation] == [1, 2]
    teacher = pair[0] if make in (sdpo, sdft) else pair[1]
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    for row, line in zip(rows.evaluation, lines, strict=True):
        dense = list(spy.dense(-row["step"], teacher, temperature))
        assert len(dense) == 3 * {distillation: 1, sdft: 2, sdpo: 4}.get(make, 2)
        for key, value in by_hand(dense).items():
            if make in (grpo, rloo) and f"eval_{key}" not in row:
                continue  # no whole distributions
            assert row[f"eval_{key}"] == pytest.approx(value, rel=2e-4, abs=1e-6, nan_ok=True), key
            if key in LOG_COLUMNS and value == value:
                assert line[f"eval_{key}"] == row[f"eval_{key}"]
    recorded = read_rows(tmp_path / "panel.jsonl")
    assert [row["step"] for row in recorded] == [1, 1, 2, 2]
    assert ["eval_divergence/k1" in row for row in recorded] == [False, True] * 2


@pytest.mark.parametrize("make", [gkd, gold, iw_opd])
def test_an_evaluation_on_the_responses_of_the_data_is_not_measured(
    pair: Any, tmp_path: Path, make: Any
) -> None:
    trainer = evaluated(make, pair, tmp_path)
    rows = train(trainer, Monitor(), evaluation=True)
    assert [row["trl/on_policy_share"] for row in rows] == [1, 1]
    share = {"eval_trl/on_policy_share": 0.0}
    assert rows.evaluation == [{"step": 1, **share}, {"step": 2, **share}]


def test_a_failed_evaluation_costs_its_row_only(pair: Any, tmp_path: Path) -> None:
    trainer = evaluated(distillation, pair, tmp_path)

    def fail(batch: Any) -> dict[str, Any]:
        if not trainer.model.training:
            raise RuntimeError("no numbers")
        return {}

    with pytest.warns(RuntimeWarning, match="the evaluation at step . has no row: .*no numbers"):
        rows = train(trainer, Monitor({"fails": fail}), evaluation=True)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows.evaluation == []


def rows_text(rows: list[dict[str, float]]) -> list[str]:
    return [json.dumps(row) for row in rows]


def test_the_callback_gives_the_rows_of_the_context_manager(pair: Any, tmp_path: Path) -> None:
    context_trainer, trainer = (
        evaluated(distillation, pair, tmp_path / name) for name in ("context", "callback")
    )
    expected = train(context_trainer, Monitor(FULL), evaluation=True)
    callback = trl_callback(trainer, Monitor(FULL), k=5, evaluation=True)
    trainer.add_callback(callback)
    attributes = {name for name, x in vars(trainer).items() if callable(x)}
    torch.manual_seed(11)
    trainer.train()
    assert rows_text(callback.rows) == rows_text(expected)
    assert rows_text(callback.rows.evaluation) == rows_text(expected.evaluation)
    assert {name for name, x in vars(trainer).items() if callable(x)} == attributes
    for key, value in context_trainer.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key]), key
    logs = [
        [{k: v for k, v in line.items() if "time" not in k and "second" not in k} for line in x]
        for x in (context_trainer.state.log_history, trainer.state.log_history)
    ]
    assert logs[0] == logs[1]


def test_the_callback_detaches_when_training_raises_and_attaches_again(
    pair: Any, tmp_path: Path
) -> None:
    trainer = distillation(pair, tmp_path)
    callback = trl_callback(trainer, Monitor())
    trainer.add_callback(callback)
    assert "log" not in vars(trainer)
    step = trainer.training_step

    def stop(*args: Any, **kwargs: Any) -> Any:
        assert {"log", "_compute_loss"} <= vars(trainer).keys()
        raise KeyboardInterrupt

    trainer.training_step = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not {"log", "_compute_loss", "evaluation_loop"} & vars(trainer).keys()
    trainer.training_step = step
    trainer.train()
    assert [row["step"] for row in callback.rows] == [1, 2]
    assert not {"log", "_compute_loss"} & vars(trainer).keys()


def test_the_log_shows_the_headline_and_the_file_everything(pair: Any, tmp_path: Path) -> None:
    trainer = distillation(pair, tmp_path, max_steps=1)
    plain = distillation(pair, tmp_path / "plain", max_steps=1)
    plain.train()
    train(trainer, Monitor(sinks=[to_file(tmp_path / "panel.jsonl")]))
    added = trainer.state.log_history[0].keys() - plain.state.log_history[0].keys()
    assert added <= {*LOG_COLUMNS}
    assert 15 <= len(added) <= len(HEADLINE) + 2 <= 24
    (row,) = read_rows(tmp_path / "panel.jsonl")
    assert added - {"trl/observed_steps"} < row.keys()
    assert len(row) > 100
    needs_other_fields = {"response/reward", "consistency/age"}
    needs_other_fields |= {"consistency/sampler_log_ratio_square"}
    assert HEADLINE.keys() - row.keys() == needs_other_fields
    everything = distillation(pair, tmp_path / "all", max_steps=1)
    train(everything, Monitor(), log_columns=None)
    finite = {name for name, x in row.items() if x is not None}
    assert finite - {"step"} <= everything.state.log_history[0].keys()


def test_the_report_reads_the_folder_of_the_documented_example(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd.cli.main import main

    folder = tmp_path / "runs" / "trl"
    trainer = evaluated(distillation, pair, folder)
    train(trainer, Monitor(sinks=[to_file(folder / "panel.jsonl")]), evaluation=True)
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["opd", "report", str(folder), "--out", str(page)])
    main()
    text = page.read_text()
    assert "divergence/reverse_kl" in text
    assert "eval_divergence/reverse_kl" in text
