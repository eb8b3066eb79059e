"""Measures of a map beside accuracy: which numbers of an evaluation, pooled over pairs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.errors import InvalidInput
from figures import style
from figures.collect.final_measures import measures_table, summarize_measures
from figures.regimes import side_effects
from tests.helpers.records.written_runs import write_run

TAGS = {"cost": {"mean": 12.0, "count": 1}}
FACTS = {
    "foreign": {"token_share": 0.02, "tags": TAGS, "ends": None},
    "rollouts": {"divergence/reverse_kl": 0.5},
    "accuracy": {"teacher": {"accuracy": 0.9}},
}
NAMES = (
    *("gap@4", "calibration/over_confidence", "calibration/brier", "calibration/ece"),
    *("vote/over_confidence", "recovery/unperturbed", "recovery/perturbed", "recovery/loss"),
)
"""Measures whose intervals are NAME/low and NAME/high."""


def evaluation(shift: float, *, is_final: bool) -> dict[str, float]:
    """Return an evaluation in which every number is another one; `shift` moves all of them."""
    numbers: dict[str, float] = {}
    names = {name: f"{name}/" for name in NAMES} | {"accuracy": "", "other/accuracy": "other/"}
    if is_final:
        names |= {"teacher/closed": "teacher/closed/", "against/other/gain": "against/other/"}
    for number, (name, prefix) in enumerate(names.items()):
        middle = 0.05 * (1 + number) + shift
        numbers |= {name: middle, f"{prefix}low": middle - 0.02, f"{prefix}high": middle + 0.02}
    if is_final:
        numbers |= {"against/gain": 0.99, "teacher/gap": 0.99, "gap@2": 0.99}
        numbers |= {"cost/response_tokens": 900.0 + shift, "cost/seconds": 3.0 + shift}
        numbers |= {"cost/student_tokens": 800.0 + shift, "cost/teacher_tokens": 1000.0 + shift}
    return numbers | {"samples": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("map")
    folders = []
    for pair in range(3):
        models = root / "pairs" / f"density-1-{pair}"
        models.mkdir(parents=True)
        knobs = {"foreign_tags": 1.0, "tag_log_probability": -12.0}
        (models / "pair.json").write_text(json.dumps({"knobs": knobs, "facts": FACTS}))
        measurements = root / "measurements" / f"density-1-{pair}-test.json"
        measurements.parent.mkdir(exist_ok=True)
        measurements.write_text(json.dumps(evaluation(0.3 + 0.01 * pair, is_final=False)))
        for method, shift in (("sampled", 0.0), ("sft", 0.1)) if pair < 2 else (("sft", 0.1),):
            run = root / "runs" / "density-1" / f"{method}-{pair}"
            student = str(models / "student")
            write_run(run, {0: "01", 1: "11"}, seed=pair, seconds=1.0, student=student)
            numbers = evaluation(shift + 0.01 * pair, is_final=True)
            if (method, pair) == ("sft", 1):  # the teacher is no better than this student
                numbers = {k: x for k, x in numbers.items() if not k.startswith("teacher/closed")}
            (run / "evaluation.json").write_text(json.dumps(numbers))
            folders.append(run)
    return folders


@pytest.fixture(scope="module")
def table(runs: list[Path]) -> pd.DataFrame:
    return measures_table(runs)


def test_each_column_is_the_measure_of_its_name(table: pd.DataFrame) -> None:
    row = table[(table["method"] == "sampled") & (table["seed"] == 1)].iloc[0]
    expected = evaluation(0.01, is_final=True)
    for column, name in {
        "accuracy": "accuracy",
        "closed": "teacher/closed",
        "gap": "gap@4",
        "over_confidence": "calibration/over_confidence",
        "brier": "calibration/brier",
        "ece": "calibration/ece",
        "vote_over_confidence": "vote/over_confidence",
        "unperturbed": "recovery/unperturbed",
        "perturbed": "recovery/perturbed",
        "recovery_loss": "recovery/loss",
        "other_accuracy": "other/accuracy",
        "other_gain": "against/other/gain",
    }.items():
        assert row[column] == pytest.approx(expected[name]), column
        assert row[f"{column}_low"] == pytest.approx(expected[name] - 0.02), column
        assert row[f"{column}_high"] == pytest.approx(expected[name] + 0.02), column
    assert (row["response_tokens"], row["student_tokens"]) == pytest.approx((900.01, 800.01))
    assert (row["teacher_tokens"], row["seconds"]) == pytest.approx((1000.0, 3.01))
    assert (row["group"], row["family"], row["foreign_share"]) == ("density-1", "density", 0.02)


def test_students_before_training_are_a_method_with_one_row_a_pair(table: pd.DataFrame) -> None:
    rows = table[table["method"] == "start"].set_index("seed")
    assert sorted(rows.index) == [0, 1, 2]
    for pair, row in rows.iterrows():
        expected = evaluation(0.3 + 0.01 * pair, is_final=False)
        assert row["brier"] == pytest.approx(expected["calibration/brier"])
        assert row[["closed", "other_gain", "seconds"]].isna().all()


def test_means_and_intervals_are_over_the_pairs_that_have_a_measure(table: pd.DataFrame) -> None:
    results = summarize_measures(table).set_index("method")
    sft = results.loc["sft"]
    assert (sft["pairs"], sft["closed_pairs"], sft["gap_pairs"]) == (3, 2, 3)
    values = table[table["method"] == "sft"].sort_values("seed")
    for name, pairs, student_t in (("gap", [0, 1, 2], 4.302653), ("closed", [0, 2], 12.7062)):
        numbers = values.set_index("seed").loc[pairs, name].to_numpy()
        assert sft[name] == pytest.approx(numbers.mean())
        between = numbers.var(ddof=1) / len(pairs)
        total = between + (0.02 / 1.959964) ** 2 / len(pairs)
        half_width = sft[f"{name}_high"] - sft[name]
        assert sft[name] - sft[f"{name}_low"] == pytest.approx(half_width)
        # Student's t of both parts together lies between those of each alone
        assert 1.959964 * total**0.5 < half_width < student_t * total**0.5
    seconds = values["seconds"].to_numpy()
    error = 4.302653 * seconds.std(ddof=1) / 3**0.5
    assert sft["seconds_high"] - sft["seconds"] == pytest.approx(error, rel=1e-4)
    single = summarize_measures(table[table["seed"] == 1]).set_index("method").loc["sampled"]
    assert (single["gap_low"], single["gap_high"]) == pytest.approx((0.04, 0.08))
    assert np.isnan([single["seconds_low"], single["seconds_high"]]).all()


def test_marks_stand_at_the_values_of_their_methods(table: pd.DataFrame) -> None:
    with style.style_context():
        axes = side_effects.draw(table).axes
    results = summarize_measures(table).set_index("method")
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == ["before training", "sampled token", "SFT"]
    for ax, column in zip(axes, side_effects.PANELS, strict=True):
        (container,) = ax.containers
        expected = results.loc[["start", "sampled", "sft"], column].to_numpy()
        assert container.lines[0].get_xdata() == pytest.approx(expected, nan_ok=True)
        assert container.lines[0].get_ydata() == pytest.approx([0, 1, 2])


def test_the_table_has_a_line_a_method_with_the_start_first(table: pd.DataFrame) -> None:
    text = side_effects.markdown(side_effects.summary(table))
    first, second, third = (part.splitlines() for part in text.split("### ")[1:])
    assert first[4].startswith("| density-1 | before training | 3 | 0.760 [")
    assert first[4].endswith("|  |  |  |  |")
    sft = first[6]
    assert sft.startswith("| density-1 | SFT | 3 | 0.560 [0.")
    assert "] (2) | " in sft
    assert second[5].startswith("| density-1 | sampled token | 2 | +0.105 [+0.")
    assert third[5].split(" | ")[-1].startswith("+0.605 [+0.")


def test_runs_that_were_not_evaluated_are_named(runs: list[Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "density-1" / "sampled-0", {0: "01", 1: "11"}, seed=0, seconds=1.0)
    with pytest.raises(InvalidInput, match=r"1 of 6 runs have no evaluation.json, such as .*"):
        measures_table([*runs, run])
    start = runs[0].parents[2] / "measurements" / "density-1-0-test.json"
    text = start.read_text()
    start.unlink()
    with pytest.raises(InvalidInput, match=r"no evaluation of a student in .*density-1-0-test"):
        measures_table(runs)
    start.write_text(text)
