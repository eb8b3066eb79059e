"""A process that compares answers, one JSON object a line in, one out: `python -m opd.data.grading.worker`.

Arguments: "math" (math-verify), "gym" (reasoning-gym) or a function of the user's,
MODULE:FUNCTION or FILE.py:FUNCTION; seconds for a comparison; bytes of memory, 0 for no limit.

Computer algebra can hang or eat all memory in compiled code that no Python exception reaches
(9^{9^{9^9}}), and so can a user's function, so each comparison has an alarm that ends this process,
and the process a limit on its memory. Started by opd.data.grading.worker_process.
"""

import importlib
import importlib.util
import json
import logging
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
"""Largest relative difference of two numbers that math-verify, which rounds to six decimals, may
call equal."""
Compare = Callable[[str, str], dict[str, Any]]


def main() -> None:
    """Answer requests {"gold", "given"} until the input ends."""
    kind, seconds, memory = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what graders print is no reply
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends us, in compiled code too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for our owner
    try:
        comparison = comparer(kind)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = comparison(request["gold"], request["given"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=replies, flush=True)


def comparer(kind: str) -> Compare:
    """The comparison of that kind, loaded."""
    if kind == "math":
        logging.disable(logging.CRITICAL)
        compare("1", "1")
        return compare_safely
    if kind == "gym":
        importlib.import_module("reasoning_gym.factory")  # takes seconds, which are no answer's
        return score_gym
    return own_score(load_function(kind))


def load_function(name: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION or FILE.py:FUNCTION names.

    Raises:
      ImportError, AttributeError: there is none.
    """
    where, _, function = name.rpartition(":")
    if where.endswith(".py"):
        description = importlib.util.spec_from_file_location(Path(where).stem, where)
        if description is None or description.loader is None:
            raise ImportError(f"{where} is no Python file")
        module = importlib.util.module_from_spec(description)
        sys.modules[description.name] = module
        description.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    return getattr(module, function)


def own_score(function: Callable[..., Any]) -> Compare:
    """The comparison by a user's function of (response, answer), which returns a number."""

    def scored(gold: str, given: str) -> dict[str, Any]:
        try:
            score = float(function(given, gold))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"score": score} if math.isfinite(score) else {"error": f"it returned {score}"}

    return scored


def score_gym(gold: str, given: str) -> dict[str, Any]:
    """The score of reasoning-gym's own judgement; gold: TASK:SIZE:SEED#NUMBER."""
    from opd.data.benchmarks import gym_task

    words, _, number = gold.partition("#")
    task, size, seed = words.split(":")
    if words not in GYM_TASKS:
        GYM_TASKS[words] = gym_task(task, int(size), int(seed))
    made = GYM_TASKS[words]
    try:
        return {"score": float(made.score_answer(given, made[int(number)]))}
    except (Exception, RecursionError, MemoryError):
        return {"score": 0.0}


GYM_TASKS: dict[str, Any] = {}


def compare_safely(gold: str, given: str) -> dict[str, Any]:
    """`compare`; what cannot be compared is unreadable."""
    try:
        return compare(gold, given)
    except (Exception, RecursionError, MemoryError):
        return {"gold": True, "key": None, "equal": False}


def compare(gold: str, given: str) -> dict[str, Any]:
    """Whether both could be read (`gold`, `key` not None) and are `equal`.

    key: a canonical spelling of the given answer, that of the gold answer where they are equal;
    numbers are written as exact rationals, or by twenty digits, so that 0.5, 1/2 and
    \\frac{2}{4} have one key. A percentage that is wrong has its own. Words are compared as text:
    as mathematics, "live" is a product of letters and equals "evil".
    """
    from math_verify import verify

    if (word := spoken(gold)) is not None:
        key = spoken(given) or given
        return {"gold": True, "key": key, "equal": key == word}
    want, found = parsed(gold), parsed(given)
    if not found:
        return {"gold": bool(want), "key": None, "equal": False}
    equal = bool(want) and bool(verify(want, found, timeout_seconds=None))
    if equal and "%" not in gold + given:
        equal = close(want[0], found[0])
    key = canonical(want[0]) if equal else canonical(found[0]) + ("%" if "%" in given else "")
    return {"gold": bool(want), "key": key, "equal": equal}


def spoken(answer: str) -> str | None:
    """The answer in lower case if it is words (one of three letters or more), else None."""
    plain = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", answer).strip(" .")
    words = re.fullmatch(r"[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*", plain)
    is_word = words and max(map(len, re.split(r"[\s'-]+", plain))) >= 3
    return " ".join(plain.lower().split()) if is_word else None


def parsed(answer: str) -> list[Any]:
    """math-verify's reading of the content of a box, [] where it has none."""
    from math_verify import parse
    from math_verify.parser import LatexExtractionConfig

    # 1\,234 and 1{,}234 are one number; math-verify reads the first as a product
    plain = re.sub(r"(?<=\d)(\\[,!;: ]|\{,\}|~)(?=\d{3}(?!\d))", "", answer)
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    boxed = f"\\boxed{{{plain}}}"
    return parse(boxed, config, fallback_mode="no_fallback", parsing_timeout=None)


def close(gold: Any, given: Any) -> bool:
    """Whether numbers that were called equal are so relative to their size; in pairs, sets and
    intervals too. What holds no numbers is left to math-verify."""
    import sympy

    gold, given = right_side(gold), right_side(given)
    if gold == given:
        return True
    if getattr(gold, "is_number", False) and getattr(given, "is_number", False):
        one, two = (complex(sympy.N(x.doit(), 30)) for x in (gold, given))
        return abs(one - two) <= TOLERANCE * max(abs(one), abs(two))
    ours, theirs = members(gold), members(given)
    if len(ours) != len(theirs) or not all(
        getattr(x, "is_number", False) for x in (*ours, *theirs)
    ):
        return True
    return all(close(*pair) for pair in zip(ours, theirs, strict=True))


def members(expression: Any) -> list[Any]:
    """What is in a pair, the ends of an interval, a set's elements by size; nothing of others."""
    import sympy

    if isinstance(expression, sympy.Interval):
        return [expression.start, expression.end]
    if isinstance(expression, sympy.FiniteSet):
        numbers = all(getattr(x, "is_number", False) for x in expression.args)
        return sorted(expression.args, key=size) if numbers else []
    return list(expression.args) if isinstance(expression, sympy.Tuple) else []


def size(number: Any) -> tuple[float, float]:
    value = complex(number)
    return value.real, value.imag


def right_side(expression: Any) -> Any:
    """5 of x = 5."""
    import sympy

    return expression.rhs if isinstance(expression, sympy.Eq) else expression


def canonical(expression: Any) -> str:
    """Text that is equal for equal numbers; of anything else, the expression simplified."""
    import sympy

    expression = right_side(expression)
    if getattr(expression, "is_number", False):
        value = sympy.nsimplify(expression.doit(), rational=True)
        if value.is_Rational:
            return str(value)
        return str(sympy.N(sympy.N(value, 40, chop=True), 20))
    if isinstance(expression, sympy.Tuple | sympy.FiniteSet):
        parts = [canonical(part) for part in expression.args]
        ordered = sorted(parts) if isinstance(expression, sympy.FiniteSet) else parts
        return f"{type(expression).__name__}({', '.join(ordered)})"
    if isinstance(expression, sympy.Interval):
        ends = f"{canonical(expression.start)}, {canonical(expression.end)}"
        return f"Interval({ends}, {expression.left_open}, {expression.right_open})"
    try:
        return str(sympy.expand(sympy.cancel(expression.doit())))
    except Exception:  # what it cannot simplify keeps its spelling
        return str(expression)


if __name__ == "__main__":
    main()
