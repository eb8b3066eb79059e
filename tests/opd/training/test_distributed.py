"""Runs of two processes, whole or sharded, against one process: the same rows, up to rounding."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from diagnostics.batch import Rollouts
from diagnostics.records.batch_files import load
from opd.config.settings import Config, TaskSettings, to_json
from opd.runtime import distributed
from opd.teachers.factory import make_pair
from opd.training.checkpoint import load_optimizer
from opd.training.optimizer import adamw
from opd.training.train import train
from tests.opd.training.test_train import rows, settings

PROGRAM = """
import sys
import time
from opd.config.settings import from_json
from opd.runtime.distributed import joined
from opd.training.optimizer import adamw
from opd.teachers.factory import make_pair
from opd.training.train import train
with joined("cpu"):
    for name in sys.argv[1:]:
        train(from_json(name))
"""


FOUR: dict[str, Any] = {"prompts_per_step": 4, "save_every": 1}


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def launched(
    folder: Path, configs: list[Config], launcher: tuple[str, ...] = TORCHRUN
) -> subprocess.Popen[str]:
    """Two processes that run the configurations one after the other."""
    names = []
    for i, config in enumerate(configs):
        names.append(str(folder / f"{i}.json"))
        Path(names[-1]).write_text(json.dumps(to_json(config)))
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, str(folder / "program.py"), *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
    )


def run_in_two(folder: Path, configs: list[Config], launcher: tuple[str, ...] = TORCHRUN) -> None:
    process = launched(folder, configs, launcher)
    said, _ = process.communicate(timeout=150)
    assert process.returncode == 0, said


def assert_same_rows(one: Path, two: Path, tolerance: float = 2e-4) -> None:
    """Every number of every row; standard errors are differences of large sums and err more."""
    ours, theirs = rows(one), rows(two)
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            if not isinstance(value, float) or math.isnan(value):
                assert y[name] == value or math.isnan(y[name]), name
                continue
            slack = 20 if name.endswith("_se") or name.startswith("consistency/") else 1
            assert y[name] == pytest.approx(value, rel=slack * tolerance, abs=2e-6), (
                name,
                x["step"],
            )


def evaluations(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def kinds(tiny_pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Settings whose losses look at other processes' tokens, each in its own way."""
    rooms = {"max_prompt": 200, "max_response": 6, "max_turns": 3, "prompts_per_step": 2}
    both = {"max_response": 8, "prompts_per_step": 4}
    tasks = (
        TaskSettings(name="a", task="lab"),
        TaskSettings(name="b", task="lab", teacher=str(tiny_pair[0]), mask=("token:<",)),
    )
    return {
        "plain": {"updates_per_batch": 2, "probe_every": 2, "eval_samples": 3, "eval_problems": 5},
        "credit": {
            "objective": "sampled_token",
            "gamma": 0.9,
            "baseline": "position_mean",
            "denominator": "group_mean",
            "mask": ("token:1:first",),
        },
        "chosen": {
            "entropy_top_fraction": 0.4,
            "denominator": "sequence_mean",
            "max_response": 30,
            "max_tokens_per_microbatch": 108,  # one or two responses: processes have unequally many passes
        },
        "whole": {
            "objective": "full_reverse_kl",
            "gradient_checkpointing": True,
            "max_tokens_per_microbatch": 90,
        },
        "adapters": {"lora_rank": 4, "lr": 1e-2},
        "games": {"task": "env:household", **rooms},
        "mixed": {"tasks": tasks, "task_order": "mixed", **both},
    }


@pytest.fixture(scope="module")
def made(tiny_pair, kinds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind in one process, in two, and in two that share the weights out."""
    folder = tmp_path_factory.mktemp("processes")
    both: list[Config] = []
    for name, changes in kinds.items():
        fields: dict[str, Any] = {
            "prompts_per_step": 4,
            "steps": 3,
            "save_batch_every": 3,
            **changes,
        }
        config = replace(settings(tiny_pair, folder / "one" / name), **fields)
        train(config)
        for sharding in ("none", "full"):
            both.append(replace(config, out=str(folder / sharding / name), sharding=sharding))
    run_in_two(folder, both + elsewhere(tiny_pair, folder))
    return folder


def elsewhere(tiny_pair: tuple[Path, Path], folder: Path) -> list[Config]:
    """Runs that begin in one number of processes and go on in another, and moving averages."""
    found = []
    for dtype in ("float32", "bfloat16"):
        config = settings(tiny_pair, folder / f"begun in one, {dtype}", dtype=dtype, **FOUR)
        train(replace(config, steps=2))
        found.append(replace(config, sharding="full"))
        begun = replace(config, out=str(folder / f"begun in two, {dtype}"))
        found.append(replace(begun, steps=2, sharding="full"))
        train(replace(config, out=str(folder / f"one, {dtype}")))
    for sharding in ("none", "full"):
        config = settings(tiny_pair, folder / f"average, {sharding}", steps=1, save_every=1)
        moving: dict[str, Any] = {"teacher": "ema", "reward_weight": 1.0, "ema_decay": 0.75}
        found.append(replace(config, prompts_per_step=4, sharding=sharding, **moving))
    return found


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize(
    "name", ["plain", "credit", "chosen", "whole", "adapters", "games", "mixed"]
)
def test_two_processes_write_the_rows_of_one(
    made: Path, tiny_pair, name: str, sharding: str
) -> None:
    one, two = made / "one" / name, made / sharding / name
    assert_same_rows(one, two)
    assert evaluations(one) == evaluations(two)
    ours, theirs = weights(one), weights(two)
    start = load_file(
        Path(json.loads((one / "config.json").read_text())["student"]) / "model.safetensors"
    )
    moved = max(float((ours[k] - start[k]).abs().max()) for k in start)
    apart = max(float((ours[k] - theirs[k]).abs().max()) for k in ours)
    assert moved > 1e-3
    assert apart < 0.02 * moved
    saved = [load(d / "batches" / "step_000000.safetensors") for d in (one, two)]
    assert sorted(responses(saved[0])) == sorted(responses(saved[1]))


def responses(batch: Rollouts) -> list[tuple[int, int, list[int], float]]:
    """Of each row task, prompt, ids, and what the sampler said of them."""
    logp = (batch.sampler_logp * batch.mask).sum(1)
    rows = zip(batch.tokens, batch.mask, strict=True)
    ids = [tokens[mask].tolist() for tokens, mask in rows]
    tags = zip(batch.task.tolist(), batch.prompt.tolist(), ids, logp.tolist(), strict=True)
    return [(task, prompt, row, round(x, 3)) for task, prompt, row, x in tags]


def test_a_run_goes_on_in_another_number_of_processes(made: Path, tiny_pair) -> None:
    """From whole weights to parts and back, as if it always had been one process."""
    whole = made / "one, float32"
    train(settings(tiny_pair, made / "begun in two, float32", **FOUR))
    start = load_file(tiny_pair[0] / "model.safetensors")
    for begun in ("one", "two"):
        there = made / f"begun in {begun}, float32"
        assert [row["step"] for row in rows(there)] == [0, 1, 2, 3]
        assert_same_rows(whole, there)
        ours, theirs = weights(whole), weights(there)
        moved = max(float((ours[k] - start[k]).abs().max()) for k in ours)
        apart = max(float((ours[k] - theirs[k]).abs().max()) for k in ours)
        assert apart < 0.02 * moved


def test_parts_of_masters_and_moments_are_read_whole(made: Path, tiny_pair) -> None:
    """bfloat16: what two processes wrote in parts is what one reads, and the masters are exact."""
    config = settings(tiny_pair, made / "begun in two, bfloat16", dtype="bfloat16", **FOUR)
    last = max((made / "begun in two, bfloat16" / "checkpoints").iterdir())
    halves = [load_file(part) for part in sorted((last / "optimizer").iterdir())]
    assert len(halves) == 2
    network = make_pair(config).student.network
    optimizer = adamw(network.parameters(), config.betas, 0.0)
    load_optimizer(last, optimizer)
    saved = AutoModelForCausalLM.from_pretrained(last, dtype=torch.bfloat16).state_dict()
    names = [name for name, _ in network.named_parameters()]
    assert {f"{i}.master" for i in range(len(names))} <= optimizer.tensors().keys()
    for name, x in optimizer.tensors().items():
        parts = [half[name] for half in halves if name in half]
        want = parts[0] if name.endswith("step") else torch.cat(parts)
        assert torch.equal(x, want), name
        if name.endswith("master"):
            assert torch.equal(x.bfloat16(), saved[names[int(name.split(".")[0])]])
            assert not torch.equal(x, x.bfloat16().float())
    train(config)
    assert [row["step"] for row in rows(Path(config.out))] == [0, 1, 2, 3]
    for begun in ("one", "two"):  # in bfloat16 the number of rows of a product moves its last bits
        there = rows(made / f"begun in {begun}, bfloat16")
        for x, y in zip(rows(made / "one, bfloat16"), there, strict=True):
            assert y["loss"] == pytest.approx(x["loss"], rel=0.15)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_the_average_follows_a_student_of_two_processes(
    made: Path, tiny_pair, sharding: str
) -> None:
    folder = made / f"average, {sharding}"
    slow = load_file(folder / "checkpoints" / "step_000001" / "teacher.safetensors")
    start, end = load_file(tiny_pair[0] / "model.safetensors"), weights(folder)
    assert any(not torch.equal(start[name], x) for name, x in end.items())
    for name, x in end.items():
        want = 0.75 * start[name] + 0.25 * x
        torch.testing.assert_close(slow[name], want, atol=1e-7, rtol=1e-6)


def test_a_killed_process_ends_the_run_with_its_last_checkpoint_whole(
    tiny_pair, tmp_path: Path
) -> None:
    config = settings(tiny_pair, tmp_path / "run", steps=500, eval_every=0, **FOUR)
    process = launched(tmp_path, [config])
    written = tmp_path / "run" / "rows.jsonl"
    deadline = time.monotonic() + 120
    while not written.exists() or len(written.read_text().splitlines()) < 3:
        assert process.poll() is None, "the run ended before one could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(c) for c in children if b"program.py" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    done = len(rows(tmp_path / "run"))
    assert 3 <= done < 500
    train(replace(config, steps=done + 2))  # in this one process
    whole = settings(tiny_pair, tmp_path / "whole", steps=done + 2, eval_every=0, **FOUR)
    assert_same_rows(train(whole), tmp_path / "run", 2e-3)


def test_accelerate_starts_the_same_run(made: Path, tiny_pair, kinds, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"prompts_per_step": 4, "steps": 3, "save_batch_every": 3}
    config = settings(tiny_pair, tmp_path / "run", **(fields | kinds["credit"]))
    run_in_two(tmp_path, [config], ACCELERATE)
    assert rows(tmp_path / "run") == rows(made / "none" / "credit")


def test_prompts_that_cannot_be_shared_equally_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(ValueError, match="8 prompts a step cannot be shared equally by 3 proc"):
        distributed.own(8)
    found = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(distributed.own(12, updates=2))
    assert found == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_sharding_in_one_process_is_refused(tiny_pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchrun --nproc_per_node"):
        train(settings(tiny_pair, tmp_path / "run", sharding="full"))
