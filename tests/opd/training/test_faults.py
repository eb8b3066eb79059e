"""Silent faults in real runs of a tiny pair are refused, or named within five steps."""

import re
from pathlib import Path

import pytest

from benchmarks.faults import make_models, run_outcome, run_settings
from benchmarks.injected import Fault
from benchmarks.silent import SILENT_FAULTS
from diagnostics.alarms.alarms import replay
from diagnostics.records import rows
from opd.config.settings import Config, with_settings
from opd.runtime import distributed
from tests.helpers.runs import train_in_rank
from tests.helpers.warm_process import run_ranks

REFUSED = {
    "teacher scores with dropout": "teacher mode: 2 modules with dropout are in training mode",
    "student and teacher share a head": "1 of the teacher's tensors are shared with the student",
    "student and teacher exchanged": "student weights: .* differ from the files",
    "teacher in bfloat16": "teacher mode: 100% of the weights are not in float32",
    "teacher rounded to bfloat16": "differ from the files, rounded to lower precision",
    "tokenizer not as in its file": "is encoded as .* by tokenizer.json",
    "teacher ignores the mask": "teacher forward pass: masked ids change",
}
"""Expected message by fault."""
ALARMS = {
    "teacher drops out, from step 1": ("teacher_dropout", 2),
    "student drops out, from step 1": ("student_dropout", 2),
    "sampler's head not synced": ("sampler_unsynced", 3),
    "one prompt fills the data": ("repeated_prompts", 2),
    "grader constant at 1": ("grader_constant", 5),
    "grader constant at 0": ("grader_constant", 5),
    "rewards are NaN": ("reward_missing", 1),
    "learning rate 0": ("learning_rate_zero", 2),
    "clip at 0": ("weights_stuck", 2),
    "optimizer step not taken": ("weights_stuck", 2),
    "bfloat16 without masters": ("weights_stuck", 2),
    "weights not published": ("weights_unpublished", 1),
    "decoder detached": ("gradient_partial", 2),
    "gradient not zeroed": ("gradient_leftover", 2),
    "gradient not accumulated": ("gradient_lost", 1),
    "teacher moves": ("teacher_moved", 2),
    "mean of micro-batch means": ("loss_denominator", 2),
    "loss twice as large": ("loss_value", 2),
    "forward KL for reverse": ("loss_direction", 2),
    "reverse KL for forward": ("loss_direction", 2),
    "k3 for k2": ("loss_value", 2),
    "top-K ids a position late": ("support_ids", 2),
    "top-K ids a rank late": ("support_ids", 2),
    "support renormalised twice": ("support_values", 2),
    "support's mass a fifth": ("support_values", 2),
    "support's mass above 1": ("support_mass", 1),
    "support at another temperature": ("support_mass", 2),
    "softmax of the step before": ("support_mass", 2),
    "two BOS": ("doubled_bos", 1),
    "teacher's positions not shifted": ("teacher_padding", 2),
    "teacher in bfloat16, unchecked start": ("teacher_precision", 1),
    "teacher ignores the mask, unchecked start": ("teacher_mask", 2),
    "teacher's scores of the step before": ("teacher_rescored", 2),
    "teacher's scores of another row": ("teacher_exchanged", 1),
    "scored at another temperature": ("teacher_rescored", 1),
}
"""Expected alarm rule and number of steps until it is raised, by fault."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("pairs")
    kinds = {fault.architecture for fault in SILENT_FAULTS.values()}
    return {kind: make_models(folder / kind, architecture=kind) for kind in sorted(kinds)}


def test_every_fault_is_expected_to_be_caught() -> None:
    assert REFUSED.keys() | ALARMS.keys() == SILENT_FAULTS.keys()
    assert all(steps <= 5 for _, steps in ALARMS.values())


@pytest.mark.parametrize("name", REFUSED)
def test_a_fault_is_refused_before_training(pairs, tmp_path: Path, name: str) -> None:
    fault = SILENT_FAULTS[name]
    result = run_outcome(pairs[fault.architecture], tmp_path / "run", 1, fault)
    assert re.search(REFUSED[name], result["refused"]), result
    assert "start_checks to False" in result["refused"]
    assert rows.read_rows(tmp_path / "run" / "rows.jsonl") == []


@pytest.mark.parametrize("name", ALARMS)
def test_a_fault_is_named(pairs, tmp_path: Path, name: str) -> None:
    fault, (rule, steps) = SILENT_FAULTS[name], ALARMS[name]
    result = run_outcome(pairs[fault.architecture], tmp_path / "run", steps, fault)
    assert not result["refused"]
    assert result["alarms"].get(rule) == steps - 1, result


@pytest.mark.parametrize(
    "changes",
    [
        {
            "max_tokens_per_microbatch": 256,
            "objective": "teacher_topk",
            "mask": ("role:eos",),
            "top_p": 0.9,
        },
        {"dtype": "bfloat16", "denominator": "group_mean", "rescore_every": 1},
        {"dtype": "bfloat16", "objective": "teacher_topk", "full_metrics_every": 9},
        {
            "lora_rank": 2,
            "updates_per_batch": 2,
            "objective": "sampled_token_clipped",
            "temperature": 0.9,
        },
    ],
    ids=["masked top-p", "bfloat16", "bfloat16, few full metrics", "adapters"],
)
def test_a_healthy_run_is_silent(pairs, tmp_path: Path, changes: dict[str, object]) -> None:
    steps = 6 if "full_metrics_every" in changes else 4
    result = run_outcome(pairs["qwen2"], tmp_path / "run", steps, Fault(settings=changes))
    assert result == {"refused": "", "alarms": {}}
    for row in rows.read_rows(tmp_path / "run" / "rows.jsonl"):
        assert row["consistency/support_mass_over_share"] == 0
        # the student is scored by itself, also where few metrics are due
        assert (row["consistency/sampler_log_ratio_square"] > 0) or changes.get(
            "dtype"
        ) != "bfloat16"


def train_in_faulty_rank(config: Config) -> None:
    """Train as one of two ranks that both take the first half of the prompts."""
    distributed.shard_prompts = lambda count, updates=1: list(range(count // 2))
    train_in_rank([config])


def test_two_ranks_with_the_same_prompts_are_named(pairs, tmp_path: Path) -> None:
    alarms = {}
    for kind in ("faulty", "healthy"):
        config = with_settings(
            Config(student="", teacher="", out=""),
            **run_settings(pairs["qwen2"], tmp_path / kind, 0, 2),
        )
        if kind == "faulty":
            run_ranks(tmp_path, train_in_faulty_rank, config)
        else:
            run_ranks(tmp_path, train_in_rank, [config])
        record = rows.read_rows(tmp_path / kind / "rows.jsonl")
        alarms[kind] = {alarm.rule.name: alarm.step for alarm in replay(record)}
        share = 0.5 if kind == "faulty" else 0.0
        assert [row["data/prompts_on_several_ranks"] for row in record] == [share, share]
        assert [row["data/repeated_prompts"] for row in record] == [0, 0]
    assert alarms == {"faulty": {"prompts_on_several_ranks": 1}, "healthy": {}}
