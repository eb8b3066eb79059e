"""`opd figures`: draw figures from recorded tables, in seconds and without torch.

A figure NAME is the module figures/NAME.py with `COLUMNS`, what it reads, `CAPTION`, and
`draw(table)`. Its table is figures/data/NAME.csv unless --table or --run names another. `paper`
stands for the figures and tables of the paper, `all` for every figure, and `claims` writes what
the paper claims beside what is recorded here. --refresh makes the recorded table anew first.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from glob import glob
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).resolve().parent
DATA = FOLDER / "data"
NOT_FIGURES = (
    *("__init__", "__main__", "collect", "style", "tables"),
    *("runs", "tokens", "vocabulary", "steps", "paired", "claims"),
)
PAPER = (
    *("toy", "scatter", "loop", "gap", "segmentation", "dynamics", "multitask", "ablations"),
    "comparison",
)
"""What stands for the paper's own figures and tables."""
FROM_RUNS = (
    *PAPER[1:],
    *("training", "anatomy", "fan", "heatmap", "ledger", "lorenz", "pairs", "quadrants"),
    *("sampler", "signal_loss", "tokenizer", "warning"),
)
"""Figures of run folders: all but the first make their table by `collect(runs)`."""
RECORDED_AS = {
    "frontier": "bias_variance",
    "warning": "early_warning",
    **dict.fromkeys(("dynamics", "ablations", "multitask"), "paper_steps"),
    "comparison": "paper_evaluations",
}
"""Figures whose table has another name than theirs."""


def figures() -> list[str]:
    """Names of the figures: the modules of this folder that draw."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in NOT_FIGURES)


def made_by(name: str) -> list[str]:
    """The commands that make a figure's table, each a line."""
    update = f"opd figures {name} --run {{runs}} --update-data"
    if name == "training":
        return ["opd demo", update.format(runs="results/demo/runs/*")]
    if name in FROM_RUNS:
        about = recorded(name).with_suffix(".json")
        known = json.loads(about.read_text()).get("runs", {}) if about.exists() else {}
        folders = [f"results/paper/{run}" for run in known] or ["results/paper/*/*"]
        return ["opd paper", update.format(runs=" ".join(folders))]
    return [f"opd study run {RECORDED_AS.get(name, name)} --update-figures"]


def main(argv: list[str]) -> None:
    """`opd figures [NAME|paper|all|claims] [--run DIR ...] [--table CSV] [--refresh]`."""
    parser = argparse.ArgumentParser(prog="opd figures", description=__doc__)
    known = f"{', '.join(figures())}; paper, all, or claims"
    parser.add_argument("name", nargs="?", default="all", help=known)
    parser.add_argument("--table", type=Path, help="draw this table instead of the recorded one")
    parser.add_argument("--run", type=Path, nargs="+", help=f"run folders to draw, for {FROM_RUNS}")
    parser.add_argument("--out", type=Path, default=Path("results/figures"))
    parser.add_argument(
        "--update-data", action="store_true", help="also record the runs' table in figures/data"
    )
    parser.add_argument(
        "--refresh", action="store_true", help="run the experiment behind it and record it first"
    )
    given = parser.parse_args(argv)
    if given.name == "claims":
        from figures.claims import written

        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "claims.md").write_text(written(DATA))
        print(given.out / "claims.md")
        return
    names = {"all": figures(), "paper": list(PAPER)}.get(given.name, [given.name])
    if given.table and len(names) > 1:
        raise ValueError(f"--table {given.table} needs the name of its figure: {', '.join(names)}")
    if given.run and not set(names) <= {*FROM_RUNS, "phase"}:
        raise ValueError(f"--run is for the figures {', '.join(FROM_RUNS)}, phase, one by one")
    if given.update_data and names == ["phase"]:
        raise ValueError("the recorded maps of phase are the study's; runs are only drawn on them")
    if given.update_data and not given.run:
        raise ValueError("--update-data records the table of --run, and no run is given")
    if given.refresh and given.run:
        raise ValueError("--refresh makes its own runs; leave out --run")
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
        done = subprocess.run([sys.executable, "-m", "opd.cli", *words], check=False)
        if done.returncode:
            raise RuntimeError(f"`{line}` ended with {done.returncode}; the same command goes on")


def collected(name: str, runs: list[Path]) -> "pd.DataFrame":
    """The table of a figure made from run folders."""
    if name == "training":
        from figures.collect import training_table

        return training_table(runs)
    return import_module(f"figures.{name}").collect(runs)


def recorded(name: str) -> Path:
    """Where the table of a figure is kept."""
    return DATA / f"{RECORDED_AS.get(name, name)}.csv"


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
        raise FileNotFoundError(
            f"{path} does not exist; make it with `{' && '.join(made_by(name))}`"
        )
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
    path = recorded(name)
    table.to_csv(path, index=False)
    configs = {label(run): json.loads((run / "config.json").read_text()) for run in runs}
    first = next(iter(configs.values()))
    shared = {k: x for k, x in first.items() if all(c.get(k) == x for c in configs.values())}
    own = {r: {k: x for k, x in c.items() if k not in shared} for r, c in configs.items()}
    about = {
        "command": made_by(name),
        "settings": shared,
        "runs": own,
        "code": sorted({(run / "code.txt").read_text().splitlines()[0] for run in runs}),
        "seconds": round(sum(map(seconds, runs)), 1),
        "device": sorted({c["device"] for c in configs.values()}),
        "commit": commit(),
        "table": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "pandas")},
    }
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(path)


def label(run: Path) -> str:
    """GROUP/METHOD-SEED of a run folder."""
    return f"{run.resolve().parent.name}/{run.name}"


def seconds(run: Path) -> float:
    """What a run's steps took together, by its own clock."""
    from diagnostics import rows

    found = rows.read(run / "rows.jsonl")
    return sum(x for row in found for k, x in row.items() if k.startswith("seconds/") and x)


def commit() -> str:
    """The checkout's commit, or "unknown" for an installed package."""
    words = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(words, cwd=DATA.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(sys.argv[1:])
