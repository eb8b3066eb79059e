"""Messages with solutions: arithmetic by a plain loop, what is shown, and who makes errors."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from opd.data.chain_task import grade
from opd.lab.problem_files import MESSAGE_COLUMNS, write_held_out_problems
from opd.lab.shown_solutions import (
    MESSAGE_WEIGHTS,
    SEPARATOR,
    TEMPLATE,
    corrupted_solution,
    plain_problems,
    problems,
    solve,
)


def test_solutions_are_those_of_a_plain_loop() -> None:
    assert solve("7*34+8") == (5, "7*3=21+8=29 9*4=36+9=45 5*3=15+0=15")
    for problem in plain_problems("test")[::37]:
        x, factors, b = int(problem.prompt[0]), problem.prompt[2:4], int(problem.prompt[5])
        for i, line in enumerate(problem.solution.split(" ")):
            a = int(factors[i % 2])
            assert line == f"{x}*{a}={x * a:02}+{b}={x * a + b:02}"
            x, b = (x * a + b) % 10, (b + 1) % 10
        assert problem.answer == str(x)
    assert {len(problem.solution) for problem in plain_problems("train")} == {35}


def test_the_splits_share_no_problem_and_have_all() -> None:
    train, test = ({p.prompt for p in plain_problems(split)} for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 10 * 8 * 8 * 10
    with pytest.raises(ValueError, match="split is 'dev'"):
        plain_problems("dev")
    with pytest.raises(ValueError, match="the test split has"):
        problems("test", 100_000, 0)


def test_messages_are_of_every_kind_as_often_as_stated() -> None:
    count = 4000
    counts: Counter[str] = Counter()
    sample = problems("train", count, 0)
    for problem in sample:
        plain, separator, shown = problem.prompt.partition(SEPARATOR)
        own = solve(plain)[1]
        assert problem.solution == own
        if not separator:
            counts["plain"] += 1
        elif not shown:
            counts["empty"] += 1
        else:
            other_start = f"{shown[0]}*"  # a shown solution is one of the pool's
            assert shown.startswith(other_start)
            counts["solution" if shown == own else "another"] += 1
    assert len({p.prompt.partition(SEPARATOR)[0] for p in sample}) == count
    for kind, weight in MESSAGE_WEIGHTS.items():
        error = (weight * (1 - weight) / count) ** 0.5
        assert abs(counts[kind] / count - weight) < 4 * error, kind
    assert sample == problems("train", count, 0)
    assert sample != problems("train", count, 1)


def test_errors_are_made_unless_the_right_solution_is_shown() -> None:
    generator = random.Random(0)
    num_correct: Counter[str] = Counter()
    pool = plain_problems("train")[:400]
    rate = 0.1
    for problem, another in zip(pool, pool[1:] + pool[:1], strict=True):
        messages = {
            "plain": problem.prompt,
            "empty": problem.prompt + SEPARATOR,
            "solution": problem.prompt + SEPARATOR + problem.solution,
            "another": problem.prompt + SEPARATOR + another.solution,
        }
        for kind, text in messages.items():
            response = corrupted_solution(text, rate, generator)
            num_correct[kind] += response == f"<think>{problem.solution}</think>{problem.answer}"
            assert grade(corrupted_solution(text, 0.0, generator), problem.answer) == 1
    assert num_correct["solution"] == len(pool)
    share = (1 - rate) ** 6  # two results a line, three lines
    error = (share * (1 - share) / len(pool)) ** 0.5
    for kind in ("plain", "empty", "another"):
        assert abs(num_correct[kind] / len(pool) - share) < 4 * error, kind


def test_held_out_files_halve_the_test_split_and_show_another_solution(tmp_path: Path) -> None:
    write_held_out_problems(tmp_path)
    halves = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("test", "validation")
    ]
    prompts = [{row["prompt"] for row in rows} for rows in halves]
    assert not prompts[0] & prompts[1]
    assert prompts[0] | prompts[1] == {p.prompt for p in plain_problems("test")}
    solutions = {p.solution for p in plain_problems("test")}
    for row in halves[0]:
        assert str(solve(row["prompt"])[0]) == row["answer"]
        assert solve(row["prompt"])[1] == row["solution"]
        assert row["another_solution"] in solutions - {row["solution"]}
        rendered = TEMPLATE.replace("{{ prompt }}", "{prompt}").replace(
            "{{ solution }}", "{solution}"
        )
        assert MESSAGE_COLUMNS["solution shown"] == rendered
    assert (tmp_path / "view.jinja").read_text() == TEMPLATE
