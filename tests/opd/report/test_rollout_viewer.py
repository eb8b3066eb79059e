"""Data of the rollout viewer against the batches that it shows."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.records.batch_files import load_batch
from diagnostics.records.token_dumps import save_dump
from diagnostics.records.vocabulary import Vocabulary
from opd.report import build, rollout_viewer, run_data


def test_viewer_data_equals_the_batch(run: Path) -> None:
    data = rollout_viewer.viewer_data(run_data.read_run(run), tokens=10_000)
    batch = load_batch(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, ScoredRollouts)
    assert batch.support is not None
    assert batch.prefix is not None
    batch_entries = [roll for roll in data["rollouts"] if roll["step"] == 1]
    assert [roll["row"] for roll in batch_entries] == list(range(len(batch)))
    for roll in batch_entries:
        i, n = roll["row"], len(roll["ids"])
        is_supervised = batch.mask[i]
        assert (roll["prompt"], roll["turn"]) == (int(batch.prompt[i]), int(batch.turn[i]))
        assert n == int(is_supervised.nonzero()[-1]) + 1
        assert roll["ids"] == batch.tokens[i, :n].tolist()
        assert roll["off"] == [k for k in range(n) if not is_supervised[k]]
        assert [x / 100 for x in roll["s"]] == close(batch.student_logp[i, :n])
        assert [x / 100 for x in roll["t"]] == close(batch.teacher_logp[i, :n])
        inside = batch.support.contains(batch.tokens)[i, :n]
        assert roll["in"] == "".join("1" if x else "0" for x in inside)
        assert roll["rank"] == batch.prefix.teacher_rank[i, :n].tolist()
        p = batch.student_logp[i, :n].exp()
        energy = batch.log_ratio[i, :n] ** 2 * (1 - 2 * p + batch.prefix.collision[i, :n])
        assert [x / 100 for x in roll["e"]] == close(energy.sqrt())
        for shown_masses, masses in zip(roll["mass"], batch.support.masses(), strict=True):
            assert [x / 1e4 for x in shown_masses] == pytest.approx(
                masses[i, :n].tolist(), abs=6e-5
            )
        assert (roll["source"], roll["k"]) == (batch.support.source, batch.support.k)
        for k in range(n):
            check_tops(batch, i, k, roll["tops"][k])
    assert all(str(i) in data["texts"] for roll in batch_entries for i in roll["ids"])
    assert [batch_entry["step"] for batch_entry in data["saved"]] == [0, 1, 2]


def close(x: torch.Tensor) -> Any:
    return pytest.approx(x.tolist(), abs=0.0051)


def check_tops(batch: ScoredRollouts, i: int, k: int, shown_values: list[int]) -> None:
    """Compare with a loop: five likeliest ids of each model above 0.1 %, sorted by the teacher."""
    support = batch.support
    assert support is not None
    table = [
        (int(v), float(s), float(t))
        for v, s, t in zip(
            support.ids[i, k], support.student_logp[i, k], support.teacher_logp[i, k], strict=True
        )
    ]
    expected_ids = {
        row[0]
        for column in (1, 2)
        for row in sorted(table, key=lambda row: -row[column])[: rollout_viewer.TOP_IDS]
        if math.exp(row[column]) >= rollout_viewer.MIN_PROBABILITY
    }
    shown_rows = [shown_values[j : j + 3] for j in range(0, len(shown_values), 3)]
    assert {row[0] for row in shown_rows} == expected_ids
    assert [row[2] for row in shown_rows] == sorted((row[2] for row in shown_rows), reverse=True)
    exact = {v: (s, t) for v, s, t in table}
    for v, s, t in shown_rows:
        assert (s / 100, t / 100) == pytest.approx(exact[v], abs=0.0051)


def test_ids_that_are_absent_or_masked_are_not_shown_as_likely(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, ScoredRollouts)
    assert batch.support is not None
    present = (torch.arange(batch.support.k) > 0).expand(batch.support.ids.shape)
    reduced_support = replace(batch.support, present=present)
    mask_with_gap = batch.mask.clone()
    mask_with_gap[:, 1] = False
    changed_batch = replace(batch, support=reduced_support, mask=mask_with_gap)
    roll = rollout_viewer.rollout_entry(changed_batch, 0, 0, 3, [], Vocabulary(), set())
    assert (
        rollout_viewer.rollout_entry(batch, 0, 0, 3, ["math"], Vocabulary(), set())["task"]
        == "math"
    )
    first = int(batch.support.ids[0, 0, 0])
    assert first not in roll["tops"][0][::3]
    assert roll["off"] == [1]
    assert roll["tops"][1] == []


def test_likely_ids_do_not_depend_on_the_order_of_the_support(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, ScoredRollouts)
    assert batch.support is not None
    order = torch.randperm(batch.support.k, generator=torch.Generator().manual_seed(0))
    permuted = {
        name: getattr(batch.support, name)[..., order]
        for name in ("ids", "student_logp", "teacher_logp")
    }
    changed_batch = replace(batch, support=replace(batch.support, **permuted))
    for i in range(len(batch)):
        assert rollout_viewer.top_tokens(changed_batch, i, 3) == rollout_viewer.top_tokens(
            batch, i, 3
        )


def test_a_dump_is_shown_as_the_batch_that_it_was_made_of(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    (folder / "dumps").mkdir(parents=True)
    shutil.copy(run / "rows.jsonl", folder)
    shutil.copytree(run / "final", folder / "final")
    batch = load_batch(run / "batches" / "step_000001.safetensors")
    assert isinstance(batch, ScoredRollouts)
    save_dump(folder / "dumps" / "step_00000001.parquet", batch, 1)
    dump_data = rollout_viewer.viewer_data(run_data.read_run(folder), 10_000)
    batch_data = rollout_viewer.viewer_data(run_data.read_run(run), 10_000)
    expected_rollouts = [
        roll | {"asked": None, "view": None} for roll in batch_data["rollouts"] if roll["step"] == 1
    ]
    assert dump_data["rollouts"] == expected_rollouts  # a dump has no prompts
    assert build.report_data([folder])["runs"][0]["config"] == {}


def test_few_tokens_show_the_worst_responses(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000000.safetensors")
    assert isinstance(batch, ScoredRollouts)
    mean = batch.log_ratio.abs().sum(1) / batch.mask.sum(1)
    worst = int(mean.argmax())
    budget = 3 * int(batch.mask.sum(1)[worst])  # divided among three batches
    data = rollout_viewer.viewer_data(run_data.read_run(run), budget)
    assert worst in [roll["row"] for roll in data["rollouts"] if roll["step"] == 0]
    for step in range(3):
        assert sum(len(r["ids"]) for r in data["rollouts"] if r["step"] == step) <= budget // 3


def test_rollouts_show_their_prompts(run: Path) -> None:
    data = rollout_viewer.viewer_data(run_data.read_run(run), tokens=10_000)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    file = run / "batches" / "step_000001.prompts.json"
    texts = json.loads(file.read_text())
    assert len(texts) == len(load_batch(run / "batches" / "step_000001.safetensors"))
    for roll in data["rollouts"]:
        if roll["step"] == 1:
            assert roll["asked"] == texts[roll["row"]]
            assert tokenizer.eos_token in roll["asked"] or "user" in roll["asked"]
        assert roll["view"] is None


def test_what_the_teacher_reads_is_shown_beside_the_prompt(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "viewed"
    shutil.copytree(run, folder)
    file = folder / "batches" / "step_000001.safetensors"
    views = [f"hint {row}" for row in range(len(load_batch(file)))]
    views_file = file.with_suffix(".teacher_prompts.json")
    views_file.write_text(json.dumps(views))
    data = rollout_viewer.viewer_data(run_data.read_run(folder), tokens=10_000)
    for roll in data["rollouts"]:
        assert roll["view"] == (views[roll["row"]] if roll["step"] == 1 else None)
    views_file.write_text(json.dumps(views[1:]))
    with pytest.raises(InvalidInput, match=r"teacher_prompts\.json must be a JSON list"):
        rollout_viewer.viewer_data(run_data.read_run(folder), tokens=10_000)
