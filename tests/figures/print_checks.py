"""What a figure shows when it is printed: sizes, overlaps, names, ticks, hidden curves, legends."""

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from figures import labels, style

CODE_NAME = re.compile(r"[A-Za-z]{2,}_[A-Za-z0-9]+|\b[a-z_]+/[a-z]+_[a-z_]+|--[a-z]")
"""An identifier, a metric's column, or a command-line flag."""
SLACK = 1.5
"""Pixels by which two texts may touch: their boxes include the space of letters like g."""


def print_problems(figure: Figure, table: pd.DataFrame, width: float) -> list[str]:
    """Return what a reviewer of the printed figure would object to.

    Args:
        figure: A figure that has not been laid out yet.
        table: The table that it was drawn from.
        width: Width in inches at which it is printed.

    Returns:
        One line a problem; none for a figure that is fit to be printed.
    """
    size = figure.get_size_inches()
    problems = []
    if abs(size[0] - width) > 1e-6:
        problems.append(f"the figure is {size[0]:g} in wide, not {width:g}")
    if size[1] > style.MAX_HEIGHT:
        problems.append(f"the figure is {size[1]:.2f} in high, a page {style.MAX_HEIGHT:g}")
    FigureCanvasAgg(figure)
    figure.set_dpi(mpl.rcParams["savefig.dpi"])
    figure.draw_without_rendering()  # lays it out and places its texts
    texts = [(text, text.get_window_extent()) for text in shown_texts(figure)]
    problems += text_problems(figure, texts, code_names(table))
    explained = explained_colors(figure)
    for axes in figure.axes:
        problems += [f"{axes_name(axes)}: {x}" for x in tick_problems(axes)]
        problems += [f"{axes_name(axes)}: {x}" for x in curve_problems(axes)]
        problems += [f"{axes_name(axes)}: {x}" for x in label_problems(axes)]
        problems += [f"{axes_name(axes)}: {x}" for x in legend_problems(axes, explained)]
    return problems


def axes_name(axes: Axes) -> str:
    """Return the title or the labels of axes, to name them in a message."""
    title = axes.get_title(loc="left") or axes.get_title() or axes.get_ylabel()
    return f"panel {list(axes.figure.axes).index(axes)} ({title})"


def code_names(table: pd.DataFrame) -> set[str]:
    """Return the values of a table's text columns that are code names of methods or metrics."""
    known = {
        name
        for names in (labels.METHODS, labels.METRICS, labels.PAIRS)
        for name, label in names.items()
        if name != label
    }
    text_columns = [c for c in table if not pd.api.types.is_numeric_dtype(table[c])]
    values = {str(x) for c in text_columns if c != "text" for x in table[c].unique()}
    return {x for x in values if x in known or CODE_NAME.search(x)}


def shown_texts(figure: Figure) -> Iterator[Text]:
    """Yield the texts that are drawn: of ticks only those within the axis."""
    hidden: set[int] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            shown = {id(label) for label in tick_labels(axis)}
            for tick in ticks:
                hidden |= {id(x) for x in (tick.label1, tick.label2)} - shown
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible() and id(text) not in hidden:
            parent = text.axes
            if parent is None or parent.get_visible():
                yield text


def tick_labels(axis: Any) -> list[Text]:
    """Return the labels of an axis that are drawn: not empty, and within its limits."""
    if not axis.axes.axison or not axis.get_visible():
        return []
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (low if axis.get_scale() == "log" else max(abs(low), abs(high)))
    shown = []
    for ticks in (axis.get_major_ticks(), axis.get_minor_ticks()):
        for tick in ticks:
            for label in (tick.label1, tick.label2):
                inside = low - slack <= tick.get_loc() <= high + slack
                if inside and label.get_visible() and label.get_text().strip():
                    shown.append(label)
    return shown


def text_problems(figure: Figure, texts: list[tuple[Text, Bbox]], names: set[str]) -> Iterator[str]:
    """Yield the texts that are too small, cut off, over each other, or code names."""
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in texts:
        content = text.get_text()
        if text.get_fontsize() < style.MIN_FONT_SIZE:
            yield f"{content!r} has {text.get_fontsize():g} pt"
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            yield f"{content!r} is cut off at the edge of the figure"
        if content in names or (CODE_NAME.search(content) and not is_token(text)):
            yield f"{content!r} is a code name"
    for i, j in overlaps([box for _, box in texts]):
        yield f"{texts[i][0].get_text()!r} overlaps {texts[j][0].get_text()!r}"


def overlaps(boxes: list[Bbox]) -> list[tuple[int, int]]:
    """Return the pairs of boxes that overlap by more than SLACK in both directions."""
    low = np.array([box.min for box in boxes]).reshape(-1, 2)
    high = np.array([box.max for box in boxes]).reshape(-1, 2)
    sizes = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    pairs = np.argwhere(np.triu((sizes > SLACK).all(-1), k=1))
    return [(int(i), int(j)) for i, j in pairs]


def is_token(text: Text) -> bool:
    """Return whether a text quotes a token of a model, which is drawn without mathematics."""
    return not text.get_parse_math()


def tick_problems(axes: Axes) -> Iterator[str]:
    """Yield axes whose tick labels do not differ, or tell no scale."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        shown = [label.get_text() for label in tick_labels(axis) if not is_token(label)]
        numbers = [x for x in shown if re.search(r"\d", x)]
        if len(set(numbers)) < len(numbers):
            yield f"tick labels of {name} repeat: {', '.join(shown)}"
        if len(shown) == 1:
            yield f"{name} has the single tick label {shown[0]!r}"


def curve_problems(axes: Axes) -> Iterator[str]:
    """Yield curves outside the axes, under another curve, or under the legend."""
    box = axes.get_window_extent()
    curves = [line for line in axes.lines if is_curve(line)]
    points = [line.get_transform().transform(line.get_xydata()) for line in curves]
    for line, xy in zip(curves, points, strict=True):
        inside = [box.x0 - 1 <= x <= box.x1 + 1 and box.y0 - 1 <= y <= box.y1 + 1 for x, y in xy]
        if not any(inside):
            yield f"the curve {line.get_label()!r} lies outside the axes"
    for (lower, low_xy), (upper, high_xy) in combinations(zip(curves, points, strict=True), 2):
        if len(low_xy) > 1 and len(high_xy) > 1 and hides(lower, low_xy, upper, high_xy):
            yield f"the curve {upper.get_label()!r} hides {lower.get_label()!r}"
    legend = axes.get_legend()
    if legend is not None:
        place = legend.get_window_extent()
        for line in axes.lines:
            path = line.get_transform().transform_path(line.get_path())
            if len(path.vertices) and path.intersects_bbox(place.shrunk(0.98, 0.98), filled=False):
                yield f"the legend covers the curve {line.get_label()!r}"


def is_curve(line: Line2D) -> bool:
    """Return whether a line joins several finite points of the data."""
    xy = np.asarray(line.get_xydata(), float)
    in_data = line.get_transform().contains_branch(line.axes.transData)
    joined = line.get_linestyle() not in ("None", "", " ") and len(xy) > 2
    return bool(line.get_visible() and in_data and joined and np.isfinite(xy).all(1).any())


def hides(lower: Line2D, low_xy: np.ndarray, upper: Line2D, high_xy: np.ndarray) -> bool:
    """Return whether a curve is solid and covers every point of an earlier one."""
    if lower.get_zorder() > upper.get_zorder():
        lower, low_xy, upper, high_xy = upper, high_xy, lower, low_xy
    if upper.get_linestyle() != "-" or lower.get_linewidth() > upper.get_linewidth() + 1:
        return False
    if lower.get_marker() not in ("None", None, "") and lower.get_marker() != upper.get_marker():
        return False
    low_xy, high_xy = (x[np.isfinite(x).all(1)] for x in (low_xy, high_xy))
    order = np.argsort(high_xy[:, 0], kind="stable")
    high_xy = high_xy[order]
    if low_xy[:, 0].min() < high_xy[0, 0] - 1 or low_xy[:, 0].max() > high_xy[-1, 0] + 1:
        return False
    y = np.interp(low_xy[:, 0], high_xy[:, 0], high_xy[:, 1])
    return bool(np.abs(y - low_xy[:, 1]).max() < 2)


def label_problems(axes: Axes) -> Iterator[str]:
    """Yield axes with numbers whose quantity is named nowhere."""
    if not axes.axison or not tick_labels(axes.xaxis) + tick_labels(axes.yaxis):
        return
    figure = axes.figure
    titled = bool(axes.get_title(loc="left") or axes.get_title())
    for name, axis, group, common in (
        ("x", axes.xaxis, axes.get_shared_x_axes(), figure.get_supxlabel()),
        ("y", axes.yaxis, axes.get_shared_y_axes(), figure.get_supylabel()),
    ):
        shown = [label.get_text() for label in tick_labels(axis)]
        numeric = shown and all(re.search(r"\d", x) for x in shown)
        siblings = [getattr(x, f"get_{name}label")() for x in group.get_siblings(axes)]
        below = [getattr(x, f"get_{name}label")() for x in same_row_or_column(axes, name)]
        if numeric and not (any(siblings) or common or any(below) or (name == "y" and titled)):
            yield f"{name} has numbers, but no label"


def same_row_or_column(axes: Axes, name: str) -> list[Axes]:
    """Return the axes that stand in the column (for x) or the row (for y) of these."""
    spec = axes.get_subplotspec()
    if spec is None:
        return []
    attribute = "colspan" if name == "x" else "rowspan"
    return [
        other
        for other in axes.figure.axes
        if (other_spec := other.get_subplotspec()) is not None
        and other_spec.get_gridspec() is spec.get_gridspec()
        and getattr(other_spec, attribute) == getattr(spec, attribute)
    ]


def explained_colors(figure: Figure) -> set[str]:
    """Return the colors of the texts of a figure and of what its legends show."""
    explained = {
        colors.to_hex(text.get_color()) for text in figure.findobj(Text) if text.get_text().strip()
    }
    for legend in figure.findobj(Legend):
        for handle in legend.legend_handles:
            explained |= artist_colors(handle)
        for handle in legend.findobj(lambda artist: hasattr(artist, "get_color")):
            explained |= artist_colors(handle)
    return explained


def legend_problems(axes: Axes, explained: set[str]) -> Iterator[str]:
    """Yield colors of marks that no legend, color bar or text of the same color explains."""
    marks = [*axes.lines, *axes.patches, *(c for c in axes.collections if c.get_array() is None)]
    if axes.get_label() == "<colorbar>":
        return
    used = set().union(*(artist_colors(mark) for mark in marks if mark.get_visible()), set())
    used = {x for x in used if not is_grey(x)}
    missing = used - explained
    if len(used) > 1 and missing:
        yield f"no legend explains the colors {', '.join(sorted(missing))}"


def artist_colors(artist: Any) -> set[str]:
    """Return the colors of a line, patch, collection or text as hexadecimal numbers."""
    found = set()
    for getter in ("get_color", "get_facecolor", "get_markerfacecolor", "get_edgecolor"):
        value = getattr(artist, getter, lambda: None)()
        if value is None or (isinstance(value, str) and value in ("none", "auto")):
            continue
        try:
            rgba = colors.to_rgba_array(value)
        except (ValueError, TypeError):
            continue
        found |= {colors.to_hex(x[:3]) for x in rgba if x[3] > 0}
    return found


def is_grey(color: str) -> bool:
    """Return whether a color has no hue: frames, reference lines and notes."""
    red, green, blue = colors.to_rgb(color)
    return max(red, green, blue) - min(red, green, blue) < 0.06
