"""The command `opd scout`: measurements, forecasts from a bank, its test, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from diagnostics.errors import InvalidInput, MissingFile
from opd.analysis.scout import bank as bank_module
from opd.analysis.scout.measure import pair_measurements
from opd.analysis.scout.report import read_report
from opd.cli import scout
from opd.lab.build import make_tokenizer
from tests.helpers.records.scout_banks import synthetic_bank, write_bank

SHORT = ["--rollouts", "32", "--max-prompt", "64", "--max-response", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank.csv"
    write_bank(path, synthetic_bank(0, effects={}, families=3, pairs=5, methods=2))
    return path


def test_a_scout_measures_says_that_noise_is_no_forecast_and_ranks(
    tiny_pair, table: Path, tmp_path: Path, capsys
) -> None:
    student, teacher = map(str, tiny_pair)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    out = tmp_path / "scout.json"
    options = [*SHORT, "--bank", str(table), "--out", str(out)]
    scout.main([student, teacher, str(other), *options])
    text = capsys.readouterr().out
    assert "30 runs of 15 pairs in 3 families, 2 methods" in text
    assert "gain is not forecast: the rank correlation" in text
    assert f"{other} cannot be used" in text
    report = read_report(out)
    assert [x.teacher for x in report.teachers] == [teacher]
    expected = pair_measurements(student, teacher, max_prompt=64, max_response=4, rollouts=32)
    measured = report.teachers[0].measurements
    assert measured["reverse_kl"] == pytest.approx(expected["reverse_kl"])
    assert report.teachers[0].outside, "a random pair is outside of the bank"
    scout.main(["--show", str(out)])
    assert capsys.readouterr().out == text


def test_without_a_bank_nothing_is_forecast(tiny_pair, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bank_module, "recorded_data", lambda: tmp_path)
    scout.main([*map(str, tiny_pair), *SHORT])
    text = capsys.readouterr().out
    assert "none: nothing is forecast" in text
    assert "method  none: no bank of runs" in text
    with pytest.raises(MissingFile, match="name a table of runs with --bank"):
        scout.main(["--validate"])
    with pytest.raises(MissingFile):
        scout.main([*map(str, tiny_pair), "--bank", str(tmp_path / "none.csv")])


def test_validate_prints_and_writes_the_scores(table: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "validation.json"
    scout.main(["--validate", "--bank", str(table), "--out", str(out)])
    text = capsys.readouterr().out
    scores = json.loads(out.read_text())
    for unit in ("pair", "family"):
        assert f"leave one {unit} out: 30 runs" in text
        for name, (value, low, high) in scores[unit]["spearman"].items():
            assert f"{name:18} {value:>7.2f} [{low:.2f}, {high:.2f}]" in text
    assert scores["gain_doubts"][0] in text
    assert "gain is not forecast" in text
    few = tmp_path / "few.csv"
    write_bank(few, synthetic_bank(0, effects={}, families=1, pairs=3, methods=2))
    with pytest.raises(InvalidInput, match="the bank has 3 pairs; 8 are needed"):
        scout.main(["--validate", "--bank", str(few)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give STUDENT and one or several TEACHER"),
        (["student"], "give STUDENT and one or several TEACHER"),
        (["student", "a", "a"], "a teacher is given twice"),
        (["student", "teacher", "--validate"], "remove STUDENT and TEACHER"),
        (["--show", "scout.json", "--validate"], "either --validate or --show"),
        (["student", "teacher", "--rollouts", "4"], "prompts are its sampling unit"),
        (["student", "http://localhost:1/v1"], "loaded in this process"),
        (["student", "http://localhost:1/v1", "student"], "no teacher can be used"),
    ],
)
def test_contradictions_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        scout.main(arguments)
