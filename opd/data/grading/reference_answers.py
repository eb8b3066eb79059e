"""Answers to compare with, read and graded against themselves before anything is sampled."""

import warnings
from collections.abc import Sequence

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short
from opd.data.chain_task import Problem
from opd.data.grading.answer_text import stated
from opd.data.grading.exact_numbers import LONGEST
from opd.data.grading.graders import GYM_PROBLEM, Grader, gold_text, is_number, readable
from opd.data.sources import final_answer, numbered, row_of

MOST_SHOWN = 5
MOST_PARSED = 500
"""Answers that computer algebra reads, in hundredths of a second each; numbers do not count, and
what it cannot read of later ones is warned of when they are graded."""
MOST_OF_GYM = 8
"""Problems of reasoning-gym that are asked about: their answers are the package's own."""


def check_golds(problems: Sequence[Problem], source: str, name: str, grade: Grader) -> None:
    """Refuse answers that the grader cannot compare with, or would not take for themselves.

    What mathematics cannot read, and still is right where a response has the same text, is warned
    of; it is refused where that is so of all. Of a user's own function one answer is tried, since
    nobody knows how its responses state them. Problems without an answer are left out.

    Raises:
      ValueError: names the source, the rows, the values and what is expected.
    """
    answers = {
        problem.answer: row_of(problem, i) for i, problem in reversed([*enumerate(problems)])
    }
    answers.pop("", None)
    if ":" in name:
        for answer in list(answers)[-1:]:
            grade(answer, answer)
        return
    if name == "gym":
        answers = dict(list(answers.items())[-MOST_OF_GYM:])
    wrong, unread, parsed = dict[str, int](), dict[str, int](), 0
    words = f"is not right where a response gives it itself, by the grader {name}"
    for answer, row in answers.items():
        gold = final_answer(answer)
        try:
            if name == "math":
                if not takes_itself(gold):
                    wrong[answer] = row
                elif not is_number(gold_text(gold)) and parsed < MOST_PARSED:
                    parsed += 1
                    if not readable(gold_text(gold)):
                        unread[answer] = row
            elif grade(response_of(gold, name), answer).reward < 1:
                wrong[answer] = row
        except ValueError as error:
            wrong[answer], words = row, f"cannot be compared with: {error}"
    if wrong:
        raise InvalidInput(
            f"{source}: {listed(wrong)} {words}; mend or drop the rows, or choose another grader"
        )
    if unread:
        text = (
            f"{source}: {listed(unread)} cannot be read as mathematics; only a response with the "
        )
        text += "same text is right there (the grader exact suits answers in words)"
        if len(unread) == len(answers):
            raise InvalidInput(f"{text}. No answer can be read: choose another grader")
        warnings.warn(text, stacklevel=3)


def takes_itself(gold: str) -> bool:
    """Whether a box with the answer is read as the answer; the same text is right then, so that
    computer algebra, which takes a tenth of a second, need not be asked."""
    text = gold_text(gold)
    return 0 < len(text) <= LONGEST and stated(response_of(gold, "math")) == text


def response_of(answer: str, name: str) -> str:
    """A response that gives the answer as the grader of that name expects it."""
    if name == "math":
        return f"\\boxed{{{gold_text(answer)}}}"
    if name == "gym":
        return GYM_PROBLEM.sub("", answer)
    return f"<think></think>{answer}"


def listed(answers: dict[str, int]) -> str:
    """The rows of some answers, and the first answers."""
    rows = sorted(answers.values())
    first = sorted(answers, key=answers.__getitem__)[:MOST_SHOWN]
    return f"{numbered(rows)}, answer{'s' * (len(rows) > 1)} {', '.join(map(short, first))},"
