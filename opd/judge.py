"""A process that compares answers with math-verify: one JSON object a line in, one out.

Run by opd.grading as `python -m opd.judge SECONDS`. Computer algebra can hang or eat all memory in
compiled code that no Python exception reaches (9^{9^{9^9}}), so each comparison has an alarm that
ends this process, and the process a limit on its memory. Imports nothing of ours.
"""

import json
import logging
import re
import resource
import signal
import sys
from typing import Any

MEMORY = 4 << 30


def main() -> None:
    """Answer requests {"gold", "given"} until the input ends."""
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends us, in compiled code too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for our owner
    logging.disable(logging.CRITICAL)
    compare("1", "1")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            answer = compare(request["gold"], request["given"])
        except (Exception, RecursionError, MemoryError):
            answer = {"gold": True, "key": None, "equal": False}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


def compare(gold: str, given: str) -> dict[str, Any]:
    """Whether both could be read (`gold`, `key` not None) and are `equal`.

    key: a canonical spelling of the given answer; numbers are written as exact rationals, so that
    0.5, 1/2 and \\frac{2}{4} have one key. A percentage, which equals two numbers, has its own.
    Words are compared as text: as mathematics, "live" is a product of letters and equals "evil".
    """
    from math_verify import verify

    if (word := spoken(gold)) is not None:
        key = spoken(given) or given
        return {"gold": True, "key": key, "equal": key == word}
    want, found = parsed(gold), parsed(given)
    if not found:
        return {"gold": bool(want), "key": None, "equal": False}
    equal = bool(want) and verify(want, found, timeout_seconds=None)
    key = canonical(found[0]) + ("%" if "%" in given else "")
    return {"gold": bool(want), "key": key, "equal": bool(equal)}


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


def canonical(expression: Any) -> str:
    """Text that is equal for equal numbers; of anything else, the expression as parsed."""
    import sympy

    if getattr(expression, "is_number", False):
        return str(sympy.nsimplify(expression.doit(), rational=True))
    return str(expression)


if __name__ == "__main__":
    main()
