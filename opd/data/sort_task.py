"""The sorting task, generated on the fly: insertion sort of digits.

The prompt "sort 7294" has the worked answer "<think>7 27 279 2479</think>2479": the sorted prefix
after each digit. Every entry is the previous one with one digit inserted, so an error persists.
"""

import random
from collections.abc import Sequence

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem, assign_split

LENGTHS = range(4, 9)


def problems(split: str, count: int, seed: int, lengths: Sequence[int] = LENGTHS) -> list[Problem]:
    """Return `count` distinct problems, deterministic in (split, count, seed).

    "train" and "test" share no prompt; the hash of the prompt decides the split.

    Args:
        split: "train" or "test".
        count: Number of problems.
        seed: Seed of the sample.
        lengths: Numbers of digits, equally likely.

    Returns:
        The problems.

    Raises:
        InvalidInput: An unknown split.
    """
    if split not in ("train", "test"):
        raise InvalidInput(f'split is {split!r}; it must be "train" or "test"')
    generator = random.Random(f"sort-{split}-{seed}")
    problems_by_prompt: dict[str, Problem] = {}
    while len(problems_by_prompt) < count:
        digits = "".join(generator.choices("0123456789", k=generator.choice(lengths)))
        prompt = f"sort {digits}"
        if assign_split(prompt) == split:
            problems_by_prompt[prompt] = Problem(
                prompt, "".join(sorted(digits)), corrupted_solution(prompt, 0, generator)
            )
    return list(problems_by_prompt.values())


def corrupted_solution(prompt: str, rate: float, generator: random.Random) -> str:
    """Return a worked solution in which digits are inserted at random positions at a rate.

    Args:
        prompt: The prompt.
        rate: Probability that a digit is inserted at a random position.
        generator: Source of randomness.

    Returns:
        The worked solution.
    """
    entries = [""]
    for digit in prompt.removeprefix("sort "):
        sorted_digits = entries[-1]
        position = next(
            (i for i, sorted_digit in enumerate(sorted_digits) if sorted_digit > digit),
            len(sorted_digits),
        )
        if generator.random() < rate:
            position = generator.randint(0, len(sorted_digits))
        entries.append(sorted_digits[:position] + digit + sorted_digits[position:])
    return f"<think>{' '.join(entries[1:])}</think>{entries[-1]}"
