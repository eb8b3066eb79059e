"""The figure `pretrained`: gains against plain numbers, what its marks and lines show."""

import json
from pathlib import Path

import numpy as np
import pytest

from diagnostics.errors import InvalidInput
from diagnostics.records import rows
from figures import style
from figures.claims.matched_measures import pretrained_accuracy
from figures.paper import pretrained

OUTCOMES = {
    ("sampled_token", 0): ("0100", "0110"),
    ("sampled_token", 1): ("0100", "1110"),
    ("teacher_topk", 0): ("0100", "1111"),
    ("teacher_topk", 1): ("0100", "1101"),
    ("teacher", 0): ("1110",),
}
NUM_STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write runs as the trainer does; the KL of seed s at step n is 4 - n / 2 + s."""
    root, folders = tmp_path_factory.mktemp("paper") / "pretrained", []
    for (method, seed), outcomes in OUTCOMES.items():
        run = root / f"{method}-{seed}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"seed": seed, "objective": method}))
        for step in range(NUM_STEPS if len(outcomes) > 1 else 0):
            row = {"step": step, "divergence/k1": 4 - step / 2 + seed, "response/reward": 0.25}
            row |= {"response/truncated_share": 0.5, "response/length": 90.0}
            rows.append_row(run / "rows.jsonl", row)
        for i, text in enumerate(outcomes):
            row = {"step": NUM_STEPS * i, "accuracy": text.count("1") / 4, "outcomes": text}
            row |= {"problem_set": "p", "length": 100.0 - 20 * i - seed, "truncated": 0.5 - 0.5 * i}
            rows.append_row(run / "evals.jsonl", row)
        folders.append(run)
    return folders


def test_gains_are_paired_by_seed_and_problem(runs: list[Path]) -> None:
    summary = pretrained.summary(pretrained.collect(runs)).set_index(["method", "seed"])
    assert set(summary.loc["sampled_token"].index) == {"0", "1", "all"}
    sampled, local = summary.loc[("sampled_token", "all")], summary.loc[("teacher_topk", "all")]
    assert [sampled["before"], sampled["after"]] == pytest.approx([1 / 4, 5 / 8])
    assert [local["gain"], local["away"]] == pytest.approx([5 / 8, 2 / 8])
    assert local["gain_low"] < local["gain"] < local["gain_high"]
    # local support solves two problems more than the sampled token with seed 0, as many with 1
    assert summary.loc[("teacher_topk", "0"), "away"] == pytest.approx(2 / 4)
    assert summary.loc[("teacher_topk", "1"), "away"] == pytest.approx(0)
    assert np.isnan(sampled["away"])
    assert [sampled["length"], sampled["truncated"]] == pytest.approx([79.5, 0.0])
    teacher = summary.loc[("teacher", "0")]
    assert teacher["after"] == 0.75
    assert np.isnan([teacher["gain"], teacher["before"]]).all()
    text = pretrained.markdown(pretrained.summary(pretrained.collect(runs)))
    assert "| local support | all | 0.250 | 0.875 [" in text
    assert text.count("\n| teacher |") == 1


def test_marks_are_the_start_and_every_seed(runs: list[Path]) -> None:
    with style.style_context():
        axes = pretrained.draw(pretrained.collect(runs)).axes
    marks = [float(bar.lines[0].get_ydata()[0]) for bar in axes[0].containers]
    assert marks == [0.25, 0.5, 0.75, 1.0, 0.75]
    positions = [float(bar.lines[0].get_xdata()[0]) for bar in axes[0].containers]
    assert positions == pytest.approx([0, 0.88, 1.12, 1.88, 2.12])
    (dotted,) = [line for line in axes[0].lines if line.get_linestyle() == ":"]
    assert list(dotted.get_ydata()) == [0.75, 0.75]


def test_lines_are_seeds_and_their_mean_over_steps(runs: list[Path]) -> None:
    with style.style_context():
        axes = pretrained.draw(pretrained.collect(runs)).axes
    lines = [line.get_ydata() for line in axes[1].lines]
    assert len(lines) == 6, "two seeds and their mean for each method"
    assert list(lines[0]) == pytest.approx([4, 3.5, 3, 2.5, 2, 1.5])
    assert list(lines[1]) == pytest.approx([5, 4.5, 4, 3.5, 3, 2.5])
    assert list(lines[2]) == pytest.approx([4, 3.75, 3.5, 3, 2.75, 2.5])
    assert set(axes[2].lines[2].get_ydata()) == {0.5}


def test_other_runs_and_other_problems_are_refused(runs: list[Path], tmp_path: Path) -> None:
    other_run = tmp_path / "pretrained" / "another-2"
    other_run.mkdir(parents=True)
    (other_run / "config.json").write_text('{"seed": 2, "objective": "another"}')
    row = {"step": 0, "accuracy": 0.5, "outcomes": "01", "problem_set": "q"}
    rows.append_row(other_run / "evals.jsonl", row)
    with pytest.raises(ValueError, match="evaluated on the problems q, others of pretrained on p"):
        pretrained.collect([*runs, other_run])
    (tmp_path / "single").mkdir()
    another_group = other_run.rename(tmp_path / "single" / "lsm-2")
    with pytest.raises(InvalidInput, match="no run of the group 'pretrained'"):
        pretrained.draw(pretrained.collect([another_group]))


def test_claims_compare_with_the_start_and_with_the_other_method(runs: list[Path]) -> None:
    tables = {"pretrained": pretrained.collect(runs)}
    result = pretrained_accuracy("sampled_token")(tables)
    assert result.measurement.startswith("0.625 [")
    assert "against 0.250 [" in result.measurement
    assert "+0.375 [" in result.measurement
    result = pretrained_accuracy("teacher_topk", "sampled_token")(tables)
    assert result.measurement.startswith("0.875 [")
    assert "against 0.625 [" in result.measurement
    assert result.measurement.endswith("2 seeds")
