"""Registry of the figures: their names, modules, recorded tables, and the commands that make these.

A figure is a module of `figures.study`, `figures.paper`, `figures.runs` or `figures.regimes` with
`COLUMNS` (the columns it reads), `CAPTION`, and `draw(table)`. A figure of run folders also has
`collect(runs)`.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from diagnostics.errors import InvalidInput
from diagnostics.io.files import read_object, translate_read_errors
from diagnostics.io.recorded_data import recorded_data
from diagnostics.records.renamed import present_key

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).resolve().parent
DATA = recorded_data()
FIGURE_PACKAGES = ("study", "paper", "runs", "regimes")
PAPER_FIGURES = (
    *("toy", "scatter", "loop", "gap", "segmentation", "dynamics", "multitask", "ablations"),
    *("comparison", "agents"),
)
"""Figures that correspond to figures and tables of the paper."""
MAP_FIGURES = (
    *("dose", "mask_gain", "regime_curves", "regime_gains", "regime_map", "support_variants"),
)
"""Figures of the map of methods, which share a table."""
RUN_FIGURES = (
    *PAPER_FIGURES[1:],
    *("training", "anatomy", "fan", "heatmap", "ledger", "lorenz", "pairs", "quadrants"),
    *("sampler", "signal_loss", "tokenizer", "warning", "views", "controls"),
    *MAP_FIGURES,
    "side_effects",
    "pretrained",
)
"""Figures of run folders; they build their table with `collect(runs)`."""
TABLE_NAMES = {
    "frontier": "bias_variance",
    "warning": "early_warning",
    **dict.fromkeys(("dynamics", "ablations", "multitask"), "paper_steps"),
    "comparison": "paper_evaluations",
    **dict.fromkeys(MAP_FIGURES, "regimes"),
}
"""Table of every figure whose table is not named after it."""


def figure_names() -> list[str]:
    """Return the names of all figures, sorted."""
    return sorted(_packages_by_figure())


def figure_module(name: str) -> ModuleType:
    """Import the module that draws a figure.

    Args:
        name: Name of the figure.

    Returns:
        The module.

    Raises:
        InvalidInput: There is no such figure.
    """
    packages = _packages_by_figure()
    if name not in packages:
        raise InvalidInput(f"unknown figure {name!r}; known: {', '.join(sorted(packages))}, all")
    return import_module(f"figures.{packages[name]}.{name}")


def _packages_by_figure() -> dict[str, str]:
    """Return the subpackage of every figure."""
    paths = (path for package in FIGURE_PACKAGES for path in (FOLDER / package).glob("*.py"))
    return {p.stem: p.parent.name for p in paths if p.stem not in ("__init__", "rows")}


def table_path(name: str, folder: Path = DATA) -> Path:
    """Return the path of a figure's recorded table in a folder of tables."""
    return folder / f"{TABLE_NAMES.get(name, name)}.csv"


def commands_for_table(name: str, runs: list[str] | None = None) -> list[str]:
    """Return the commands that make a figure's table, one per line.

    Args:
        name: Name of the figure.
        runs: GROUP/METHOD-SEED of each run folder; None for the runs of the recorded table.

    Returns:
        Command lines, in the order in which they are run.
    """
    update = f"opd figures {name} --run {{runs}} --update-data"
    if name == "training":
        return ["opd demo --full", update.format(runs="results/demo/runs/*")]
    if name == "agents":
        runs = ["results/paper/games/*", "results/paper/agents/*"]
        return ["opd paper --groups games agents", update.format(runs=" ".join(runs))]
    if name in ("views", "controls", "pretrained"):
        update = update.format(runs=f"results/paper/{name}/*")
        return [f"opd paper --groups {name}", update]
    if name in MAP_FIGURES:
        return ["opd map", update.format(runs="results/map/runs/*/*")]
    if name == "side_effects":
        return ["opd map --evaluate", update.format(runs="results/map/runs/*/*")]
    if name in RUN_FIGURES:
        record_path = table_path(name).with_suffix(".json")
        if runs is None and record_path.exists():
            runs = list(read_object(record_path).get("runs", {}))
        methods = dict.fromkeys(run.rpartition("-")[0] or run for run in runs or [])
        use_all_folders = not methods or (name in TABLE_NAMES and name != "warning")
        folders = (
            ["single/*", "multi/*"] if use_all_folders else [f"{method}-*" for method in methods]
        )
        return ["opd paper", update.format(runs=" ".join(f"results/paper/{x}" for x in folders))]
    return [f"opd study run {TABLE_NAMES.get(name, name)} --update-figures"]


def read_table(path: Path) -> "pd.DataFrame":
    """Read a recorded table, with old metric names replaced by the current ones.

    Args:
        path: A CSV file.

    Returns:
        The table.

    Raises:
        InvalidInput: The file is not a CSV table.
    """
    import pandas as pd

    with translate_read_errors(path):
        try:
            table = pd.read_csv(path, dtype={"outcomes": str})
        except (
            ValueError,
            pd.errors.ParserError,
        ) as error:  # bad bytes, bad columns, or an empty file
            raise InvalidInput(f"{path} is not a CSV table ({error})") from error
    table = table.rename(columns=present_key)
    for column in {"metric", "indicator"} & set(table):
        table[column] = table[column].map(present_key)
    return table
