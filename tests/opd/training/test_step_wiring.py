"""What a step is wired to: its own noise, denominator, learning rate, and teacher."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.records.batch_files import load
from opd.objectives.reduction import DENOMINATORS
from opd.runtime.seeds import PROBE, ROLLOUT
from opd.training import step as steps
from opd.training import update as updates
from opd.training.optimizer import Optimizer
from opd.training.state import TaskRun
from opd.training.step import roll_out
from opd.training.train import train
from tests.opd.training.test_train import rows, settings


@pytest.fixture
def run_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train, and the `Run` whose steps were taken."""

    def trained(config: Any) -> TaskRun:
        seen: list[TaskRun] = []
        honest = steps.update

        def kept(parts: Any, step: int) -> Any:
            seen.append(parts[0].run)
            return honest(parts, step)

        monkeypatch.setattr(steps, "update", kept)
        train(config)
        return seen[0]

    return trained


def test_steps_and_purposes_have_noise_of_their_own(tiny_pair, tmp_path: Path, run_of) -> None:
    """The same prompts, sampled for another step or for the probe, get other responses."""
    run = run_of(settings(tiny_pair, tmp_path / "run", steps=1))
    drawn = [
        roll_out(run, step, 0, 1.0, purpose)[1].tokens
        for step, purpose in ((0, ROLLOUT), (0, ROLLOUT), (1, ROLLOUT), (0, PROBE), (1, PROBE))
    ]
    assert torch.equal(drawn[0], drawn[1])
    for first, second in itertools.combinations(drawn[1:], 2):
        assert not torch.equal(first[:, :4], second[:, :4])


def test_a_probe_of_a_nucleus_draws_noise_of_its_own(
    tiny_pair, tmp_path: Path, monkeypatch
) -> None:
    purposes = []
    honest = steps.roll_out

    def watched(*given: Any, **named: Any) -> Any:
        purposes.append((named.get("purpose", given[-1]), named.get("top_p", given[3:4])))
        return honest(*given, **named)

    monkeypatch.setattr(steps, "roll_out", watched)
    train(settings(tiny_pair, tmp_path / "run", steps=1, top_p=0.8, probe_every=1))
    assert purposes == [(ROLLOUT, (0.8,)), (PROBE, 1.0)]
    assert ROLLOUT != PROBE


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_step_has_the_rate_of_its_own_index(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    rates, honest = [], Optimizer.step

    def watched(self: Optimizer, rate: float, clip: float) -> Any:
        rates.append(rate)
        return honest(self, rate, clip)

    monkeypatch.setattr(Optimizer, "step", watched)
    config = settings(tiny_pair, tmp_path / "run", lr=8e-6, warmup=2, schedule=schedule, steps=4)
    found = [row["lr"] for row in rows(train(config))]
    after = [8e-6, 4e-6] if schedule == "cosine" else [8e-6, 8e-6]
    assert found == pytest.approx([8e-6 / 3, 16e-6 / 3, *after])
    assert rates == found


@pytest.mark.parametrize("name", DENOMINATORS)
def test_an_update_divides_by_what_it_trains_on(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Two updates on two prompts each: tokens, responses and prompts of that half alone."""
    seen, honest = [], updates.shared_out

    def watched(part: Any) -> Any:
        seen.append(honest(part))
        return seen[-1]

    monkeypatch.setattr(updates, "shared_out", watched)
    config = settings(
        tiny_pair, tmp_path / "run", steps=1, prompts_per_step=4, updates_per_batch=2, save_batch_every=1,
        denominator=name, mask=tuple(f"id:{token}" for token in range(20, 140)),
    )  # fmt: skip
    batch = load(train(config) / "batches" / "step_000000.safetensors")
    tokens = batch.mask.sum(1).tolist()
    for work, half in zip(seen[0], (range(4), range(4, 8)), strict=True):
        assert work.rows == list(half)
        by_prompt = {
            i: sum(tokens[j] for j in half if batch.prompt[j] == batch.prompt[i]) for i in half
        }
        want = {
            "token_mean": [sum(tokens[i] for i in half)] * 4,
            "sequence_sum": [4] * 4,
            "sequence_mean": [4 * max(1, tokens[i]) for i in half],
            "group_mean": [2 * max(1, by_prompt[i]) for i in half],
        }[name]
        assert work.denominator[work.rows].tolist() == want
        whole = torch.tensor(want)[:, None].expand(work.weight[work.rows].shape)
        torch.testing.assert_close(work.weight[work.rows], 1 / whole)


def test_an_update_without_tokens_is_named(tiny_pair, tmp_path: Path) -> None:
    """One token of the whole step is kept, so that three of four updates have none."""
    config = settings(
        tiny_pair,
        tmp_path / "run",
        steps=1,
        prompts_per_step=4,
        updates_per_batch=4,
        entropy_top_fraction=1e-9,
    )
    with pytest.raises(InvalidInput, match=r"update \d of 4 has no supervised token, of 1 in the"):
        train(config)


def test_a_moving_average_does_not_follow_a_refused_step(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three updates is refused; the teacher moves with the two that were taken."""
    followed, outcomes = [], []
    honest_follow, honest_step = updates.follow, Optimizer.step

    def watched(*given: Any) -> None:
        followed.append(len(outcomes))
        honest_follow(*given)

    def refusing(self: Optimizer, rate: float, clip: float) -> Any:
        if len(outcomes) == 1:
            for master in self.masters:
                master.grad.fill_(float("nan"))
        outcomes.append(honest_step(self, rate, clip))
        return outcomes[-1]

    monkeypatch.setattr(updates, "follow", watched)
    monkeypatch.setattr(Optimizer, "step", refusing)
    config = settings(
        (tiny_pair[0], Path("ema")), tmp_path / "run", steps=3, reward_weight=1.0,
        objective="sampled_token",
    )  # fmt: skip
    train(config)
    assert [taken for _, taken in outcomes] == [True, False, True]
    assert followed == [1, 3]


def test_the_ends_of_the_generation_config_end_a_response(
    tiny_pair, tmp_path: Path, run_of
) -> None:
    """An id that only the generation config names stops sampling, and the response has ended."""
    from transformers import GenerationConfig

    student = tmp_path / "student"
    shutil.copytree(tiny_pair[0], student)
    extra = list(range(100, 200))
    generation = GenerationConfig.from_pretrained(student)
    generation.eos_token_id = extra
    generation.save_pretrained(student)
    config = settings((student, tiny_pair[1]), tmp_path / "run", steps=1, save_batch_every=1)
    run = run_of(config)
    assert set(extra) < set(run.pair.eos)
    batch = load(Path(config.out) / "batches" / "step_000000.safetensors")
    ends = torch.isin(batch.tokens, torch.tensor(run.pair.eos)) & batch.sampled
    last = batch.sampled & (batch.sampled.cumsum(1) == batch.sampled.sum(1, keepdim=True))
    assert bool(ends.any())
    assert not bool((ends & ~last).any())
    assert torch.equal(batch.ended, ends.any(1))
