"""Checks of reference answers against their grader, before anything is sampled."""

import warnings
from collections.abc import Sequence

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from opd.data.chain_task import Problem
from opd.data.grading.answer_text import extract_answer
from opd.data.grading.exact_numbers import MAX_LENGTH
from opd.data.grading.graders import GYM_PROBLEM, Grader, is_number, is_readable, strip_gold_answer
from opd.data.sources import final_answer, format_row_numbers, row_number

MAX_SHOWN = 5
MAX_PARSED = 500
"""Largest number of answers that are parsed by computer algebra (some 10 ms each).

Numbers are not counted; unreadable answers beyond this limit cause a warning when they are graded.
"""
MAX_GYM_CHECKED = 8
"""Number of reasoning-gym problems that are checked: their answers come from the package itself."""


def check_reference_answers(
    problems: Sequence[Problem], source: str, name: str, grade: Grader
) -> None:
    """Check that the grader accepts every reference answer as a correct response.

    Answers that cannot be read as mathematics are still correct as identical text, so they only
    cause a warning, unless that holds for all answers. For a user's function one answer is tried,
    since its response format is unknown. Problems without an answer are skipped.

    Args:
        problems: The problems of a source.
        source: Name of the source, for messages.
        name: Name of the grader.
        grade: The grader.

    Raises:
        InvalidInput: Some answers are rejected; the message contains source, rows and values.
    """
    answers = {
        problem.answer: row_number(problem, i) for i, problem in reversed([*enumerate(problems)])
    }
    answers.pop("", None)
    if ":" in name:
        for answer in list(answers)[-1:]:
            grade(answer, answer)
        return
    if name == "gym":
        answers = dict(list(answers.items())[-MAX_GYM_CHECKED:])
    rejected, unreadable, num_parsed = dict[str, int](), dict[str, int](), 0
    reason = f"is graded as wrong when a response states it itself, by the grader {name}"
    for answer, row in answers.items():
        gold = final_answer(answer)
        try:
            if name == "math":
                if not is_read_back(gold):
                    rejected[answer] = row
                elif not is_number(strip_gold_answer(gold)) and num_parsed < MAX_PARSED:
                    num_parsed += 1
                    if not is_readable(strip_gold_answer(gold)):
                        unreadable[answer] = row
            elif grade(example_response(gold, name), answer).reward < 1:
                rejected[answer] = row
        except ValueError as error:
            rejected[answer], reason = row, f"cannot be compared with: {error}"
    if rejected:
        raise InvalidInput(
            f"{source}: {describe_rows(rejected)} {reason}; correct or remove the rows, or choose "
            f"another grader"
        )
    if unreadable:
        text = f"{source}: {describe_rows(unreadable)} cannot be read as mathematics; only a "
        text += (
            "response with identical text is correct (use the grader exact for answers in words)"
        )
        if len(unreadable) == len(answers):
            raise InvalidInput(f"{text}. No answer can be read: choose another grader")
        warnings.warn(text, stacklevel=3)


def is_read_back(gold: str) -> bool:
    """Return whether a box with the answer is read as exactly this answer.

    Identical text is correct, so computer algebra, which takes 0.1 s, is not needed.

    Args:
        gold: The reference answer.

    Returns:
        Whether the same text is extracted.
    """
    text = strip_gold_answer(gold)
    return 0 < len(text) <= MAX_LENGTH and extract_answer(example_response(gold, "math")) == text


def example_response(answer: str, name: str) -> str:
    """Return a response that states an answer in the format of a grader."""
    if name == "math":
        return f"\\boxed{{{strip_gold_answer(answer)}}}"
    if name == "gym":
        return GYM_PROBLEM.sub("", answer)
    return f"<think></think>{answer}"


def describe_rows(answers: dict[str, int]) -> str:
    """Format the rows of some answers, and the first answers."""
    rows = sorted(answers.values())
    first_answers = sorted(answers, key=answers.__getitem__)[:MAX_SHOWN]
    return (
        f"{format_row_numbers(rows)}, answer{'s' * (len(rows) > 1)} "
        f"{', '.join(map(short_repr, first_answers))},"
    )
