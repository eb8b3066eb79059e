"""The figure `agents`: its table, its statistics against hand-computed values, its lines."""

import json
from pathlib import Path

import numpy as np
import pytest

from diagnostics.records import rows
from figures import style
from figures.paper import agents

WON = {
    ("games", "sampled", 0): ("0100", "0111"),
    ("games", "sampled", 1): ("0100", "1101"),
    ("games", "lsm", 0): ("0100", "1111"),
    ("games", "lsm", 1): ("0100", "1110"),
    ("games", "teacher", 0): ("1101",),
    ("agents", "sampled", 0): ("0100", "0100"),
    ("agents", "lsm", 0): ("0100", "0110"),
}
SOLVED = {"sampled": ("00", "00"), "lsm": ("00", "11")}
STEPS = 12


def evaluation_row(step: int, outcomes: str, **fields: object) -> dict[str, object]:
    share = outcomes.count("1") / len(outcomes)
    return {"step": step, "accuracy": share, "outcomes": outcomes, "problem_set": "p"} | fields


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write runs of games, and of games alternating with sorting, as the trainer does."""
    folder, run_folders = tmp_path_factory.mktemp("paper"), []
    for (group, method, seed), won in WON.items():
        run = folder / group / f"{method}-{seed}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"seed": seed}))
        has_two_tasks = group == "agents"
        for step in range(STEPS if len(won) > 1 else 0):
            row = {"step": step, "episodes/turns": 10.0, "episodes/invalid_share": 0.5}
            row |= {"response/reward": 0.5}
            row |= {f"turn={n}/divergence/k1": n * (1.0 if step < 5 else 0.1) for n in agents.TURNS}
            if has_two_tasks:
                row["task"] = ("rooms", "sort")[step % 2]
            rows.append_row(run / "rows.jsonl", row)
        for i, outcomes in enumerate(won):
            episode_fields = {
                "episodes/turns": 8.0 - i,
                "episodes/invalid_share": 0.2 + 0.1 * i + 0.1 * seed,
            }
            task = {"task": "rooms"} if has_two_tasks else {}
            rows.append_row(
                run / "evals.jsonl", evaluation_row(STEPS * i, outcomes, **episode_fields, **task)
            )
            if has_two_tasks:
                rows.append_row(
                    run / "evals.jsonl", evaluation_row(STEPS * i, SOLVED[method][i], task="sort")
                )
        run_folders.append(run)
    return run_folders


def test_gains_and_differences_are_those_of_the_outcomes(runs: list[Path]) -> None:
    summary = agents.summary(agents.collect(runs)).set_index(["group", "task", "method"])
    assert len(summary) == 7
    local = summary.loc["games", "rooms", "lsm"]
    assert (local["seeds"], local["count"]) == (2, 4)
    assert [local["before"], local["won"]] == pytest.approx([0.25, 7 / 8])
    assert [local["gain"], local["away"]] == pytest.approx([5 / 8, 1 / 8])
    assert local["gain_low"] < local["gain"] < local["gain_high"]
    assert local["inadmissible_before"] == pytest.approx(0.25)
    assert local["inadmissible"] == pytest.approx(0.35)
    assert np.isnan(summary.loc["games", "rooms", "sampled"]["away"])
    teacher = summary.loc["games", "rooms", "teacher"]
    assert teacher["won"] == 0.75
    assert np.isnan(teacher["gain"])
    assert summary.loc["agents", "sort", "lsm"]["gain"] == 1
    assert summary.loc["agents", "sort", "lsm"]["away"] == 1
    assert summary.loc["agents", "rooms", "sampled"]["gain"] == 0
    text = agents.markdown(agents.summary(agents.collect(runs)))
    assert "| teacher | 1 |  | 0.750 [" in text
    assert "+0.625 [" in text
    assert text.count("### ") == 3


def test_lines_and_points_are_the_tables_numbers(runs: list[Path]) -> None:
    with style.style_context():
        axes = agents.draw(agents.collect(runs)).axes
    lines = [[*map(float, line.get_ydata())] for line in axes[0].lines]
    assert lines == [[0.25, 0.75], [0.25, 0.875], [0.75, 0.75]]
    assert [[*map(float, x.get_ydata())] for x in axes[2].lines] == [[0, 0], [0, 1]]
    values_by_dash = {
        line.get_linestyle(): [*map(float, line.get_ydata())] for line in axes[3].lines
    }
    assert values_by_dash["-"] == pytest.approx([0.25, 0.35])
    assert values_by_dash["--"] == pytest.approx([0.2, 0.3])
    drawn_costs = sorted({float(bar.lines[0].get_ydata()[0]) for bar in axes[5].containers})
    assert drawn_costs == pytest.approx(sorted([*agents.TURNS, *(n / 10 for n in agents.TURNS)]))


def test_runs_judged_on_other_games_are_refused(runs: list[Path], tmp_path: Path) -> None:
    other_run = tmp_path / "games" / "another-2"
    other_run.mkdir(parents=True)
    (other_run / "config.json").write_text('{"seed": 2}')
    rows.append_row(other_run / "evals.jsonl", evaluation_row(0, "01") | {"problem_set": "q"})
    with pytest.raises(ValueError, match="evaluated on the problems q, others of rooms on p"):
        agents.collect([*runs, other_run])
