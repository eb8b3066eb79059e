"""Graders: the answer that a response gives, and whether it is the right one.

A grader takes a response and the answer to compare with, and never fails on a strange response:
one that holds no readable answer is worth 0 and says so (`Verdict.answer` is None). It takes time
in proportion to the length of the response; what could hang has a time limit (opd.data.grading.worker_process).
"""

import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from diagnostics.errors import InvalidInput, MissingFile, MissingPackage, OperationFailed
from opd.data import chain_task
from opd.data.chain_task import Problem
from opd.data.grading.answer_text import behind_thoughts, last_box, last_number, stated
from opd.data.grading.exact_numbers import LONGEST, Number, TooLarge, latex_of, read_number
from opd.data.grading.worker_process import SECONDS, GraderWorker
from opd.data.prompts import response_texts

OWN_SECONDS = 60.0
GYM_PROBLEM = re.compile(r" \[(\w+:\d+:\d+#\d+)\]$")


@dataclass(frozen=True)
class Grade:
    """reward: 1 for the right answer, else 0. answer: what it votes for, or None if unreadable.

    Responses with equal `answer` say the same and have the same reward.
    """

    reward: float
    answer: str | None


Grader = Callable[[str, str], Grade]


def grade_lab(response: str, answer: str) -> Grade:
    """Of the lab task: exactly the answer after the one closing think tag."""
    parts = response.split("</think>")
    given = parts[1].strip() if len(parts) == 2 else ""
    return Grade(chain_task.grade(response, answer), given or None)


def grade_exact(response: str, answer: str) -> Grade:
    """What follows the last closing think tag is the answer, white space at its ends aside."""
    given = behind_thoughts(response).strip()
    return Grade(float(given == answer.strip()), given or None)


def grade_numeric(response: str, answer: str) -> Grade:
    """The last number after the last closing think tag equals the answer, as exact fractions.

    A number may have a sign, thousands separators, decimals, a denominator or a power of ten:
    "-1,234.50", "3/4", "3e8", "3 \\times 10^8". With a box in the text, the last box is read
    instead of all of it; without one, a last line "Answer: ..." is.

    Raises:
      ValueError: the answer to compare with is not one number.
    """
    want = gold_number(answer.strip())
    text = behind_thoughts(response)
    chosen = stated(text)
    given = last_number(text) if chosen is None else whole_number(chosen) or last_number(chosen)
    if given is None:
        return Grade(0.0, None)
    right = want.equals(given)
    return Grade(float(right), (want if right else given).key)


@lru_cache(maxsize=1 << 14)
def gold_number(answer: str) -> Number:
    number = whole_number(answer)
    if number is None:
        raise InvalidInput(
            f"the answer {answer!r} is not a number; use the grader exact or math for this task"
        )
    return number


def whole_number(text: str) -> Number | None:
    """The number that all of a text states; None if it states none, or one too large."""
    try:
        return read_number(text)
    except TooLarge:
        return None


def grade_math(response: str, answer: str) -> Grade:
    """The last \\boxed{...} equals the answer as mathematics; without one, the last line
    "Answer: ..." does.

    As the paper's verifier does, a response with a closing think tag is read from its first to its
    second one, any other as a whole; an answer without a box or a line is unreadable. Two numbers,
    as decimals, fractions, powers of ten or simple Python, are compared exactly. All else is
    compared by math-verify: equal means equal values, sets, intervals, expressions after
    simplification; units and degree signs are dropped; 50\\% equals both 50 and 0.5. The answer to
    compare with may be boxed or between dollars. A right answer votes for the answer that it
    equals. Each comparison by math-verify runs in a process of its own that is ended after SECONDS;
    the answer is unreadable then. Safe to call from any thread.

    Raises:
      ImportError: math-verify is not installed; names the extra.
    """
    parts = response.split("</think>")
    given = stated(parts[min(1, len(parts) - 1)])
    if given is None or len(given) > LONGEST or not (given := undressed(given)):
        return Grade(0.0, None)
    return judged(given, gold_text(answer))


def gold_text(answer: str) -> str:
    """An answer to compare with, without its box and dollars."""
    boxed = last_box(answer)
    return undressed(answer if boxed is None else boxed)


def undressed(answer: str) -> str:
    return answer.strip().strip("$").strip()


@lru_cache(maxsize=1 << 14)
def judged(given: str, gold: str) -> Grade:
    """The verdict on two answers; the same text is right in any case."""
    same = Grade(float(given == gold), given if given == gold else None)
    try:
        want, number = read_number(gold), read_number(given)
    except TooLarge:
        return same
    if want is not None and number is not None:
        right = want.equals(number)
        return Grade(float(right), (want if right else number).key)
    found = judge()(latex_of(gold), latex_of(given))
    if found is None:
        return same
    if not found["gold"]:
        warnings.warn(
            f"the answer {gold!r} cannot be read as mathematics; only the same text counts as "
            "right (the grader exact suits answers in words)",
            stacklevel=2,
        )
    if found["key"] is None:
        return same
    right = found["equal"] or given == gold
    known = want if right else number
    return Grade(float(right), found["key"] if known is None else known.key)


def is_number(gold: str) -> bool:
    return gold.isdecimal() or whole_number(gold) is not None


def readable(gold: str) -> bool:
    """Whether an answer to compare with is a number, words, or what math-verify reads."""
    if is_number(gold):
        return True
    found = judge()(latex_of(gold), "")
    return found is not None and found["gold"]


def require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise MissingPackage("the grader math needs math-verify: pip install 'opdlab[math]'")


@cache
def judge(kind: str = "math") -> GraderWorker:
    """This process's one judge of that kind."""
    if kind == "math":
        require_math_verify()
    if is_own(kind):
        return GraderWorker(OWN_SECONDS, kind, memory=0)
    return GraderWorker(SECONDS, kind)


def grade_gym(response: str, answer: str) -> Grade:
    """Of reasoning-gym: the task's own judgement of the last box, or else of what follows the last
    closing think tag, within SECONDS. What it gives less than full marks for is wrong.

    Raises:
      ValueError: an answer that does not say of which problem it is (opd.data.benchmarks.gym_rows).
    """
    text = behind_thoughts(response)
    boxed = last_box(text)
    given = (text if boxed is None else boxed).strip()
    problem = GYM_PROBLEM.search(answer[-LONGEST:])
    if problem is None:
        raise InvalidInput(
            f"the answer {answer!r} does not end in [TASK:SIZE:SEED#NUMBER]; the grader gym is for "
            "problems of gym:TASK alone"
        )
    if not given or len(given) > LONGEST:
        return Grade(0.0, None)
    found = judge("gym")(problem[1], given)
    if found is None:
        return Grade(0.0, None)
    return Grade(float(found["score"] >= 1.0), given)


def grade_own(name: str, response: str, answer: str) -> Grade:
    """By a function of the user's, MODULE:FUNCTION or FILE.py:FUNCTION: the reward is what it
    returns for (response, answer), 1 or more is right.

    It runs in a process of its own; a response that takes it longer than OWN_SECONDS is worth 0,
    with a warning. A response votes for its box, its line "Answer: ...", or else for all that
    follows its last closing think tag.

    Raises:
      RuntimeError: the function cannot be loaded, fails, or returns no finite number.
    """
    found = judge(name)(answer, response)
    if found is None:
        warnings.warn(
            f"the grader {name} took more than {OWN_SECONDS:g} s over a response, or its process "
            f"died of it; the response is worth 0 (it begins {response[:60]!r})",
            stacklevel=2,
        )
        return Grade(0.0, None)
    if "error" in found:
        raise OperationFailed(
            f"the grader {name} failed with {found['error']}, for the answer {answer[:60]!r} and a "
            f"response that begins {response[:60]!r}; it must return a finite number for any text"
        )
    text = behind_thoughts(response)
    given = stated(text)
    return Grade(found["score"], (text if given is None else given).strip() or None)


GRADERS: Mapping[str, Grader] = {
    "exact": grade_exact,
    "numeric": grade_numeric,
    "math": grade_math,
    "gym": grade_gym,
    "lab": grade_lab,
}


def is_own(name: str) -> bool:
    """Whether a grader is a function of the user's, which is code that its name makes run."""
    return ":" in name


def refuse_own_of_record(name: str, record: Path, trust: bool) -> None:
    """Refuse to run a function that a record names, unless the user trusts it.

    Raises:
      ValueError: it is not trusted.
    """
    if is_own(name) and not trust:
        raise InvalidInput(
            f"{record} names the grader {name}, a function whose code would run; read it, and give "
            "--trust-remote-code to run it"
        )


def make_grader(name: str) -> Grader:
    """The grader of that name, or a function of the user's, MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises:
      ValueError: unknown name; lists the known ones. FileNotFoundError: no such file.
      ImportError: math-verify is not installed.
    """
    where, colon, function = name.rpartition(":")
    if colon and where and function:
        if where.endswith(".py") and not Path(where).is_file():
            raise MissingFile(f"the grader {name} names a file that does not exist: {where}")
        return partial(grade_own, name)
    if name not in GRADERS:
        raise InvalidInput(
            f"unknown grader {name!r}; known: {', '.join(GRADERS)}, or a function of (response, "
            "answer) of your own: MODULE:FUNCTION or FILE.py:FUNCTION"
        )
    if name == "math":  # before hours of work, not at the first response
        require_math_verify()
    return GRADERS[name]


def grade_responses(
    tokenizer: Any,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    problems: Sequence[Problem],
    grade: Grader,
    ends: Sequence[int] = (),
) -> list[float]:
    """The reward of each response: see `verdicts`."""
    found = verdicts(tokenizer, tokens, mask, problems, grade, ends)
    return [verdict.reward for verdict in found]


def verdicts(
    tokenizer: Any,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    problems: Sequence[Problem],
    grade: Grader,
    ends: Sequence[int] = (),
) -> list[Grade]:
    """The verdict on each response; the grader sees special tokens, but not the one that ends it.

    A response to a problem without an answer has the reward NaN.

    Args:
      tokens, mask: (B, T). ends: ids that end a response, besides the tokenizer's own end token.
    """
    texts = response_texts(tokenizer, tokens, mask, ends)
    return [
        grade(text, problem.answer) if problem.answer else Grade(math.nan, None)
        for text, problem in zip(texts, problems, strict=True)
    ]
