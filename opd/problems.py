"""A verifiable task made on the spot: iterate x <- last digit of a x + b, where b rises by one.

The prompt "4:7*3+8" asks for four steps from x = 7 with a = 3 and b = 8; its worked answer is
"<think>4:7*3=21+8=29 3:9*3=27+9=36 2:6*3=18+0=18 1:8*3=24+1=25</think>5". Every line follows from
the one before, so a wrong digit spoils all that comes after: long enough to drift, exact to grade.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass
from functools import cache

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
        raise ValueError(f'split is {split!r}; it must be "train" or "test"')
    pool = every(split)
    if count > len(pool):
        raise ValueError(f"{count} problems wanted, the {split} split has {len(pool)}")
    return random.Random(f"{split}-{seed}").sample(pool, count)


@cache
def every(split: str) -> list[Problem]:
    """All problems of a split."""
    found = itertools.starmap(iteration, itertools.product(STEPS, STATES, FACTORS, OFFSETS))
    return [problem for problem in found if split_of(problem.prompt) == split]


def iteration(steps: int, x: int, a: int, b: int) -> Problem:
    """The problem that starts at x, worked out."""
    prompt, lines = f"{steps}:{x}*{a}+{b}", []
    for left in range(steps, 0, -1):
        product = x * a
        lines.append(f"{left}:{x}*{a}={product}+{b}={product + b}")
        x, b = (product + b) % 10, (b + 1) % 10
    return Problem(prompt, str(x), f"<think>{' '.join(lines)}</think>{x}")


def split_of(prompt: str) -> str:
    """One problem in eight is held out, by its own hash."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < 32 else "train"


def grade(response: str, answer: str) -> float:
    """1 if exactly the answer follows the one closing think tag, else 0; any text is accepted."""
    parts = response.split("</think>")
    return float(len(parts) == 2 and parts[1].strip() == answer)
