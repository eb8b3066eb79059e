"""Problems of a pair and their files: splits that depend on the seed, and another task.

The test and the validation split have an eighth of the problems each. Pairs of other seeds split
the problems in other ways, so that results of pairs are independent.
"""

import hashlib
import random
from pathlib import Path

from opd.data import chain_task, sort_task
from opd.data.chain_task import Problem
from opd.lab.knobs import PairKnobs
from opd.lab.pair_lengths import step_range
from opd.lab.problem_files import problem_columns, write_rows

SORT_LENGTHS = range(3, 6)
"""Numbers of digits of the sorting problems."""
EIGHTH = 32
"""An eighth of the values of a byte."""


def split_prompts(knobs: PairKnobs, seed: int) -> dict[str, list[str]]:
    """Return the prompts of each split, in an order that the seed decides.

    Args:
        knobs: Knobs of the pair.
        seed: Seed of the pair.

    Returns:
        Prompts by split: "train", "validation", "test".
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    prompts = chain_task.all_prompts(step_range(knobs.response_tokens))
    for prompt in random.Random(f"pair problems {seed}").sample(prompts, len(prompts)):
        byte = hashlib.sha256(f"{seed} {prompt}".encode()).digest()[0]
        name = "test" if byte < EIGHTH else "validation" if byte < 2 * EIGHTH else "train"
        splits[name].append(prompt)
    return splits


def write_problem_files(
    folder: Path, knobs: PairKnobs, seed: int, num_training: int, num_held_out: int
) -> None:
    """Write train, validation, test and other_task.jsonl; the first without responses yet.

    Settings are chosen on validation.jsonl and reported on test.jsonl. The other task is sorting,
    which both models know.

    Args:
        folder: Folder of the pair.
        knobs: Knobs of the pair.
        seed: Seed of the pair.
        num_training: Largest number of training problems.
        num_held_out: Largest number of problems of each other file.
    """
    for name, prompts in split_prompts(knobs, seed).items():
        count = num_training if name == "train" else num_held_out
        problems = [Problem(prompt, *chain_task.solve(prompt)) for prompt in prompts[:count]]
        write_rows(folder / f"{name}.jsonl", map(problem_columns, problems))
    sort_problems = sort_task.problems("test", num_held_out, seed, SORT_LENGTHS)
    write_rows(folder / "other_task.jsonl", map(problem_columns, sort_problems))
