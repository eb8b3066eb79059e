"""A second task made on the spot: sort digits by insertion, one at a time.

The prompt "sort 7294" has the worked answer "<think>7 27 279 2479</think>2479": the sorted prefix
after each digit. Every entry is the one before with a digit put in, so that a slip stays.
"""

import random

from diagnostics.errors import InvalidInput
from opd.data.chain_task import Problem, split_of

LENGTHS = range(4, 9)


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` different problems, the same for the same (split, count, seed).

    "train" and "test" share no prompt; they are told apart by the prompt's own hash.

    Raises:
      ValueError: another split.
    """
    if split not in ("train", "test"):
        raise InvalidInput(f'split is {split!r}; it must be "train" or "test"')
    generator = random.Random(f"sort-{split}-{seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        digits = "".join(generator.choices("0123456789", k=generator.choice(LENGTHS)))
        prompt = f"sort {digits}"
        if split_of(prompt) == split:
            found[prompt] = Problem(prompt, "".join(sorted(digits)), careless(prompt, 0, generator))
    return list(found.values())


def careless(prompt: str, rate: float, generator: random.Random) -> str:
    """A solution by somebody who puts each digit in a wrong place with probability `rate`."""
    entries = [""]
    for digit in prompt.removeprefix("sort "):
        done = entries[-1]
        place = next((i for i, other in enumerate(done) if other > digit), len(done))
        if generator.random() < rate:
            place = generator.randint(0, len(done))
        entries.append(done[:place] + digit + done[place:])
    return f"<think>{' '.join(entries[1:])}</think>{entries[-1]}"
