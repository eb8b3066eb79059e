"""`opd diagnose` on records: partial files, scoring with models, and a run's own batch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diagnostics.monitor import Monitor
from diagnostics.records.columns import STATS_COLUMNS
from diagnostics.records.writer import batch_rows, save_records
from opd.analysis import diagnose
from opd.cli.diagnose import group_by_level, main
from opd.teachers.pair import load_pair
from tests.helpers.batches import batch


@pytest.fixture(scope="module")
def sampled(tiny_pair) -> SimpleNamespace:
    """Sample responses of the tiny student to two prompts, token by token without padding."""
    pair = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), "cpu", "float32")
    student, teacher = pair.student.network, pair.teacher.model.network
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(6):
        prompt = [[5, 6, 7], [9, 8]][i // 3]
        ids, length = list(prompt), 4 + i
        for _ in range(length):
            with torch.no_grad():
                p = student(torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(int(torch.multinomial(p, 1, generator=generator)))
        with torch.no_grad():
            logits = [
                m(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                for m in (student, teacher)
            ]
        rows.append(
            {
                "prompt_tokens": prompt,
                "tokens": ids[len(prompt) :],
                "data_source": ["sums", "words"][i // 3],
                "finish_reason": "stop" if i % 2 else "length",
                "logits": logits,
            }
        )
    return SimpleNamespace(pair=tiny_pair, rows=rows)


def without_logits(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "logits"}


def diagnose_as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict, str]:
    main([*map(str, arguments), "--json"])
    out = capsys.readouterr()
    return json.loads(out.out), out.err


def test_scoring_records_equals_dense_numbers(sampled, tmp_path, capsys) -> None:
    path = tmp_path / "r.parquet"
    save_records(path, [without_logits(row) for row in sampled.rows])
    unscored_row, errors = diagnose_as_json(capsys, path)
    assert unscored_row["divergence/tokens"] == sum(len(row["tokens"]) for row in sampled.rows)
    assert unscored_row["response/truncated_share"] == 0.5
    assert "divergence/k1" not in unscored_row
    assert "not computed: sampled_divergence (the records have no student_logp)" in errors
    assert "--student and --teacher add" in errors
    models = ("--student", sampled.pair[0], "--teacher", sampled.pair[1], "--device", "cpu")
    row, errors = diagnose_as_json(capsys, path, *models, "--k", 4)
    r, kl, outside = by_hand(sampled.rows, k=4)
    assert row["divergence/k1"] == pytest.approx(r, rel=1e-4)
    assert row["divergence/reverse_kl"] == pytest.approx(kl, rel=1e-4)
    assert row["divergence/outside_topk_expected"] == pytest.approx(outside, rel=1e-4)
    assert abs(row["consistency/z_H"]) < 4
    assert row["response/truncated_share"] == 0.5
    assert "not computed: sampler_ratio (the records have no sampler_logp)" in errors
    words_row, _ = diagnose_as_json(capsys, path, *models, "--task", "words")
    assert words_row["divergence/k1"] == pytest.approx(by_hand(sampled.rows[3:], k=4)[0], rel=1e-4)
    warm_row, _ = diagnose_as_json(capsys, path, *models, "--temperature", 2)
    assert warm_row["divergence/reverse_kl"] < row["divergence/reverse_kl"]


def by_hand(rows: list[dict], k: int) -> tuple[float, float, float]:
    r, kl, outside = [], [], []
    for row in rows:
        p, q = row["logits"]
        y = torch.tensor(row["tokens"])[:, None]
        r.append((p.gather(-1, y) - q.gather(-1, y))[:, 0])
        kl.append((p.exp() * (p - q)).sum(-1))
        outside.append(1 - p.gather(-1, q.topk(k, -1).indices).exp().sum(-1))
    mean = [float(torch.cat(x).mean()) for x in (r, kl, outside)]
    return mean[0], mean[1], mean[2]


def test_recorded_student_scores_are_compared(sampled, tmp_path, capsys) -> None:
    rows = []
    for row in sampled.rows:
        y = torch.tensor(row["tokens"])[:, None]
        logp = (row["logits"][0].gather(-1, y)[:, 0] - 0.25).tolist()
        rows.append(without_logits(row) | {"student_logp": logp, "teacher_logp": logp})
    save_records(tmp_path / "r.jsonl", rows)
    models = ("--student", sampled.pair[0], "--teacher", sampled.pair[1], "--device", "cpu")
    row, errors = diagnose_as_json(capsys, tmp_path / "r.jsonl", *models)
    assert row["divergence/k1"] == pytest.approx(by_hand(sampled.rows, 4)[0], rel=1e-4)
    assert "differs from this student's by 0.25 per token, 0.25 at most" in errors
    unscored_row, _ = diagnose_as_json(capsys, tmp_path / "r.jsonl")
    assert unscored_row["divergence/k1"] == 0


def test_a_table_by_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = batch()
    save_records(tmp_path / "r.jsonl", [b])
    main([str(tmp_path / "r.jsonl")])
    output = capsys.readouterr().out
    places = [output.index(f"\n from {level}\n") for level in diagnose.LEVELS]
    assert places == sorted(places)
    parts = [output[a:z] for a, z in zip(places, [*places[1:], len(output)], strict=True)]
    names = (
        "divergence/tokens",
        "divergence/k1",
        "divergence/outside_topk",
        "divergence/reverse_kl",
    )
    for i, name in enumerate(names):
        has_column = [f"  {name} " in part for part in parts]
        assert has_column == [j == i for j in range(4)], name
    row = Monitor()(0, [b])
    assert f"{row['divergence/k1']:.4g}  ± {row['divergence/k1_se']:.2g}" in output
    rows = [{k: v for k, v in r.items() if k not in STATS_COLUMNS} for r in batch_rows(b)]
    save_records(tmp_path / "p.jsonl", rows)
    main([str(tmp_path / "p.jsonl")])
    output = capsys.readouterr().out
    assert diagnose.LEVELS[2] in output
    assert diagnose.LEVELS[3] not in output
    assert "not computed: exact_divergence (the batch has no distribution statistics" in output


def test_a_column_belongs_to_the_longest_name_that_begins_it() -> None:
    row = {"a": 1.0, "a_se": 2.0, "a_b": 3.0, "a_b@0-1_se": 4.0}
    assert group_by_level(row, {"a": 1, "a_b": 0}) == {
        0: {"a_b": 3.0, "a_b@0-1_se": 4.0},
        1: {"a": 1.0, "a_se": 2.0},
    }


def test_invalid_input_is_rejected(sampled, tmp_path: Path) -> None:
    models = ["--student", str(sampled.pair[0]), "--teacher", str(sampled.pair[1])]
    batch().save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors is not a records file; --student"):
        main([str(tmp_path / "b.safetensors"), *models])
    path = tmp_path / "r.jsonl"
    for change, message in (
        ({"prompt_tokens": None}, "has no prompt_tokens"),
        ({"prompt_tokens": []}, "a row has no prompt_tokens; the first response token needs"),
        ({"tokens": [10**6]}, "token 1000000 is not in the models' vocabulary"),
        ({"prompt_tokens": [10**6]}, "prompt token 1000000 is not in the models' vocabulary"),
    ):
        save_records(path, [without_logits(sampled.rows[0]) | change])
        with pytest.raises(ValueError, match=message):
            main([str(path), *models, "--device", "cpu"])
    save_records(path, [without_logits(sampled.rows[0])])
    with pytest.raises(ValueError, match="has no rows of task 'chess'"):
        main([str(path), "--task", "chess"])
    with pytest.raises(ValueError, match="no model given"):
        main([str(path), "--student", str(sampled.pair[0])])


@pytest.mark.parametrize("has_masks", [True, False])
def test_padding_is_masked_or_rejected(sampled, tmp_path, capsys, has_masks: bool) -> None:
    """Records padded as in TRL, with and without masks: same numbers as unpadded, or an error."""
    pair = load_pair(*map(str, sampled.pair), "cpu", "float32")
    padding = pair.tokenizer.pad_token_id
    rows = []
    for row in map(without_logits, sampled.rows):
        prompt, tokens = row["prompt_tokens"], row["tokens"]
        masks = {
            "prompt_mask": [0] * (5 - len(prompt)) + [1] * len(prompt),
            "completion_mask": [1] * len(tokens) + [0] * (12 - len(tokens)),
        }
        padded = {
            "prompt_ids": [padding] * (5 - len(prompt)) + prompt,
            "completion_ids": tokens + [padding] * (12 - len(tokens)),
        }
        rows.append(padded | (masks if has_masks else {}))
    save_records(tmp_path / "r.jsonl", rows)
    models = ("--student", sampled.pair[0], "--teacher", sampled.pair[1], "--device", "cpu")
    if not has_masks:
        with pytest.raises(ValueError, match=f"begins with the padding id {padding}; add prompt_m"):
            main([*map(str, (tmp_path / "r.jsonl", *models))])
        unpadded = [
            row | {"prompt_ids": r["prompt_tokens"]}
            for row, r in zip(rows, sampled.rows, strict=True)
        ]
        save_records(tmp_path / "r.jsonl", unpadded)
        with pytest.raises(
            ValueError, match=f"ends with the id {padding} more than once.*response"
        ):
            main([*map(str, (tmp_path / "r.jsonl", *models))])
        return
    row, _ = diagnose_as_json(capsys, tmp_path / "r.jsonl", *models, "--k", 4)
    r, kl, _ = by_hand(sampled.rows, k=4)
    assert row["divergence/k1"] == pytest.approx(r, rel=1e-4)
    assert row["divergence/reverse_kl"] == pytest.approx(kl, rel=1e-4)
