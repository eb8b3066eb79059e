"""Figures that judge a run: sampler, collapse, control, signal; and folders they refuse."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.batch import DATASET
from diagnostics.errors import InvalidInput
from diagnostics.records import rows
from diagnostics.records.run_folder import RunFolder
from diagnostics.records.run_groups import common_saved_steps, group_by_method
from diagnostics.records.vocabulary import load_run_vocabulary
from figures.collect.tokens import token_table
from figures.runs import (
    fan,
    sampler,
    signal_loss,
    warning,
)
from tests.helpers.dense_batches import make_dense_batch
from tests.helpers.records.saved_runs import expected_tokens


def test_the_sampler_check_tells_a_nucleus(saved_runs: list[Path]) -> None:
    data, expected = token_table(saved_runs[:1], 3), expected_tokens(saved_runs[:1], 3)
    results = sampler.z_by_kind(data)
    for name, is_selected in (
        ("all", lambda row: True),
        ("student undecided", lambda row: row["entropy"] >= 0.1),
        ("first 8 tokens", lambda row: row["position"] < 8),
    ):
        selected = [row for row in expected if is_selected(row)]
        z = sum(row["surprise"] - row["entropy"] for row in selected)
        variance = sum(row["surprise_variance"] for row in selected)
        assert results[name] == pytest.approx((z / np.sqrt(variance), variance), rel=1e-6)
    assert abs(results["all"][0]) < 4
    likely = data.assign(student_logp=data["student_logp"].clip(lower=-1.0))
    assert sampler.z_by_kind(likely)["all"][0] < -4
    table = sampler.collect(saved_runs)
    first = rows.read_rows(saved_runs[0] / "rows.jsonl")[0]["consistency/z_H@4-7"]
    position = table[(table["panel"] == "position") & (table["label"] == "4–7")]
    assert any(value == pytest.approx(first, rel=1e-4) for value in position["value"])
    figure = sampler.draw(table[table["method"] == "plain"])
    values = position[position["method"] == "plain"]["value"]
    diamonds = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "D"]
    pooled = values.sum() / np.sqrt(len(values))
    assert any(len(y) and y[0] == pytest.approx(pooled) for y in diamonds)
    halves = [sampler.z_by_kind(data[data["response"] % 2 == i])["all"] for i in (0, 1)]
    z, variance = (np.array(x) for x in zip(*halves, strict=True))
    assert sampler.combine_z(z, variance) == pytest.approx(results["all"][0])


def test_the_sampler_is_checked_on_what_the_student_has_just_sampled(tmp_path: Path) -> None:
    batch = make_dense_batch(seed=3, gap=1.5, sharpness=3.0).batch
    rows_of_student = [i for i in range(len(batch)) if i % 3 == 0]
    origin = torch.tensor([i % 3 if i % 3 < 2 else 0 for i in range(len(batch))])
    age = torch.tensor([int(i % 3 == 2) for i in range(len(batch))])
    runs = []
    for name, written in (
        ("mixed", batch.with_fields(origin=origin, age=age)),
        ("own", batch.rows(torch.tensor(rows_of_student))),
        ("given", batch.with_fields(origin=torch.full((len(batch),), DATASET))),
    ):
        run = tmp_path / name
        (run / "batches").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"seed": 0, "student": "s", "teacher": "t"}))
        written.save(RunFolder(run).batch_path(0))
        rows.append_row(run / "rows.jsonl", {"step": 0})
        runs.append(run)
    mixed, own = (token_table([run], 0, sampled_now=True) for run in runs[:2])
    assert sampler.z_by_kind(mixed) == sampler.z_by_kind(own)
    assert sampler.z_by_kind(mixed) != sampler.z_by_kind(token_table(runs[:1], 0))
    with pytest.raises(InvalidInput, match="sampled none of the responses"):
        sampler.collect(runs[2:])


def outcome_row(step: int, reward: float, truncated: float, entropy: float) -> dict:
    row = {"step": step, "response/reward": reward, "response/truncated_share": truncated}
    return row | {"divergence/student_entropy": entropy, "response/truncated_share_se": 0.01}


def test_a_collapse_is_told_from_outcomes_and_the_lead_from_it(tmp_path: Path) -> None:
    g, run_folders = np.random.default_rng(0), []
    for seed in range(4):
        run = tmp_path / f"{'good' if seed < 3 else 'bad'}-{seed}"
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"seed": seed}))
        for step in range(20):
            collapses = seed == 3
            row = outcome_row(
                step,
                0.2 if collapses and step >= 12 and step != 13 else 0.6,
                0.9 if collapses and step >= 15 else 0.05 + 0.01 * g.random(),
                1 + 0.1 * g.normal() + (5 if collapses and step >= 9 else 0),
            )
            rows.append_row(run / "rows.jsonl", row)
        run_folders.append(run)
    assert warning.collapse_step(rows.read_rows(run_folders[0] / "rows.jsonl")) is None
    assert (
        warning.collapse_step(rows.read_rows(run_folders[3] / "rows.jsonl")) == 14
    )  # step 12 alone is no collapse
    table = warning.collect(run_folders)
    assert set(table["kind"]) == {"healthy", "bad"}
    nearby = [row for run in run_folders[:3] for row in rows.read_rows(run / "rows.jsonl")]
    nearby = np.array([x["divergence/student_entropy"] for x in nearby if 5 <= x["step"] <= 9])
    entropy = table[table["indicator"] == "divergence/student_entropy"]
    bad_row = entropy[(entropy["run"] == "bad-3") & (entropy["step"] == 7)]
    z = (bad_row["value"].item() - nearby.mean()) / nearby.std(ddof=1)
    assert bad_row["z"].item() == pytest.approx(z, abs=0.01)
    healthy_rows = entropy[entropy["kind"] == "healthy"]
    assert len(healthy_rows) < 20 < len(entropy), (
        "of healthy runs what went off, and the first step"
    )
    assert set(healthy_rows["run"]) == {"good-0", "good-1", "good-2"}
    bars = warning.draw(table).axes[2]
    row = list(dict.fromkeys(table["indicator"])).index("divergence/student_entropy")
    warned, false = np.split(np.array([bar.get_width() for bar in bars.patches]), 2)
    assert (warned[row], false[row]) == (1, 0), "in one of one run, and in no healthy run"
    leads = {text.get_position()[1]: text.get_text() for text in bars.texts}
    assert leads[row] == "5", "step 9 to 14"
    counts = warning.count_warnings(
        table.assign(far=table["z"].abs() > warning.FAR_Z, alarm=table["alarm"].astype(bool)), "bad"
    )["divergence/student_entropy", "far"]
    assert counts == warning.Warnings(warned=1, collapsing=1, false=0, healthy=3, lead=5.0)
    with pytest.raises(ValueError, match="3 of 3 runs are healthy"):
        warning.collect(run_folders[:3])


def test_the_control_is_paired_by_prompt(saved_runs: list[Path]) -> None:
    run = saved_runs[0]
    with pytest.raises(FileNotFoundError, match="opd probe-own-prefix"):
        fan.collect([run])
    all_batches = {
        "teacher": make_dense_batch(5),
        "student": make_dense_batch(6),
        "trained": make_dense_batch(7),
    }
    for name, dense_batch in all_batches.items():
        dense_batch.batch.save(run / "control" / f"{name}.safetensors")
    table = fan.collect([run])
    doubts = {}
    for name, dense_batch in all_batches.items():
        positions = [(i, t) for i, t in dense_batch.tokens() if 4 <= t <= 7]
        doubts[name] = np.mean([1 - float(dense_batch.q[i, t].exp().max()) for i, t in positions])
        bin_rows = table[(table["source"] == name) & (table["first"] == 4)].set_index("quantity")
        assert bin_rows.loc["doubt", "value"] == pytest.approx(doubts[name], rel=1e-4)
        assert bin_rows.loc["doubt", "tokens"] == len(positions)
        entropy = np.mean(
            [-float((dense_batch.q[i, t].exp() * dense_batch.q[i, t]).sum()) for i, t in positions]
        )
        assert bin_rows.loc["teacher_entropy", "value"] == pytest.approx(entropy, rel=1e-4)
    teacher_tokens = pd.DataFrame({"prompt": np.arange(9).repeat(3), "bin": 2, "doubt": 0.1})
    teacher_tokens["doubt"] += np.arange(9).repeat(3)  # prompts differ a lot, the gap hardly does
    student_tokens = teacher_tokens.assign(doubt=teacher_tokens["doubt"] + 0.5)
    (gap,) = fan.paired_gaps(teacher_tokens, student_tokens, np.random.default_rng(0))
    assert (gap["value"], gap["low"], gap["high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert (gap["first"], gap["last"], gap["tokens"]) == (4, 7, 27)
    longer = student_tokens.iloc[np.repeat(np.arange(27), np.arange(27) % 5 + 1)]
    (gap,) = fan.paired_gaps(teacher_tokens, longer, np.random.default_rng(0))
    assert gap["value"] == pytest.approx(
        longer["doubt"].mean() - teacher_tokens["doubt"].mean(), rel=1e-4
    )


def test_signal_and_loss_are_the_probes(tmp_path: Path) -> None:
    run = tmp_path / "probed-0"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 0}))
    for step, signal in enumerate((4.0, None, -0.5)):
        row = {"step": step, "divergence/reverse_kl": 0.5, "divergence/reverse_kl_se": 0.1}
        if signal is not None:
            row |= {"gradient/signal": signal}
            row |= {"gradient/signal_low": signal - 1, "gradient/signal_high": signal + 1}
        rows.append_row(run / "rows.jsonl", row)
    table = signal_loss.collect([run])
    assert table["step"].tolist() == [0, 2]
    assert table["ratio"].tolist() == [4.0, -0.5]
    figure = signal_loss.draw(table)
    floor = 4.0 / 3
    triangles = [line for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert len(triangles) == 1, "the interval of the second reaches 0"
    assert figure.axes[0].lines[0].get_ydata().tolist() == [4.0, floor]
    (run / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="--probe-every"):
        signal_loss.collect([run])


def test_folders_that_cannot_be_read_say_why(saved_runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        group_by_method([tmp_path])
    empty = tmp_path / "empty-0"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"seed": 0, "student": "nowhere"}))
    with pytest.raises(FileNotFoundError, match="--save-batch-every"):
        common_saved_steps([saved_runs[0], empty])
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_run_vocabulary(empty)
    assert list(group_by_method([*saved_runs, empty])) == ["plain", "other", "empty"]
