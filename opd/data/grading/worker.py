"""Process that compares answers: one JSON object per line in, one per line out.

Usage: `python -m opd.data.grading.worker KIND SECONDS BYTES`. KIND is "math" (math-verify), "gym"
(reasoning-gym) or a user's function, MODULE:FUNCTION or FILE.py:FUNCTION; SECONDS is the time limit
of a comparison; BYTES is the memory limit, 0 for none.

Computer algebra can hang or use all memory in compiled code that no Python exception reaches
(9^{9^{9^9}}), and so can a user's function. Each comparison therefore has an alarm that ends this
process, and the process has a memory limit. Started by opd.data.grading.worker_process.
"""

import importlib
import json
import logging
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from diagnostics.errors import UserError
from diagnostics.io.user_functions import check_arguments, load_function

TOLERANCE = 1e-4
"""Largest relative difference of two numbers that math-verify may call equal.

math-verify rounds to six decimals.
"""
Compare = Callable[[str, str], dict[str, Any]]


def main() -> None:
    """Answer requests {"gold", "given"} until the input ends."""
    kind, seconds, memory = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what graders print out of the replies
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, even in C code
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles interrupts
    try:
        compare_answers = load_comparison(kind)
    except UserError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = compare_answers(request["gold"], request["given"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=replies, flush=True)


def load_comparison(kind: str) -> Compare:
    """Load the comparison of a kind."""
    if kind == "math":
        logging.disable(logging.CRITICAL)
        compare("1", "1")
        return compare_safely
    if kind == "gym":
        importlib.import_module("reasoning_gym.factory")  # slow: before the first time limit
        return score_gym
    function = load_function(kind, "grader")
    check_arguments(function, kind, "grader", "response", "answer")
    return user_comparison(function)


def user_comparison(function: Callable[..., Any]) -> Compare:
    """Wrap a user's function of (response, answer) as a comparison.

    Args:
        function: Returns a number, or a number and what to say about the response.

    Returns:
        The comparison.
    """

    def compare_with_user_function(gold: str, response_text: str) -> dict[str, Any]:
        try:
            value, feedback = function(response_text, gold), ""
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str):
                value, feedback = value
            if isinstance(value, str):
                return {"error": f"it returned the text {value[:60]!r}"}
            score = float(value)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        if not math.isfinite(score):
            return {"error": f"it returned {score}"}
        return {"score": score, "feedback": feedback} if feedback else {"score": score}

    return compare_with_user_function


def score_gym(gold: str, response_answer: str) -> dict[str, Any]:
    """Return reasoning-gym's score of an answer; `gold` is TASK:SIZE:SEED#NUMBER."""
    from opd.data.benchmarks import load_gym_task

    source, _, number = gold.partition("#")
    task, size, seed = source.split(":")
    if source not in GYM_TASKS:
        GYM_TASKS[source] = load_gym_task(task, int(size), int(seed))
    dataset = GYM_TASKS[source]
    try:
        return {"score": float(dataset.score_answer(response_answer, dataset[int(number)]))}
    except (Exception, RecursionError, MemoryError):
        return {"score": 0.0}


GYM_TASKS: dict[str, Any] = {}


def compare_safely(gold: str, response_answer: str) -> dict[str, Any]:
    """Run `compare`; what cannot be compared is unreadable."""
    try:
        return compare(gold, response_answer)
    except (Exception, RecursionError, MemoryError):
        return {"gold": True, "key": None, "equal": False}


def compare(gold: str, response_answer: str) -> dict[str, Any]:
    r"""Compare two answers with math-verify.

    Words are compared as text: as mathematics, "live" is a product of letters and equals "evil".

    Args:
        gold: The reference answer.
        response_answer: The answer of a response.

    Returns:
        "gold": whether the reference answer could be read; "equal": whether both are equal; "key":
            a canonical text of the response's answer, that of the reference where they are equal,
            None if unreadable. Numbers are written as exact rationals, or with twenty digits, so
            that 0.5, 1/2 and \frac{2}{4} have one key. A wrong percentage has its own key.
    """
    from math_verify import verify

    if (gold_words := normalise_words(gold)) is not None:
        key = normalise_words(response_answer) or response_answer
        return {"gold": True, "key": key, "equal": key == gold_words}
    parsed_gold, parsed_answer = parse_answer(gold), parse_answer(response_answer)
    if not parsed_answer:
        return {"gold": bool(parsed_gold), "key": None, "equal": False}
    equal = bool(parsed_gold) and bool(verify(parsed_gold, parsed_answer, timeout_seconds=None))
    if equal and "%" not in gold + response_answer:
        equal = nearly_equal(parsed_gold[0], parsed_answer[0])
    key = (
        canonical_text(parsed_gold[0])
        if equal
        else canonical_text(parsed_answer[0]) + ("%" if "%" in response_answer else "")
    )
    return {"gold": bool(parsed_gold), "key": key, "equal": equal}


def normalise_words(answer: str) -> str | None:
    """Return the answer in lower case if it is words (one of three letters or more), else None."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", answer).strip(" .")
    words = re.fullmatch(r"[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*", text)
    is_word = words and max(map(len, re.split(r"[\s'-]+", text))) >= 3
    return " ".join(text.lower().split()) if is_word else None


def parse_answer(answer: str) -> list[Any]:
    """Parse the content of a box with math-verify; [] if it cannot be parsed."""
    from math_verify import parse
    from math_verify.parser import LatexExtractionConfig

    # 1\,234 and 1{,}234 are one number; math-verify reads the first as a product
    cleaned = re.sub(r"(?<=\d)(\\[,!;: ]|\{,\}|~)(?=\d{3}(?!\d))", "", answer)
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    boxed_text = f"\\boxed{{{cleaned}}}"
    return parse(boxed_text, config, fallback_mode="no_fallback", parsing_timeout=None)


def nearly_equal(gold: Any, answer: Any) -> bool:
    """Return whether numbers that math-verify called equal are equal relative to their size.

    Elements of pairs, sets and intervals are compared too. Expressions without numbers are left to
    math-verify.

    Args:
        gold: Parsed reference answer.
        answer: Parsed answer of a response.

    Returns:
        Whether they are equal up to TOLERANCE.
    """
    import sympy

    gold, answer = right_side(gold), right_side(answer)
    if gold == answer:
        return True
    if getattr(gold, "is_number", False) and getattr(answer, "is_number", False):
        gold_value, answer_value = (complex(sympy.N(x.doit(), 30)) for x in (gold, answer))
        return abs(gold_value - answer_value) <= TOLERANCE * max(abs(gold_value), abs(answer_value))
    gold_elements, answer_elements = elements(gold), elements(answer)
    if len(gold_elements) != len(answer_elements) or not all(
        getattr(x, "is_number", False) for x in (*gold_elements, *answer_elements)
    ):
        return True
    return all(nearly_equal(*pair) for pair in zip(gold_elements, answer_elements, strict=True))


def elements(expression: Any) -> list[Any]:
    """Return the elements of a pair or set (sorted), or the ends of an interval, else []."""
    import sympy

    if isinstance(expression, sympy.Interval):
        return [expression.start, expression.end]
    if isinstance(expression, sympy.FiniteSet):
        numbers = all(getattr(x, "is_number", False) for x in expression.args)
        return sorted(expression.args, key=numeric_sort_key) if numbers else []
    return list(expression.args) if isinstance(expression, sympy.Tuple) else []


def numeric_sort_key(number: Any) -> tuple[float, float]:
    """Return (real part, imaginary part) of a number."""
    value = complex(number)
    return value.real, value.imag


def right_side(expression: Any) -> Any:
    """Return 5 for x = 5."""
    import sympy

    return expression.rhs if isinstance(expression, sympy.Eq) else expression


def canonical_text(expression: Any) -> str:
    """Return text that is equal for equal numbers, or the text of the simplified expression."""
    import sympy

    expression = right_side(expression)
    if getattr(expression, "is_number", False):
        value = sympy.nsimplify(expression.doit(), rational=True)
        if value.is_Rational:
            return str(value)
        return str(sympy.N(sympy.N(value, 40, chop=True), 20))
    if isinstance(expression, sympy.Tuple | sympy.FiniteSet):
        element_texts = [canonical_text(element) for element in expression.args]
        ordered_texts = (
            sorted(element_texts) if isinstance(expression, sympy.FiniteSet) else element_texts
        )
        return f"{type(expression).__name__}({', '.join(ordered_texts)})"
    if isinstance(expression, sympy.Interval):
        bounds = f"{canonical_text(expression.start)}, {canonical_text(expression.end)}"
        return f"Interval({bounds}, {expression.left_open}, {expression.right_open})"
    try:
        return str(sympy.expand(sympy.cancel(expression.doit())))
    except Exception:  # leave what sympy cannot simplify as it is
        return str(expression)


if __name__ == "__main__":
    main()
