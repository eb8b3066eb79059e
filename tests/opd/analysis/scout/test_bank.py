"""Reading of a bank of runs, and what is refused."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from diagnostics.errors import InvalidInput, MissingFile
from opd.analysis.scout.bank import FEATURES, pair_features, read_bank
from opd.analysis.scout.columns import COLUMNS
from opd.analysis.scout.gradients import ESTIMATORS
from tests.helpers.records.scout_banks import measurements, synthetic_bank, write_bank


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "bank.csv"
    write_bank(path, synthetic_bank(0, effects={}, families=2, pairs=5, methods=2))
    return path


def test_a_bank_is_read_as_it_was_written(table: Path) -> None:
    bank = synthetic_bank(0, effects={}, families=2, pairs=5, methods=2)
    parsed = read_bank(table)
    for name in ("pair", "family", "method", "collapsed"):
        assert getattr(parsed, name).tolist() == getattr(bank, name).tolist()
    assert parsed.gain == pytest.approx(bank.gain)
    assert parsed.start == pytest.approx(bank.start)
    expected = np.stack([pair_features(measurements(x)) for x in bank.features])
    assert parsed.features == pytest.approx(expected)
    assert parsed.methods == ["method-0", "method-1"]
    assert parsed.rows(parsed.family == "family-0").describe() == (
        "10 runs of 5 pairs in 1 families, 2 methods"
    )
    four_pairs = parsed.rows(np.isin(parsed.pair, np.unique(parsed.pair)[:4]))
    assert four_pairs.methods == []


def test_features_are_measurements_of_a_scout_on_their_scales() -> None:
    accuracies = {"student_accuracy", "accuracy_gap", "continuation_gain"}
    assert {name for name, _ in FEATURES.values()} <= {*COLUMNS, *ESTIMATORS, *accuracies}
    values = measurements(np.zeros(len(FEATURES))) | {"snr": -0.5, "special_gap": -3.0}
    features = dict(zip(FEATURES, pair_features(values | {"reverse_kl": 0.25}), strict=True))
    assert features["log_reverse_kl"] == pytest.approx(math.log(0.25))
    assert features["log_snr"] == pytest.approx(math.log(1e-4))
    assert features["special_gap"] == pytest.approx(-math.log(4))
    assert features["student_accuracy"] == values["student_accuracy"]
    assert math.isnan(
        pair_features(values | {"length": math.nan})[list(FEATURES).index("log_length")]
    )
    del values["snr"]
    with pytest.raises(InvalidInput, match="lack snr"):
        pair_features(values)


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("gain", "0.7", r"line 2: gain is 0.7, but final - start"),
        ("gain", "", r"line 2: gain is nan, but final - start"),
        ("length", "long", r"line 2: length is 'long'; expected a number"),
        ("collapsed", "perhaps", r"line 2: collapsed is 'perhaps'; write true or false"),
        ("family", "another", r"line 3: pair pair-0-0 is of family family-0 and of another"),
        ("method", "method-1", r"line 3: pair pair-0-0, method method-1, seed 0 is also line 2"),
    ],
)
def test_wrong_rows_are_refused(table: Path, column: str, text: str, message: str) -> None:
    rows = list(csv.DictReader(table.open()))
    rows[0][column] = text
    rewrite(table, rows)
    with pytest.raises(InvalidInput, match=message):
        read_bank(table)


def test_missing_columns_rows_and_files_are_refused(table: Path, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "snr"} for row in csv.DictReader(table.open())]
    rewrite(table, rows)
    with pytest.raises(InvalidInput, match="lacks the columns snr"):
        read_bank(table)
    table.write_text("pair,family\n")
    with pytest.raises(InvalidInput, match="has no runs"):
        read_bank(table)
    with pytest.raises(MissingFile):
        read_bank(tmp_path / "none.csv")


def test_an_empty_cell_is_a_measurement_that_is_not_defined(table: Path) -> None:
    rows = list(csv.DictReader(table.open()))
    rows[1]["special_gap"] = ""
    rewrite(table, rows)
    column = read_bank(table).features[:, list(FEATURES).index("special_gap")]
    assert np.isnan(column).tolist() == [False, True] + [False] * (len(rows) - 2)


def rewrite(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
