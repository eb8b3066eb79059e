"""A verifiable task made on the spot: chains of single-digit sums with a running total.

"3+8-5" is answered by "<think>3+8=11 11-5=6</think>6": long enough to drift, exact to grade.
"""

import hashlib
import random
from dataclasses import dataclass

SHORTEST, LONGEST = 6, 12


@dataclass(frozen=True)
class Problem:
    """A prompt, the answer to compare with, and a worked solution where one is known."""

    prompt: str
    answer: str
    solution: str = ""


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` problems, the same for the same (split, count, seed).

    "train" and "test" are disjoint for all seeds: a problem's own hash decides where it belongs.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split is {split!r}; it must be "train" or "test"')
    generator = random.Random(f"{split}-{seed}")
    found: list[Problem] = []
    while len(found) < count:
        problem = chain(generator)
        if split_of(problem.prompt) == split:
            found.append(problem)
    return found


def chain(generator: random.Random) -> Problem:
    """One chain of additions and subtractions whose running total never is negative."""
    total = generator.randint(1, 9)
    prompt, steps = str(total), []
    for _ in range(generator.randint(SHORTEST, LONGEST) - 1):
        digit = generator.randint(1, 9)
        sign = "-" if digit <= total and generator.random() < 0.5 else "+"
        after = total + digit if sign == "+" else total - digit
        prompt += f"{sign}{digit}"
        steps.append(f"{total}{sign}{digit}={after}")
        total = after
    solution = f"<think>{' '.join(steps)}</think>{total}"
    return Problem(prompt=prompt, answer=str(total), solution=solution)


def split_of(prompt: str) -> str:
    """One problem in sixteen is held out."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < 16 else "train"


def grade(response: str, answer: str) -> float:
    """1 if exactly the answer follows the one closing think tag, else 0; any text is accepted."""
    parts = response.split("</think>")
    return float(len(parts) == 2 and parts[1].strip() == answer)
