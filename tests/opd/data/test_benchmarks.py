"""Benchmarks by name: columns of each, and grading with reasoning-gym."""

import json
from pathlib import Path

import pytest

from opd.data.benchmarks import (
    BENCHMARKS,
    BOXED_INSTRUCTION,
    extract_final_answer,
    read_benchmark_rows,
)
from opd.data.grading.graders import make_grader
from opd.data.tasks import load_task

ROWS = {
    "math-500": {"problem": "1+1?", "answer": "2", "solution": "so 2", "level": 1},
    "aime24": {"problem": "2+2?", "answer": "004"},
    "aime25": {"problem": "3+3?", "answer": "6"},
    "amc23": {"question": "5+4?", "answer": 9.0},
    "minerva": {"question": "1/3?", "answer": "\\frac{1}{3}"},
    "olympiad": {"question": "x?", "final_answer": ["$2 \\sqrt{3}$"], "context": None},
    "gsm8k": {"question": "eggs?", "answer": "She has 3 #### in 2 words.\n#### 1,234"},
    "gsm8k-train": {"question": "hens?", "answer": "#### 7"},
    "dapo-math": {"prompt": "y?", "solution": "34", "data_source": "d"},
}
RIGHT = ["2", "4", "6", "9", "1/3", "2\\sqrt{3}", "1234", "7", "34"]


@pytest.mark.parametrize(("name", "expected_answer"), list(zip(ROWS, RIGHT, strict=True)))
def test_each_set_is_read_from_a_file_with_its_own_columns(
    tmp_path: Path, name: str, expected_answer: str
) -> None:
    assert ROWS.keys() == BENCHMARKS.keys()
    second_row = {**ROWS[name], BENCHMARKS[name].prompt: "another?"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[name], second_row)))
    task = load_task(f"{name}:{path}", 0, test=f"{name}:{path}")
    first_problem = next(p for p in task.test(2) if not p.prompt.startswith("another?"))
    assert first_problem.prompt == ROWS[name][BENCHMARKS[name].prompt] + BOXED_INSTRUCTION
    assert (
        task.grade(
            f"<think>9</think>It is \\boxed{{{expected_answer}}}.", first_problem.answer
        ).reward
        == 1
    )
    assert task.grade("<think>9</think>It is \\boxed{5}.", first_problem.answer).reward == 0


def test_rows_of_another_set_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1?", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"row 0 lacks \['problem'\].*is this math-500"):
        read_benchmark_rows(f"math-500:{path}")
    with pytest.raises(ValueError, match="has 2 answers, expected one"):
        extract_final_answer(["1", "2"], "row 3")


def test_a_set_on_the_hub_that_has_grown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.data.benchmarks.read_rows", lambda source: [ROWS["aime24"]] * 31)
    with pytest.raises(ValueError, match="has 31 rows, aime24 had 30"):
        read_benchmark_rows("aime24")


def test_reasoning_gym_generates_and_grades() -> None:
    rows = read_benchmark_rows("gym:chain_sum:20:7")
    assert (
        rows
        == read_benchmark_rows("gym:chain_sum:20:7")
        != read_benchmark_rows("gym:chain_sum:20:8")
    )
    assert len(rows) == 20
    grade = make_grader("gym")
    for row in rows:
        expression = row["prompt"].split("problem: ")[1].rstrip(" =")
        value = eval(expression)  # generated here: sums of integers
        assert row["answer"].startswith(f"{value} [chain_sum:20:7#")
        assert grade(f"<think>{value + 1}</think> {value}\n", row["answer"]).reward == 1
        assert grade(f"<think></think>\\boxed{{{value}}} or {value + 1}", row["answer"]).reward == 1
        assert grade(f"<think>{value}</think>{value + 1}", row["answer"]).reward == 0
    assert grade("<think>1</think>", rows[0]["answer"]).answer is None
    task = load_task("gym:leg_counting:40", 0)
    assert len(task.test(9)) == 4
    assert task.grade("no idea", task.test(1)[0].answer).reward == 0


def test_unsupported_gym_sources_are_explained() -> None:
    with pytest.raises(ValueError, match=r"no task 'chains'; it has .*chain_sum"):
        read_benchmark_rows("gym:chains")
    with pytest.raises(ValueError, match="gym:TASK:SIZE:SEED"):
        read_benchmark_rows("gym:chain_sum:many")
    with pytest.raises(ValueError, match="no answers to compare with"):
        read_benchmark_rows("gym:propositional_logic:3")
    with pytest.raises(ValueError, match=r"does not end in \[TASK"):
        make_grader("gym")("1", "1")
