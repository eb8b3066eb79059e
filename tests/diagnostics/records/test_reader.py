"""Records: round trip, columns of other trainers, incomplete files, and rejected rows."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.concatenation import concatenate
from diagnostics.core.optional_fields import MissingField
from diagnostics.core.partial import without_fields
from diagnostics.missing import missing_fields
from diagnostics.monitor import Monitor
from diagnostics.records.columns import NAMES, STATS_COLUMNS, integer_id
from diagnostics.records.reader import Records
from diagnostics.records.writer import batch_rows, save_records
from tests.helpers.batches import batch

SUFFIXES = (".jsonl", ".parquet")


def graded(seed: int = 0) -> ScoredRollouts:
    b = batch(seed)
    reward = torch.linspace(0, 1, len(b))
    reward[3] = math.nan
    return replace(b, reward=reward, task=b.prompt % 2, turn=b.prompt, temperature=0.5)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_row(**changes) -> dict:
    row = {
        "tokens": [5, 6, 7],
        "mask": [1, 0, 1],
        "student_logp": [-1.0, None, -2.0],
        "teacher_logp": [-0.5, 9.0, -3.0],
        "prompt": 1,
        "ended": True,
    }
    return {k: v for k, v in (row | changes).items() if v is not ...}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_batch_survives_the_records(tmp_path: Path, suffix: str) -> None:
    b = graded()
    assert save_records(tmp_path / f"r{suffix}", [b]) == len(b)
    (loaded_batch,) = Records(tmp_path / f"r{suffix}")
    width = loaded_batch.tokens.shape[1]
    assert torch.equal(loaded_batch.tokens, torch.where(sampled_prefix(b), b.tokens, 0)[:, :width])
    for f in fields(ScoredRollouts):
        original, loaded = getattr(b, f.name), getattr(loaded_batch, f.name)
        if f.name not in ("tokens", "support", "prefix") and isinstance(original, torch.Tensor):
            expected = original[:, :width] if original.dim() > 1 else original
            assert torch.allclose(expected, loaded, rtol=0, atol=0, equal_nan=True), f.name
    assert loaded_batch.temperature == 0.5
    for part in ("support", "prefix"):
        for name, x in getattr(b, part)._tensors().items():
            x = x * b.mask[..., None] if name == "ids" else x
            assert torch.equal(x[:, :width], getattr(getattr(loaded_batch, part), name)), name
    expected_row = Monitor()(0, [b])
    assert Monitor()(0, [loaded_batch]) == pytest.approx(
        expected_row, rel=1e-6, abs=1e-9, nan_ok=True
    )
    assert [p.name for p in tmp_path.iterdir()] == [f"r{suffix}"]


def sampled_prefix(b: ScoredRollouts) -> torch.Tensor:
    """Return the positions up to the last supervised one of each row."""
    return b.mask.long().flip(1).cumsum(1).flip(1) > 0


def test_streaming_in_small_batches_changes_no_number(tmp_path: Path) -> None:
    b = concatenate([batch(s) for s in range(3)])
    b = replace(b, prompt=torch.arange(len(b)) // 4)
    save_records(tmp_path / "r.jsonl", [b.rows(slice(0, 10)), b.rows(slice(10, None))])
    records = Records(tmp_path / "r.jsonl", positions=40 * 5)
    sizes = [len(part) for part in records]
    assert sizes == [
        8,
        8,
        8,
        8,
        4,
    ]  # prompts are not split: a batch ends at the next prompt after 5 rows
    streamed_row, full_row = Monitor()(0, records), Monitor()(0, [b])
    assert streamed_row == pytest.approx(full_row, rel=1e-6, abs=1e-9, nan_ok=True)
    assert records.notes == {}
    shuffled = list(batch_rows(b))
    save_records(
        tmp_path / "s.jsonl", shuffled[::4] + shuffled[1::4] + shuffled[2::4] + shuffled[3::4]
    )
    unsorted_records = Records(tmp_path / "s.jsonl", positions=40 * 5)
    values = Monitor()(0, unsorted_records)
    assert values["divergence/k1"] == pytest.approx(full_row["divergence/k1"], rel=1e-9)
    assert "sort the file by prompt" in unsorted_records.notes["order"]


def test_what_is_lacking_is_named_and_the_rest_computed(tmp_path: Path) -> None:
    b = batch()
    full = Monitor()(0, [b])

    def without(*names: str) -> tuple[dict[str, float], Monitor, Records]:
        rows = [{k: v for k, v in row.items() if k not in names} for row in batch_rows(b)]
        records = Records(write_lines(tmp_path / "r.jsonl", rows))
        monitor = Monitor()
        return monitor(0, records), monitor, records

    row, monitor, _ = without("teacher_logp", "ended", *STATS_COLUMNS)
    assert row["divergence/tokens"] == full["divergence/tokens"]
    assert row["divergence/outside_topk"] == pytest.approx(full["divergence/outside_topk"])
    assert row["consistency/sampler_log_ratio"] == pytest.approx(0)
    assert not any(name.startswith(("divergence/k1", "divergence/reverse_kl")) for name in row)
    assert monitor.missing["sampled_divergence"] == "the records have no teacher_logp"
    assert monitor.missing["length"] == "the records have no ended"
    assert "distribution statistics" in monitor.missing["martingales"]

    row, monitor, _ = without("sampler_logp", "support.student_logp")
    assert row["consistency/z_H"] == pytest.approx(full["consistency/z_H"])
    assert monitor.missing["sampler_ratio"] == "the records have no sampler_logp"
    assert monitor.missing["support_mass"] == "the support of the records has no student_logp"

    row, monitor, records = without("prompt", "prefix.collision")
    assert row["divergence/k1"] == pytest.approx(full["divergence/k1"])
    assert row["divergence/k1_se"] != pytest.approx(full["divergence/k1_se"])
    assert "every response as independent" in records.notes["prompt"]
    assert records.notes["prefix"].endswith("prefix.collision")

    row, monitor, _ = without(*(set(next(batch_rows(b))) - {"tokens"}))
    assert row["divergence/tokens"] == sum(len(r["tokens"]) for r in batch_rows(b))
    assert row["response/graded_share"] == 0


def test_a_partial_batch_stays_partial() -> None:
    b = without_fields(batch(), ["teacher_logp"])
    for derived in (b.rows([0, 1]), b.to("cpu"), b.trim(), without_fields(b, ["ended"])):
        with pytest.raises(MissingField, match="teacher_logp"):
            derived.log_ratio  # noqa: B018
        assert "teacher_logp" in missing_fields(derived)
        assert torch.equal(derived.student_logp, batch().student_logp[: len(derived)])
    with pytest.raises(MissingField, match="no ended"):
        without_fields(b, ["ended"]).ended  # noqa: B018
    with pytest.raises(ValueError, match="without ended cannot be saved"):
        without_fields(b, ["ended"]).save("x")
    with pytest.raises(ValueError, match="ScoredRollouts has no fields"):
        without_fields(batch(), ["teacher"])
    assert "teacher_logp" not in next(batch_rows(b))
    assert without_fields(batch(), []).__class__ is ScoredRollouts


def test_columns_of_others_are_understood(tmp_path: Path) -> None:
    verl_row = {
        "responses": [5, 6, 7],
        "response_mask": [1, 0, 1],
        "old_log_probs": [-1.0, 0, -2.0],
        "ref_log_prob": [-0.5, 0, -3.0],
        "rollout_log_probs": [-1.5, 0, -2.5],
        "uid": "a-b-c",
        "finish_reason": "length",
        "score": None,
        "data_source": "math",
        "topk_ids": [[5, 1], None, [2, 7]],
        "topk_teacher_logp": [[-0.5, -1.0], None, [-1.0, -3.0]],
        "support": {"student_logp": [[-1.0, -2.0], [0, 0], [-4.0, -2.0]]},
        "text": "hello",
        "my_turn": 3,
    }
    ended_row = verl_row | {"data_source": "code", "finish_reason": "stop", "score": 0.5}
    records = Records(
        write_lines(tmp_path / "r.jsonl", [verl_row, ended_row, verl_row]),
        rename={"my_turn": "turn"},
    )
    (b,) = records
    assert b.tokens.tolist() == [[5, 6, 7]] * 3
    assert b.mask.tolist() == [[True, False, True]] * 3
    assert b.student_logp[0].tolist() == [-1.0, 0.0, -2.0]
    assert b.teacher_logp[0].tolist() == [-0.5, 0.0, -3.0]
    assert b.sampler_logp[0].tolist() == [-1.5, 0.0, -2.5]
    assert b.ended.tolist() == [False, True, False]
    assert b.prompt.tolist() == [integer_id("a-b-c")] * 3
    assert b.reward.isnan().tolist() == [True, False, True]
    assert (b.task.tolist(), records.tasks) == ([0, 1, 0], ["math", "code"])
    assert b.turn.tolist() == [3, 3, 3]
    assert b.support.contains(b.tokens)[0].tolist() == [True, False, True]
    assert b.support.masses()[0][0, 0].item() == pytest.approx(math.exp(-1) + math.exp(-2))
    assert records.unused == ("text",)
    (code_batch,) = Records(tmp_path / "r.jsonl", task="code")
    assert len(code_batch) == 1
    assert "turn" not in Records(tmp_path / "r.jsonl").columns
    truncated_rows = [plain_row(ended=..., truncated=value) for value in (True, False)]
    (b,) = Records(write_lines(tmp_path / "r.jsonl", truncated_rows))
    assert b.ended.tolist() == [False, True]


def test_the_table_of_names_is_the_one_that_is_read() -> None:
    from diagnostics.records import columns

    documented = {
        word.strip(" ,|")
        for line in columns.__doc__.splitlines()
        if line.startswith("| ")
        for word in line.replace("(", " ").replace(")", " ").replace(";", " ").split()
    }
    column_names = {name for name in NAMES if not name.startswith("prefix.")}
    assert column_names <= documented, column_names - documented
    assert len(STATS_COLUMNS) == len(fields(DistributionStats))


FAULTS = {
    "no columns": ({"text": "a"}, "row 2: no column tokens among text"),
    "length": (plain_row(teacher_logp=[-1.0]), "row 2, field teacher_logp: 1 values, tokens has 3"),
    "nan": (
        plain_row(teacher_logp=[-1, 0, math.nan]),
        "teacher_logp: nan at position 2 .*finite",
    ),
    "null": (plain_row(student_logp=[None, 0, -1.0]), "field student_logp: nan at position 0"),
    "infinite": (plain_row(teacher_logp=[-math.inf, 0, -1]), "teacher_logp: -inf at position 0"),
    "positive": (plain_row(student_logp=[-1, 5, 0.5]), "0.5 at position 2 is a positive log-prob"),
    "text": (
        plain_row(student_logp=["x", 0, 0]),
        "student_logp: .'x', 0, 0. does not hold numbers",
    ),
    "label": (plain_row(tokens=[5, -100, 7]), "field tokens: -100 at position 1 is not an id"),
    "float id": (plain_row(tokens=[5, 6.5, 7]), "field tokens: .*integers"),
    "not a list": (plain_row(tokens=3), "field tokens: 3 is not a list"),
    "mask": (plain_row(mask=[1, 2, 1]), "field mask: .1, 2, 1. holds values other"),
    "reason": (
        plain_row(ended=..., finish_reason="abort"),
        "finish_reason: 'abort' is none of stop",
    ),
    "twice": (plain_row(old_log_probs=[0, 0, 0]), "'student_logp' and 'old_log_probs' both mean"),
    "lost": (
        plain_row(teacher_logp=...),
        "row 2: field teacher_logp is only in this or only in the first row",
    ),
    "no object": ([1], r"row 2: \[1\] is not an object"),
    "reward": (plain_row(reward="good"), "field reward: 'good' is not a number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_row_is_refused_with_its_place(tmp_path: Path, fault: str) -> None:
    row, pattern = FAULTS[fault]
    path = write_lines(tmp_path / "r.jsonl", [plain_row(), row])
    with pytest.raises(ValueError, match=f"r.jsonl row 2.*{pattern.removeprefix('row 2')}"):
        list(Records(path))


def test_faults_of_a_support_and_of_files(tmp_path: Path) -> None:
    good = {"topk_ids": [[1, 2]] * 3, "topk_teacher_logp": [[-1, -2]] * 3}
    for change, pattern in (
        ({"topk_ids": [[1, 2], [1], [1, 2]]}, "support.ids: 1 values at position 1, but 2 before"),
        ({"topk_ids": [[1, 2], None, None]}, "support.ids: null at position 2"),
        ({"topk_ids": [[1]] * 3}, "the fields of the support have different shapes"),
        ({"topk_teacher_logp": [[-1, 1], [0, 0], [0, 0]]}, "teacher_logp: 1.0 at position 0"),
        ({"temperature": 0.7}, "temperature"),
    ):
        path = write_lines(tmp_path / "r.jsonl", [plain_row(**good), plain_row(**good | change)])
        with pytest.raises(ValueError, match=pattern):
            list(Records(path))
    first, second = plain_row(temperature=0.5), plain_row(temperature=0.7)
    with pytest.raises(
        ValueError, match=r"row 2, field temperature: 0.7, but the first row has 0.5"
    ):
        list(Records(write_lines(tmp_path / "r.jsonl", [first, second])))
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(plain_row()) + '\n{"tokens": [1')
    with pytest.raises(ValueError, match="row 2 is not JSON"):
        list(Records(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        Records(path)
    with pytest.raises(ValueError, match=r"is none of \.jsonl, \.parquet"):
        Records(tmp_path / "r.csv")
    with pytest.raises(ValueError, match=r"neither suffix \.jsonl nor \.parquet"):
        save_records(tmp_path / "r.csv", [batch()])
    with pytest.raises(ValueError, match=r"unknown columns \['teacher'\]"):
        Records(path, rename={"x": "teacher"})
