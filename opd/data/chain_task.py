"""The chain task, generated on the fly: iterate x <- last digit of a x + b, where b rises by one.

The prompt "4:7*3+8" asks for four steps from x = 7 with a = 3 and b = 8; its worked answer is
"<think>4:7*3=21+8=29 3:9*3=27+9=36 2:6*3=18+0=18 1:8*3=24+1=25</think>5". Every line depends on the
previous one, so a wrong digit corrupts the rest: solutions are long enough to drift and are graded
exactly.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from diagnostics.errors import InvalidInput

STEPS, STATES, FACTORS, OFFSETS = range(4, 11), range(10), range(2, 10), range(10)


@dataclass(frozen=True)
class Problem:
    """A prompt and its reference answer."""

    prompt: str
    answer: str
    solution: str = ""
    """Worked solution, where one is known."""


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """Return `count` distinct problems of STEPS steps, deterministic in (split, count, seed).

    "train" and "test" share no prompt; they do share single lines, of which there are only 800.

    Args:
        split: "train" or "test".
        count: Number of problems.
        seed: Seed of the sample.

    Returns:
        The problems.

    Raises:
        InvalidInput: An unknown split, or more problems than the split has.
    """
    if split not in ("train", "test"):
        raise InvalidInput(f'split is {split!r}; it must be "train" or "test"')
    pool = all_problems(split)
    if count > len(pool):
        raise InvalidInput(
            f"{count} problems requested, the {split} split has {len(pool)}; request fewer"
        )
    return random.Random(f"{split}-{seed}").sample(pool, count)


@cache
def all_problems(split: str) -> list[Problem]:
    """Return all problems of a split."""
    return [Problem(p, *solve(p)) for p in all_prompts() if assign_split(p) == split]


def all_prompts(steps: Iterable[int] = STEPS) -> list[str]:
    """Return the prompts of all problems with these numbers of steps, 800 of each."""
    numbers = itertools.product(steps, STATES, FACTORS, OFFSETS)
    return ["{}:{}*{}+{}".format(*values) for values in numbers]


def solve(prompt: str, next_error: Callable[[], int] = lambda: 0) -> tuple[str, str]:
    """Solve a problem, optionally with errors.

    Args:
        prompt: The prompt, such as "4:7*3+8".
        next_error: Called once per intermediate result; returns the offset added to its last digit
            (0: correct).

    Returns:
        The answer and the worked solution.
    """
    steps, x, a, b = map(int, re.split(r"\D", prompt))
    lines = []
    for steps_left in range(steps, 0, -1):
        product = shift_last_digit(x * a, next_error())
        total = shift_last_digit(product + b, next_error())
        lines.append(f"{steps_left}:{x}*{a}={product}+{b}={total}")
        x, b = total % 10, (b + 1) % 10
    return str(x), f"<think>{' '.join(lines)}</think>{x}"


def shift_last_digit(value: int, offset: int) -> int:
    """Return the number with `offset` added to its last digit, modulo 10."""
    return value - value % 10 + (value + offset) % 10


def corrupted_solution(prompt: str, rate: float, generator: random.Random) -> str:
    """Return a worked solution in which each intermediate result is wrong with probability `rate`.

    Errors propagate: later steps use the wrong result.

    Args:
        prompt: The prompt.
        rate: Error rate per intermediate result.
        generator: Source of randomness.

    Returns:
        The worked solution.
    """
    return solve(prompt, lambda: generator.randint(1, 9) if generator.random() < rate else 0)[1]


def assign_split(prompt: str) -> str:
    """Assign one prompt in eight to the test split, by the hash of its text."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < 32 else "train"


def grade(response: str, answer: str) -> float:
    """Return 1 if exactly the answer follows the only closing think tag, else 0."""
    parts = response.split("</think>")
    return float(len(parts) == 2 and parts[1].strip() == answer)
