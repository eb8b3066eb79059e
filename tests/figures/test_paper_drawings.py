"""What the paper's figures draw: every run, every character, and shares that add up."""

import numpy as np
import pytest

from figures import style
from figures.paper import comparison, loop, toy
from figures.registry import DATA, read_table


@pytest.mark.parametrize("width", [style.PAGE_WIDTH, style.COLUMN_WIDTH])
def test_a_comparison_draws_every_run_and_counts_those_at_0(width: float) -> None:
    table = read_table(DATA / "paper_evaluations.csv")
    with style.style_context():
        figure = comparison.draw(table, width)
    title = comparison.TITLES["table4"]
    (axes,) = [x for x in figure.axes if x.get_title(loc="left") == title]
    methods = comparison.TABLES["table4"].methods
    final = table[(table["group"] == "single") & table["method"].isin(methods)]
    final = final[final["step"] == final["step"].max()]
    dots = np.concatenate([x.get_xdata() for x in axes.lines if x.get_marker() == "o"])
    assert sorted(dots) == sorted(final["accuracy"])
    collapsed = final[final["accuracy"] < comparison.COLLAPSED].groupby("method").size()
    expected = [f"{n} of 5 at 0" for n in collapsed.reindex(methods).dropna().astype(int)]
    assert [text.get_text() for text in axes.texts] == expected
    assert "3 of 5 at 0" in expected


def test_the_text_of_a_loop_is_whole_and_marks_its_repetition() -> None:
    table = read_table(DATA / "loop.csv")
    segments = loop.text_segments(table, 50)
    assert "".join(text for *_, text, _ in segments) == "".join(table["text"].astype(str))
    repeated = table.loc[table["repeated"], "text"].astype(str)
    assert "".join(text for *_, text, inside in segments if inside) == "".join(repeated)
    ends = {line: start + len(text) for line, start, text, _ in segments}
    assert set(list(ends.values())[:-1]) == {50}
    longest = loop.text_segments(table, 10)
    assert max(line for line, *_ in longest) == loop.MAX_LINES - 1
    assert longest[-1][2].endswith("…")


def test_the_shares_of_a_map_add_up_to_1_at_every_time_step() -> None:
    table = read_table(DATA / "toy.csv")
    for task, target in toy.TASKS.items():
        shares = toy.visit_shares(table, task, 1.0)
        assert np.nansum(shares, axis=0) == pytest.approx(np.ones(21))
        start = -np.sign(target) * toy.START
        assert shares[round((start + toy.LIMIT) / toy.CELL), 0] == 1
