"""Write one prompt file for verl in which the tasks alternate, one batch each in turn.

    python examples/verl/alternate.py --batch 16 --steps 400 --out train.parquet math.parquet ...

verl 0.9.1 has no sampler for tasks, but with data.shuffle=False it reads a file in order, one batch
per step. Each input file holds one task, named in its data_source column, by which verl selects the
teacher. A task whose prompts are used up starts again from its first prompt.
"""

import argparse
from pathlib import Path

import pandas as pd


def alternate(tables: list[pd.DataFrame], batch: int, steps: int) -> pd.DataFrame:
    """Return batches of the tables in turn, as one table.

    Args:
        tables: Prompts of each task, with the column data_source.
        batch: Number of rows per batch.
        steps: Number of batches.

    Returns:
        `steps` x `batch` rows.

    Raises:
        ValueError: A table has no rows or several values of data_source, or two tables have the
            same value.
    """
    sources = [sorted(set(table["data_source"])) for table in tables]
    if any(len(x) != 1 for x in sources) or len({x[0] for x in sources}) < len(sources):
        raise ValueError(f"each file must hold one data_source of its own, but they hold {sources}")
    parts = []
    for step in range(steps):
        table, round_number = tables[step % len(tables)], step // len(tables)
        rows = [(round_number * batch + i) % len(table) for i in range(batch)]
        parts.append(table.iloc[rows])
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, required=True, help="prompts per step")
    parser.add_argument("--steps", type=int, required=True, help="number of batches")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tables = [pd.read_parquet(file) for file in args.files]
    alternate(tables, args.batch, args.steps).to_parquet(args.out)


if __name__ == "__main__":
    main()
