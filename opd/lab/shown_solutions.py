"""Arithmetic problems whose message may show a worked solution: of the problem, or of another one.

Iterate x <- last digit of x a + b, where a alternates between two factors and b rises by one. The
problem "7*34+8" starts from x = 7 with the factors 3 and 4 and b = 8; its worked answer is
"<think>7*3=21+8=29 9*4=36+9=45 5*3=15+0=15</think>5". All worked solutions have the same length, so
that a small model soon learns to copy a digit that is shown.

A message is the problem alone, or the problem, SEPARATOR and a worked solution, which may be empty:
"7*34+8 | 7*3=21+8=29 9*4=36+9=45 5*3=15+0=15". Demonstrations follow a solution of the same problem
exactly; without one, or with that of another problem, they have the errors of their author. A model
that learns from them solves problems alone, and better with the right solution in view.
"""

import itertools
import random
import re
from collections.abc import Callable
from functools import cache

from diagnostics.errors import InvalidInput
from opd.data.chain_task import FACTORS, OFFSETS, STATES, Problem, assign_split, shift_last_digit

NUM_LINES = 3
SEPARATOR = " | "
TEMPLATE = "{{ prompt }} | {{ solution }}"
"""Message of a teacher that reads the solution."""
PLAIN, EMPTY, SOLUTION, ANOTHER = "plain", "empty", "solution", "another"
MESSAGE_WEIGHTS = {PLAIN: 0.3, EMPTY: 0.1, SOLUTION: 0.4, ANOTHER: 0.2}
"""Probability of each kind of message in the training data of a toy model."""


@cache
def plain_problems(split: str) -> list[Problem]:
    """Return all problems of a split; `solution` has the worked lines without tags and answer.

    Args:
        split: "train" or "test"; the hash of the problem decides.

    Returns:
        The problems, in a fixed order.

    Raises:
        InvalidInput: An unknown split.
    """
    if split not in ("train", "test"):
        raise InvalidInput(f'split is {split!r}; it must be "train" or "test"')
    numbers = itertools.product(STATES, FACTORS, FACTORS, OFFSETS)
    prompts = ("{}*{}{}+{}".format(*values) for values in numbers)
    return [
        Problem(prompt, str(x), lines)
        for prompt in prompts
        if assign_split(prompt) == split
        for x, lines in [solve(prompt)]
    ]


def solve(prompt: str, next_error: Callable[[], int] = lambda: 0) -> tuple[int, str]:
    """Solve a problem, optionally with errors.

    Args:
        prompt: The problem, such as "7*34+8".
        next_error: Called once per intermediate result; returns the offset added to its last digit
            (0: correct).

    Returns:
        The answer and the worked lines.
    """
    x, first, second, b = map(int, re.findall(r"\d", prompt))
    lines = []
    for a in itertools.islice(itertools.cycle((first, second)), NUM_LINES):
        product = shift_last_digit(x * a, next_error())
        total = shift_last_digit(product + b, next_error())
        lines.append(f"{x}*{a}={product:02}+{b}={total:02}")
        x, b = total % 10, (b + 1) % 10
    return x, " ".join(lines)


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """Return `count` messages with distinct problems, deterministic in (split, count, seed).

    Args:
        split: "train" or "test".
        count: Number of problems.
        seed: Seed of the sample.

    Returns:
        Problems whose prompts are messages, of the kinds and with the probabilities of
        MESSAGE_WEIGHTS.

    Raises:
        InvalidInput: An unknown split, or more problems than the split has.
    """
    pool = plain_problems(split)
    if count > len(pool):
        raise InvalidInput(
            f"{count} problems requested, the {split} split has {len(pool)}; request fewer"
        )
    generator = random.Random(f"shown-{split}-{seed}")
    kinds = generator.choices(list(MESSAGE_WEIGHTS), list(MESSAGE_WEIGHTS.values()), k=count)
    return [
        Problem(message(problem, kind, pool, generator), problem.answer, problem.solution)
        for problem, kind in zip(generator.sample(pool, count), kinds, strict=True)
    ]


def message(problem: Problem, kind: str, pool: list[Problem], generator: random.Random) -> str:
    """Return the message of a problem.

    Args:
        problem: The problem.
        kind: One of MESSAGE_WEIGHTS.
        pool: Problems of which ANOTHER shows a solution.
        generator: Source of randomness.

    Returns:
        The text of the user's message.
    """
    if kind == PLAIN:
        return problem.prompt
    shown = {EMPTY: "", SOLUTION: problem.solution}.get(kind)
    if shown is None:
        shown = another_problem(problem, pool, generator).solution
    return problem.prompt + SEPARATOR + shown


def another_problem(problem: Problem, pool: list[Problem], generator: random.Random) -> Problem:
    """Draw a problem of the pool with another prompt."""
    while (candidate := generator.choice(pool)).prompt == problem.prompt:
        pass
    return candidate


def corrupted_solution(prompt: str, rate: float, generator: random.Random) -> str:
    """Return a worked answer with errors, or without any if the message shows the right one.

    Errors propagate: later lines use the wrong result.

    Args:
        prompt: A message.
        rate: Error rate per intermediate result, where the solution of the problem is not shown.
        generator: Source of randomness.

    Returns:
        The worked answer, with tags.
    """
    problem, _, shown = prompt.partition(SEPARATOR)
    if shown == solve(problem)[1]:
        rate = 0.0
    x, lines = solve(problem, lambda: generator.randint(1, 9) if generator.random() < rate else 0)
    return f"<think>{lines}</think>{x}"
