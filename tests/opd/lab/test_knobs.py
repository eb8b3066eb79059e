"""Knobs of a pair: every value out of range and every contradiction has a message."""

from dataclasses import replace
from typing import Any

import pytest

from opd.cli.lab import main
from opd.lab.knobs import CHOICES, RANGES, PairKnobs, check_knobs, knob_problems

BAD_VALUES: list[tuple[str, Any, str]] = [
    ("size", "huge", "size is 'huge'; choose one of tiny, small, medium, large"),
    ("response_tokens", 63, "response_tokens is 63; choose a whole number from 64 to 1024"),
    ("response_tokens", 64.5, "response_tokens is 64.5; choose a whole number"),
    (
        "response_budget",
        20,
        "below the 39 tokens of the shortest solution; raise it to at least 39",
    ),
    ("response_budget", -1, "response_budget is -1; choose a whole number from 0"),
    ("vocabulary", 199, "vocabulary is 199; choose a whole number from 200 to 32000"),
    ("vocabulary", True, "vocabulary is True"),
    ("foreign_tags", -0.1, "foreign_tags is -0.1; choose a number from 0 to 10"),
    ("foreign_tags", float("nan"), "foreign_tags is nan"),
    (
        "foreign_tags",
        4.5,
        "have 4 places for tags; lower foreign_tags, or raise response_tokens to",
    ),
    ("tag_log_probability", -1.9, "tag_log_probability is -1.9; choose a number from -20 to -2"),
    ("own_tag_share", 0.4, "own_tag_share is 0.4; choose a number from 0.5 to 1"),
    ("spelled_by", "nobody", "spelled_by is 'nobody'; choose one of student, teacher"),
    ("second_end", 1, "second_end is 1; choose one of False, True"),
    ("foreign_ends", 0.5, "foreign_ends is 0.5, but the student has only one end token; set"),
    ("teacher_errors", 1.0, "teacher_errors is 1.0; choose a number from 0 to 0.95"),
    ("student_errors", "many", "student_errors is 'many'; choose a number"),
    ("teacher_style", "prose", "teacher_style is 'prose'; choose one of same, terse"),
    ("teacher_loops", 0.6, "teacher_loops is 0.6; choose a number from 0 to 0.5"),
    ("student_loops", float("inf"), "student_loops is inf"),
    ("student_weakness", "lazy", "choose one of careless, short_sighted, small"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_a_bad_value_has_a_message(name: str, value: Any, message: str) -> None:
    problems = knob_problems(replace(PairKnobs(), **{name: value}))
    assert len(problems) == 1
    assert message in problems[0]


def test_every_knob_is_tried_above() -> None:
    assert {name for name, _, _ in BAD_VALUES} == set(vars(PairKnobs())) == {*RANGES, *CHOICES}


def test_all_problems_are_listed_together() -> None:
    knobs = PairKnobs(vocabulary=5, foreign_tags=9.0, foreign_ends=1.0, response_budget=1)
    with pytest.raises(ValueError, match="4 settings are invalid") as error:
        check_knobs(knobs)
    for name in ("vocabulary", "foreign_tags", "foreign_ends", "response_budget"):
        assert f"{name} is " in str(error.value)


def test_the_remedies_are_accepted() -> None:
    problem = knob_problems(PairKnobs(foreign_tags=10.0))[0]
    response_tokens = int(problem.rpartition(" ")[2])
    assert not knob_problems(PairKnobs(foreign_tags=10.0, response_tokens=response_tokens))
    assert knob_problems(PairKnobs(foreign_tags=10.0, response_tokens=response_tokens - 1))
    assert not knob_problems(PairKnobs(response_budget=39))
    assert not knob_problems(PairKnobs(foreign_ends=0.5, second_end=True))


@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_of_ranges_are_accepted(end: int) -> None:
    knobs = PairKnobs(response_tokens=1024, second_end=True)
    values = {name: bounds[end] for name, bounds in RANGES.items() if name != "response_tokens"}
    values["response_budget"] = (0, 4096)[end]
    assert not knob_problems(replace(knobs, **values))  # type: ignore[arg-type]


def test_the_command_refuses_bad_knobs_and_knobs_of_other_kinds() -> None:
    with pytest.raises(ValueError, match="tag_log_probability is -30"):
        main(["--family", "--tag-log-probability", "-30"])
    with pytest.raises(
        ValueError, match="--foreign-tags, --bases has an effect with --family only"
    ):
        main(["--tiny", "--foreign-tags", "1", "--bases", "x"])
    with pytest.raises(ValueError, match="seed is -1"):
        main(["--family", "--seed", "-1"])
