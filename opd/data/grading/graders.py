"""Graders: extract the answer of a response and compare it with the reference answer.

A grader takes a response and a reference answer and never fails on malformed responses: a response
without a readable answer has reward 0 and `Grade.answer` None. Its time is linear in the length of
the response; comparisons that can hang have a time limit (opd.data.grading.worker_process).
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
from diagnostics.io.user_functions import is_function_name
from opd.data import chain_task
from opd.data.grading.answer_text import (
    extract_answer,
    last_boxed_content,
    last_number,
    text_after_thinking,
)
from opd.data.grading.exact_numbers import MAX_LENGTH, Number, TooLarge, read_number, to_latex
from opd.data.grading.worker_process import TIMEOUT, GraderWorker
from opd.data.prompts import decode_responses

USER_GRADER_TIMEOUT = 60.0
GYM_PROBLEM = re.compile(r" \[(\w+:\d+:\d+#\d+)\]$")


@dataclass(frozen=True)
class Grade:
    """The result of grading a response.

    Responses with equal `answer` state the same answer and have the same reward.
    """

    reward: float
    """1 for a correct answer, else 0; a user's function may return other values."""
    answer: str | None
    """Key of the answer in majority votes, or None if unreadable."""
    feedback: str = ""
    """What the grader says about the response; "" if it says nothing but the reward."""

    def feedback_text(self) -> str:
        """Return what is wrong or right with the response, in words; "" if it was not graded."""
        if math.isnan(self.reward):
            return ""
        if self.feedback:
            return self.feedback
        if self.answer is None:
            return "No answer could be read."
        return f"The answer {self.answer} is {'correct' if self.reward >= 1 else 'wrong'}."


Grader = Callable[[str, str], Grade]


def grade_lab(response: str, answer: str) -> Grade:
    """Grade the lab task: exactly the answer after the only closing think tag."""
    parts = response.split("</think>")
    response_answer = parts[1].strip() if len(parts) == 2 else ""
    return Grade(chain_task.grade(response, answer), response_answer or None)


def grade_exact(response: str, answer: str) -> Grade:
    """Grade by text: what follows the last closing think tag, stripped, is the answer."""
    response_answer = text_after_thinking(response).strip()
    return Grade(float(response_answer == answer.strip()), response_answer or None)


def grade_numeric(response: str, answer: str) -> Grade:
    r"""Compare the last number after the last closing think tag with the answer, exactly.

    A number may have a sign, thousands separators, decimals, a denominator or a power of ten:
    "-1,234.50", "3/4", "3e8", "3 \times 10^8". If the text contains a box, only the last box is
    read; else a last line "Answer: ..." if there is one.

    Args:
        response: The response.
        answer: The reference answer.

    Returns:
        The grade.

    Raises:
        InvalidInput: The reference answer is not one number.
    """
    expected = parse_gold_number(answer.strip())
    text = text_after_thinking(response)
    stated_answer = extract_answer(text)
    number = (
        last_number(text)
        if stated_answer is None
        else parse_number(stated_answer) or last_number(stated_answer)
    )
    if number is None:
        return Grade(0.0, None)
    is_right = expected.equals(number)
    return Grade(float(is_right), (expected if is_right else number).key)


@lru_cache(maxsize=1 << 14)
def parse_gold_number(answer: str) -> Number:
    """Parse a reference answer that must be a number."""
    number = parse_number(answer)
    if number is None:
        raise InvalidInput(
            f"the answer {answer!r} is not a number; use the grader exact or math for this task"
        )
    return number


def parse_number(text: str) -> Number | None:
    """Parse a text that is one number; None if it is not, or the number is too large."""
    try:
        return read_number(text)
    except TooLarge:
        return None


def grade_math(response: str, answer: str) -> Grade:
    r"""Compare the last box, else the last line "Answer: ...", with the answer as mathematics.

    As in the paper's verifier, a response with a closing think tag is read from its first to its
    second one, any other response completely; an answer without \boxed{...} or an answer line is
    unreadable. Two numbers (decimals, fractions, powers of ten or simple Python) are compared
    exactly. Everything else is compared by math-verify: equal values, sets, intervals, and
    expressions after simplification. Units and degree signs are dropped; 50\% equals both 50 and
    0.5. The reference answer may be boxed or between dollars. A correct answer votes for the answer
    that it equals. Each comparison by math-verify runs in a separate process with the time limit
    TIMEOUT; after a timeout the answer is unreadable. Thread-safe.

    Args:
        response: The response.
        answer: The reference answer.

    Returns:
        The grade.

    Raises:
        MissingPackage: math-verify is not installed; the message names the extra.
    """
    parts = response.split("</think>")
    response_answer = extract_answer(parts[min(1, len(parts) - 1)])
    if (
        response_answer is None
        or len(response_answer) > MAX_LENGTH
        or not (response_answer := strip_dollars(response_answer))
    ):
        return Grade(0.0, None)
    return compare_answers(response_answer, strip_gold_answer(answer))


def strip_gold_answer(answer: str) -> str:
    """Return a reference answer without its box and dollars."""
    boxed = last_boxed_content(answer)
    return strip_dollars(answer if boxed is None else boxed)


def strip_dollars(answer: str) -> str:
    """Strip white space and dollar signs."""
    return answer.strip().strip("$").strip()


@lru_cache(maxsize=1 << 14)
def compare_answers(response_answer: str, gold: str) -> Grade:
    """Grade an answer against the reference answer; identical text is always correct."""
    same_text = Grade(
        float(response_answer == gold), response_answer if response_answer == gold else None
    )
    try:
        expected, number = read_number(gold), read_number(response_answer)
    except TooLarge:
        return same_text
    if expected is not None and number is not None:
        is_right = expected.equals(number)
        return Grade(float(is_right), (expected if is_right else number).key)
    comparison = grader_worker()(to_latex(gold), to_latex(response_answer))
    if comparison is None:
        return same_text
    if not comparison["gold"]:
        warnings.warn(
            f"the answer {gold!r} cannot be read as mathematics; only identical text counts as "
            "correct (use the grader exact for answers in words)",
            stacklevel=2,
        )
    if comparison["key"] is None:
        return same_text
    is_right = comparison["equal"] or response_answer == gold
    vote = expected if is_right else number
    return Grade(float(is_right), comparison["key"] if vote is None else vote.key)


def is_number(gold: str) -> bool:
    """Return whether a reference answer is a number."""
    return gold.isdecimal() or parse_number(gold) is not None


def is_readable(gold: str) -> bool:
    """Return whether a reference answer is a number, words, or readable by math-verify."""
    if is_number(gold):
        return True
    comparison = grader_worker()(to_latex(gold), "")
    return comparison is not None and comparison["gold"]


def require_math_verify() -> None:
    """Raise if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise MissingPackage("the grader math needs math-verify: pip install 'opdlab[math]'")


@cache
def grader_worker(kind: str = "math") -> GraderWorker:
    """Return this process's worker for a kind of comparison; one per kind."""
    if kind == "math":
        require_math_verify()
    if is_function_name(kind):
        return GraderWorker(USER_GRADER_TIMEOUT, kind, memory=0)
    return GraderWorker(TIMEOUT, kind)


def grade_gym(response: str, answer: str) -> Grade:
    """Grade with reasoning-gym's own scoring; less than full marks is wrong.

    The answer is the last box, or else what follows the last closing think tag. The time limit is
    TIMEOUT.

    Args:
        response: The response.
        answer: The reference answer, which names its problem (opd.data.benchmarks.read_gym_rows).

    Returns:
        The grade.

    Raises:
        InvalidInput: The reference answer does not name its problem.
    """
    text = text_after_thinking(response)
    boxed = last_boxed_content(text)
    response_answer = (text if boxed is None else boxed).strip()
    problem = GYM_PROBLEM.search(answer[-MAX_LENGTH:])
    if problem is None:
        raise InvalidInput(
            f"the answer {answer!r} does not end in [TASK:SIZE:SEED#NUMBER]; the grader gym only "
            "works with problems of gym:TASK"
        )
    if not response_answer or len(response_answer) > MAX_LENGTH:
        return Grade(0.0, None)
    comparison = grader_worker("gym")(problem[1], response_answer)
    if comparison is None:
        return Grade(0.0, None)
    return Grade(float(comparison["score"] >= 1.0), response_answer)


def grade_with_user_function(name: str, response: str, answer: str) -> Grade:
    """Grade with a user's function; the reward is the number it returns, 1 or more is correct.

    Where it returns a number and a text, the text is the feedback on the response, which a
    teacher's view may show.

    The function runs in a separate process; a response that takes longer than USER_GRADER_TIMEOUT
    has reward 0, with a warning. A response votes for its box, its line "Answer: ...", or else for
    everything after its last closing think tag.

    Args:
        name: MODULE:FUNCTION or FILE.py:FUNCTION; called as function(response, answer).
        response: The response.
        answer: The reference answer.

    Returns:
        The grade.

    Raises:
        OperationFailed: The function cannot be loaded, fails, or returns no finite number.
    """
    result = grader_worker(name)(answer, response)
    if result is None:
        warnings.warn(
            f"the grader {name} took more than {USER_GRADER_TIMEOUT:g} s for a response, or its "
            f"process died; the response has reward 0 (it begins {response[:60]!r})",
            stacklevel=2,
        )
        return Grade(0.0, None)
    if "error" in result:
        raise OperationFailed(
            f"the grader {name} failed with {result['error']} for the answer {answer[:60]!r} and a "
            f"response that begins {response[:60]!r}; it must return a finite number for any text, "
            "or such a number and a text of feedback"
        )
    text = text_after_thinking(response)
    response_answer = extract_answer(text)
    return Grade(
        result["score"],
        (text if response_answer is None else response_answer).strip() or None,
        result.get("feedback", ""),
    )


GRADERS: Mapping[str, Grader] = {
    "exact": grade_exact,
    "numeric": grade_numeric,
    "math": grade_math,
    "gym": grade_gym,
    "lab": grade_lab,
}


def make_grader(name: str) -> Grader:
    """Return a grader by name, or a user's function MODULE:FUNCTION or FILE.py:FUNCTION.

    Args:
        name: The name.

    Returns:
        The grader.

    Raises:
        InvalidInput: Unknown name; the message lists the known ones.
        MissingFile: FILE.py does not exist.
        MissingPackage: math-verify is needed and not installed.
    """
    module, colon, function = name.rpartition(":")
    if colon and module and function:
        if module.endswith(".py") and not Path(module).is_file():
            raise MissingFile(f"the grader {name} names a file that does not exist: {module}")
        return partial(grade_with_user_function, name)
    if name not in GRADERS:
        raise InvalidInput(
            f"unknown grader {name!r}; known: {', '.join(GRADERS)}, or your own function of "
            "(response, answer): MODULE:FUNCTION or FILE.py:FUNCTION"
        )
    if name == "math":  # fail before the run starts, not at the first response
        require_math_verify()
    return GRADERS[name]


def grade_responses(
    tokenizer: Any,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    answers: Sequence[str],
    grade: Grader,
    eos_ids: Sequence[int] = (),
) -> list[Grade]:
    """Grade responses; the grader sees special tokens except the one that ends the response.

    A response to a problem whose answer is empty has the reward NaN.

    Args:
        tokenizer: A Hugging Face tokenizer.
        tokens: (B, T) token ids.
        mask: (B, T), True where a token is real.
        answers: Reference answer to the problem of each response.
        grade: The grader.
        eos_ids: Ids that end a response, besides the tokenizer's EOS id.

    Returns:
        One grade per response.
    """
    texts = decode_responses(tokenizer, tokens, mask, eos_ids)
    return [
        grade(text, answer) if answer else Grade(math.nan, None)
        for text, answer in zip(texts, answers, strict=True)
    ]
