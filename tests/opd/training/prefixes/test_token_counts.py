"""Tokens that a step sampled and scored, against its saved batch."""

import json
from pathlib import Path

import pytest

from diagnostics.batch import STUDENT, TEACHER
from diagnostics.records.batch_files import load_batch
from diagnostics.records.run_cost import run_cost
from opd.config.groups import EvalConfig
from opd.evaluation.folder import EvaluationSettings, measure_folder
from opd.lab.build import make_tokenizer
from opd.training.train import train
from tests.helpers.runs import rows, settings

NAMES = ("cost/student_tokens", "cost/teacher_sampled_tokens", "cost/teacher_tokens")


@pytest.mark.parametrize("prefixes", ["mixed:0.5", "replay:1"])
def test_counts_are_those_of_the_saved_batches(tiny_pair, tmp_path: Path, prefixes: str) -> None:
    changes = {"objective": "full_reverse_kl", "steps": 3, "eval_every": 0, "eval_problems": 2}
    config = settings(tiny_pair, tmp_path / "run", prefixes=prefixes, save_batch_every=1, **changes)
    folder = train(config).folder
    tokenizer, totals = make_tokenizer(), dict.fromkeys(NAMES, 0)
    for step, row in enumerate(rows(folder)):
        path = folder / "batches" / f"step_{step:06d}.safetensors"
        batch = load_batch(path)
        prompts = json.loads(path.with_suffix(".prompts.json").read_text())
        lengths = batch.lengths.tolist()
        origins = [STUDENT] * len(batch) if batch.origin is None else batch.origin.tolist()
        counts = {
            writer: sum(n for n, origin in zip(lengths, origins, strict=True) if origin == writer)
            for writer in (STUDENT, TEACHER)
        }
        if prefixes == "replay:1" and step == 1:
            counts = {STUDENT: 0, TEACHER: 0}  # the responses of step 0 again
        read = sum(lengths) + sum(len(tokenizer.encode(prompt)) for prompt in prompts)
        expected = (counts[STUDENT], counts[TEACHER], read)
        assert tuple(row[name] for name in NAMES) == expected
        for name, value in zip(NAMES, expected, strict=True):
            totals[name] += value
    if prefixes == "mixed:0.5":
        assert totals["cost/teacher_sampled_tokens"] > 0
    cost = run_cost(folder)
    assert {name: cost[name] for name in NAMES} == totals
    evaluation = EvaluationSettings(
        evaluation=EvalConfig(eval_problems=2), max_prompt=64, max_response=4, seed=0, device="cpu"
    )
    assert cost.items() <= measure_folder(str(folder / "final"), evaluation).metrics.items()


def test_no_teacher_reads_nothing(tiny_pair, tmp_path: Path) -> None:
    config = settings(
        (tiny_pair[0], "none"),
        tmp_path / "run",
        objective="reward_only",
        reward_weight=1.0,
        steps=1,
        eval_problems=2,
    )
    (row,) = rows(train(config).folder)
    assert row["cost/teacher_tokens"] == row["cost/teacher_sampled_tokens"] == 0
    assert row["cost/student_tokens"] > 0
