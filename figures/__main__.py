"""`opd figures`: draw figures from recorded tables, in seconds and without torch.

NAME is the name of a figure. Its table is figures/data/NAME.csv unless --table or --run is given.
`paper` draws the figures and tables of the paper and `all` every figure. `claims` writes the
paper's claims next to the measurements recorded here, and `gallery` lists every figure with its
caption and the related claims. --refresh runs the experiment and records its table first.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed
from diagnostics.io.command import parse_options, run_command
from diagnostics.io.module_process import module_command
from diagnostics.io.provenance import code_state, package_version
from diagnostics.io.recorded_data import writable_data
from diagnostics.records.run_folder import RunFolder
from diagnostics.terminal import protect_terminal
from figures.registry import (
    DATA,
    PAPER_FIGURES,
    RUN_FIGURES,
    commands_for_table,
    figure_module,
    figure_names,
    read_table,
    table_path,
)

if TYPE_CHECKING:
    import pandas as pd

DOCUMENTS = {"claims": "claims.md", "gallery": "README.md"}
"""Documents generated from the recorded tables, and their file names."""


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """Draw figures from recorded tables, in seconds and without torch.

    NAME is the name of a figure. Its table is figures/data/NAME.csv unless --table or --run is
    given. `paper` draws the figures and tables of the paper and `all` every figure. `claims` writes
    the paper's claims next to the measurements recorded here, and `gallery` lists every figure with
    its caption and the related claims.
    """

    name: Annotated[
        Positional[str],
        tyro.conf.arg(
            metavar="NAME",
            help=f"{', '.join(figure_names())}; paper, all, claims, or gallery",
        ),
    ] = "all"
    table: Path | None = None
    """draw this table instead of the recorded one"""
    run: Annotated[
        tuple[Path, ...],
        tyro.conf.arg(help=f"run folders to draw, for {', '.join(RUN_FIGURES)}"),
    ] = ()
    out: Path = Path("results/figures")
    """folder of the drawings"""
    width: Literal["page", "column"] = "page"
    """printed width: across a page (7 in), or one column of it (3.3 in; files NAME-column.*)"""
    update_data: bool = False
    """also save the table of --run in figures/data"""
    data_folder: Path | None = None
    """folder in which --update-data and --refresh save tables"""
    refresh: bool = False
    """run the experiment and record its table first"""


def main(argv: list[str]) -> None:
    """Run `opd figures [NAME|paper|all|claims|gallery] [--run DIR ...] [--table CSV] [--refresh]`.

    Args:
        argv: command-line arguments.

    Raises:
        InvalidInput: The arguments contradict each other.
    """
    options = parse_options(FigureOptions, argv, "opd figures")
    if options.name in DOCUMENTS:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / DOCUMENTS[options.name]
        path.write_text(import_module(f"figures.claims.{options.name}").render_markdown(DATA))
        print(path)
        return
    names = {"all": figure_names(), "paper": list(PAPER_FIGURES)}.get(options.name, [options.name])
    if options.table and len(names) > 1:
        raise InvalidInput(
            f"--table {options.table} needs the name of a single figure, got {', '.join(names)}"
        )
    if options.run and not set(names) <= {*RUN_FIGURES, "phase"}:
        raise InvalidInput(
            "--run needs the name of a single figure of run folders: "
            f"{', '.join(RUN_FIGURES)}, phase"
        )
    if options.update_data and names == ["phase"]:
        raise InvalidInput(
            "--update-data cannot be used with phase: its recorded table is that of the study"
        )
    if options.update_data and not options.run:
        raise InvalidInput("--update-data saves the table of --run; add --run")
    if options.refresh and options.run:
        raise InvalidInput("--refresh trains its own runs; remove --run")
    if options.data_folder and not (options.update_data or options.refresh):
        raise InvalidInput(
            f"--data-folder {options.data_folder} is where tables are saved; add --update-data or "
            "--refresh, or read one of its tables with --table"
        )
    data = DATA
    if options.update_data or options.refresh:
        option = "--update-data" if options.update_data else "--refresh"
        data = writable_data(options.data_folder, option)
    for name in names:
        if options.refresh:
            refresh_table(name, data)
        if options.run:
            table = collect_table(name, list(options.run))
        else:
            table = load_figure_table(name, options.table or table_path(name, data))
        for path in render_figure(name, table, options.out, options.width):
            print(path)
        if options.update_data:
            record_table(name, table, list(options.run), data)


def refresh_table(name: str, data: Path) -> None:
    """Run the commands that make a figure's table; an interrupted run is resumed.

    Args:
        name: Name of the figure.
        data: Folder in which the table is saved.

    Raises:
        OperationFailed: A command failed.
    """
    for line in commands_for_table(name):
        print(f"-- {line}", file=sys.stderr)
        words = [x for word in line.split()[1:] for x in sorted(glob(word)) or [word]]
        if "--update-" in line:
            words += ["--data-folder", str(data)]
        completed = subprocess.run(module_command("opd.cli.main", *words), check=False)
        if completed.returncode:
            raise OperationFailed(
                f"`{line}` failed with exit code {completed.returncode}; run it again to resume"
            )


def collect_table(name: str, runs: list[Path]) -> "pd.DataFrame":
    """Build the table of a figure from run folders.

    Args:
        name: Name of the figure.
        runs: Run folders.

    Returns:
        The table.

    Raises:
        InvalidInput: The runs contain nothing that the figure draws.
    """
    table = figure_module(name).collect(runs)
    if table.empty:
        raise InvalidInput(
            f"{name}: nothing to draw in {', '.join(map(str, runs))}: they have too few tokens or "
            "steps, or lack the metrics that this figure needs"
        )
    return table


def load_figure_table(name: str, path: Path) -> "pd.DataFrame":
    """Read the table of a figure and check its columns.

    Args:
        name: Name of the figure.
        path: Path of the table.

    Returns:
        The table.

    Raises:
        MissingFile: There is no such table; the message names the commands that make it.
        InvalidInput: There is no such figure, or the table lacks a column.
    """
    module = figure_module(name)
    if not path.exists():
        raise MissingFile(
            f"{path} does not exist; make it with `{' && '.join(commands_for_table(name))}`"
        )
    table = read_table(path)
    missing_columns = [c for c in module.COLUMNS if c not in table]
    if missing_columns:
        raise InvalidInput(
            f"{path} lacks the columns {', '.join(missing_columns)}; make the table again"
        )
    return table


def render_figure(
    name: str, table: "pd.DataFrame", out: Path, width: Literal["page", "column"] = "page"
) -> list[Path]:
    """Draw one figure and write its files; figures that have tables also write these.

    Args:
        name: Name of the figure.
        table: Its table.
        out: Output folder.
        width: Printed width: "page", or "column" for files named NAME-column.

    Returns:
        The paths of all files written.
    """
    from figures import style

    module = figure_module(name)
    inches, suffix = {"page": (style.PAGE_WIDTH, ""), "column": (style.COLUMN_WIDTH, "-column")}[
        width
    ]
    with style.style_context():
        paths = style.save_figure(module.draw(table, inches), out, name + suffix)
    if hasattr(module, "markdown"):
        text, numbers = out / f"{name}.md", out / f"{name}.csv"
        summary = module.summary(table)
        text.write_text(module.markdown(summary))
        summary.to_csv(numbers, index=False, float_format="%.5g")
        paths += [text, numbers]
    return paths


def record_table(name: str, table: "pd.DataFrame", runs: list[Path], data: Path) -> None:
    """Save a table of runs in a folder, with the commands, settings and versions behind it."""
    path = table_path(name, data)
    table.to_csv(path, index=False)
    configs = {run_label(run): portable_settings(run) for run in runs}
    first_config = next(iter(configs.values()))
    common_settings = {
        k: x for k, x in first_config.items() if all(c.get(k) == x for c in configs.values())
    }
    run_specific_settings = {
        r: {k: x for k, x in c.items() if k not in common_settings} for r, c in configs.items()
    }
    metadata_fields = {
        "command": commands_for_table(name, list(configs)),
        "settings": common_settings,
        "runs": run_specific_settings,
        "code": sorted({RunFolder(run).commit() for run in runs}),
        "seconds": round(sum(map(training_seconds, runs)), 1),
        "device": sorted({c["device"] for c in configs.values()}),
        "commit": code_state().commit,
        "table": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "versions": {p: package_version(p) for p in ("torch", "transformers", "pandas")},
    }
    path.with_suffix(".json").write_text(format_json(metadata_fields))
    print(path)


def portable_settings(run: Path) -> dict[str, Any]:
    """Return a run's config.json without its output folder and with relative paths."""
    config = RunFolder(run).settings()
    config.pop("out", None)
    return {name: make_portable(value, run.resolve()) for name, value in config.items()}


def make_portable(value: Any, run: Path) -> Any:
    """Make absolute paths in a setting relative to the nearest folder that contains the run too."""
    if isinstance(value, dict):
        return {name: make_portable(x, run) for name, x in value.items() if x is not None}
    if isinstance(value, list):
        return [make_portable(x, run) for x in value]
    if isinstance(value, str) and Path(value).is_absolute():
        common = next(parent for parent in run.parents if Path(value).is_relative_to(parent))
        return str(Path(value).relative_to(common))
    return value


def format_json(record: dict[str, Any]) -> str:
    """Format a JSON object with one line for every entry of its two upper levels."""
    parts = []
    for name, value in record.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            lines = (f"  {json.dumps(k)}: {json.dumps(x)}" for k, x in value.items())
            text = "{\n" + ",\n".join(lines) + "\n }"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def run_label(run: Path) -> str:
    """Return GROUP/METHOD-SEED of a run folder."""
    folder = RunFolder(run)
    return f"{folder.group}/{folder.name}"


def training_seconds(run: Path) -> float:
    """Return the total duration of a run's steps in seconds, as measured during the run."""
    rows = RunFolder(run).rows()
    return sum(x for row in rows for k, x in row.items() if k.startswith("seconds/") and x)


if __name__ == "__main__":
    protect_terminal()
    run_command("opd figures", lambda: main(sys.argv[1:]))
