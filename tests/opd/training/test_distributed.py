"""Runs on two ranks, with and without FSDP, against one process: the same rows up to rounding."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from diagnostics.batch import Rollouts
from diagnostics.records.batch_files import load_batch
from opd.config.files import to_flat
from opd.config.settings import Config, TaskSettings, with_settings
from opd.runtime import distributed
from opd.teachers.factory import make_pair
from opd.training.checkpoint import load_optimizer
from opd.training.optimizer import make_optimizer
from opd.training.train import train
from tests.helpers.runs import rows, settings, train_in_rank
from tests.helpers.warm_process import WarmProcess, run_module, run_ranks, start_process

PROGRAM = """
import gc
gc.disable()  # an import is searched for garbage in vain
import sys
from opd.config.files import read_config
from opd.runtime.distributed import process_group
from opd.training.optimizer import make_optimizer
from opd.teachers.factory import make_pair
from opd.training.train import train
gc.enable()
with process_group("cpu"):
    for name in sys.argv[1:]:
        train(read_config(name))
"""


FOUR_PROMPTS: dict[str, Any] = {"prompts_per_step": 4, "max_response": 12, "save_every": 1}


ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
"""It starts ranks in new interpreters through torch.distributed.run, as torchrun does."""


@contextmanager
def two_ranks(folder: Path, configs: list[Config]) -> Iterator[WarmProcess]:
    """Let accelerate start two ranks that run the configurations; none outlives the block."""
    config_paths = []
    for i, config in enumerate(configs):
        config_paths.append(str(folder / f"{i}.json"))
        Path(config_paths[-1]).write_text(json.dumps(to_flat(config)))
    (folder / "program.py").write_text(PROGRAM)
    words = [*ACCELERATE, str(folder / "program.py"), *config_paths]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    launcher = start_process(folder, run_module, words, environment=environment)
    try:
        yield launcher
    finally:
        for process_id in (*worker_ids(launcher), launcher.process.pid):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        launcher.process.join()


def worker_ids(launcher: WarmProcess) -> list[int]:
    """Return the process ids of the ranks that a launcher has started."""
    process_id = launcher.process.pid
    children = Path(f"/proc/{process_id}/task/{process_id}/children")
    ids = children.read_text().split() if children.exists() else []
    return [int(c) for c in ids if b"program.py" in Path(f"/proc/{c}/cmdline").read_bytes()]


def assert_same_rows(expected_folder: Path, actual_folder: Path, tolerance: float = 2e-4) -> None:
    """Compare every number; standard errors are differences of large sums and less exact."""
    expected_rows, actual_rows = rows(expected_folder), rows(actual_folder)
    assert len(expected_rows) == len(actual_rows) > 0
    for expected, actual in zip(expected_rows, actual_rows, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            if not isinstance(value, float) or math.isnan(value):
                assert actual[name] == value or math.isnan(actual[name]), name
                continue
            slack = 20 if name.endswith("_se") or name.startswith("consistency/") else 1
            assert actual[name] == pytest.approx(value, rel=slack * tolerance, abs=2e-6), (
                name,
                expected["step"],
            )


def evaluations(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def kinds(two_layer_pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Settings whose losses need the tokens of other ranks, each for another reason."""
    household = {"max_prompt": 200, "max_response": 6, "max_turns": 3, "prompts_per_step": 2}
    four_prompts = {"max_response": 8, "prompts_per_step": 4}
    tasks = (
        TaskSettings(name="a", task="lab"),
        TaskSettings(name="b", task="lab", teacher=str(two_layer_pair[0]), mask=("token:<",)),
    )
    folder = tmp_path_factory.mktemp("view")
    sums = ({"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(20))
    (folder / "sums.jsonl").write_text("".join(json.dumps(x) + "\n" for x in sums))
    (folder / "view.jinja").write_text(
        "{{ prompt }} {{ feedback }}{% for peer in peers %} {{ peer.response }}{% endfor %}"
    )
    return {
        "view": {
            "task": str(folder / "sums.jsonl"),
            "teacher_view": str(folder / "view.jinja"),
            "teacher": "ema",
            "ema_decay": 0.5,
        },
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
            # One or two responses: ranks have different numbers of micro-batches.
            "max_tokens_per_microbatch": 108,
        },
        "whole": {
            "objective": "full_reverse_kl",
            "gradient_checkpointing": True,
            "max_tokens_per_microbatch": 90,
        },
        "adapters": {"lora_rank": 4, "lr": 1e-2},
        "games": {"task": "env:household", **household},
        "mixed": {"tasks": tasks, "task_order": "mixed", **four_prompts},
    }


@pytest.fixture(scope="module")
def run_folders(two_layer_pair, kinds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every configuration in one process, on two ranks, and on two ranks with FSDP."""
    folder = tmp_path_factory.mktemp("processes")
    two_process_configs: list[Config] = []
    for name, changes in kinds.items():
        config = short_config(two_layer_pair, folder / "one" / name, changes)
        train(config)
        for sharding in ("none", "full"):
            two_process_configs.append(
                with_settings(config, out=str(folder / sharding / name), sharding=sharding)
            )
    configs = two_process_configs + resumed_configs(two_layer_pair, folder)
    run_ranks(folder, train_in_rank, configs)
    return folder


def short_config(pair: tuple[Path, Path], out: Path, changes: dict[str, object]) -> Config:
    """Two steps: the second is taken with the weights and the optimizer's state of the first."""
    fields: dict[str, Any] = {"prompts_per_step": 4, "max_response": 12, "steps": 2}
    return with_settings(settings(pair, out), **(fields | {"save_batch_every": 2} | changes))


def resumed_configs(two_layer_pair: tuple[Path, Path], folder: Path) -> list[Config]:
    """Runs that resume with another number of ranks, and runs with an EMA teacher."""
    configs = []
    for dtype in ("float32", "bfloat16"):
        config = settings(
            two_layer_pair, folder / f"begun in one, {dtype}", dtype=dtype, **FOUR_PROMPTS
        )
        train(replace(config, steps=2))
        configs.append(with_settings(config, sharding="full"))
        begun_config = replace(config, out=str(folder / f"begun in two, {dtype}"))
        configs.append(with_settings(begun_config, steps=2, sharding="full"))
        train(replace(config, out=str(folder / f"one, {dtype}")))
    for sharding in ("none", "full"):
        config = settings(two_layer_pair, folder / f"average, {sharding}", steps=1, save_every=1)
        moving: dict[str, Any] = {"teacher": "ema", "reward_weight": 1.0, "ema_decay": 0.75}
        configs.append(with_settings(config, prompts_per_step=4, sharding=sharding, **moving))
    return configs


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize(
    "name", ["view", "plain", "credit", "chosen", "whole", "adapters", "games", "mixed"]
)
def test_two_processes_write_the_rows_of_one(run_folders: Path, name: str, sharding: str) -> None:
    single, distributed_run = run_folders / "one" / name, run_folders / sharding / name
    assert_same_rows(single, distributed_run)
    assert evaluations(single) == evaluations(distributed_run)
    single_weights, distributed_weights = weights(single), weights(distributed_run)
    start = load_file(
        Path(json.loads((single / "config.json").read_text())["student"]) / "model.safetensors"
    )
    update_size = max(float((single_weights[key] - start[key]).abs().max()) for key in start)
    difference = max(
        float((single_weights[key] - distributed_weights[key]).abs().max())
        for key in single_weights
    )
    assert update_size > 1e-3
    assert difference < 0.02 * update_size
    saved = [
        load_batch(folder / "batches" / "step_000000.safetensors")
        for folder in (single, distributed_run)
    ]
    assert sorted(responses(saved[0])) == sorted(responses(saved[1]))


def responses(batch: Rollouts) -> list[tuple[int, int, list[int], float]]:
    """Task, prompt, ids and total sampler log-probability of each row."""
    logp = (batch.sampler_logp * batch.mask).sum(1)
    rows = zip(batch.tokens, batch.mask, strict=True)
    ids = [tokens[mask].tolist() for tokens, mask in rows]
    tags = zip(batch.task.tolist(), batch.prompt.tolist(), ids, logp.tolist(), strict=True)
    return [(task, prompt, row, round(x, 3)) for task, prompt, row, x in tags]


def test_a_run_goes_on_in_another_number_of_processes(run_folders: Path, two_layer_pair) -> None:
    """From full weights to FSDP and back, with the rows of a single process."""
    reference = run_folders / "one, float32"
    train(settings(two_layer_pair, run_folders / "begun in two, float32", **FOUR_PROMPTS))
    start = load_file(two_layer_pair[0] / "model.safetensors")
    for start_count in ("one", "two"):
        resumed = run_folders / f"begun in {start_count}, float32"
        assert [row["step"] for row in rows(resumed)] == [0, 1, 2, 3]
        assert_same_rows(reference, resumed)
        reference_weights, resumed_weights = weights(reference), weights(resumed)
        update_size = max(
            float((reference_weights[key] - start[key]).abs().max()) for key in reference_weights
        )
        difference = max(
            float((reference_weights[key] - resumed_weights[key]).abs().max())
            for key in reference_weights
        )
        assert difference < 0.02 * update_size


def test_parts_of_masters_and_moments_are_read_whole(run_folders: Path, two_layer_pair) -> None:
    """In bfloat16, one process reads the shards of two ranks, and the master weights are exact."""
    config = settings(
        two_layer_pair, run_folders / "begun in two, bfloat16", dtype="bfloat16", **FOUR_PROMPTS
    )
    last_checkpoint = max((run_folders / "begun in two, bfloat16" / "checkpoints").iterdir())
    halves = [load_file(part) for part in sorted((last_checkpoint / "optimizer").iterdir())]
    assert len(halves) == 2
    network = make_pair(config).student.network
    optimizer = make_optimizer(network.parameters(), config.optimizer.betas, 0.0)
    load_optimizer(last_checkpoint, optimizer)
    saved = AutoModelForCausalLM.from_pretrained(last_checkpoint, dtype=torch.bfloat16).state_dict()
    names = [name for name, _ in network.named_parameters()]
    assert {f"{i}.master" for i in range(len(names))} <= optimizer.state_tensors().keys()
    for name, tensor in optimizer.state_tensors().items():
        parts = [half[name] for half in halves if name in half]
        expected = parts[0] if name.endswith("step") else torch.cat(parts)
        assert torch.equal(tensor, expected), name
        if name.endswith("master"):
            assert torch.equal(tensor.bfloat16(), saved[names[int(name.split(".")[0])]])
            assert not torch.equal(tensor, tensor.bfloat16().float())
    train(config)
    assert [row["step"] for row in rows(Path(config.out))] == [0, 1, 2, 3]
    for start_count in (
        "one",
        "two",
    ):  # in bfloat16 the number of rows of a product moves its last bits
        resumed_rows = rows(run_folders / f"begun in {start_count}, bfloat16")
        for tensor, resumed_row in zip(
            rows(run_folders / "one, bfloat16"), resumed_rows, strict=True
        ):
            assert resumed_row["loss"] == pytest.approx(tensor["loss"], rel=0.15)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_the_average_follows_a_student_of_two_processes(
    run_folders: Path, two_layer_pair, sharding: str
) -> None:
    folder = run_folders / f"average, {sharding}"
    teacher = load_file(folder / "checkpoints" / "step_000001" / "teacher.safetensors")
    start, end = load_file(two_layer_pair[0] / "model.safetensors"), weights(folder)
    assert any(not torch.equal(start[name], x) for name, x in end.items())
    for name, x in end.items():
        expected = 0.75 * start[name] + 0.25 * x
        torch.testing.assert_close(teacher[name], expected, atol=1e-7, rtol=1e-6)


@pytest.fixture(scope="module")
def accelerated(two_layer_pair, kinds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in ranks that accelerate starts, one of which is killed in the second run."""
    folder = tmp_path_factory.mktemp("accelerate")
    complete = short_config(two_layer_pair, folder / "complete", kinds["credit"])
    endless = settings(two_layer_pair, folder / "killed", steps=500, eval_every=0, **FOUR_PROMPTS)
    rows_path = folder / "killed" / "rows.jsonl"
    deadline = time.monotonic() + 600
    with two_ranks(folder, [complete, endless]) as launcher:
        while not rows_path.exists() or len(rows_path.read_text().splitlines()) < 3:
            assert launcher.exit_code is None, launcher.stdout + launcher.stderr
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = worker_ids(launcher)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert launcher.wait() != 0
    return folder


def test_a_killed_process_ends_the_run_with_its_last_checkpoint_whole(
    accelerated: Path, two_layer_pair
) -> None:
    num_rows = len(rows(accelerated / "killed"))
    assert 3 <= num_rows < 500
    changes: dict[str, Any] = {"steps": num_rows + 2, "eval_every": 0, **FOUR_PROMPTS}
    train(settings(two_layer_pair, accelerated / "killed", **changes))  # in this one process
    reference = train(settings(two_layer_pair, accelerated / "undisturbed", **changes)).folder
    assert_same_rows(reference, accelerated / "killed", 2e-3)


def test_accelerate_starts_the_same_run(accelerated: Path, run_folders: Path) -> None:
    assert rows(accelerated / "complete") == rows(run_folders / "none" / "credit")


def test_prompts_that_cannot_be_shared_equally_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(
        ValueError, match="8 prompts per step cannot be divided equally among 3 proc"
    ):
        distributed.shard_prompts(8)
    shards = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shards.append(distributed.shard_prompts(12, updates=2))
    assert shards == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_sharding_in_one_process_is_refused(two_layer_pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchrun --nproc_per_node"):
        train(settings(two_layer_pair, tmp_path / "run", sharding="full"))
