"""Logarithmic axes have two tick labels or more, whatever their range."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from figures import style
from tests.figures.print_checks import tick_labels

RANGES = {
    "one power of ten": (0.2, 9.0),
    "several decades": (1e-4, 1e3),
    "a factor of three": (0.06, 0.19),
    "a factor of two": (0.21, 0.44),
    "a few percent": (3.01, 3.13),
}
"""Limits of an axis."""


def draw(low: float, high: float) -> Axes:
    axes: Axes = style.make_panels(1, 1, 2.0, width=style.COLUMN_WIDTH)[1][0]
    axes.plot([low, high], [low, high])
    axes.set(xlim=(low, high), ylim=(low, high))
    return axes


@pytest.mark.parametrize(("low", "high"), RANGES.values(), ids=RANGES)
def test_a_saved_figure_labels_both_log_axes(tmp_path: Path, low: float, high: float) -> None:
    with style.style_context():
        axes = draw(low, high)
        axes.set(xscale="log")
        style.set_log_axis(axes)
        style.save_figure(axes.figure, tmp_path, "figure")
        for axis in (axes.xaxis, axes.yaxis):
            shown = [label.get_text() for label in tick_labels(axis)]
            assert len(set(shown)) == len(shown) >= 2
            assert len(shown) < 10


def test_ticks_that_were_chosen_or_hidden_stay(tmp_path: Path) -> None:
    with style.style_context():
        axes = draw(0.21, 0.44)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks([0.3], ["middle"], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(style.NullFormatter())
        axes.yaxis.set_minor_formatter(style.NullFormatter())
        style.save_figure(axes.figure, tmp_path, "figure")
        assert [label.get_text() for label in tick_labels(axes.xaxis)] == ["middle"]
        assert tick_labels(axes.yaxis) == []
