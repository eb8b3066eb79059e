"""Rollout servers under two processes: the first loads the weights, each samples its own rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from opd.config.settings import Config
from opd.training.train import train
from tests.helpers.fake_rollout_server import SamplingServer
from tests.opd.rollouts.test_vllm_servers import restarting
from tests.opd.training.test_distributed import (
    assert_same_rows,
    evaluations,
    launched,
    run_in_two,
    weights,
)
from tests.opd.training.test_prefetch import served, servers
from tests.opd.training.test_train import rows

__all__ = ["servers"]  # a fixture
AHEAD: dict[str, object] = {
    "rollout_lag": 1,
    "updates_per_batch": 2,
    "objective": "sampled_token_weighted",
}


def four(pair: tuple[Path, Path], out: Path, urls: tuple[str, ...], **changes: object) -> Config:
    how: dict[str, object] = {"prompts_per_step": 4, "save_every": 1}
    return served(pair, out, urls, **(how | changes))


def test_two_processes_write_the_rows_of_one(tiny_pair, servers, tmp_path: Path) -> None:
    """On policy and ahead of the update, with whole weights and with parts of them."""
    two, urls = servers
    kinds = {"on policy": {}, "rollout_lag": AHEAD}
    whole = {name: four(tiny_pair, tmp_path / name, urls, **how) for name, how in kinds.items()}
    loads = []
    for config in whole.values():
        before = len(two[0].loads)
        train(config)
        loads.append(len(two[0].loads) - before)
    both = [
        replace(config, out=str(tmp_path / f"{name}, {sharding}"), sharding=sharding)
        for name, config in whole.items()
        for sharding in ("none", "full")
    ]
    before = len(two[0].loads)
    run_in_two(tmp_path, both)
    assert len(two[0].loads) - before == 2 * sum(loads), "more than one process loaded weights"
    for name, config in whole.items():
        one = Path(config.out)
        for sharding in ("none", "full"):
            there = tmp_path / f"{name}, {sharding}"
            assert_same_rows(one, there)
            assert evaluations(one) == evaluations(there)
            ours, theirs = weights(one), weights(there)
            apart = max(float((ours[k] - theirs[k]).abs().max()) for k in ours)
            assert apart < 1e-4
            assert not list((there / "weights").iterdir())
    found = rows(tmp_path / "ahead, full")
    assert [row["consistency/age"] for row in found] == [0, *[2] * (len(found) - 1)]


def test_a_restarted_server_ends_the_run_which_goes_on_to_the_same_rows(
    tiny_pair, servers, tmp_path: Path
) -> None:
    two, urls = servers
    config = four(tiny_pair, tmp_path / "whole", urls, **AHEAD)
    whole = train(config)
    cut = replace(config, out=str(tmp_path / "cut"))
    after(two[0], len(two[0].asked) // 2)
    process = launched(tmp_path, [cut])
    said, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    assert "was restarted and has lost the student's weights" in said
    assert 0 < len(rows(Path(cut.out))) < config.steps, "it was cut where nothing is to be taken up"
    with pytest.raises(ValueError, match="rollouts ahead of 2 processes, and these are 1"):
        train(cut)
    run_in_two(tmp_path, [cut])
    assert_same_rows(whole, Path(cut.out))


def after(server: SamplingServer, count: int) -> None:
    """The server is restarted, with its first weights, behind so many answers."""
    server.faults = [*[lambda body: (200, {}, body)] * count, restarting(server)]
