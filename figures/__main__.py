"""`opd figures`: draw figures from recorded tables, in seconds and without torch.

A figure NAME is the module figures/NAME.py with `COLUMNS`, what it reads, and `draw(table)`. Its
table is figures/data/NAME.csv unless --table or --run names another.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).resolve().parent
DATA = FOLDER / "data"
NOT_FIGURES = ("__init__", "__main__", "collect", "style", "tables")


def figures() -> list[str]:
    """Names of the figures: the modules of this folder that draw."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in NOT_FIGURES)


def made_by(name: str) -> str:
    """The command that makes a figure's table."""
    if name == "training":
        return "opd figures training --run DIR [DIR ...] --update-data"
    return f"opd study run {name} --update-figures"


def main(argv: list[str]) -> None:
    """`opd figures [NAME|all] [--run DIR ...] [--table CSV] [--out DIR]`."""
    parser = argparse.ArgumentParser(prog="opd figures", description=__doc__)
    parser.add_argument("name", nargs="?", default="all", help=f"{', '.join(figures())}, or all")
    parser.add_argument("--table", type=Path, help="draw this table instead of the recorded one")
    parser.add_argument("--run", type=Path, nargs="+", help="draw these run folders (training)")
    parser.add_argument("--out", type=Path, default=Path("results/figures"))
    parser.add_argument(
        "--update-data", action="store_true", help="also record the runs' table in figures/data"
    )
    given = parser.parse_args(argv)
    names = figures() if given.name == "all" else [given.name]
    if given.table and len(names) > 1:
        raise ValueError(f"--table {given.table} needs the name of its figure: {', '.join(names)}")
    if given.run and names != ["training"]:
        raise ValueError("--run is for `opd figures training`")
    if given.update_data and not given.run:
        raise ValueError("--update-data records the table of --run, and no run is given")
    for name in names:
        if given.run:
            from figures.collect import training_table

            table = training_table(given.run)
        else:
            table = read(name, given.table or DATA / f"{name}.csv")
        for path in render(name, table, given.out):
            print(path)
        if given.update_data:
            record(name, table, given.run)


def read(name: str, path: Path) -> "pd.DataFrame":
    """The table of a figure.

    Raises:
      FileNotFoundError: no such table; says what makes it.
      ValueError: a figure or a column that does not exist.
    """
    import pandas as pd

    if name not in figures():
        raise ValueError(f"unknown figure {name!r}; known: {', '.join(figures())}, all")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; make it with `{made_by(name)}`")
    table = pd.read_csv(path, dtype={"outcomes": str})
    lacking = [c for c in import_module(f"figures.{name}").COLUMNS if c not in table]
    if lacking:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}")
    return table


def render(name: str, table: "pd.DataFrame", out: Path) -> list[Path]:
    """Draw one figure and write its files."""
    from figures import style

    with style.look():
        return style.save(import_module(f"figures.{name}").draw(table), out, name)


def record(name: str, table: "pd.DataFrame", runs: list[Path]) -> None:
    """Keep a table of runs in figures/data, with what made it."""
    table.to_csv(DATA / f"{name}.csv", index=False)
    about = {
        "command": made_by(name),
        "configs": {run.name: json.loads((run / "config.json").read_text()) for run in runs},
        "code": {run.name: (run / "code.txt").read_text().splitlines()[0] for run in runs},
        "commit": commit(),
        "table": hashlib.sha256((DATA / f"{name}.csv").read_bytes()).hexdigest()[:16],
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "pandas")},
    }
    (DATA / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(DATA / f"{name}.csv")


def commit() -> str:
    """The checkout's commit, or "unknown" for an installed package."""
    words = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(words, cwd=DATA.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(sys.argv[1:])
