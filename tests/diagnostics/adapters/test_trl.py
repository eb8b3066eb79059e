"""Unmodified TRL trainers for two steps: rows against independently computed values.

The reference uses the weights before each step, the tokens that the trainer sampled, and plain full
log-softmaxes.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.adapters.trl import LOG_COLUMNS, observe_trl
from diagnostics.adapters.trl_batches import prompt_ids
from diagnostics.monitor import Monitor
from tests.helpers.trl_trainers import (
    Spy,
    by_hand,
    distillation,
    gkd,
    gold,
    grpo,
    iw_opd,
    questions,
    sdft,
    sdpo,
)

pytestmark = pytest.mark.filterwarnings("error:step .* has no row:RuntimeWarning")

MAKERS = {
    "distillation": (distillation, 0.8),
    "gkd": (gkd, 1.0),
    "gold": (gold, 0.9),
    "iw_opd": (iw_opd, 0.7),
    "grpo": (grpo, 1.0),
    "sdpo": (sdpo, 0.8),
    "sdft": (sdft, 0.8),
}
"""Each with the temperature of its loss."""


def run_training(
    trainer: Any, monitor: Monitor | None = None
) -> tuple[list[dict], list[dict], Any]:
    """Train; return the rows, the trainer's log, and the trained weights."""
    torch.manual_seed(11)
    if monitor is None:
        trainer.train()
        return [], trainer.state.log_history, trainer.model.state_dict()
    with observe_trl(trainer, monitor, k=5, max_logits_per_chunk=300) as rows:
        trainer.train()
    return rows, trainer.state.log_history, trainer.model.state_dict()


@pytest.mark.parametrize("name", MAKERS)
def test_rows_equal_dense_numbers_and_training_its_bits(
    pair: Any, tmp_path: Path, name: str
) -> None:
    student, teacher, _ = pair
    make, temperature = MAKERS[name]
    unobserved_run = run_training(make(pair, tmp_path / "alone"))
    trainer = make(pair, tmp_path / "watched")
    if name in ("sdpo", "sdft"):  # teacher: the initial student with a longer prompt
        teacher = student
    spy, monitor = Spy(trainer, student), Monitor()
    attributes_before = {k for k in vars(trainer) if callable(vars(trainer)[k])}
    rows, log, weights = run_training(trainer, monitor)
    assert {k for k in vars(trainer) if callable(vars(trainer)[k])} == attributes_before
    for key, value in unobserved_run[2].items():
        assert torch.equal(value, weights[key]), key
    assert [row["step"] for row in rows] == [1, 2]
    truncated: list[float] = []
    for row, log_line, unobserved_line in zip(rows, log, unobserved_run[1], strict=False):
        expected = by_hand(list(spy.dense(row["step"], teacher, temperature)))
        truncated.append(expected["response/truncated_share"])
        dense = ("reverse_kl", "outside_topk", "outside_topk_expected", "overlap_ratio")
        for key, value in expected.items():
            if name == "grpo" and key.removeprefix("divergence/") in dense:
                assert key not in row
            elif math.isnan(value):
                assert math.isnan(row[key]), key
            else:
                assert row[key] == pytest.approx(value, rel=2e-4, abs=1e-6), key
                assert key not in LOG_COLUMNS or log_line[key] == pytest.approx(row[key]), key
        assert all(math.isfinite(x) for x in log_line.values() if isinstance(x, float))
        assert {k: v for k, v in log_line.items() if k in unobserved_line and "time" not in k} == {
            k: v for k, v in unobserved_line.items() if "time" not in k
        }
        assert log_line["trl/observed_steps"] == 1
    assert 0 < sum(truncated) < 2
    if name in ("grpo", "sdpo", "distillation"):  # TRL's own lengths of generated responses
        for row, log_line in zip(rows, log, strict=False):
            assert row["response/length"] == pytest.approx(log_line["completions/mean_length"])
    if name == "distillation":  # beta 1: its loss is the reverse KL at its temperature
        for row, log_line in zip(rows, log, strict=False):
            assert log_line["loss"] == pytest.approx(row["divergence/reverse_kl"], rel=1e-3)
            assert log_line["entropy"] == pytest.approx(row["divergence/student_entropy"], rel=0.1)
    assert monitor.missing["sampler_ratio"].endswith("has no sampler_logp")
    graded = name in ("grpo", "sdpo")
    assert monitor.missing.get("reward", "").endswith("has no reward") is not graded
    assert ("response/graded_share" in rows[0]) is graded


def test_only_what_the_student_sampled_is_measured(pair: Any, tmp_path: Path) -> None:
    for changes in ({"lmbda": -1.0}, {"lmbda": -1.0, "seq_kd": True}):
        trainer = gkd(pair, tmp_path / "off", **{**changes, "lmbda": 0.0})
        trainer.lmbda = -1.0  # never on policy: random() <= 0 could still happen
        rows, log, _ = run_training(trainer, Monitor())
        assert rows == [{"step": i, "trl/on_policy_share": 0.0} for i in (1, 2)]
        assert log[0]["trl/on_policy_share"] == 0.0


def test_cadence_evaluation_and_what_is_put_back(pair: Any, tmp_path: Path) -> None:
    trainer = distillation(pair, tmp_path / "run")
    trainer.eval_dataset = questions("prompt").select(range(2))
    with observe_trl(trainer, Monitor(interval=2)) as rows:
        trainer.train()
        trainer.evaluate()
    assert [row["step"] for row in rows] == [2]
    assert "divergence/k1" not in trainer.state.log_history[0]
    assert trainer.state.log_history[1]["divergence/k1"] == rows[0]["divergence/k1"]
    with pytest.raises(RuntimeError, match="stop"), observe_trl(trainer, Monitor()):
        raise RuntimeError("stop")
    assert not {"log", "_compute_loss"} & vars(trainer).keys()


def test_evaluation_between_steps_is_not_measured(pair: Any, tmp_path: Path) -> None:
    trainer = distillation(pair, tmp_path / "run")
    trainer.eval_dataset = questions("prompt").select(range(3))
    step = trainer.training_step

    def evaluate_then_step(*args: Any) -> torch.Tensor:
        trainer.evaluate()
        trainer.model.train()
        return step(*args)

    trainer.training_step = evaluate_then_step
    with observe_trl(trainer, Monitor()) as rows:
        trainer.train()
    responses = [row["divergence/tokens"] / row["response/length"] for row in rows]
    assert responses == pytest.approx([4, 4])


def test_a_prompt_is_the_same_whatever_its_padding() -> None:
    tokens = torch.tensor([[0, 5, 6], [5, 6, 0], [9, 5, 6], [0, 5, 6]])
    not_padding = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]])
    ids = prompt_ids(tokens, not_padding).tolist()
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_a_path_that_hides_the_logits_is_refused(pair: Any, tmp_path: Path) -> None:
    trainer = gkd(pair, tmp_path / "fused")
    compute = trainer.generalized_jsd_loss
    trainer.use_liger_gkd_loss = True
    with pytest.raises(ValueError, match="use_liger_gkd_loss is set: the fused loss"):  # noqa: SIM117
        with observe_trl(trainer):
            pass
    del trainer.use_liger_gkd_loss

    def fused(model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        logits = model(inputs["input_ids"]).logits
        return compute(logits, logits.detach(), inputs["labels"])

    trainer.compute_loss = fused
    with pytest.raises(RuntimeError, match="generalized_jsd_loss 0 times, expected once"):
        run_training(trainer, Monitor())
    with pytest.raises(ValueError, match="beta 0 has no reference model"):
        run_training(grpo(pair, tmp_path / "grpo", beta=0.0), Monitor())
    with pytest.raises(ValueError, match="Monitor is not supported; supported: Distil"):  # noqa: SIM117
        with observe_trl(Monitor()):
            pass
