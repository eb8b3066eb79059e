"""What a run has cost, against plain sums over its rows."""

from pathlib import Path

import pytest

from diagnostics.errors import MissingFile
from diagnostics.records.rows import append_row
from diagnostics.records.run_cost import run_cost


def write_run(folder: Path, columns: dict[int, dict[str, float]]) -> Path:
    folder.mkdir()
    for step in range(4):
        seconds = {"seconds/rollout": 2.0 + step, "seconds/update": 0.5}
        tokens = {"machine/tokens_per_second": (100 + step) / (2.5 + step)}
        append_row(folder / "rows.jsonl", {"step": step, **seconds, **tokens, **columns[step]})
    return folder


def test_totals_are_added_over_steps(tmp_path: Path) -> None:
    costs = {
        step: {
            "cost/student_tokens": 90.0 + step,
            "cost/teacher_tokens": 500.0 * step,
            "cost/teacher_sampled_tokens": 7.0,
        }
        for step in range(4)
    }
    assert run_cost(write_run(tmp_path / "run", costs)) == {
        "cost/steps": 4,
        "cost/response_tokens": 406,
        "cost/seconds": pytest.approx(16.0),
        "cost/seconds/rollout": pytest.approx(14.0),
        "cost/seconds/update": pytest.approx(2.0),
        "cost/student_tokens": 366,
        "cost/teacher_tokens": 3000,
        "cost/teacher_sampled_tokens": 28,
    }
    del costs[0]["cost/teacher_tokens"]  # begun by an older version
    older_cost = run_cost(write_run(tmp_path / "older", costs))
    assert "cost/teacher_tokens" not in older_cost
    assert older_cost["cost/student_tokens"] == 366
    with pytest.raises(MissingFile, match="is not a run folder"):
        run_cost(tmp_path)
