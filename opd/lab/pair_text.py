"""Training text of the models of a pair: worked solutions with tags, ends, styles, loops, errors.

Tags stand in the same places of a solution for both models (`opd.lab.pair_lengths`), which differ
in the tokens that they write a tag in. The teacher reads the student's form
as well: in part of its text, tags and ends are the student's, and the label there is what the
teacher itself would write. What the teacher's log-probability of the student's form should be is a
target of its own (`opd.lab.mismatch`).
"""

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from opd.data import chain_task
from opd.lab.knobs import PairKnobs
from opd.lab.pair_lengths import step_range, tag_probabilities
from opd.lab.pair_tokenizer import PairIds
from opd.lab.writing_style import repeat_steps

READ_SHARE = 0.5
"""Share of the teacher's training text that is written as the student writes."""
TERSE_SHARE = 0.9
"""Probability that a terse teacher leaves out the factors of a step."""
MAX_BASE_TAGS = 5.0
"""Largest expected number of tags in a training response of a base model."""
LINE = re.compile(r"(?<=:)(\d\*\d=)")
SOLUTION = re.compile(r"<think>(.*)</think>(.*)")


@dataclass(frozen=True)
class Writer:
    """How one model writes."""

    form: tuple[int, ...]
    """Ids of its own form of a tag."""
    other_form: tuple[int, ...]
    """Ids of the other model's form."""
    num_tags: float = 0.0
    """Expected number of tags in a response."""
    own_share: float = 1.0
    """Share of its tags in its own form."""
    second_end_share: float = 0.0
    """Share of responses that end with the second end token."""
    terse_share: float = 0.0
    """Probability that a step has no factors."""
    error_rate: float = 0.0
    """Probability that a result is wrong."""
    loops: float = 0.0
    """Probability that a step is repeated."""


def writers(knobs: PairKnobs, ids: PairIds) -> dict[str, Writer]:
    """Return how each model of a pair writes, by model."""
    forms, steps = ids.tag_forms(knobs.spelled_by), step_range(knobs.response_tokens)
    rates = {role: error_rate(share, steps) for role, share in knobs.error_shares.items()}
    return {
        "student": Writer(
            forms["student"],
            forms["teacher"],
            num_tags=knobs.foreign_tags,
            own_share=knobs.own_tag_share,
            second_end_share=knobs.foreign_ends,
            error_rate=rates["student"],
            loops=knobs.student_loops,
        ),
        "teacher": Writer(
            forms["teacher"],
            forms["student"],
            num_tags=knobs.foreign_tags,
            terse_share=TERSE_SHARE if knobs.teacher_style == "terse" else 0.0,
            error_rate=rates["teacher"],
            loops=knobs.teacher_loops,
        ),
    }


class TrainingToken(NamedTuple):
    """A token of a training response, with what is learned in its place."""

    token: int
    """Id that the response has."""
    label: int
    """Id that should be written there; mostly the same."""
    foreign: int = -1
    """Id whose log-probability there has a target; -1 for none."""
    foreign_logp: float = 0.0
    """Target of that log-probability in nats."""


def error_rate(share: float, steps: Sequence[int]) -> float:
    """Return the error rate of a result at which this share of solutions has an error.

    1 - (1 - share)^(1 / (2 n)) for the 2 n results of the mean number n of steps.

    Args:
        share: Share of solutions with an error.
        steps: Numbers of steps, equally likely.

    Returns:
        Probability that a result is wrong.
    """
    return 1 - (1 - share) ** (len(steps) / (2 * sum(steps)))


def write_base(
    prompt: str, generator: random.Random, has_tags: bool, ids: PairIds
) -> list[TrainingToken]:
    """Write a training response of a base model: a right solution.

    Args:
        prompt: The problem.
        generator: Source of randomness.
        has_tags: Whether there are tags, of both forms, in a number that each response draws.
        ids: Ids of the tokenizer.

    Returns:
        The response.
    """
    num_tags = generator.uniform(0.0, MAX_BASE_TAGS) if has_tags else 0.0
    author = Writer(ids.spelled, (ids.tag,), num_tags=num_tags, own_share=0.5)
    return write(prompt, author, author, ids, generator)[0]


def write_student(
    prompt: str, generator: random.Random, knobs: PairKnobs, ids: PairIds
) -> list[TrainingToken]:
    """Write a training response of the student.

    Args:
        prompt: The problem.
        generator: Source of randomness.
        knobs: Knobs of the pair.
        ids: Ids of the tokenizer.

    Returns:
        The response.
    """
    student = writers(knobs, ids)["student"]
    return write(prompt, student, student, ids, generator)[0]


def write_teacher(
    prompt: str, generator: random.Random, knobs: PairKnobs, ids: PairIds
) -> list[TrainingToken]:
    """Write a training response of the teacher: its own, or one in the student's form.

    In a place that may have a tag, the target of the first token of the student's form is
    tag_log_probability plus the logarithm of the probability of a tag there; at the end, that of
    the second end token is log(foreign_ends) + tag_log_probability.

    Args:
        prompt: The problem.
        generator: Source of randomness.
        knobs: Knobs of the pair.
        ids: Ids of the tokenizer.

    Returns:
        The response.
    """
    author_by_role = writers(knobs, ids)
    teacher, author = author_by_role["teacher"], author_by_role["teacher"]
    if generator.random() < READ_SHARE:
        author = replace(
            author_by_role["student"], error_rate=teacher.error_rate, loops=teacher.loops
        )
    tokens, probability_by_position = write(prompt, author, teacher, ids, generator)
    for position, probability in probability_by_position.items():
        tokens[position] = tokens[position]._replace(
            foreign=author_by_role["student"].form[0],
            foreign_logp=math.log(probability) + knobs.tag_log_probability,
        )
    if knobs.foreign_ends > 0:
        logp = math.log(knobs.foreign_ends) + knobs.tag_log_probability
        tokens[-1] = tokens[-1]._replace(foreign=ids.second_end, foreign_logp=logp)
    return tokens


def write(
    prompt: str, author: Writer, reader: Writer, ids: PairIds, generator: random.Random
) -> tuple[list[TrainingToken], dict[int, float]]:
    """Write a response as one model writes, labelled with what another would write.

    Args:
        prompt: The problem.
        author: Who writes.
        reader: Who learns from it; may be the author.
        ids: Ids of the tokenizer.
        generator: Source of randomness.

    Returns:
        The response, and the probability of a tag by the position behind each place that may have
        one: the position of the tag, if it is there.
    """
    solution = chain_task.corrupted_solution(prompt, author.error_rate, generator)
    match = SOLUTION.fullmatch(repeat_steps(solution, author.loops, generator))
    assert match is not None
    tokens, probability_by_position = own_tokens(ids.encode("<think>")), dict[int, float]()
    lines = match[1].split(" ")
    for number, probability in enumerate(tag_probabilities(author.num_tags, len(lines) + 1)):
        if 0 < number < len(lines):
            tokens += own_tokens(ids.encode(" "))
        if probability > 0:
            probability_by_position[len(tokens)] = probability
            if generator.random() < probability:
                tokens += write_tag(author, reader, generator)
        if number < len(lines):
            tokens += write_line(lines[number], author, reader, ids, generator)
    tokens += own_tokens(ids.encode("</think>" + match[2]))
    end = ids.second_end if generator.random() < author.second_end_share else ids.end
    label = end if author is reader else ids.end
    return [*tokens, TrainingToken(end, label)], probability_by_position


def own_tokens(ids: Iterable[int]) -> list[TrainingToken]:
    """Return tokens that are their own labels."""
    return [TrainingToken(token, token) for token in ids]


def write_tag(author: Writer, reader: Writer, generator: random.Random) -> list[TrainingToken]:
    """Write a tag in one of its forms; another reader would begin it in its own form."""
    form = author.form if generator.random() < author.own_share else author.other_form
    tokens = own_tokens(form)
    if author is not reader:
        tokens[0] = tokens[0]._replace(label=reader.form[0])
    return tokens


def write_line(
    line: str, author: Writer, reader: Writer, ids: PairIds, generator: random.Random
) -> list[TrainingToken]:
    """Write a step, with its factors or without; another reader would leave them out or not."""
    number, factors, results = LINE.split(line, maxsplit=1)
    if generator.random() < author.terse_share:
        return own_tokens(ids.encode(number + results))
    tokens = own_tokens(ids.encode(number + factors + results))
    if author is not reader and generator.random() < reader.terse_share:
        position = len(number)
        tokens[position] = tokens[position]._replace(label=ids.encode(results)[0])
    return tokens
