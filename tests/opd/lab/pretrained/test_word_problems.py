"""Word problems: answers by a second reading of the text, solutions line by line, splits."""

import re
from collections.abc import Callable
from operator import add, mul, sub

import pytest

from opd.data.grading.graders import grade_numeric
from opd.lab.pretrained.word_problems import (
    CONCLUSIONS,
    OPENINGS,
    STORIES,
    WordProblem,
    draw_splits,
)

READINGS: dict[str, Callable[..., int]] = {
    r"buys (\d+) more .* gives": lambda a, b, c: a + b - c,
    r"got (\d+) more from": lambda a, b, c: a + b - c,
    r"more \w+ than": lambda a, b: a + (a + b),
    r"more than that": lambda a, b: a + (a + b),
    r"A box holds": lambda size, boxes, c: boxes * size - c,
    r"bags with": lambda bags, size, c: bags * size - c,
    r"dollars\. \w+ buys": lambda money, count, price: money - count * price,
    r"At the market": lambda price, money, count: money - count * price,
    r"on Monday and twice": lambda a, c: a + 2 * a - c,
    r"On Saturday": lambda a, c: a + 2 * a - c,
}
"""Words of each phrasing to the answer from its numbers in reading order."""
OPERATIONS = {"+": add, "-": sub, "*": mul}


@pytest.fixture(scope="module")
def problems() -> list[WordProblem]:
    return draw_splits({"all": 1500}, seed=0)["all"]


def test_answers_are_those_of_the_text(problems: list[WordProblem]) -> None:
    readings_used = set()
    for problem in problems:
        (pattern,) = [p for p in READINGS if re.search(p, problem.prompt)]
        numbers = map(int, re.findall(r"\d+", problem.prompt))
        assert int(problem.answer) == READINGS[pattern](*numbers) > 0, problem
        readings_used.add(pattern)
    assert readings_used == set(READINGS)
    assert {problem.kind for problem in problems} == set(STORIES)


def test_every_line_of_a_solution_is_true_and_ends_in_the_answer(
    problems: list[WordProblem],
) -> None:
    for problem in problems:
        sums = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)", problem.solution)
        assert len(sums) == problem.solution.count("=") >= 2, problem
        for left, sign, right, result in sums:
            assert OPERATIONS[sign](int(left), int(right)) == int(result), problem
        assert sums[-1][-1] == problem.answer
        assert grade_numeric(problem.solution, problem.answer).reward == 1
        assert grade_numeric(problem.solution, str(int(problem.answer) + 1)).reward == 0
        assert not re.search(r"[{}]", problem.prompt + problem.solution)
        given = set(re.findall(r"\d+", problem.prompt))
        listed = {str(i + 1) for i in range(3)} if "1. " in problem.solution else set()
        results = {number for *_, number in sums}
        assert set(re.findall(r"\d+", problem.solution)) <= given | listed | results | {"2"}
    layouts = {"\n1. " in problem.solution for problem in problems}
    assert layouts == {True, False}
    for texts in (OPENINGS, CONCLUSIONS):
        for text in texts:
            beginning = text.partition("{")[0]
            assert any(beginning in problem.solution for problem in problems)


def test_names_and_pronouns_agree(problems: list[WordProblem]) -> None:
    for problem in problems:
        words = re.findall(r"\w+", problem.prompt)
        assert len({word.lower() for word in words} & {"he", "she"}) <= 1
    assert any(re.search(r"Anna .* She ", problem.prompt) for problem in problems)
    assert not any(re.match(r"Anna .* [Hh]e ", problem.prompt) for problem in problems)


def test_splits_have_no_problem_in_common() -> None:
    sizes = {"train": 400, "test": 200}
    splits = draw_splits(sizes, seed=3)
    assert {name: len(problems) for name, problems in splits.items()} == sizes
    assert len({p.prompt for problems in splits.values() for p in problems}) == 600
    assert splits == draw_splits(sizes, seed=3)
    assert splits != draw_splits(sizes, seed=4)
    row = splits["test"][0].row()
    assert set(row) == {"prompt", "answer", "response", "grader"}
    assert row["grader"] == "numeric"
