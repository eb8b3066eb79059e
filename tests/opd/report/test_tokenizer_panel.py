"""The tokenizer panel against counts over the batch, and the files that it reads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.records.batch_files import load_batch
from diagnostics.records.eos_ids import read_eos_ids
from diagnostics.records.vocabulary import Vocabulary, load_vocabulary
from opd.lab.build import make_tokenizer
from opd.report import rollout_viewer, run_data, tokenizer_panel


def test_attribution_equals_a_count(run: Path) -> None:
    data = rollout_viewer.viewer_data(run_data.read_run(run), tokens=10_000)
    batch = load_batch(run / "batches" / "step_000002.safetensors")
    assert isinstance(batch, ScoredRollouts)
    r, total_signal = batch.log_ratio, float(batch.log_ratio.abs()[batch.mask].sum())
    for row in data["blame"]:
        is_this_id = batch.mask & (batch.tokens == row["id"])
        assert row["count"] == int(is_this_id.sum())
        assert row["signal"] == pytest.approx(
            float(r.abs()[is_this_id].sum()) / total_signal, abs=1e-5
        )
        assert row["cost"] == pytest.approx(float(r[is_this_id].mean()), abs=1e-3)
    shares = [row["signal"] for row in data["blame"]]
    assert shares == sorted(shares, reverse=True)
    impossible = data["sheet"]["impossible"]
    is_impossible = (
        batch.mask & (batch.student_logp.exp() > 0.9) & (batch.teacher_logp.exp() < 1e-4)
    )
    assert impossible["share"] == pytest.approx(
        float(is_impossible.sum() / batch.mask.sum()), abs=1e-5
    )
    assert sum(row["count"] for row in impossible["rows"]) == int(is_impossible.sum())
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    special = {row["id"]: row for row in data["sheet"]["special"]}
    assert set(special) == {i for i, x in tokenizer.added_tokens_decoder.items() if x.special}
    for i, row in special.items():
        is_this_id = batch.mask & (batch.tokens == i)
        assert row["count"] == int(is_this_id.sum())
        assert row["signal"] == pytest.approx(
            float(r.abs()[is_this_id].sum()) / total_signal, abs=1e-5
        )


def test_impossible_tokens_are_named(run: Path) -> None:
    batch = load_batch(run / "batches" / "step_000002.safetensors")
    assert isinstance(batch, ScoredRollouts)
    student_logp, teacher_logp = batch.student_logp.clone(), batch.teacher_logp.clone()
    student_logp[0, 0], teacher_logp[0, 0] = -0.01, -12.0
    teacher_logp[1, 0] = 0.0  # a negative log ratio, which counts by its absolute value
    changed_batch = replace(batch, student_logp=student_logp, teacher_logp=teacher_logp)
    panel = tokenizer_panel.impossible_ids(changed_batch, set())
    assert {"id": int(batch.tokens[0, 0]), "count": 1, "student": -0.01, "teacher": -12.0} in panel[
        "rows"
    ]
    is_impossible = (student_logp.exp() > 0.9) & (teacher_logp.exp() < 1e-4) & batch.mask
    signal_size = (student_logp - teacher_logp).abs()
    signal = float(signal_size[is_impossible].sum() / signal_size[batch.mask].sum())
    assert panel["signal"] == pytest.approx(signal, abs=1e-5)
    assert panel["share"] == pytest.approx(float(is_impossible.sum() / batch.mask.sum()), abs=1e-5)
    assert panel["ended"] == pytest.approx(float(batch.ended.float().mean()), abs=1e-4)


def test_end_tokens_and_the_doctor_report_are_read(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    student, teacher = folder / "final", tmp_path / "teacher"
    shutil.copytree(student, teacher)
    tokenizer = AutoTokenizer.from_pretrained(student)
    for name in ("generation_config.json", "config.json"):
        model_config = json.loads((student / name).read_text()) if (student / name).exists() else {}
        (student / name).write_text(json.dumps(model_config | {"eos_token_id": [2, 1]}))
        (teacher / name).write_text(json.dumps(model_config | {"eos_token_id": None}))
    config = json.loads((folder / "config.json").read_text())
    changed_config = config | {"student": str(student), "teacher": "teacher"}
    (folder / "config.json").write_text(json.dumps(changed_config))
    item = {"item": "eos", "verdict": "fail", "found": "1 is not 2", "advice": "mend"}
    findings = {"verdict": "fail", "items": [item | {"numbers": {}}]}
    (folder / "doctor.json").write_text(json.dumps(findings))
    panel_of_folder = tokenizer_panel.tokenizer_panel(
        run_data.read_run(folder), Vocabulary(), None, set()
    )
    assert [end["role"] for end in panel_of_folder["ends"]] == ["student"]
    assert panel_of_folder["unread"] == [f"teacher: {teacher}"]
    panel = tokenizer_panel.tokenizer_panel(
        run_data.read_run(folder, models=True), Vocabulary(), None, set()
    )
    assert panel["unread"] == []
    own_eos = {"own": tokenizer.eos_token}
    assert panel["ends"] == [
        {
            "role": "student",
            "ids": [1, 2],
            "texts": tokenizer.convert_ids_to_tokens([1, 2]),
            **own_eos,
        },
        {
            "role": "teacher",
            "ids": [tokenizer.eos_token_id],
            "texts": [tokenizer.eos_token],
            **own_eos,
        },
    ]
    assert panel["doctor"] == {"verdict": "fail", "items": [item]}
    tasks = [{"name": "a", "teacher": None}, {"name": "b", "teacher": str(student)}]
    (folder / "config.json").write_text(json.dumps(changed_config | {"tasks": tasks}))
    end_tokens = tokenizer_panel.model_eos_tokens(run_data.read_run(folder, models=True))
    assert [(x["role"], x["ids"]) for x in end_tokens] == [
        ("student", [1, 2]),
        ("teacher of a", [tokenizer.eos_token_id]),
        ("teacher of b", [1, 2]),
    ]


def test_end_ids_are_read_from_a_nested_text_config(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    vocabulary = load_vocabulary(tmp_path)
    settings = tmp_path / "config.json"
    own_ids = read_eos_ids(tmp_path, vocabulary)
    settings.write_text('{"text_config": {"eos_token_id": [5, 6]}}')
    assert len(own_ids) == 1
    assert read_eos_ids(tmp_path, vocabulary) == (*own_ids, 5, 6)
    for value in ('"5"', "true", "[[1]]", "[1, null]", "1.0"):
        settings.write_text(f'{{"eos_token_id": {value}}}')
        with pytest.raises(
            InvalidInput, match=r"config\.json, field eos_token_id: .* is not an id"
        ):
            read_eos_ids(tmp_path, vocabulary)
