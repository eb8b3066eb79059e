"""Alternate tasks in one file of prompts for verl, a batch of each in turn.

    python examples/verl/alternate.py --batch 16 --steps 400 --out train.parquet math.parquet ...

verl 0.9.1 has no sampler of tasks, but reads a file in order (data.shuffle=False), a batch a step.
Each file is one task and must say so in its data_source column, by which verl finds the teacher. A
task that runs out starts anew.
"""

import argparse
from pathlib import Path

import pandas as pd


def alternated(tables: list[pd.DataFrame], batch: int, steps: int) -> pd.DataFrame:
    """`steps` batches of `batch` rows, of the tables in turn.

    Raises:
      ValueError: a table without rows or with several values of data_source, or two with the same.
    """
    tasks = [sorted(set(table["data_source"])) for table in tables]
    if any(len(task) != 1 for task in tasks) or len({task[0] for task in tasks}) < len(tasks):
        raise ValueError(f"each file must hold one data_source of its own; found {tasks}")
    parts = []
    for step in range(steps):
        table, round_number = tables[step % len(tables)], step // len(tables)
        rows = [(round_number * batch + i) % len(table) for i in range(batch)]
        parts.append(table.iloc[rows])
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, required=True, help="prompts of a step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    tables = [pd.read_parquet(file) for file in words.files]
    alternated(tables, words.batch, words.steps).to_parquet(words.out)


if __name__ == "__main__":
    main()
