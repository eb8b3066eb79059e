"""Rollout servers with two processes: rank 0 loads the weights, each samples its own rows."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from opd.config.settings import Config, with_settings
from opd.training.train import train
from tests.helpers.runs import rows, train_in_rank
from tests.helpers.servers.rollout_server import FakeRolloutServer
from tests.helpers.warm_process import run_ranks, start_ranks, wait_for_ranks
from tests.opd.training.test_distributed import (
    assert_same_rows,
    evaluations,
    weights,
)
from tests.opd.training.test_prefetch_runs import serve_two, server_config

LAGGED: dict[str, object] = {
    "rollout_lag": 1,
    "updates_per_batch": 2,
    "objective": "sampled_token_weighted",
}
KINDS: dict[str, dict[str, object]] = {"on policy": {}, "rollout_lag": LAGGED}


@dataclass
class ReferenceRun:
    """A run of one process, and how often it loaded weights into the first server."""

    config: Config
    num_loads: int


@pytest.fixture(scope="module")
def servers(
    tiny_pair: tuple[Path, Path],
) -> Iterator[tuple[list[FakeRolloutServer], tuple[str, ...]]]:
    with serve_two(tiny_pair) as servers_and_urls:
        yield servers_and_urls


@pytest.fixture(scope="module")
def references(
    tiny_pair, servers, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ReferenceRun]:
    """On-policy and with rollout_lag."""
    (first, _), urls = servers
    folder, runs = tmp_path_factory.mktemp("references"), {}
    for name, options in KINDS.items():
        num_loads = len(first.loaded_folders)
        config = server_config(
            tiny_pair,
            folder / name,
            urls,
            **({"steps": 3, "prompts_per_step": 4, "save_every": 1} | options),
        )
        train(config)
        runs[name] = ReferenceRun(config, len(first.loaded_folders) - num_loads)
    return runs


def test_two_processes_write_the_rows_of_one(servers, references, tmp_path: Path) -> None:
    """With replicated and with sharded weights."""
    (first, _), _ = servers
    configs = {
        (name, sharding): with_settings(
            run.config, out=str(tmp_path / f"{name}, {sharding}"), sharding=sharding
        )
        for name, run in references.items()
        for sharding in ("none", "full")
    }
    num_loads = len(first.loaded_folders)
    run_ranks(tmp_path, train_in_rank, list(configs.values()))
    assert len(first.loaded_folders) - num_loads == 2 * sum(
        run.num_loads for run in references.values()
    ), "more than one process loaded weights"
    for (name, _), config in configs.items():
        folder, distributed_folder = Path(references[name].config.out), Path(config.out)
        assert_same_rows(folder, distributed_folder)
        assert evaluations(folder) == evaluations(distributed_folder)
        expected_weights, actual_weights = weights(folder), weights(distributed_folder)
        gap = max(
            float((expected_weights[k] - actual_weights[k]).abs().max()) for k in expected_weights
        )
        assert gap < 1e-4
        assert not list((distributed_folder / "weights").iterdir())
    final_rows = rows(Path(configs["rollout_lag", "full"].out))
    assert [row["consistency/age"] for row in final_rows] == [0, 2, 2]


def test_a_restarted_server_ends_the_run_which_goes_on_to_the_same_rows(
    servers, references, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, _), _ = servers
    reference = references["rollout_lag"]
    config = replace(reference.config, out=str(tmp_path / "cut"))
    rows_per_step = config.data.prompts_per_step * config.data.group_size // 2  # two servers
    restart_after_responses(first, 2 * rows_per_step + 1, monkeypatch)  # in the third batch
    exit_code, output = wait_for_ranks(start_ranks(tmp_path, train_in_rank, [config]))
    assert exit_code != 0
    assert "was restarted and has lost the student's weights" in output
    assert 0 < len(rows(Path(config.out))) < config.steps, (
        "the run was interrupted before its first row or after its last"
    )
    with pytest.raises(ValueError, match="rollouts of 2 processes, but this run has 1"):
        train(config)
    run_ranks(tmp_path, train_in_rank, [config])
    assert_same_rows(Path(reference.config.out), Path(config.out))


def restart_after_responses(
    server: FakeRolloutServer, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restart the server with its initial weights after `count` sampled responses."""
    honest, num_sampled = server.completions, itertools.count(1)

    def completions(payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = honest(payload)
        if payload["max_tokens"] > 1 and next(num_sampled) == count:  # not a probe of the weights
            server.restart()
        return answer

    monkeypatch.setattr(server, "completions", completions)
