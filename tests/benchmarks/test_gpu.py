"""The prepared command for GPUs, at toy sizes: its budget, its guards, and that it finds errors."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import benchmarks.floor.processes
import opd.models.fsdp
import opd.rollouts.decoding
import opd.rollouts.static_cache
import opd.scoring.chosen_ids
from benchmarks.gpu import (
    adapters,
    decoding,
    gathered,
    losses,
    memory,
    precision,
    selection,
    sharding,
)
from benchmarks.gpu import setting as machine
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.result import Check, Measurement, Outcome, Part, Row, SkipPart, fact
from benchmarks.gpu.runner import exit_code, run_part, run_parts
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.table import markdown, write_results
from opd.models import gathered_head
from opd.models.lm_head import LmHead
from opd.training.optimizer import Optimizer
from tests.helpers.warm_process import run_module, run_process

TOY = Setting("cpu", toy=True)


# --- the dry run --------------------------------------------------------------------------------


def run_in_fork(line: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE OPTIONS` in a fork of this process, as `subprocess.run` would."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            exit_code = 1
            try:
                os.dup2(output.fileno(), 1)
                run_module(line[line.index("-m") + 1 :])
                sys.stdout.flush()
                exit_code = 0
            finally:
                os._exit(exit_code)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return subprocess.CompletedProcess(line, exit_code, output.read(), "")


def dry_run(folder: Path) -> None:
    """Run the command; the trainer that it starts in a process of its own is a fork of this one."""
    setattr(benchmarks.floor.processes, "subprocess", SimpleNamespace(run=run_in_fork))  # noqa: B010
    sys.exit(main(["--dry-run", "--minutes", "60", "--out", str(folder)]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run it in a process where Triton's interpreter is selected, as by the command itself."""
    folder = tmp_path_factory.mktemp("gpu")
    process = run_process(folder, dry_run, folder / "out")
    assert process.exit_code == 0, process.stdout + process.stderr
    report = (folder / "out" / "results.md").read_text()
    assert report in process.stdout
    return {**json.loads((folder / "out" / "results.json").read_text()), "report": report}


def test_every_part_is_right_or_says_why_it_was_skipped(results: dict[str, Any]) -> None:
    parts = {part["name"]: part for part in results["parts"]}
    assert list(parts) == [part.name for part in PARTS]
    skipped = {name: part["reason"] for name, part in parts.items() if part["status"] != "ok"}
    same = "toy sizes are those of d = 896"
    assert skipped == {"head and loss, d = 2048": same, "head and loss, d = 3584": same}
    for name, part in parts.items():
        assert f"| {name} | {part['kind']} | {part['status']} |" in results["report"]
        if part["kind"] == "proof" and name != "share of the metrics":
            assert any(row["kind"] == "check" for row in part["rows"]), name


def test_the_dry_run_covers_triton_the_rivals_and_every_divergence(results) -> None:
    subjects = [row["subject"] for part in results["parts"] for row in part["rows"]]
    measured = [
        row["subject"]
        for part in results["parts"]
        for row in part["rows"]
        if row["kind"] == "measurement"
    ]
    assert sum("Triton, interpreted: gradients" in subject for subject in subjects) >= 5
    for name in ("full_reverse_kl", "full_forward_kl", "full_jsd", "k3", "teacher_topk_bucket"):
        assert f"{name}, bfloat16: gradients" in subjects
    for name in ("TRL chunked_divergence", "TRL chunked_logprob", "step, teacher_topk"):
        assert any(name in subject for subject in measured), name
    assert any("Liger" in subject for subject in subjects)
    assert {"torch", "transformers", "triton", "commit"} <= results["machine"].keys()


# --- wrong numbers ------------------------------------------------------------------------------


def scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda *arguments, **options: function(*arguments, **options) * factor


def wrong_kernel(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        kernels = gathered_head._TORCH
        changed = replace(kernels, **{name: scaled(getattr(kernels, name), 1.01)})
        monkeypatch.setattr(gathered_head, "_TORCH", changed)

    return patch


def wrong_method(owner: Any, name: str, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, scaled(getattr(owner, name), factor))


def with_function(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, value)


def first_ids_only(logits: torch.Tensor, k: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forget the ids after the last full block."""
    topk = logits[..., : logits.shape[-1] // block * block].topk(k, -1)
    return topk.values, topk.indices


def padding_attended(tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tokens, torch.ones_like(mask)


def scaled_head(network: Any, vocabulary: int) -> LmHead:
    return LmHead(network.get_output_embeddings().weight * 1.01, vocabulary)


FAULTS: dict[str, tuple[Callable[[Setting], Iterator[Row]], Any, str]] = {
    "product": (gathered.prove, wrong_kernel("product"), "torch: values"),
    "hidden gradient": (gathered.prove, wrong_kernel("hidden_gradient"), "torch: gradients"),
    "weight gradient": (gathered.prove, wrong_kernel("weight_gradient"), "torch: gradients"),
    "chunked logits": (losses.prove, wrong_method(LmHead, "products", 1.01), "float32: value"),
    "chunked gradient": (
        losses.prove,
        wrong_method(LmHead, "backproject", 1.05),
        "full_jsd, bfloat16: gradients",
    ),
    "top-K": (
        selection.prove_topk,
        with_function(selection, "two_stage_topk", first_ids_only),
        "V = 1,000",
    ),
    "chosen ids": (
        selection.prove_chosen_ids,
        wrong_method(opd.scoring.chosen_ids, "apply_temperature", 1.01),
        "union: log-probabilities, student, support",
    ),
    "static cache": (
        decoding.prove,
        with_function(opd.rollouts.decoding, "pad_to_bucket", padding_attended),
        "static, sampled: tokens",
    ),
    "silent fallback": (
        decoding.prove_fallback,
        with_function(opd.rollouts.static_cache.warnings, "warn", lambda *_, **__: None),
        "Falcon, ALiBi: falls back with a warning",
    ),
    "weights not copied": (
        precision.prove,
        with_function(Optimizer, "copy_to_model", lambda _: None),
        "float32 masters",
    ),
    "merge": (adapters.prove_lora, wrong_method(torch.nn.Linear, "forward", 1.001), "gradient of"),
    "quantised weights": (
        adapters.prove_quantised,
        with_function(adapters, "dequantised", lambda _, plain: plain),
        "nf4: logits",
    ),
    "no recomputation": (
        memory.prove_checkpointing,
        with_function(memory, "activation_checkpointing", lambda *_: nullcontext()),
        "share of without",
    ),
    "sharded head": (
        sharding.prove,
        with_function(opd.models.fsdp, "_current_head", scaled_head),
        "float32: loss",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_number_fails_its_part_and_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove, patch, subject = FAULTS[name]
    patch(monkeypatch)
    outcome = run_part(Part(name, "proof", 1, prove), TOY, 600)
    assert outcome.status == "failed", outcome.traceback
    wrong = [row.subject for row in outcome.rows if isinstance(row, Check) and not row.passed]
    assert any(subject in text for text in wrong), wrong
    assert exit_code([outcome]) == 1
    assert "**WRONG**" in markdown({}, {}, [outcome])


# --- budget and guards --------------------------------------------------------------------------


def right(_: Setting) -> Iterator[Row]:
    yield Check("a deviation", 0.1, 0.1)


def broken(_: Setting) -> Iterator[Row]:
    yield Measurement("a time", 3.0, "ms", 2.0, 0.5, "of another")
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def nan(_: Setting) -> Iterator[Row]:
    yield Check("not a number", math.nan, 1.0)


def absent(_: Setting) -> Iterator[Row]:
    raise SkipPart("no such package")
    yield


def slow(_: Setting) -> Iterator[Row]:
    yield fact("a fact", True)
    while True:
        with suppress(Exception):  # as a part that catches the errors of its rivals
            time.sleep(0.01)


def empty(_: Setting) -> Iterator[Row]:
    yield from ()


def parts_of(*functions: Callable[[Setting], Iterator[Row]]) -> list[Part]:
    return [Part(function.__name__, "proof", 5, function) for function in functions]


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    states: list[list[str]] = []

    def record(outcomes: list[Outcome]) -> None:
        write_results(tmp_path, {"device": "toy"}, {}, outcomes)
        content = json.loads((tmp_path / "results.json").read_text())
        states.append([part["status"] for part in content["parts"]])

    outcomes = run_parts(parts_of(broken, right, nan, absent, empty), TOY, 5, record)
    assert states[0] == ["error"]
    assert states[-1] == ["error", "ok", "failed", "skipped", "error"]
    assert [len(state) for state in states] == [1, 2, 3, 4, 5]
    assert outcomes[0].reason == "OutOfMemoryError: CUDA out of memory."
    assert "Tried to allocate" in outcomes[0].traceback
    assert outcomes[3].reason == "no such package"
    report = (tmp_path / "results.md").read_text()
    assert "| a time | 3 ms | 2 MiB | 0.50x of another |" in report
    assert "| right | proof | ok |" in report
    assert outcomes[0].traceback.strip() in report
    assert exit_code(outcomes[1:2]) == 0
    assert exit_code(outcomes[3:4]) == 0
    for outcome in (outcomes[0], outcomes[2], outcomes[4]):
        assert exit_code([outcome, outcomes[1]]) == 1


def test_a_budget_of_nothing_skips_all_and_says_so(tmp_path: Path) -> None:
    outcomes = run_parts(PARTS, TOY, 0, lambda x: write_results(tmp_path, {}, {}, x))
    assert {outcome.status for outcome in outcomes} == {"skipped"}
    assert all("budget of 0 minutes" in outcome.reason for outcome in outcomes)
    assert not any(outcome.rows for outcome in outcomes)
    assert (tmp_path / "results.md").read_text().count("budget of 0 minutes") == len(PARTS)


def test_a_part_that_does_not_fit_is_skipped_and_a_later_one_run() -> None:
    large = replace(TOY, toy=False)
    parts = [Part("long", "proof", 100, right), Part("short", "proof", 1, right)]
    outcomes = run_parts(parts, large, 0.5, lambda _: None)
    assert [outcome.status for outcome in outcomes] == ["skipped", "ok"]
    assert "needs about 100 s and 30 s remain" in outcomes[0].reason


def test_a_part_is_stopped_when_the_budget_ends() -> None:
    begin = time.monotonic()
    outcomes = run_parts(parts_of(slow, right), TOY, 0.5 / 60, lambda _: None)
    assert time.monotonic() - begin < 30
    assert [outcome.status for outcome in outcomes] == ["skipped", "skipped"]
    assert "stopped after" in outcomes[0].reason
    assert len(outcomes[0].rows) == 1
    assert "budget of" in outcomes[1].reason


def test_the_expected_time_of_all_parts_is_near_the_default_budget() -> None:
    assert 300 < sum(part.seconds for part in PARTS) <= 480
    proofs = [i for i, part in enumerate(PARTS) if part.kind == "proof"]
    assert proofs[:7] == list(range(7)), "what proves correctness comes first"


# --- the machine --------------------------------------------------------------------------------


def test_missing_packages_are_named_with_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OPTIONAL", {"no_such_package": "no comparison", "json": "x"})
    assert machine.missing_packages() == {"no_such_package": "no comparison"}
    monkeypatch.setattr(machine, "REQUIRED", ("torch", "no_such_torch"))
    with pytest.raises(SystemExit, match="not installed: no_such_torch; pip install"):
        machine.missing_packages()


def test_sizes_are_halved_until_they_fit() -> None:
    free = TOY.free_bytes()
    assert TOY.fitting(8192, 0.8 * free / 8192) == 8192
    assert TOY.fitting(8192, 0.9 * free / 8192) == 4096
    assert TOY.fitting(8192, 10 * free / 8192) == 512
    assert TOY.fitting(8192, 2 * free) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_without_a_device_the_command_says_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out")])
    assert "finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
