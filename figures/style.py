"""Shared figure style: size, fonts, colors, interval bands, and reproducible output files.

Uses `Figure` objects only: no pyplot, no global state, no display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from diagnostics.errors import InvalidInput

PAGE_WIDTH, COLUMN_WIDTH = 7.0, 3.3
"""Widths in inches at which figures are printed: across a page, and in one of its two columns."""
MAX_HEIGHT = 9.2
"""Height in inches of a printed page without its margins."""
MIN_FONT_SIZE = 7
"""Smallest size of a printed text in points."""

SHORT_RANGE = 30
"""Ratio of the limits of a logarithmic axis below which it has ticks between the powers of ten."""

# Okabe-Ito palette, distinguishable with color blindness
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)

RC_PARAMS = {
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


def style_context() -> Any:
    """Return the matplotlib context in which figures are drawn and saved."""
    return mpl.rc_context({**mpl.rcParamsDefault, **RC_PARAMS})


def make_panels(
    rows: int, columns: int, height: float, width: float = PAGE_WIDTH
) -> tuple[Figure, list[Any]]:
    """Create a figure with a grid of axes.

    Args:
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        height: Height of the figure in inches.
        width: Width of the figure in inches.

    Returns:
        The figure, and its axes row by row.

    Raises:
        InvalidInput: There are no rows or columns, because the table has nothing to draw.
    """
    if not rows or not columns:
        raise InvalidInput("the table has no rows that this figure draws; check --table or --run")
    figure = Figure(figsize=(width, min(height, MAX_HEIGHT)), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def is_column(width: float) -> bool:
    """Return whether a figure of this width in inches is printed in one column."""
    return width < PAGE_WIDTH


def plot_band(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    **options: Any,
) -> None:
    """Plot a line with its interval as a shaded band.

    Args:
        axes: Axes to draw on.
        x: Horizontal coordinates.
        y: Values of the line.
        low: Lower ends of the intervals.
        high: Upper ends of the intervals.
        **options: Options of `Axes.plot` for the line.
    """
    (line,) = axes.plot(x, y, **options)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def set_log_axis(axes: Any) -> None:
    """Make the y axis logarithmic, with at least two tick labels however short its range is."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < SHORT_RANGE:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    label_log_axis(axes.yaxis)


def label_log_axis(axis: Any) -> None:
    """Give a logarithmic axis the coarsest ticks of which two have a label, unless it has two.

    Of the decades, 1, 2 and 5 of each, all digits, and equal distances. A range between two powers
    of ten has no tick of the first kind, and one of a factor of two may have one of the second.

    Args:
        axis: An axis whose data and limits are final.
    """
    low, high = sorted(axis.get_view_interval())
    locators = [LogLocator(subs=(1, 2, 5)), LogLocator(subs=range(1, 10)), MaxNLocator(4)]
    while num_labels(axis, low, high) < 2 and locators:
        axis.set_major_locator(locators.pop(0))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def has_automatic_ticks(axis: Any) -> bool:
    """Return whether the ticks and labels of an axis follow from its limits."""
    chosen = isinstance(axis.get_major_locator(), FixedLocator | NullLocator)
    named = isinstance(axis.get_major_formatter(), FixedFormatter | NullFormatter)
    return not chosen and not named


def num_labels(axis: Any, low: float, high: float) -> int:
    """Return how many ticks of an axis have a label between its limits."""
    count = 0
    for locator, formatter in (
        (axis.get_major_locator(), axis.get_major_formatter()),
        (axis.get_minor_locator(), axis.get_minor_formatter()),
    ):
        values = locator()
        labels = formatter.format_ticks(values)
        count += sum(
            low <= x <= high and bool(label) for x, label in zip(values, labels, strict=True)
        )
    return count


def sequential_colors(num_colors: int) -> list[Any]:
    """Return `num_colors` colors from light to dark, for an ordered quantity such as a discount."""
    scale = mpl.colormaps["viridis_r"]
    return [scale(0.12 + 0.83 * i / max(1, num_colors - 1)) for i in range(num_colors)]


def save_figure(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf; the same figure always gives the same bytes.

    Args:
        figure: The figure to save.
        out: Output folder, created if it does not exist.
        name: File name without its suffix.

    Returns:
        The paths of the two files.
    """
    out.mkdir(parents=True, exist_ok=True)
    png, pdf = out / f"{name}.png", out / f"{name}.pdf"
    fix_layout(figure)
    figure.savefig(png, metadata={"Software": None})
    figure.savefig(pdf, metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return [png, pdf]


def fix_layout(figure: Figure) -> None:
    """Label logarithmic axes, lay a figure out once, and remove its layout engine.

    It is laid out at the resolution of its PNG.
    `savefig` of a figure with an engine, even one that does nothing, draws everything twice.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log" and has_automatic_ticks(axis):
                label_log_axis(axis)
    engine = figure.get_layout_engine()
    if engine is not None:
        # This canvas keeps its renderer, so that the PNG finds the sizes of the texts of the layout
        FigureCanvasAgg(figure)
        figure.set_dpi(mpl.rcParams["savefig.dpi"])
        engine.execute(figure)
        figure.set_layout_engine(None)
