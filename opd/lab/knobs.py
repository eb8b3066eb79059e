"""Knobs of a pair of the family: how teacher and student differ, and how long they write.

Every knob changes one thing of the default pair, a good teacher and a careless student that write
in the same way (`opd.lab.family`).
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from diagnostics.errors import InvalidInput
from opd.config.problems import raise_problems
from opd.lab.pair_lengths import (
    fewest_places,
    shortest_response,
    step_range,
    tokens_for_places,
)

NUM_SPECIAL, NUM_BYTES = 6, 256
"""Special tokens of a pair's tokenizer; bytes, each of which has a token where there is room."""


@dataclass(frozen=True, kw_only=True)
class PairKnobs:
    """Knobs of a pair; `knob_problems` lists which values can be used."""

    size: Literal["tiny", "small", "medium", "large"] = "small"
    """Width and layers of both models; tiny ones train in seconds and do not solve the tasks."""
    response_tokens: int = 64
    """Typical length in tokens of a response without foreign tags, 64 to 1,024."""
    response_budget: int = 0
    """Largest response of the pair's runs in tokens; 0: the longest solution, never hit."""
    vocabulary: int = NUM_SPECIAL + NUM_BYTES
    """Tokens of the vocabulary, 200 to 32,000; those beyond the bytes are never written."""
    foreign_tags: float = 0.0
    """Expected number of tags in a response, 0 to 10, which the two models write differently. They
    have fixed places: its start, its end, then those between its steps."""
    tag_log_probability: float = -8.0
    """Log-probability in nats, -20 to -2, of the student's form for a teacher that writes a tag."""
    own_tag_share: float = 0.98
    """Share of the student's tags that it writes in its own form and not in the teacher's."""
    spelled_by: Literal["student", "teacher"] = "student"
    """Who spells tags in bytes; for the other model a tag is one special token."""
    second_end: bool = False
    """Whether the student's responses end with <|endoftext|>, too; the teacher's never do."""
    foreign_ends: float = 0.0
    """Share of the student's responses that end with <|endoftext|>; needs second_end."""
    teacher_errors: float = 0.0
    """Share of the teacher's training solutions, of typical length, with an error."""
    student_errors: float | None = None
    """The same of the student; None: 0.65 if it is careless, else 0."""
    teacher_style: Literal["same", "terse"] = "same"
    """How the teacher writes a step: as the student, or without repeating its two factors."""
    teacher_loops: float = 0.0
    """Probability that the teacher's training solutions repeat a step, up to ten times."""
    student_loops: float = 0.0
    """The same of the student."""
    student_weakness: Literal["careless", "short_sighted", "small"] = "careless"
    """Why the student is worse: errors in its training solutions, training on the shorter half of
    the problems only, or one layer of half the width."""

    @property
    def error_shares(self) -> dict[str, float]:
        """Share of training solutions with an error, by model."""
        careless = 0.65 if self.student_weakness == "careless" else 0.0
        student = careless if self.student_errors is None else self.student_errors
        return {"teacher": self.teacher_errors, "student": student}


RANGES: dict[str, tuple[float, float]] = {
    "response_tokens": (64, 1024),
    "response_budget": (0, 4096),
    "vocabulary": (200, 32_000),
    "foreign_tags": (0, 10),
    "tag_log_probability": (-20, -2),
    "own_tag_share": (0.5, 1),
    "foreign_ends": (0, 1),
    "teacher_errors": (0, 0.95),
    "student_errors": (0, 0.95),
    "teacher_loops": (0, 0.5),
    "student_loops": (0, 0.5),
}
"""Smallest and largest value of each knob that is a number."""
CHOICES: dict[str, tuple[object, ...]] = {
    "size": ("tiny", "small", "medium", "large"),
    "spelled_by": ("student", "teacher"),
    "second_end": (False, True),
    "teacher_style": ("same", "terse"),
    "student_weakness": ("careless", "short_sighted", "small"),
}
"""Values of each other knob."""
WHOLE_NUMBERS = ("response_tokens", "response_budget", "vocabulary")


def knob_problems(knobs: PairKnobs) -> list[str]:
    """List every value out of range, and every contradiction between values in range.

    Args:
        knobs: The knobs; their values may have any type.

    Returns:
        One message per problem, with the value and the remedy.
    """
    problems: dict[str, str] = {}
    for name in (field.name for field in fields(PairKnobs)):
        message = value_problem(name, getattr(knobs, name))
        if message:
            problems[name] = message
    messages = list(problems.values())
    ends_are_valid = not {"foreign_ends", "second_end"} & problems.keys()
    if ends_are_valid and knobs.foreign_ends > 0 and not knobs.second_end:
        messages.append(
            f"foreign_ends is {knobs.foreign_ends}, but the student has only one end token; "
            "set second_end, or foreign_ends to 0"
        )
    if "response_tokens" in problems:
        return messages
    steps = step_range(knobs.response_tokens)
    if "foreign_tags" not in problems and knobs.foreign_tags > fewest_places(steps):
        messages.append(
            f"foreign_tags is {knobs.foreign_tags}, but the shortest responses of about "
            f"{knobs.response_tokens} tokens have {fewest_places(steps)} places for tags; lower "
            f"foreign_tags, or raise response_tokens to {tokens_for_places(knobs.foreign_tags)}"
        )
    shortest = shortest_response(steps)
    if "response_budget" not in problems and 0 < knobs.response_budget < shortest:
        messages.append(
            f"response_budget is {knobs.response_budget}, below the {shortest} tokens of the "
            f"shortest solution; raise it to at least {shortest}, or set 0 for the longest solution"
        )
    return messages


def value_problem(name: str, value: object) -> str | None:
    """Return what is wrong with the value of one knob, None if nothing is."""
    if name in CHOICES:
        choices = CHOICES[name]
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return None
        return f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}"
    if name == "student_errors" and value is None:
        return None
    low, high = RANGES[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and name in WHOLE_NUMBERS and not isinstance(value, int):
        is_number = False
    if not is_number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        kind = "a whole number" if name in WHOLE_NUMBERS else "a number"
        return f"{name} is {value!r}; choose {kind} from {low:g} to {high:g}"
    return None


def check_knobs(knobs: PairKnobs) -> None:
    """Raise one error with every problem of the knobs.

    Args:
        knobs: The knobs.

    Raises:
        InvalidInput: There are problems.
    """
    raise_problems(knob_problems(knobs))


def check_seed(seed: int) -> None:
    """Refuse a seed below 0."""
    if seed < 0:
        raise InvalidInput(f"seed is {seed}; choose a whole number from 0")
