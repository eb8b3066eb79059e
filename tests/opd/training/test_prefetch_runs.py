"""Runs with prefetched rollouts: policy lag, sampling weights, and correction by ratios."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.records.batch_files import load_batch
from opd.config.settings import Config
from opd.data.chain_task import problems
from opd.data.prompts import Prompts, encode_prompts
from opd.models.forward import response_hidden_states
from opd.models.loading import load_model
from opd.objectives.factory import make_objective
from opd.objectives.inputs import TokenInputs
from opd.scoring.loss import loss_from_hidden
from opd.serving import json_endpoint
from opd.teachers.pair import load_pair
from opd.training.train import train
from tests.helpers.runs import rows, settings
from tests.helpers.servers.rollout_server import FakeRolloutServer
from tests.helpers.servers.teacher_server import serve
from tests.opd.rollouts.test_vllm_servers import restart_after_answer
from tests.opd.teachers.test_factory import InterruptedAfter

SERVER_SETTINGS = {
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


@contextmanager
def serve_two(
    pair: tuple[Path, Path],
) -> Iterator[tuple[list[FakeRolloutServer], tuple[str, ...]]]:
    """Serve rollouts from the teacher's weights at two addresses; failures are retried at once."""
    sampling_servers = [FakeRolloutServer(pair[1]) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(json_endpoint, "FIRST_RETRY_DELAY", 0.02)
        yield (
            sampling_servers,
            tuple(stack.enter_context(serve(server)) for server in sampling_servers),
        )


@pytest.fixture
def servers(
    tiny_pair: tuple[Path, Path],
) -> Iterator[tuple[list[FakeRolloutServer], tuple[str, ...]]]:
    with serve_two(tiny_pair) as servers_and_urls:
        yield servers_and_urls


def server_config(
    pair: tuple[Path, Path], out: Path, urls: tuple[str, ...], **changes: object
) -> Config:
    return settings(pair, out, **(SERVER_SETTINGS | {"rollout_servers": urls} | changes))


def saved_batch(folder: Path, step: int) -> ScoredRollouts:
    batch = load_batch(folder / "batches" / f"step_{step:06d}.safetensors")
    assert isinstance(batch, ScoredRollouts)
    return batch


def prompts_of_step(folder: Path, config: Config, step: int) -> Prompts:
    """The prompts of a step of the toy task."""
    from opd.training.setup import load_problem_task

    pair = load_pair(config.student, config.teacher, "cpu", "float32")
    task = load_problem_task(config, pair)
    step_problems = task.train(step, config.data.prompts_per_step)
    return encode_prompts(
        pair.tokenizer, step_problems, config.data.group_size, config.data.max_prompt
    )


def logp_under(folder: Path, prompts: Prompts, batch: ScoredRollouts) -> Tensor:
    """(B, T) log-probabilities of the sampled tokens under the final model of a run."""
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
    """Batches of steps 0 to 3 against the final weights of runs with 1, 2 and 3 steps."""
    _, urls = servers
    options = {"rollout_lag": 2, "updates_per_batch": 3, "objective": "sampled_token_weighted"}
    config = server_config(tiny_pair, tmp_path / "run", urls[:1], **options)
    folder = train(config).folder
    run_rows = rows(folder)
    assert [row["consistency/age"] for row in run_rows] == [0, 3, 6, 6]
    assert [row["consistency/stale_share"] for row in run_rows] == [0, 1, 1, 1]
    weights = [tiny_pair[0]]
    for n in (1, 2, 3):
        weights.append(train(replace(config, out=str(tmp_path / str(n)), steps=n)).folder / "final")
    for step in range(4):
        batch, prompts = saved_batch(folder, step), prompts_of_step(folder, config, step)
        tolerance = {"atol": 2e-5, "rtol": 1e-5}
        policy_step = max(0, step - 2)
        torch.testing.assert_close(
            batch.sampler_logp, logp_under(weights[policy_step], prompts, batch), **tolerance
        )
        torch.testing.assert_close(
            batch.student_logp, logp_under(weights[step], prompts, batch), **tolerance
        )
        gap = (batch.student_logp - batch.sampler_logp).abs().max()
        assert (float(gap) > 1e-2) == (step > 0)
        square = run_rows[step]["consistency/sampler_log_ratio_square"]
        assert (square > 1e-6) == (step > 0)
    assert not list((folder / "weights").iterdir())


def test_without_it_a_run_is_on_policy(tiny_pair, servers, tmp_path: Path) -> None:
    _, urls = servers
    config = server_config(tiny_pair, tmp_path / "run", urls, ratio="none")
    folder = train(config).folder
    assert all(row["consistency/age"] == 0 for row in rows(folder))
    assert all(row["consistency/sampler_log_ratio_square"] < 1e-8 for row in rows(folder))
    repeated = train(server_config(tiny_pair, tmp_path / "one", urls[:1], ratio="none")).folder
    assert rows(repeated) == rows(folder)


@pytest.mark.parametrize(
    "changes", [{"rollout_lag": 1}, {"rollout_lag": 2, "full_metrics_every": 3}]
)
def test_a_run_that_was_cut_goes_on_to_the_same_rows(
    tiny_pair, servers, tmp_path: Path, changes: dict[str, object]
) -> None:
    _, urls = servers
    config = server_config(
        tiny_pair, tmp_path / "whole", urls[:1], steps=5, save_every=2, **changes
    )
    complete = train(config).folder
    interrupted = replace(config, out=str(tmp_path / "cut"))
    for steps in (3, 4):
        with pytest.raises(KeyboardInterrupt), InterruptedAfter(steps):
            train(interrupted)
    train(interrupted)
    assert rows(Path(interrupted.out)) == rows(complete)


def test_restarts_in_the_middle_change_nothing(tiny_pair, servers, tmp_path: Path) -> None:
    sampling_servers, urls = servers
    config = server_config(tiny_pair, tmp_path / "whole", urls, rollout_lag=1)
    complete, requests_per_step = train(config).folder, len(sampling_servers[0].requests) // 6
    sampling_servers[0].faults = [
        *[lambda body: (200, {}, body)] * (4 * requests_per_step + 2),
        restart_after_answer(sampling_servers[0]),
    ]
    sampling_servers[1].faults = [
        *[lambda body: (200, {}, body)] * (3 * requests_per_step + 1),
        restart_after_answer(sampling_servers[1]),
    ]
    loads_before = [len(server.loaded_folders) for server in sampling_servers]
    repeated = train(replace(config, out=str(tmp_path / "again"))).folder
    assert rows(repeated) == rows(complete)
    loads = [
        len(server.loaded_folders) - n
        for server, n in zip(sampling_servers, loads_before, strict=True)
    ]
    assert max(loads) > loads_before[0], "nobody was restarted"


def test_an_objective_spared_whole_distributions_still_scores_the_present_student(
    tiny_pair, servers, tmp_path: Path
) -> None:
    """Between full-metric steps, scoring would reuse the sampler's log-probabilities."""
    _, urls = servers
    options = {
        "objective": "teacher_topk",
        "ratio": "none",
        "full_metrics_every": 9,
        "rollout_lag": 1,
    }
    folder = train(server_config(tiny_pair, tmp_path / "run", urls, **options)).folder
    run_rows = rows(folder)
    assert run_rows[0]["consistency/age"] == 0
    assert all(row["consistency/sampler_log_ratio_square"] > 1e-6 for row in run_rows[1:])


def test_what_would_be_wrong_in_silence_is_refused(tiny_pair, tmp_path: Path) -> None:
    nowhere = ("http://127.0.0.1:9/v1",)
    for changes, words in (
        ({"engine": "hf", "rollout_servers": ()}, "rollout_lag is 1; it must be 0 unless"),
        ({"engine": "hf"}, "rollout_servers is .* it must be addresses"),
        ({"rollout_servers": ()}, "rollout_servers is"),
        ({"rollout_lag": -1}, "rollout_lag is -1; it must be not negative"),
        ({"ratio": "none"}, "sampled_token would treat tokens sampled from earlier weights"),
        (
            {"objective": "teacher_topk", "ratio": "none", "reward_weight": 0.5},
            "set ratio to token",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            train(
                server_config(
                    tiny_pair, tmp_path / "run", nowhere, **({"rollout_lag": 1} | changes)
                )
            )


def test_vllm_in_several_processes_is_refused(tiny_pair, tmp_path: Path, monkeypatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="loads weights from a single process"):
        train(settings(tiny_pair, tmp_path / "run", engine="vllm"))


# --- importance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
def test_token_ratios_make_stale_samples_unbiased_at_their_prefixes(
    tiny_pair, updates: int
) -> None:
    """Every token after three prefixes, weighted by its probability under the old student.

    sum_y old(y) (new(y) / old(y)) cost(y) grad log new(y) is the gradient of KL(new || teacher) at
    the prefix, for every weight of a real network; without the ratio it is another vector.
    """
    name = "sampled_token" if updates == 1 else "sampled_token_weighted"
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    for model in (pair.student, pair.teacher.model):
        model.network.double()
    network, size = pair.student.network, pair.student.vocabulary
    prompts = encode_prompts(pair.tokenizer, problems("train", 3, 0), size, 64)
    with torch.no_grad():
        teacher_logp, old_logp = (
            next_token_logp(pair.teacher.model.network, prompts),
            next_token_logp(network, prompts),
        )
        for i, x in enumerate(network.parameters()):  # an update
            x += 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        new_logp = next_token_logp(network, prompts)
    y = torch.arange(size).repeat(3)[:, None]

    def sampled_logp(logp: Tensor) -> Tensor:
        return logp.gather(-1, y)

    batch = ScoredRollouts(
        tokens=y,
        mask=torch.ones_like(y, dtype=torch.bool),
        sampler_logp=sampled_logp(old_logp),
        student_logp=sampled_logp(new_logp),
        teacher_logp=sampled_logp(teacher_logp),
        prompt=prompts.index,
        ended=torch.ones(len(y), dtype=torch.bool),
        age=torch.ones(len(y), dtype=torch.long),
    )
    gradients = {}
    for ratio in ("token", "none"):
        objective = make_objective(name, ratio=ratio)
        network.zero_grad()
        weight = batch.sampler_logp.exp() * objective.ratio(batch)
        loss_from_hidden(
            pair.student,
            objective,
            response_hidden_states(pair.student, prompts, batch),
            TokenInputs.of(batch, objective.support, objective.credit(batch), weight),
            temperature=1.0,
            max_logits_per_chunk=1 << 24,
        ).backward()
        gradients[ratio] = [x.grad.clone() for x in network.parameters()]
    network.zero_grad()
    live = next_token_logp(network, prompts)[::size]
    (live.exp() * (live - teacher_logp[::size])).sum().backward()
    exact = [x.grad for x in network.parameters()]
    errors = {
        ratio: sum(
            float((a - b).square().sum()) for a, b in zip(ratio_gradients, exact, strict=True)
        )
        ** 0.5
        for ratio, ratio_gradients in gradients.items()
    }
    length = sum(float(x.square().sum()) for x in exact) ** 0.5
    assert errors["token"] < 1e-5 * length
    assert errors["none"] > 0.05 * length


def next_token_logp(network, prompts: Prompts) -> Tensor:
    """(B, V) next-token log-probabilities of each prompt, one pass per distinct prompt."""
    first_rows = [prompts.index.tolist().index(i) for i in dict.fromkeys(prompts.index.tolist())]
    size = len(prompts) // len(first_rows)
    logp = [
        network(prompts.tokens[i][prompts.mask[i]][None]).logits[0, -1].log_softmax(-1)
        for i in first_rows
    ]
    return torch.stack(logp).repeat_interleave(size, 0)
