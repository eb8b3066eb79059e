"""Run an experiment: compute its cells in parallel, resume after a kill, write its summary table.

A cell is one setting of a preset. Its rows depend only on the experiment's name, the setting and
the code, so a finished cell is reused until one of these changes.
"""

import ast
import dataclasses
import hashlib
import json
import os
import pkgutil
import platform
import sys
import time
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro
from tyro.conf import Positional

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.atomic import write_text
from diagnostics.io.command import parse_options, run_command
from diagnostics.io.provenance import code_state
from diagnostics.io.recorded_data import recorded_data, writable_data
from synthetic.seeds import canonical_json, derive

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("synthetic", "diagnostics", "opd")


def list_experiments() -> list[str]:
    """Return the names of the modules in `synthetic.experiments`."""
    from synthetic import experiments

    return sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))


def load_experiment(name: str) -> ModuleType:
    """Import an experiment, a module with CLAIM, HEADLINES, SETTINGS, measure and summarize."""
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
    """Measure the missing cells of a preset, then write rows.csv, summary.csv and summary.json.

    Files are written to out/NAME: cells/KEY.json, shared by presets, and one folder per preset. A
    cell is written atomically when it is finished.

    Args:
        name: Name of the experiment.
        preset: Name of a list of settings.
        jobs: Number of processes.
        out: Folder of the results.
        refresh: Whether to measure finished cells again.
        backend: See `backends.compute`; does not change the results.
        address: See `backends.compute`; does not change the results.

    Returns:
        The summary table.

    Raises:
        InvalidInput: If the experiment or the preset is unknown.
    """
    import pandas as pd
    from tqdm import tqdm

    from synthetic.runner.backends import compute

    experiment = load_experiment(name)
    if preset not in experiment.SETTINGS:
        known_presets = ", ".join(experiment.SETTINGS)
        raise InvalidInput(f"{name} has no preset {preset!r}; known: {known_presets}")
    settings = experiment.SETTINGS[preset]
    folder = Path(out) / name
    source = fingerprint(name)
    files = [folder / "cells" / f"{_key(name, setting, source)}.json" for setting in settings]
    missing_cells = [
        (setting, file)
        for setting, file in zip(settings, files, strict=True)
        if refresh or read_cell(file) is None
    ]
    tasks = [(name, setting, file.name) for setting, file in missing_cells]
    results = compute(measure_cell, tasks, jobs, backend, address)
    for key, cell in tqdm(
        results, total=len(missing_cells), desc=f"{name} {preset}", disable=not missing_cells
    ):
        write_text(folder / "cells" / key, json.dumps(cell), concurrent=True)
    cells = [json.loads(file.read_text()) for file in files]
    rows = pd.DataFrame([row for cell in cells for row in cell["rows"]])
    summary = experiment.summarize(rows)
    seconds = sum(cell["seconds"] for cell in cells)
    preset_folder = folder / preset
    write_text(preset_folder / "rows.csv", rows.to_csv(index=False), concurrent=True)
    write_text(
        preset_folder / "summary.csv",
        summary.to_csv(index=False, float_format="%.6g"),
        concurrent=True,
    )
    write_text(
        preset_folder / "summary.json",
        json.dumps(provenance(name, preset, source, seconds), indent=1) + "\n",
        concurrent=True,
    )
    return summary


def measure_cell(name: str, setting: dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    """Measure one setting on one thread.

    Args:
        name: Name of the experiment.
        setting: The setting.
        key: Name of the cell's file, returned unchanged.

    Returns:
        The key and the finished cell.

    Raises:
        OperationFailed: If the measurement failed; names the setting and chains the cause.
    """
    import torch

    threads = torch.get_num_threads()
    # one thread: the order of summation must not depend on the number of jobs
    torch.set_num_threads(1)
    try:
        begin = time.process_time()  # CPU time, so that other processes do not count
        rows = load_experiment(name).measure(setting, derive(name, setting))
        seconds = time.process_time() - begin
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise OperationFailed(
            f"{name}: {error}; failed while measuring the cell {canonical_json(setting)}"
        ) from error
    finally:
        torch.set_num_threads(threads)
    return key, {"setting": setting, "seconds": seconds, "rows": rows}


def read_cell(file: Path) -> dict[str, Any] | None:
    """Return a finished cell, or None if the file is missing or incomplete."""
    try:
        cell = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return cell if isinstance(cell, dict) and "rows" in cell else None


def provenance(name: str, preset: str, source: str, seconds: float) -> dict[str, Any]:
    """Return how a table was produced: command, code, versions, time on one core."""
    packages = ("torch", "numpy", "pandas", "scipy")
    code = code_state(ROOT)
    return {
        "command": f"opd study run {name} --preset {preset}",
        "preset": preset,
        "commit": code.commit,
        "changed_files": list(code.changed_files),
        "source": source,
        "seconds": round(seconds, 2),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def fingerprint(name: str) -> str:
    """Return a hash of every file that a cell depends on: the experiment and its imports."""
    digest = hashlib.sha256()
    for path in source_files(ROOT / "synthetic" / "experiments" / f"{name}.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def source_files(start: Path) -> list[Path]:
    """Return a file and the project's files that it imports, directly or indirectly, sorted."""
    files, pending = set(), [start]
    while pending:
        path = pending.pop()
        if path in files or not path.is_file():
            continue
        files.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            parts = (name.split(".") for name in names)
            pending += [ROOT.joinpath(*x).with_suffix(".py") for x in parts if x[0] in PACKAGES]
    return sorted(files)


def format_headlines(name: str, table: "pd.DataFrame") -> list[str]:
    """Format the experiment's headlines with the numbers of its summary table, value [low, high].

    Args:
        name: Name of the experiment.
        table: Its summary table.

    Returns:
        One line per headline.

    Raises:
        InvalidInput: If a headline does not select exactly one row.
    """
    lines = []
    for text, selection in load_experiment(name).HEADLINES.items():
        rows = table
        for column, value in selection.items():
            rows = rows[rows[column] == value]
        if len(rows) != 1:
            raise InvalidInput(f"{name}: {selection} selects {len(rows)} rows, expected 1 ({text})")
        value, low, high = (f"{float(rows[c].iloc[0]):.4g}" for c in ("value", "low", "high"))
        lines.append(text.format(f"{value} [{low}, {high}]"))
    return lines


def print_results(name: str, table: "pd.DataFrame", preset: str) -> None:
    """Print the claim, the headlines and the command that reproduces them."""
    print(f"{name}: {load_experiment(name).CLAIM}")
    for line in format_headlines(name, table):
        print(f"  - {line}")
    print(f"  (opd study run {name} --preset {preset})")


def load_recorded_table(name: str) -> tuple["pd.DataFrame", str]:
    """Return the recorded summary table of an experiment and the preset that produced it."""
    import pandas as pd

    data = recorded_data()
    record = json.loads((data / f"{name}.json").read_text())
    return pd.read_csv(data / f"{name}.csv"), record["preset"]


def update_figures(name: str, preset: str, out: str | Path, data: Path) -> None:
    """Copy the summary and its provenance to the folder of recorded tables."""
    for suffix in ("csv", "json"):
        text = (Path(out) / name / preset / f"summary.{suffix}").read_text()
        write_text(data / f"{name}.{suffix}", text, concurrent=True)


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List the experiments and their claims."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Print the recorded results of a claim."""

    name: Positional[str] = "all"
    """an experiment, or all"""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Measure an experiment and write its tables."""

    name: Positional[str]
    """an experiment, or all"""
    preset: str = "quick"
    """smoke, quick (minutes) or paper"""
    jobs: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """number of processes"""
    backend: str = "loky"
    """loky (this machine), ray or dask"""
    address: str | None = None
    """address of a running cluster; without it, a local one starts"""
    out: Path = Path("results")
    """output folder"""
    refresh: bool = False
    """measure finished cells again"""
    update_figures: bool = False
    """copy the summaries to figures/data"""
    data_folder: Path | None = None
    """folder to which --update-figures copies them instead"""


COMMANDS = (
    Annotated[ListOptions, tyro.conf.subcommand("list")]
    | Annotated[ShowOptions, tyro.conf.subcommand("show")]
    | Annotated[RunOptions, tyro.conf.subcommand("run")]
)
"""Sub-commands of `opd study`."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line: list the experiments, show recorded results, or run one or all."""
    arguments = sys.argv[1:] if argv is None else argv
    command_type = cast(type[ListOptions | ShowOptions | RunOptions], COMMANDS)
    options = parse_options(command_type, arguments, "opd study")
    if isinstance(options, ListOptions):
        for name in list_experiments():
            print(f"{name}\n  {load_experiment(name).CLAIM}")
        return
    data = None
    if isinstance(options, RunOptions) and options.update_figures:
        data = writable_data(options.data_folder, "--update-figures")
    for name in list_experiments() if options.name == "all" else [options.name]:
        if isinstance(options, ShowOptions):
            print_results(name, *load_recorded_table(name))
        else:
            run_and_print(name, options, data)


def run_and_print(name: str, options: RunOptions, data: Path | None) -> None:
    """Run an experiment, and print its results, files and seconds; copy the summaries to `data`."""
    begin = time.perf_counter()
    table = run(
        name,
        options.preset,
        options.jobs,
        options.out,
        options.refresh,
        options.backend,
        options.address,
    )
    print_results(name, table, options.preset)
    preset_folder = options.out / name / options.preset
    core = json.loads((preset_folder / "summary.json").read_text())["seconds"]
    wall = time.perf_counter() - begin
    print(f"  {preset_folder / 'summary.csv'}: {wall:.0f} s, all cells on one core {core:.0f} s")
    if data is not None:
        update_figures(name, options.preset, options.out, data)


def _key(name: str, setting: dict[str, Any], source: str) -> str:
    text = f"{name} {canonical_json(setting)} {source}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


if __name__ == "__main__":
    run_command("opd study", lambda: main(sys.argv[1:]))
