"""Rollout servers with two processes: rank 0 loads the weights, each samples its own rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from opd.config.settings import Config, with_settings
from opd.training.train import train
from tests.helpers.fake_rollout_server import FakeRolloutServer
from tests.helpers.runs import rows, train_in_rank
from tests.helpers.warm_process import run_ranks, start_ranks, wait_for_ranks
from tests.opd.rollouts.test_vllm_servers import restart_after_answer
from tests.opd.training.test_distributed import (
    assert_same_rows,
    evaluations,
    weights,
)
from tests.opd.training.test_prefetch import server_config, servers

__all__ = ["servers"]  # a fixture
LAGGED: dict[str, object] = {
    "rollout_lag": 1,
    "updates_per_batch": 2,
    "objective": "sampled_token_weighted",
}


def four_prompt_config(
    pair: tuple[Path, Path], out: Path, urls: tuple[str, ...], **changes: object
) -> Config:
    options: dict[str, object] = {"prompts_per_step": 4, "save_every": 1}
    return server_config(pair, out, urls, **(options | changes))


def test_two_processes_write_the_rows_of_one(tiny_pair, servers, tmp_path: Path) -> None:
    """On-policy and with rollout_lag, with replicated and with sharded weights."""
    two, urls = servers
    kinds = {"on policy": {}, "rollout_lag": LAGGED}
    configs = {
        name: four_prompt_config(tiny_pair, tmp_path / name, urls, **options)
        for name, options in kinds.items()
    }
    loads = []
    for config in configs.values():
        num_loads = len(two[0].loaded_folders)
        train(config)
        loads.append(len(two[0].loaded_folders) - num_loads)
    distributed_configs = [
        with_settings(config, out=str(tmp_path / f"{name}, {sharding}"), sharding=sharding)
        for name, config in configs.items()
        for sharding in ("none", "full")
    ]
    num_loads = len(two[0].loaded_folders)
    run_ranks(tmp_path, train_in_rank, distributed_configs)
    assert len(two[0].loaded_folders) - num_loads == 2 * sum(loads), (
        "more than one process loaded weights"
    )
    for name, config in configs.items():
        folder = Path(config.out)
        for sharding in ("none", "full"):
            distributed_folder = tmp_path / f"{name}, {sharding}"
            assert_same_rows(folder, distributed_folder)
            assert evaluations(folder) == evaluations(distributed_folder)
            expected_weights, actual_weights = weights(folder), weights(distributed_folder)
            gap = max(
                float((expected_weights[k] - actual_weights[k]).abs().max())
                for k in expected_weights
            )
            assert gap < 1e-4
            assert not list((distributed_folder / "weights").iterdir())
    final_rows = rows(tmp_path / "rollout_lag, full")
    assert [row["consistency/age"] for row in final_rows] == [0, *[2] * (len(final_rows) - 1)]


def test_a_restarted_server_ends_the_run_which_goes_on_to_the_same_rows(
    tiny_pair, servers, tmp_path: Path
) -> None:
    two, urls = servers
    config = four_prompt_config(tiny_pair, tmp_path / "whole", urls, **LAGGED)
    complete_folder = train(config).folder
    interrupted_config = replace(config, out=str(tmp_path / "cut"))
    restart_after_requests(two[0], len(two[0].requests) // 2)
    exit_code, output = wait_for_ranks(start_ranks(tmp_path, train_in_rank, [interrupted_config]))
    assert exit_code != 0
    assert "was restarted and has lost the student's weights" in output
    assert 0 < len(rows(Path(interrupted_config.out))) < config.steps, (
        "the run was interrupted before its first row or after its last"
    )
    with pytest.raises(ValueError, match="rollouts of 2 processes, but this run has 1"):
        train(interrupted_config)
    run_ranks(tmp_path, train_in_rank, [interrupted_config])
    assert_same_rows(complete_folder, Path(interrupted_config.out))


def restart_after_requests(server: FakeRolloutServer, count: int) -> None:
    """Restart the server with its initial weights after `count` requests."""
    server.faults = [*[lambda body: (200, {}, body)] * count, restart_after_answer(server)]
