"""Prefetched rollouts: which weights draw a step, what is saved, and errors of the thread."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.core.totals import Accumulator, Mean, compute
from opd.data.prompts import Prompts
from opd.training.prefetch import RolloutPrefetcher, TaskRollouts


class Weights:
    """Stands for an engine: sampled tokens encode the weights that sampled them."""

    def __init__(self) -> None:
        self.now = 0
        self.drawing = threading.Lock()

    def draw(self, step: int) -> list[TaskRollouts]:
        with self.drawing:
            tokens = torch.full((2, 3), 100 * self.now + step)
            time.sleep(0.005)
            assert 100 * self.now + step == int(tokens[0, 0]), "weights changed while drawing"
        index = torch.arange(2)
        view = Prompts(tokens=tokens + 1, mask=tokens > -1, index=index, answers=["a", "b"])
        prompts = Prompts(
            tokens=tokens, mask=tokens > -1, index=index, answers=["a", "b"], view=view
        )
        rollouts = Rollouts(
            tokens=tokens,
            mask=tokens > -1,
            sampler_logp=torch.zeros(2, 3) - step,
            prompt=index,
            ended=index > 0,
            reward=index.float(),
        )
        accumulators: Mapping[str, Accumulator] = {
            "won": Mean.from_values(index + step, index > -1, index)
        }
        return [TaskRollouts(prompts, rollouts, accumulators), TaskRollouts(prompts, rollouts, {})]


def make_prefetcher(weights: Weights, lag: int, steps: int = 6) -> RolloutPrefetcher:
    return RolloutPrefetcher(weights.draw, lambda: None, lag=lag, steps=steps, updates=3)


def get_steps(
    prefetcher: RolloutPrefetcher, weights: Weights, steps: range
) -> list[tuple[int, int]]:
    """Index of the weights that sampled each step's rollouts, and their age."""
    sources = []
    for step in steps:
        weights.now = step
        task_rollouts = prefetcher.get(step)
        prefetcher.launch(step)
        for prompts, rollouts, _ in task_rollouts:
            assert torch.equal(prompts.tokens, rollouts.tokens)
            assert prompts.view is not None
            assert torch.equal(prompts.view.tokens, rollouts.tokens + 1)
            assert prompts.view.mask.all()
            assert int(rollouts.tokens[0, 0]) % 100 == step
            assert rollouts.age.unique().numel() == 1
        sources.append(
            (int(task_rollouts[0][1].tokens[0, 0]) // 100, int(task_rollouts[1][1].age[0]))
        )
        prefetcher.wait()
    return sources


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_step_gets_what_the_weights_of_lag_steps_before_drew(lag: int) -> None:
    weights = Weights()
    with make_prefetcher(weights, lag) as prefetcher:
        sources = get_steps(prefetcher, weights, range(6))
    assert sources == [(max(0, step - lag), 3 * min(step, lag)) for step in range(6)]


def test_a_step_is_made_while_the_next_is_drawn() -> None:
    weights = Weights()
    with make_prefetcher(weights, 1) as prefetcher:
        prefetcher.get(0)
        with weights.drawing:
            prefetcher.launch(0)  # returns, though nothing can be drawn
        prefetcher.wait()


@pytest.mark.parametrize("lag", [1, 2])
def test_what_was_saved_is_taken_up(lag: int, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    weights = Weights()
    with make_prefetcher(weights, lag) as prefetcher:
        sources = get_steps(prefetcher, weights, range(3))
        prefetcher.save(tmp_path, 3)
        saved_rollouts = {step: future.result() for step, future in prefetcher._pending.items()}
        sources += get_steps(prefetcher, weights, range(3, 6))
    (tmp_path / "ahead" / "step_000002").mkdir()
    (tmp_path / "ahead" / "step_000001").mkdir()
    loaded_weights = Weights()
    with make_prefetcher(loaded_weights, lag) as prefetcher:
        prefetcher.load(tmp_path, 3, torch.device("cpu"))
        loaded_rollouts = {step: future.result() for step, future in prefetcher._pending.items()}
        assert loaded_rollouts.keys() == saved_rollouts.keys() == set(range(3, 3 + lag))
        for step in saved_rollouts:
            for saved, loaded in zip(saved_rollouts[step], loaded_rollouts[step], strict=True):
                parts = [(x.prompts, x.prompts.view, x.rollouts) for x in (saved, loaded)]
                for a, b in zip(*parts, strict=True):
                    assert a is not None
                    for name, x in vars(a).items():
                        if isinstance(x, Prompts):
                            continue  # one of the parts
                        is_equal = torch.equal(x, vars(b)[name]) if isinstance(x, Tensor) else None
                        assert is_equal or x == vars(b)[name], name
                assert compute(saved[2]) == compute(loaded[2])
        assert get_steps(prefetcher, loaded_weights, range(3, 6)) == sources[3:]
        prefetcher.save(tmp_path, 6)
    # the last checkpoint's stays until the next is there; older ones go
    assert {x.name for x in (tmp_path / "ahead").iterdir()} == {"step_000002", "step_000006"}


def test_what_is_too_old_is_refused(tmp_path: Path) -> None:
    weights = Weights()
    with make_prefetcher(weights, 2) as prefetcher:
        get_steps(prefetcher, weights, range(3))
        prefetcher.save(tmp_path, 3)
    with make_prefetcher(weights, 1) as prefetcher:
        prefetcher.load(tmp_path, 3, torch.device("cpu"))
        with pytest.raises(RuntimeError, match="step 3 are 6 updates old; at most 3 are allowed"):
            prefetcher.get(3)


def test_an_error_ends_what_is_under_way() -> None:
    stopped = threading.Event()

    def draw(step: int) -> list[TaskRollouts]:
        if step:
            assert stopped.wait(60)
        return []

    start_time = time.monotonic()

    def failing() -> None:
        with RolloutPrefetcher(draw, stopped.set, lag=2, steps=9, updates=1) as prefetcher:
            prefetcher.launch(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert time.monotonic() - start_time < 30


def test_an_error_of_the_thread_arrives() -> None:
    def draw(step: int) -> list[TaskRollouts]:
        raise ValueError("no server")

    with RolloutPrefetcher(draw, lambda: None, lag=1, steps=9, updates=1) as prefetcher:
        prefetcher.launch(0)
        with pytest.raises(ValueError, match="no server"):
            prefetcher.wait()
