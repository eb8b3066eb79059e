"""The figures: their names, their modules, their recorded tables, and the commands that make those.

A figure is a module of `figures.study`, `figures.paper` or `figures.runs` with `COLUMNS`, what it
reads, `CAPTION`, and `draw(table)`; one of run folders also has `collect(runs)`.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from diagnostics.errors import InvalidInput
from diagnostics.io.files import read_object, reading
from diagnostics.records.renamed import present_key

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).resolve().parent
DATA = FOLDER / "data"
ROOMS = ("study", "paper", "runs")
PAPER = (
    *("toy", "scatter", "loop", "gap", "segmentation", "dynamics", "multitask", "ablations"),
    *("comparison", "agents"),
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


def figure_names() -> list[str]:
    """Return the names of all figures, sorted."""
    return sorted(_rooms_by_figure())


def figure_module(name: str) -> ModuleType:
    """Import the module that draws a figure.

    Raises:
      InvalidInput: There is no such figure.
    """
    rooms = _rooms_by_figure()
    if name not in rooms:
        raise InvalidInput(f"unknown figure {name!r}; known: {', '.join(sorted(rooms))}, all")
    return import_module(f"figures.{rooms[name]}.{name}")


def _rooms_by_figure() -> dict[str, str]:
    paths = (path for room in ROOMS for path in (FOLDER / room).glob("*.py"))
    return {p.stem: p.parent.name for p in paths if p.stem not in ("__init__", "rows")}


def recorded(name: str) -> Path:
    """Return the path of a figure's recorded table."""
    return DATA / f"{RECORDED_AS.get(name, name)}.csv"


def made_by(name: str, runs: list[str] | None = None) -> list[str]:
    """The commands that make a figure's table, each a line; of its recorded runs if not of `runs`.

    runs: GROUP/METHOD-SEED of each.
    """
    update = f"opd figures {name} --run {{runs}} --update-data"
    if name == "training":
        return ["opd demo", update.format(runs="results/demo/runs/*")]
    if name == "agents":
        runs = ["results/paper/games/*", "results/paper/agents/*"]
        return ["opd paper --groups games agents", update.format(runs=" ".join(runs))]
    if name in FROM_RUNS:
        about = recorded(name).with_suffix(".json")
        if runs is None and about.exists():
            runs = list(read_object(about).get("runs", {}))
        methods = dict.fromkeys(run.rpartition("-")[0] or run for run in runs or [])
        whole = not methods or (name in RECORDED_AS and name != "warning")
        folders = ["single/*", "multi/*"] if whole else [f"{method}-*" for method in methods]
        return ["opd paper", update.format(runs=" ".join(f"results/paper/{x}" for x in folders))]
    return [f"opd study run {RECORDED_AS.get(name, name)} --update-figures"]


def read_table(path: Path) -> "pd.DataFrame":
    """Read a recorded table, older ones under the present names of metrics.

    Raises:
      InvalidInput: The file is not a CSV table.
    """
    import pandas as pd

    with reading(path):
        try:
            table = pd.read_csv(path, dtype={"outcomes": str})
        except (ValueError, pd.errors.ParserError) as error:  # of bytes, columns or an empty file
            raise InvalidInput(f"{path} is not a CSV table ({error})") from error
    table = table.rename(columns=present_key)
    for column in {"metric", "indicator"} & set(table):
        table[column] = table[column].map(present_key)
    return table
