"""One look for every figure: size, type, colours, interval bands, and files that do not change.

Draws with `Figure` objects alone: no pyplot, no global state, no display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from diagnostics.errors import InvalidInput

WIDTH = 7.0
"""Inches; two columns of a paper."""

# Okabe and Ito's palette, safe for colour-blind readers
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)

LOOK = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "opdlab",
    "pdf.fonttype": 42,
}


def look() -> Any:
    """Context in which figures are made and saved."""
    return mpl.rc_context({**mpl.rcParamsDefault, **LOOK})


def panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Any]]:
    """A figure of WIDTH x height inches and its axes, row by row.

    Raises:
      InvalidInput: no rows or columns, because the table holds nothing that is drawn.
    """
    if not rows or not columns:
        raise InvalidInput("the table holds nothing that this figure draws")
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def curve(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    **line: Any,
) -> None:
    """A line and its interval band."""
    (drawn,) = axes.plot(x, y, **line)
    axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.18, linewidth=0)


def log_axis(axes: Any) -> None:
    """A logarithmic y axis of what is drawn, with at least two labels however short it is."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 30:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def shades(count: int) -> list[Any]:
    """`count` ordered colours, light to dark, for an ordered quantity such as the discount."""
    scale = mpl.colormaps["viridis_r"]
    return [scale(0.12 + 0.83 * i / max(1, count - 1)) for i in range(count)]


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf; the same figure gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    png, pdf = out / f"{name}.png", out / f"{name}.pdf"
    figure.savefig(png, metadata={"Software": None})
    figure.savefig(pdf, metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return [png, pdf]
