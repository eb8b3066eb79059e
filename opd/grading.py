"""Graders: the answer that a response gives, and whether it is the right one.

A grader takes a response and the answer to compare with, and never fails on a strange response:
one that holds no readable answer is worth 0 and says so (`Verdict.answer` is None).
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from diagnostics.errors import InvalidInput, MissingPackage, OperationFailed
from opd import problems

JUDGE_SECONDS = 5.0
LONGEST_ANSWER = 500
GYM_PROBLEM = re.compile(r" \[(\w+):(\d+):(\d+)#(\d+)\]$")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Verdict:
    """reward: 1 for the right answer, else 0. answer: what it votes for, or None if unreadable.

    Responses with equal `answer` say the same and have the same reward.
    """

    reward: float
    answer: str | None


Grader = Callable[[str, str], Verdict]


def grade_lab(response: str, answer: str) -> Verdict:
    """Of the lab task: exactly the answer after the one closing think tag."""
    parts = response.split("</think>")
    given = parts[1].strip() if len(parts) == 2 else ""
    return Verdict(problems.grade(response, answer), given or None)


def grade_exact(response: str, answer: str) -> Verdict:
    """What follows the last closing think tag is the answer, white space at its ends aside."""
    given = response.rsplit("</think>", 1)[-1].strip()
    return Verdict(float(given == answer.strip()), given or None)


def grade_numeric(response: str, answer: str) -> Verdict:
    """The last number after the last closing think tag equals the answer, as exact fractions.

    A number may have a sign, thousands separators, decimals or a denominator: "-1,234.50", "3/4".
    With a box in the text, the last box is read instead of all of it.

    Raises:
      ValueError: the answer to compare with is not one number.
    """
    wanted = answer.strip()
    if not NUMBER.fullmatch(wanted) or (want := number(wanted)) is None:
        raise InvalidInput(
            f"the answer {answer!r} is not a number; use the grader exact or math for this task"
        )
    text = response.rsplit("</think>", 1)[-1]
    boxed = last_box(text)
    found = NUMBER.findall(text if boxed is None else boxed)
    given = number(found[-1]) if found else None
    return Verdict(float(given == want), None if given is None else str(given))


def number(text: str) -> Fraction | None:
    """The exact value of a match of NUMBER; None for a denominator of 0 or absurd length."""
    if len(text) > LONGEST_ANSWER:
        return None
    above, _, below = text.replace(",", "").partition("/")
    if below and int(below) == 0:
        return None
    return Fraction(above) / int(below or 1)


def grade_math(response: str, answer: str) -> Verdict:
    """The last \\boxed{...} equals the answer as mathematics, by math-verify.

    As the paper's verifier does, a response with a closing think tag is read from its first to its
    second one, any other as a whole; an answer without a box counts as unreadable. Equal means
    equal values (1/2 and 0.5), sets, intervals, expressions after simplification; units and
    degree signs are dropped; 50\\% equals both 50 and 0.5. The answer to compare with may be boxed
    or between dollars. Each comparison runs in a process of its own (opd.judge) that is ended
    after JUDGE_SECONDS; the answer is unreadable then. Safe to call from any thread.

    Raises:
      ImportError: math-verify is not installed; names the extra.
    """
    parts = response.split("</think>")
    boxed = last_box(parts[min(1, len(parts) - 1)])
    if boxed is None or not boxed.strip() or len(boxed) > LONGEST_ANSWER:
        return Verdict(0.0, None)
    gold = last_box(answer)
    return judged(boxed.strip(), (answer if gold is None else gold).strip().strip("$").strip())


def last_box(text: str) -> str | None:
    """Content of the last \\boxed{...} whose braces close; None if there is none.

    Braces nest; an escaped one, as in \\{1, 2\\}, counts with its partner.
    """
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i]
    return None


@lru_cache(maxsize=1 << 14)
def judged(given: str, gold: str) -> Verdict:
    """The verdict of this process's one judge; the same text is right in any case."""
    found = judge()(gold, given)
    if found is None:
        return Verdict(float(given == gold), given if given == gold else None)
    if not found["gold"]:
        warnings.warn(
            f"the answer {gold!r} cannot be read as mathematics; only the same text counts as "
            "right (the grader exact suits answers in words)",
            stacklevel=2,
        )
    if found["key"] is None:
        return Verdict(float(given == gold), given if given == gold else None)
    return Verdict(float(found["equal"] or given == gold), found["key"])


class Judge:
    """A process of `opd.judge`, started when first needed and again after each that died."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, gold: str, given: str) -> dict[str, Any] | None:
        """What `opd.judge.compare` says; None if the process ended over it."""
        with self.lock:
            process = self.process or self.start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps({"gold": gold, "given": given}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                process.communicate()  # closes the pipes
                self.process = None
                return None
            return json.loads(line)

    def start(self) -> "subprocess.Popen[str]":
        require_math_verify()
        line = [sys.executable, "-m", "opd.judge", str(self.seconds)]
        with tempfile.TemporaryFile("w+") as complaints:  # a pipe nobody reads may fill and block
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True
            )
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                complaints.seek(0)
                raise OperationFailed(
                    f"math-verify did not start: {complaints.read().strip()[-500:]}"
                )
        self.process = process
        return process


def require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise MissingPackage("the grader math needs math-verify: pip install 'opdlab[math]'")


@cache
def judge() -> Judge:
    return Judge(JUDGE_SECONDS)


def grade_gym(response: str, answer: str) -> Verdict:
    """Of reasoning-gym: the task's own judgement of the last box, or else of what follows the last
    closing think tag. What it gives less than full marks for is wrong.

    Raises:
      ValueError: an answer that does not say of which problem it is (opd.named.gym_rows).
    """
    text = response.rsplit("</think>", 1)[-1]
    boxed = last_box(text)
    given = (text if boxed is None else boxed).strip()
    problem = GYM_PROBLEM.search(answer)
    if problem is None:
        raise InvalidInput(
            f"the answer {answer!r} does not end in [TASK:SIZE:SEED#NUMBER]; the grader gym is for "
            "problems of gym:TASK alone"
        )
    task, size, seed, number = problem.groups()
    made = gym_made(task, int(size), int(seed))
    if not given or len(given) > LONGEST_ANSWER:
        return Verdict(0.0, None)
    score = made.score_answer(given, made[int(number)])
    return Verdict(float(score >= 1.0), given)


@lru_cache(maxsize=32)
def gym_made(task: str, size: int, seed: int) -> Any:
    from opd.named import gym_task

    return gym_task(task, size, seed)


GRADERS: Mapping[str, Grader] = {
    "exact": grade_exact,
    "numeric": grade_numeric,
    "math": grade_math,
    "gym": grade_gym,
    "lab": grade_lab,
}


def make_grader(name: str) -> Grader:
    """The grader of that name.

    Raises:
      ValueError: unknown name; lists the known ones. ImportError: math-verify is not installed.
    """
    if name not in GRADERS:
        raise InvalidInput(f"unknown grader {name!r}; known: {', '.join(GRADERS)}")
    if name == "math":  # before hours of work, not at the first response
        require_math_verify()
    return GRADERS[name]
