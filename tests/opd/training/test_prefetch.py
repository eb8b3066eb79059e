"""Rollouts ahead of the update: how old they are, from which weights, and that ratios repair it."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.core.totals import Accumulator, Mean, read
from diagnostics.records.batch_files import load
from opd.config.settings import Config
from opd.data.chain_task import problems
from opd.data.prompts import Prompts, encode
from opd.models.forward import response_hidden
from opd.models.loading import load as load_model
from opd.objectives.factory import make
from opd.scoring.loss import loss_from_hidden
from opd.serving import json_endpoint
from opd.teachers.pair import load_pair
from opd.training.prefetch import RolloutPrefetcher, TaskRollouts
from opd.training.train import train
from tests.helpers.fake_rollout_server import SamplingServer
from tests.helpers.fake_teacher_server import serving
from tests.opd.rollouts.test_vllm_servers import restarting
from tests.opd.teachers.test_factory import interrupted_after
from tests.opd.training.test_train import rows, settings

# --- the order of things ------------------------------------------------------------------------


class Weights:
    """Stands for an engine: what is drawn says which weights drew it."""

    def __init__(self) -> None:
        self.now = 0
        self.drawing = threading.Lock()

    def draw(self, step: int) -> TaskRollouts:
        with self.drawing:
            drawn = torch.full((2, 3), 100 * self.now + step)
            time.sleep(0.005)
            assert 100 * self.now + step == int(drawn[0, 0]), "weights changed while drawing"
        index = torch.arange(2)
        prompts = Prompts(tokens=drawn, mask=drawn > -1, index=index, answers=["a", "b"])
        rollouts = Rollouts(
            tokens=drawn,
            mask=drawn > -1,
            sampler_logp=torch.zeros(2, 3) - step,
            prompt=index,
            ended=index > 0,
            reward=index.float(),
        )
        won: Mapping[str, Accumulator] = {"won": Mean.of(index + step, index > -1, index)}
        return [(prompts, rollouts, won), (prompts, rollouts, {})]


def ahead_of(weights: Weights, depth: int, steps: int = 6) -> RolloutPrefetcher:
    return RolloutPrefetcher(weights.draw, lambda: None, depth=depth, steps=steps, updates=3)


def taken(ahead: RolloutPrefetcher, weights: Weights, steps: range) -> list[tuple[int, int]]:
    """Of each step the weights that its rollouts are of, and their age."""
    found = []
    for step in steps:
        weights.now = step
        drawn = ahead.take(step)
        ahead.begin(step)
        for prompts, rollouts, _ in drawn:
            assert torch.equal(prompts.tokens, rollouts.tokens)
            assert int(rollouts.tokens[0, 0]) % 100 == step
            assert rollouts.age.unique().numel() == 1
        found.append((int(drawn[0][1].tokens[0, 0]) // 100, int(drawn[1][1].age[0])))
        ahead.settle()
    return found


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_step_gets_what_the_weights_of_depth_steps_before_drew(depth: int) -> None:
    weights = Weights()
    with ahead_of(weights, depth) as ahead:
        found = taken(ahead, weights, range(6))
    assert found == [(max(0, s - depth), 3 * min(s, depth)) for s in range(6)]


def test_a_step_is_made_while_the_next_is_drawn() -> None:
    weights = Weights()
    with ahead_of(weights, 1) as ahead:
        ahead.take(0)
        with weights.drawing:
            ahead.begin(0)  # returns, though nothing can be drawn
        ahead.settle()


@pytest.mark.parametrize("depth", [1, 2])
def test_what_was_saved_is_taken_up(depth: int, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    weights = Weights()
    with ahead_of(weights, depth) as ahead:
        whole = taken(ahead, weights, range(3))
        ahead.save(tmp_path, 3)
        kept = {step: future.result() for step, future in ahead._coming.items()}
        whole += taken(ahead, weights, range(3, 6))
    (tmp_path / "ahead" / "step_000002").mkdir()
    (tmp_path / "ahead" / "step_000001").mkdir()
    other = Weights()
    with ahead_of(other, depth) as ahead:
        ahead.load(tmp_path, 3, torch.device("cpu"))
        again = {step: future.result() for step, future in ahead._coming.items()}
        assert again.keys() == kept.keys() == set(range(3, 3 + depth))
        for step in kept:
            for one, mine in zip(kept[step], again[step], strict=True):
                for a, b in zip(one[:2], mine[:2], strict=True):
                    for name, x in vars(a).items():
                        same = torch.equal(x, vars(b)[name]) if isinstance(x, Tensor) else None
                        assert same or x == vars(b)[name], name
                assert read(one[2]) == read(mine[2])
        assert taken(ahead, other, range(3, 6)) == whole[3:]
        ahead.save(tmp_path, 6)
    # the last checkpoint's stays until the next is there; older ones go
    assert {x.name for x in (tmp_path / "ahead").iterdir()} == {"step_000002", "step_000006"}


def test_what_is_too_old_is_refused(tmp_path: Path) -> None:
    weights = Weights()
    with ahead_of(weights, 2) as ahead:
        taken(ahead, weights, range(3))
        ahead.save(tmp_path, 3)
    with ahead_of(weights, 1) as ahead:
        ahead.load(tmp_path, 3, torch.device("cpu"))
        with pytest.raises(RuntimeError, match="step 3 are 6 updates old, at most 3 are allowed"):
            ahead.take(3)


def test_an_error_ends_what_is_under_way() -> None:
    ended = threading.Event()

    def draw(step: int) -> TaskRollouts:
        if step:
            assert ended.wait(60)
        return []

    began = time.monotonic()

    def failing() -> None:
        with RolloutPrefetcher(draw, ended.set, depth=2, steps=9, updates=1) as ahead:
            ahead.begin(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert time.monotonic() - began < 30


def test_an_error_of_the_thread_arrives() -> None:
    def draw(step: int) -> TaskRollouts:
        raise ValueError("no server")

    with RolloutPrefetcher(draw, lambda: None, depth=1, steps=9, updates=1) as ahead:
        ahead.begin(0)
        with pytest.raises(ValueError, match="no server"):
            ahead.settle()


# --- runs ---------------------------------------------------------------------------------------

HOW = {
    "engine": "servers",
    "objective": "sampled_token",
    "ratio": "token",
    "lr": 1e-3,
    "max_response": 6,
    "eval_every": 0,
    "eval_problems": 1,
    "save_batch_every": 1,
    "save_every": 1,
}


@pytest.fixture
def servers(
    tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[list[SamplingServer], tuple[str, ...]]]:
    monkeypatch.setattr(json_endpoint, "FIRST_WAIT", 0.02)
    two = [SamplingServer(tiny_pair[1]) for _ in range(2)]
    with ExitStack() as stack:
        yield two, tuple(stack.enter_context(serving(one)) for one in two)


def served(pair: tuple[Path, Path], out: Path, urls: tuple[str, ...], **changes: object) -> Config:
    return settings(pair, out, **(HOW | {"rollout_servers": urls} | changes))


def saved(folder: Path, step: int) -> ScoredRollouts:
    batch = load(folder / "batches" / f"step_{step:06d}.safetensors")
    assert isinstance(batch, ScoredRollouts)
    return batch


def asked_of(folder: Path, config: Config, step: int) -> Prompts:
    """The prompts of a step of the lab's task."""
    from opd.training.setup import load as load_task

    pair = load_pair(config.student, config.teacher, "cpu", "float32")
    task = load_task(config, pair)
    chosen = task.train(step, config.prompts_per_step)
    return encode(pair.tokenizer, chosen, config.group_size, config.max_prompt)


def logp_under(folder: Path, prompts: Prompts, batch: ScoredRollouts) -> Tensor:
    """(B, T) of the sampled tokens under the final model of a run."""
    return row_by_row(load_model(str(folder), "cpu", "float32")[1], prompts, batch)


def row_by_row(network: Any, prompts: Prompts, batch: ScoredRollouts) -> Tensor:
    """(B, T) log-probabilities of the sampled tokens, without padding."""
    out = torch.zeros_like(batch.sampler_logp)
    for i, (ids, real) in enumerate(zip(prompts.tokens, prompts.mask, strict=True)):
        prompt, response = ids[real], batch.tokens[i][batch.mask[i]]
        with torch.no_grad():
            logits = network(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        out[i, : len(response)] = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
    return out


def test_the_sampler_is_the_student_of_so_many_steps_before(
    tiny_pair, servers, tmp_path: Path
) -> None:
    """Batches of steps 0 to 3 against the weights that runs of 1, 2 and 3 steps end with."""
    _, urls = servers
    how = {"rollout_lag": 2, "updates_per_batch": 3, "objective": "sampled_token_weighted"}
    config = served(tiny_pair, tmp_path / "run", urls[:1], **how)
    folder = train(config)
    found = rows(folder)
    assert [row["consistency/age"] for row in found] == [0, 3, 6, 6]
    assert [row["consistency/stale_share"] for row in found] == [0, 1, 1, 1]
    weights = [tiny_pair[0]]
    for n in (1, 2, 3):
        weights.append(train(replace(config, out=str(tmp_path / str(n)), steps=n)) / "final")
    for step in range(4):
        batch, prompts = saved(folder, step), asked_of(folder, config, step)
        close = {"atol": 2e-5, "rtol": 1e-5}
        of = max(0, step - 2)
        torch.testing.assert_close(
            batch.sampler_logp, logp_under(weights[of], prompts, batch), **close
        )
        torch.testing.assert_close(
            batch.student_logp, logp_under(weights[step], prompts, batch), **close
        )
        gap = (batch.student_logp - batch.sampler_logp).abs().max()
        assert (float(gap) > 1e-2) == (step > 0)
        square = found[step]["consistency/sampler_log_ratio_square"]
        assert (square > 1e-6) == (step > 0)
    assert not list((folder / "weights").iterdir())


def test_without_it_a_run_is_on_policy(tiny_pair, servers, tmp_path: Path) -> None:
    _, urls = servers
    config = served(tiny_pair, tmp_path / "run", urls, ratio="none")
    folder = train(config)
    assert all(row["consistency/age"] == 0 for row in rows(folder))
    assert all(row["consistency/sampler_log_ratio_square"] < 1e-8 for row in rows(folder))
    again = train(served(tiny_pair, tmp_path / "one", urls[:1], ratio="none"))
    assert rows(again) == rows(folder)


@pytest.mark.parametrize(
    "changes", [{"rollout_lag": 1}, {"rollout_lag": 2, "full_metrics_every": 3}]
)
def test_a_run_that_was_cut_goes_on_to_the_same_rows(
    tiny_pair, servers, tmp_path: Path, changes: dict[str, object]
) -> None:
    _, urls = servers
    config = served(tiny_pair, tmp_path / "whole", urls[:1], steps=5, save_every=2, **changes)
    whole = train(config)
    cut = replace(config, out=str(tmp_path / "cut"))
    for steps in (3, 4):
        with pytest.raises(KeyboardInterrupt), interrupted_after(steps):
            train(cut)
    train(cut)
    assert rows(Path(cut.out)) == rows(whole)


def test_restarts_in_the_middle_change_nothing(tiny_pair, servers, tmp_path: Path) -> None:
    two, urls = servers
    config = served(tiny_pair, tmp_path / "whole", urls, rollout_lag=1)
    whole, each = train(config), len(two[0].asked) // 6
    two[0].faults = [*[lambda body: (200, {}, body)] * (4 * each + 2), restarting(two[0])]
    two[1].faults = [*[lambda body: (200, {}, body)] * (3 * each + 1), restarting(two[1])]
    before = [len(one.loads) for one in two]
    again = train(replace(config, out=str(tmp_path / "again")))
    assert rows(again) == rows(whole)
    loads = [len(one.loads) - n for one, n in zip(two, before, strict=True)]
    assert max(loads) > before[0], "nobody was restarted"


def test_an_objective_spared_whole_distributions_still_scores_the_present_student(
    tiny_pair, servers, tmp_path: Path
) -> None:
    """At steps between those that measure, `score_support` would take the sampler's word."""
    _, urls = servers
    how = {"objective": "teacher_topk", "ratio": "none", "full_metrics_every": 9, "rollout_lag": 1}
    folder = train(served(tiny_pair, tmp_path / "run", urls, **how))
    found = rows(folder)
    assert found[0]["consistency/age"] == 0
    assert all(row["consistency/sampler_log_ratio_square"] > 1e-6 for row in found[1:])


def test_what_would_be_wrong_in_silence_is_refused(tiny_pair, tmp_path: Path) -> None:
    nowhere = ("http://127.0.0.1:9/v1",)
    for changes, words in (
        ({"engine": "hf", "rollout_servers": ()}, "rollout_lag is 1; it must be 0 unless"),
        ({"engine": "hf"}, "rollout_servers is .* it must be addresses"),
        ({"rollout_servers": ()}, "rollout_servers is"),
        ({"rollout_lag": -1}, "rollout_lag is -1; it must be not negative"),
        ({"ratio": "none"}, "sampled_token would weigh tokens of older weights"),
        ({"objective": "teacher_topk", "ratio": "none", "reward_weight": 0.5}, "set ratio token"),
    ):
        with pytest.raises(ValueError, match=words):
            train(served(tiny_pair, tmp_path / "run", nowhere, **({"rollout_lag": 1} | changes)))


def test_vllm_in_several_processes_is_refused(tiny_pair, tmp_path: Path, monkeypatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="takes weights from one process"):
        train(settings(tiny_pair, tmp_path / "run", engine="vllm"))


# --- importance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
def test_token_ratios_make_stale_samples_unbiased_at_their_prefixes(
    tiny_pair, updates: int
) -> None:
    """Every token after three prefixes, as often as the older student draws it, enumerated.

    sum_y old(y) (new(y) / old(y)) cost(y) grad log new(y) is the gradient of KL(new || teacher) at
    the prefix, for every weight of a real network; without the ratio it is another vector.
    """
    name = "sampled_token" if updates == 1 else "sampled_token_weighted"
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    for model in (pair.student, pair.teacher):
        model.network.double()
    new, size = pair.student.network, pair.student.vocabulary
    prompts = encode(pair.tokenizer, problems("train", 3, 0), size, 64)
    with torch.no_grad():
        theirs, old = following(pair.teacher.network, prompts), following(new, prompts)
        for i, x in enumerate(new.parameters()):  # an update
            x += 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        now = following(new, prompts)
    y = torch.arange(size).repeat(3)[:, None]

    def at(logp: Tensor) -> Tensor:
        return logp.gather(-1, y)

    batch = ScoredRollouts(
        tokens=y,
        mask=torch.ones_like(y, dtype=torch.bool),
        sampler_logp=at(old),
        student_logp=at(now),
        teacher_logp=at(theirs),
        prompt=prompts.index,
        ended=torch.ones(len(y), dtype=torch.bool),
        age=torch.ones(len(y), dtype=torch.long),
    )
    found = {}
    for ratio in ("token", "none"):
        objective = make(name, ratio=ratio)
        new.zero_grad()
        loss_from_hidden(
            pair,
            objective,
            response_hidden(pair.student, prompts, batch),
            None,
            batch,
            objective.credit(batch),
            (batch.sampler_logp.exp() * objective.ratio(batch))[batch.mask],
            max_logits_per_chunk=1 << 24,
        ).backward()
        found[ratio] = [x.grad.clone() for x in new.parameters()]
    new.zero_grad()
    live = following(new, prompts)[::size]
    (live.exp() * (live - theirs[::size])).sum().backward()
    exact = [x.grad for x in new.parameters()]
    away = {
        ratio: sum(float((a - b).square().sum()) for a, b in zip(mine, exact, strict=True)) ** 0.5
        for ratio, mine in found.items()
    }
    length = sum(float(x.square().sum()) for x in exact) ** 0.5
    assert away["token"] < 1e-5 * length
    assert away["none"] > 0.05 * length


def following(network, prompts: Prompts) -> Tensor:
    """(B, V) log-probabilities of what comes after each prompt, one pass for each distinct one."""
    first = [prompts.index.tolist().index(i) for i in dict.fromkeys(prompts.index.tolist())]
    size = len(prompts) // len(first)
    found = [
        network(prompts.tokens[i][prompts.mask[i]][None]).logits[0, -1].log_softmax(-1)
        for i in first
    ]
    return torch.stack(found).repeat_interleave(size, 0)
