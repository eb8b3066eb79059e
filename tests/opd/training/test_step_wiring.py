"""What a step uses: its own noise, denominator, learning rate, teacher and EOS ids."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.records.batch_files import load_batch
from opd.objectives.reduction import DENOMINATORS
from opd.runtime.seeds import PROBE, ROLLOUT
from opd.teachers.teacher import EmaTeacher
from opd.training import step as steps
from opd.training import train as trainer
from opd.training.optimizer import Optimizer
from opd.training.state import TrainState
from opd.training.step import roll_out
from opd.training.train import train
from tests.helpers.runs import rows, settings


@pytest.fixture
def run_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train, and return the `TrainState` of its steps."""

    def train_and_get_state(config: Any) -> TrainState:
        states: list[TrainState] = []
        original = trainer.run_steps

        def recording_steps(state: TrainState, log: Any) -> None:
            states.append(state)
            original(state, log)

        monkeypatch.setattr(trainer, "run_steps", recording_steps)
        train(config)
        return states[0]

    return train_and_get_state


def test_steps_and_purposes_have_noise_of_their_own(tiny_pair, tmp_path: Path, run_of) -> None:
    """The same prompts get other responses in another step or for the gradient probe."""
    state = run_of(settings(tiny_pair, tmp_path / "run", steps=1))
    samples = [
        roll_out(state.tasks[0], state.engine, step, 0, 1.0, purpose).rollouts.tokens
        for step, purpose in ((0, ROLLOUT), (0, ROLLOUT), (1, ROLLOUT), (0, PROBE), (1, PROBE))
    ]
    assert torch.equal(samples[0], samples[1])
    for first, second in itertools.combinations(samples[1:], 2):
        assert not torch.equal(first[:, :4], second[:, :4])


def test_a_probe_of_a_nucleus_draws_noise_of_its_own(
    tiny_pair, tmp_path: Path, monkeypatch
) -> None:
    purposes = []
    original = steps.roll_out

    def recording_roll_out(*args: Any, **kwargs: Any) -> Any:
        purposes.append((kwargs.get("purpose", args[-1]), kwargs.get("top_p", args[4:5])))
        return original(*args, **kwargs)

    for module in (steps, trainer):
        monkeypatch.setattr(module, "roll_out", recording_roll_out)
    train(settings(tiny_pair, tmp_path / "run", steps=1, top_p=0.8, probe_every=1))
    assert purposes == [(ROLLOUT, (0.8,)), (PROBE, 1.0)]
    assert ROLLOUT != PROBE


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_step_has_the_rate_of_its_own_index(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    rates, original = [], Optimizer.step

    def recording_step(self: Optimizer, rate: float, clip: float) -> Any:
        rates.append(rate)
        return original(self, rate, clip)

    monkeypatch.setattr(Optimizer, "step", recording_step)
    config = settings(tiny_pair, tmp_path / "run", lr=8e-6, warmup=2, schedule=schedule, steps=4)
    row_rates = [row["lr"] for row in rows(train(config).folder)]
    decayed = [8e-6, 4e-6] if schedule == "cosine" else [8e-6, 8e-6]
    assert row_rates == pytest.approx([8e-6 / 3, 16e-6 / 3, *decayed])
    assert rates == row_rates


@pytest.mark.parametrize("name", DENOMINATORS)
def test_an_update_divides_by_what_it_trains_on(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Two updates on two prompts each: denominators count that half of the batch only."""
    losses, original = [], trainer.prepare_loss

    def recording_loss(*args: Any) -> Any:
        losses.append(original(*args))
        return losses[-1]

    monkeypatch.setattr(trainer, "prepare_loss", recording_loss)
    config = settings(
        tiny_pair, tmp_path / "run", steps=1, prompts_per_step=4, updates_per_batch=2,
        save_batch_every=1, denominator=name, mask=tuple(f"id:{token}" for token in range(20, 140)),
    )  # fmt: skip
    batch = load_batch(train(config).folder / "batches" / "step_000000.safetensors")
    tokens = batch.mask.sum(1).tolist()
    (loss,) = losses
    for rows_of_update, half in zip(loss.rows, (range(4), range(4, 8)), strict=True):
        assert rows_of_update == list(half)
        by_prompt = {
            i: sum(tokens[j] for j in half if batch.prompt[j] == batch.prompt[i]) for i in half
        }
        expected = {
            "token_mean": [sum(tokens[i] for i in half)] * 4,
            "sequence_sum": [4] * 4,
            "sequence_mean": [4 * max(1, tokens[i]) for i in half],
            "group_mean": [2 * max(1, by_prompt[i]) for i in half],
        }[name]
        assert loss.denominator[rows_of_update].tolist() == expected
        weight = loss.weight[rows_of_update]
        denominators = torch.tensor(expected)[:, None].expand(weight.shape)
        torch.testing.assert_close(weight, 1 / denominators)


def test_an_update_without_tokens_is_named(tiny_pair, tmp_path: Path) -> None:
    """One token of the step is supervised, so three of four updates have none."""
    config = settings(
        tiny_pair,
        tmp_path / "run",
        steps=1,
        prompts_per_step=4,
        updates_per_batch=4,
        entropy_top_fraction=1e-9,
    )
    with pytest.raises(
        InvalidInput, match=r"update \d of 4 has no supervised token \(the step has 1\)"
    ):
        train(config)


def test_a_moving_average_does_not_follow_a_refused_step(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three updates is skipped; the teacher is updated with the other two."""
    follow_steps, outcomes = [], []
    honest_follow, honest_step = EmaTeacher.update, Optimizer.step

    def recording_follow(*args: Any) -> None:
        follow_steps.append(len(outcomes))
        honest_follow(*args)

    def failing_step(self: Optimizer, rate: float, clip: float) -> Any:
        if len(outcomes) == 1:
            for master in self.master_weights:
                master.grad.fill_(float("nan"))
        outcomes.append(honest_step(self, rate, clip))
        return outcomes[-1]

    monkeypatch.setattr(EmaTeacher, "update", recording_follow)
    monkeypatch.setattr(Optimizer, "step", failing_step)
    config = settings(
        (tiny_pair[0], Path("ema")), tmp_path / "run", steps=3, reward_weight=1.0,
        objective="sampled_token",
    )  # fmt: skip
    train(config)
    assert [applied for _, applied in outcomes] == [True, False, True]
    assert follow_steps == [1, 3]


def test_the_ends_of_the_generation_config_end_a_response(
    tiny_pair, tmp_path: Path, run_of
) -> None:
    """An EOS id that only the generation config names ends sampling and the response."""
    from transformers import GenerationConfig

    student = tmp_path / "student"
    shutil.copytree(tiny_pair[0], student)
    extra = list(range(100, 200))
    generation = GenerationConfig.from_pretrained(student)
    generation.eos_token_id = extra
    generation.save_pretrained(student)
    config = settings((student, tiny_pair[1]), tmp_path / "run", steps=1, save_batch_every=1)
    (task,) = run_of(config).tasks
    assert set(extra) < set(task.pair.eos)
    batch = load_batch(Path(config.out) / "batches" / "step_000000.safetensors")
    ends = torch.isin(batch.tokens, torch.tensor(task.pair.eos)) & batch.sampled
    last = batch.sampled & (batch.sampled.cumsum(1) == batch.sampled.sum(1, keepdim=True))
    assert bool(ends.any())
    assert not bool((ends & ~last).any())
    assert torch.equal(batch.ended, ends.any(1))
