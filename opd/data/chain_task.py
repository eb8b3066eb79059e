"""A verifiable task made on the spot: iterate x <- last digit of a x + b, where b rises by one.

The prompt "4:7*3+8" asks for four steps from x = 7 with a = 3 and b = 8; its worked answer is
"<think>4:7*3=21+8=29 3:9*3=27+9=36 2:6*3=18+0=18 1:8*3=24+1=25</think>5". Every line follows from
the one before, so a wrong digit spoils all that comes after: long enough to drift, exact to grade.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from diagnostics.errors import InvalidInput

STEPS, STATES, FACTORS, OFFSETS = range(4, 11), range(10), range(2, 10), range(10)


@dataclass(frozen=True)
class Problem:
    """A prompt, the answer to compare with, and a worked solution where one is known."""

    prompt: str
    answer: str
    solution: str = ""


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` different problems, the same for the same (split, count, seed).

    "train" and "test" share no prompt; they do share lines, of which there are only 800 bodies.

    Raises:
      ValueError: another split, or more problems than it has.
    """
    if split not in ("train", "test"):
        raise InvalidInput(f'split is {split!r}; it must be "train" or "test"')
    pool = every(split)
    if count > len(pool):
        raise InvalidInput(f"{count} problems wanted, the {split} split has {len(pool)}")
    return random.Random(f"{split}-{seed}").sample(pool, count)


@cache
def every(split: str) -> list[Problem]:
    """All problems of a split."""
    numbers = itertools.product(STEPS, STATES, FACTORS, OFFSETS)
    prompts = ("{}:{}*{}+{}".format(*some) for some in numbers)
    return [Problem(p, *solve(p)) for p in prompts if split_of(p) == split]


def solve(prompt: str, slip: Callable[[], int] = lambda: 0) -> tuple[str, str]:
    """(answer, worked solution); `slip` says how far the last digit of each result is off."""
    steps, x, a, b = map(int, re.split(r"\D", prompt))
    lines = []
    for left in range(steps, 0, -1):
        product = shifted(x * a, slip())
        total = shifted(product + b, slip())
        lines.append(f"{left}:{x}*{a}={product}+{b}={total}")
        x, b = total % 10, (b + 1) % 10
    return str(x), f"<think>{' '.join(lines)}</think>{x}"


def shifted(value: int, by: int) -> int:
    """The number with its last digit moved round by `by`."""
    return value - value % 10 + (value + by) % 10


def careless(prompt: str, rate: float, generator: random.Random) -> str:
    """A solution by somebody who gets each result wrong with probability `rate`, and goes on."""
    return solve(prompt, lambda: generator.randint(1, 9) if generator.random() < rate else 0)[1]


def split_of(prompt: str) -> str:
    """One problem in eight is held out, by its own hash."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < 32 else "train"


def grade(response: str, answer: str) -> float:
    """1 if exactly the answer follows the one closing think tag, else 0; any text is accepted."""
    parts = response.split("</think>")
    return float(len(parts) == 2 and parts[1].strip() == answer)
