"""Runs an experiment: cells in parallel, resumable after a kill, then its summary table.

A cell is one setting of a preset. Its rows depend on nothing but the experiment's name, the setting
and the code, so a finished cell is kept and reused until one of these changes.
"""

import argparse
import ast
import hashlib
import json
import os
import pkgutil
import platform
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.atomic import write_text
from diagnostics.io.command import run_command
from diagnostics.io.provenance import code_state

if TYPE_CHECKING:
    import pandas as pd
from synthetic.seeds import canonical_json, derive

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures" / "data"
PACKAGES = ("synthetic", "diagnostics", "opd")


def list_experiments() -> list[str]:
    """Names of the modules in `synthetic.experiments`."""
    from synthetic import experiments

    return sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))


def load(name: str) -> ModuleType:
    """The experiment: CLAIM, HEADLINES, SETTINGS, measure, summarize."""
    if name not in list_experiments():
        raise InvalidInput(f"unknown experiment {name!r}; known: {', '.join(list_experiments())}")
    return import_module(f"synthetic.experiments.{name}")


def run(
    name: str,
    preset: str = "quick",
    jobs: int = 1,
    out: str | Path = "results",
    refresh: bool = False,
    backend: str = "loky",
    address: str | None = None,
) -> "pd.DataFrame":
    """Measure every missing cell of a preset, then write rows.csv, summary.csv and summary.json.

    Files go to out/NAME: cells/KEY.json, shared by presets, and one folder a preset. A cell is
    written when it is finished, whole or not at all. `refresh` measures finished cells again.
    For `backend` and `address` see `cluster.compute`; they do not change the results.

    Returns:
      the summary table.
    """
    import pandas as pd
    from tqdm import tqdm

    from synthetic.runner.backends import compute

    experiment = load(name)
    if preset not in experiment.SETTINGS:
        known = ", ".join(experiment.SETTINGS)
        raise InvalidInput(f"{name} has no preset {preset!r}; known: {known}")
    settings = experiment.SETTINGS[preset]
    folder = Path(out) / name
    files = [folder / "cells" / f"{_key(name, setting)}.json" for setting in settings]
    todo = [
        (setting, file)
        for setting, file in zip(settings, files, strict=True)
        if refresh or read_cell(file) is None
    ]
    tasks = [(name, setting, file.name) for setting, file in todo]
    done = compute(measure_cell, tasks, jobs, backend, address)
    for key, cell in tqdm(done, total=len(todo), desc=f"{name} {preset}", disable=not todo):
        write_text(folder / "cells" / key, json.dumps(cell), concurrent=True)
    cells = [json.loads(file.read_text()) for file in files]
    rows = pd.DataFrame([row for cell in cells for row in cell["rows"]])
    summary = experiment.summarize(rows)
    seconds = sum(cell["seconds"] for cell in cells)
    where = folder / preset
    write_text(where / "rows.csv", rows.to_csv(index=False), concurrent=True)
    write_text(
        where / "summary.csv", summary.to_csv(index=False, float_format="%.6g"), concurrent=True
    )
    write_text(
        where / "summary.json",
        json.dumps(provenance(name, preset, seconds), indent=1) + "\n",
        concurrent=True,
    )
    return summary


def measure_cell(name: str, setting: dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    """The key and the finished cell of one setting, measured on one thread.

    Raises:
      RuntimeError: the measurement failed; names the setting, the cause is chained.
    """
    import torch

    threads = torch.get_num_threads()
    # the same sums in the same order whatever the number of jobs
    torch.set_num_threads(1)
    try:
        begin = time.process_time()  # of one thread: what else the machine does is not counted
        rows = load(name).measure(setting, derive(name, setting))
        seconds = time.process_time() - begin
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise OperationFailed(f"{name}: {error} in the cell {canonical_json(setting)}") from error
    finally:
        torch.set_num_threads(threads)
    return key, {"setting": setting, "seconds": seconds, "rows": rows}


def read_cell(file: Path) -> dict[str, Any] | None:
    """A finished cell, or None where there is none or it is not readable to its end."""
    try:
        cell = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return cell if isinstance(cell, dict) and "rows" in cell else None


def provenance(name: str, preset: str, seconds: float) -> dict[str, Any]:
    """How a table came about: command, code, versions, time on one core."""
    packages = ("torch", "numpy", "pandas", "scipy")
    code = code_state(ROOT)
    return {
        "command": f"opd study run {name} --preset {preset}",
        "preset": preset,
        "commit": code.commit,
        "changed_files": list(code.changed),
        "source": fingerprint(name),
        "seconds": round(seconds, 2),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def fingerprint(name: str) -> str:
    """Hash of every file that a cell's numbers depend on: the experiment and all it imports."""
    digest = hashlib.sha256()
    for path in sources(ROOT / "synthetic" / "experiments" / f"{name}.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def sources(start: Path) -> list[Path]:
    """A file and the project's files that it imports, directly or not, sorted."""
    found, todo = set(), [start]
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            parts = (name.split(".") for name in names)
            todo += [ROOT.joinpath(*x).with_suffix(".py") for x in parts if x[0] in PACKAGES]
    return sorted(found)


def headlines(name: str, table: "pd.DataFrame") -> list[str]:
    """The experiment's headlines with the numbers of its summary table, value [low, high].

    Raises:
      ValueError: a headline does not select exactly one row.
    """
    lines = []
    for text, where in load(name).HEADLINES.items():
        chosen = table
        for column, value in where.items():
            chosen = chosen[chosen[column] == value]
        if len(chosen) != 1:
            raise InvalidInput(f"{name}: {where} selects {len(chosen)} rows, expected 1 ({text})")
        value, low, high = (f"{float(chosen[c].iloc[0]):.4g}" for c in ("value", "low", "high"))
        lines.append(text.format(f"{value} [{low}, {high}]"))
    return lines


def show(name: str, table: "pd.DataFrame", preset: str) -> None:
    """Print claim, headlines and the command that makes them."""
    print(f"{name}: {load(name).CLAIM}")
    for line in headlines(name, table):
        print(f"  - {line}")
    print(f"  (opd study run {name} --preset {preset})")


def recorded(name: str) -> tuple["pd.DataFrame", str]:
    """The summary table in figures/data and the preset that made it."""
    import pandas as pd

    about = json.loads((FIGURES / f"{name}.json").read_text())
    return pd.read_csv(FIGURES / f"{name}.csv"), about["preset"]


def update_figures(name: str, preset: str, out: str | Path) -> None:
    """Copy the summary and its provenance to figures/data, where they are committed."""
    for suffix in ("csv", "json"):
        text = (Path(out) / name / preset / f"summary.{suffix}").read_text()
        write_text(FIGURES / f"{name}.{suffix}", text, concurrent=True)


def main(argv: list[str] | None = None) -> None:
    """Command line: list the experiments, or run one or all of them."""
    parser = argparse.ArgumentParser(prog="opd study", description="the exact synthetic study")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="experiments and what they claim")
    showing = commands.add_parser("show", help="recorded numbers behind each claim")
    showing.add_argument("name", nargs="?", default="all", help="an experiment, or all")
    running = commands.add_parser("run", help="measure, summarise, write tables")
    running.add_argument("name", help="an experiment, or all")
    running.add_argument("--preset", default="quick", help="smoke, quick (minutes) or paper")
    running.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    running.add_argument("--backend", default="loky", help="loky, or a cluster: ray, dask")
    running.add_argument("--address", help="of a running cluster; else a local one is started")
    running.add_argument("--out", default="results", help="folder of the tables")
    running.add_argument("--refresh", action="store_true", help="measure finished cells again")
    running.add_argument(
        "--update-figures", action="store_true", help="copy the summaries to figures/data"
    )
    given = parser.parse_args(argv)
    if given.command == "list":
        for name in list_experiments():
            print(f"{name}\n  {load(name).CLAIM}")
        return
    for name in list_experiments() if given.name == "all" else [given.name]:
        if given.command == "show":
            show(name, *recorded(name))
            continue
        begin = time.perf_counter()
        where = (given.preset, given.jobs, given.out, given.refresh, given.backend, given.address)
        table = run(name, *where)
        show(name, table, given.preset)
        written = Path(given.out) / name / given.preset
        core = json.loads((written / "summary.json").read_text())["seconds"]
        wall = time.perf_counter() - begin
        print(f"  {written / 'summary.csv'}: {wall:.0f} s, all cells on one core {core:.0f} s")
        if given.update_figures:
            update_figures(name, given.preset, given.out)


def _key(name: str, setting: dict[str, Any]) -> str:
    text = f"{name} {canonical_json(setting)} {fingerprint(name)}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


if __name__ == "__main__":
    run_command("opd study", lambda: main(sys.argv[1:]))
