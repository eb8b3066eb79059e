"""`opd figures`: draw figures from recorded tables, in seconds and without torch.

A figure NAME is the module figures/NAME.py with `COLUMNS`, what it reads, `CAPTION`, and
`draw(table)`. Its table is figures/data/NAME.csv unless --table or --run names another. `paper`
stands for the figures and tables of the paper, `all` for every figure; `claims` writes what the
paper claims beside what is recorded here, `gallery` every figure with its caption and the claims
that it bears on. --refresh makes the recorded table anew first.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from glob import glob
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed
from diagnostics.io.command import run_command
from diagnostics.io.files import read_text
from diagnostics.io.provenance import code_state
from diagnostics.terminal import protect_terminal
from figures.registry import (
    DATA,
    FROM_RUNS,
    PAPER,
    figure_module,
    figure_names,
    made_by,
    read_table,
    recorded,
)

if TYPE_CHECKING:
    import pandas as pd

TEXTS = {"claims": "claims.md", "gallery": "README.md"}
"""What is written about the recorded tables, and the file's name."""


def main(argv: list[str]) -> None:
    """`opd figures [NAME|paper|all|claims|gallery] [--run DIR ...] [--table CSV] [--refresh]`."""
    parser = argparse.ArgumentParser(prog="opd figures", description=__doc__)
    known = f"{', '.join(figure_names())}; paper, all, claims, or gallery"
    parser.add_argument("name", nargs="?", default="all", help=known)
    parser.add_argument("--table", type=Path, help="draw this table instead of the recorded one")
    parser.add_argument(
        "--run", type=Path, nargs="+", help="run folders to draw, for " + ", ".join(FROM_RUNS)
    )
    parser.add_argument("--out", type=Path, default=Path("results/figures"))
    parser.add_argument(
        "--update-data", action="store_true", help="also record the runs' table in figures/data"
    )
    parser.add_argument(
        "--refresh", action="store_true", help="run the experiment behind it and record it first"
    )
    given = parser.parse_args(argv)
    if given.name in TEXTS:
        given.out.mkdir(parents=True, exist_ok=True)
        path = given.out / TEXTS[given.name]
        path.write_text(import_module(f"figures.claims.{given.name}").written(DATA))
        print(path)
        return
    names = {"all": figure_names(), "paper": list(PAPER)}.get(given.name, [given.name])
    if given.table and len(names) > 1:
        raise InvalidInput(
            f"--table {given.table} needs the name of its figure: {', '.join(names)}"
        )
    if given.run and not set(names) <= {*FROM_RUNS, "phase"}:
        raise InvalidInput(f"--run is for the figures {', '.join(FROM_RUNS)}, phase, one by one")
    if given.update_data and names == ["phase"]:
        raise InvalidInput(
            "the recorded maps of phase are the study's; runs are only drawn on them"
        )
    if given.update_data and not given.run:
        raise InvalidInput("--update-data records the table of --run, and no run is given")
    if given.refresh and given.run:
        raise InvalidInput("--refresh makes its own runs; leave out --run")
    for name in names:
        if given.refresh:
            refresh(name)
        if given.run:
            table = collected(name, given.run)
        else:
            table = read(name, given.table or recorded(name))
        for path in render(name, table, given.out):
            print(path)
        if given.update_data:
            record(name, table, given.run)


def refresh(name: str) -> None:
    """Run what makes a figure's table, as a user would; a run that was killed goes on.

    Raises:
      RuntimeError: a command failed.
    """
    for line in made_by(name):
        print(f"-- {line}", file=sys.stderr)
        words = [x for word in line.split()[1:] for x in sorted(glob(word)) or [word]]
        done = subprocess.run([sys.executable, "-m", "opd.cli.main", *words], check=False)
        if done.returncode:
            raise OperationFailed(
                f"`{line}` ended with {done.returncode}; the same command goes on"
            )


def collected(name: str, runs: list[Path]) -> "pd.DataFrame":
    """The table of a figure made from run folders."""
    if name == "training":
        from diagnostics.records.run_tables import training_table

        return training_table(runs)
    table = figure_module(name).collect(runs)
    if table.empty:
        raise InvalidInput(
            f"{name} finds nothing to draw in {', '.join(map(str, runs))}: too few tokens or "
            "steps, or runs of another kind than the recorded ones"
        )
    return table


def read(name: str, path: Path) -> "pd.DataFrame":
    """The table of a figure.

    Raises:
      FileNotFoundError: no such table; says what makes it.
      ValueError: a figure or a column that does not exist.
    """
    module = figure_module(name)
    if not path.exists():
        raise MissingFile(f"{path} does not exist; make it with `{' && '.join(made_by(name))}`")
    table = read_table(path)
    lacking = [c for c in module.COLUMNS if c not in table]
    if lacking:
        raise InvalidInput(f"{path} lacks the columns {', '.join(lacking)}")
    return table


def render(name: str, table: "pd.DataFrame", out: Path) -> list[Path]:
    """Draw one figure and write its files; a figure of tables also writes them."""
    from figures import style

    module = figure_module(name)
    with style.look():
        paths = style.save(module.draw(table), out, name)
    if hasattr(module, "markdown"):
        text, numbers = out / f"{name}.md", out / f"{name}.csv"
        text.write_text(module.markdown(table))
        module.summary(table).to_csv(numbers, index=False, float_format="%.5g")
        paths += [text, numbers]
    return paths


def record(name: str, table: "pd.DataFrame", runs: list[Path]) -> None:
    """Keep a table of runs in figures/data, with what made it."""
    path = recorded(name)
    table.to_csv(path, index=False)
    configs = {label(run): settings(run) for run in runs}
    first = next(iter(configs.values()))
    shared = {k: x for k, x in first.items() if all(c.get(k) == x for c in configs.values())}
    own = {r: {k: x for k, x in c.items() if k not in shared} for r, c in configs.items()}
    about = {
        "command": made_by(name, list(configs)),
        "settings": shared,
        "runs": own,
        "code": sorted({read_text(run / "code.txt").partition("\n")[0] for run in runs}),
        "seconds": round(sum(map(seconds, runs)), 1),
        "device": sorted({c["device"] for c in configs.values()}),
        "commit": code_state().commit,
        "table": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "pandas")},
    }
    path.with_suffix(".json").write_text(by_line(about))
    print(path)


def settings(run: Path) -> dict[str, Any]:
    """A run's config.json, but for its own place; folders beside it by relative paths."""
    from diagnostics.records.run_folders import settings as recorded_settings

    config = recorded_settings(run)
    config.pop("out", None)
    return {name: portable(value, run.resolve()) for name, value in config.items()}


def portable(value: Any, run: Path) -> Any:
    """A setting whose absolute paths begin at the nearest folder that the run is in too."""
    if isinstance(value, dict):
        return {name: portable(x, run) for name, x in value.items() if x is not None}
    if isinstance(value, list):
        return [portable(x, run) for x in value]
    if isinstance(value, str) and Path(value).is_absolute():
        common = next(up for up in run.parents if Path(value).is_relative_to(up))
        return str(Path(value).relative_to(common))
    return value


def by_line(about: dict[str, Any]) -> str:
    """JSON with a line for every entry of the two upper levels."""
    parts = []
    for name, value in about.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            lines = (f"  {json.dumps(k)}: {json.dumps(x)}" for k, x in value.items())
            text = "{\n" + ",\n".join(lines) + "\n }"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def label(run: Path) -> str:
    """GROUP/METHOD-SEED of a run folder."""
    return f"{run.resolve().parent.name}/{run.name}"


def seconds(run: Path) -> float:
    """What a run's steps took together, by its own clock."""
    from diagnostics.records.run_folders import recorded_rows

    found = recorded_rows(run)
    return sum(x for row in found for k, x in row.items() if k.startswith("seconds/") and x)


if __name__ == "__main__":
    protect_terminal()
    run_command("opd figures", lambda: main(sys.argv[1:]))
