"""Figures of hidden contexts and of prefix sources draw the values of their tables."""

from math import log

import pandas as pd
import pytest

from figures.registry import DATA
from figures.study import hidden_context, prefix_sources


def values(table: pd.DataFrame, order: str, **filters: object) -> tuple[list[float], list[float]]:
    for column, value in filters.items():
        table = table[table[column] == value]
    table = table.sort_values(order)
    return table[order].tolist(), table["value"].tolist()


def line(axes, label: str) -> tuple[list[float], list[float]]:
    (match,) = [x for x in axes.lines if x.get_label() == label]
    return list(map(float, match.get_xdata())), list(map(float, match.get_ydata()))


def test_hidden_contexts_are_the_tables_numbers() -> None:
    table = pd.read_csv(DATA / "hidden_context.csv")
    remaining, told, views, noise = hidden_context.draw(table).axes
    for name, look in hidden_context.STUDENTS.items():
        select = {"strength": hidden_context.STRENGTH, "student": name}
        expected = values(table, "horizon", quantity="remaining", **select)
        assert line(remaining, look["label"]) == expected
        expected = values(table, "horizon", quantity="context_in_response", **select)
        assert line(told, look["label"]) == expected
    entropies = [x.get_ydata()[0] for x in remaining.lines if len(set(x.get_ydata())) == 1]
    assert entropies == [pytest.approx(log(hidden_context.NUM_CONTEXTS))]
    for view, look in hidden_context.VIEWS.items():
        expected = values(table, "informed", quantity="kl_by_view", view=view)
        assert line(views, look["label"]) == expected
    first = table[(table["estimator"] == "plain") & (table["gamma"] == 0)].set_index("quantity")
    assert f"{100 * first.loc['noise_left', 'value']:.0f} %" in noise.get_title()
    points = [x for x in noise.lines if len(x.get_xdata()) == len(hidden_context.SHOWN)]
    assert points[0].get_xdata()[0] == first.loc["within_at_rest", "value"]
    assert points[1].get_xdata()[0] == first.loc["between_at_rest", "value"]


def test_prefix_sources_are_the_tables_numbers() -> None:
    table = pd.read_csv(DATA / "prefix_sources.csv")
    path, distance, ratios, noise = prefix_sources.draw(table).axes
    select = {"horizon": prefix_sources.HORIZON}
    for selection, look in (prefix_sources.TEACHER, prefix_sources.SFT, prefix_sources.REPLAY):
        expected = values(table, "moved", quantity="bias", **select, **selection)
        assert line(path, look["label"]) == expected
    selection, look = prefix_sources.TEACHER
    x, y = line(distance, look["label"])
    bias = values(table, "moved", quantity="bias_stated", **select, **selection)[1]
    moved = values(table, "moved", quantity="kl_source", **select, **selection)[1]
    assert (x, y) == (moved[::-1], bias[::-1])
    replay = select | {"source": "replay", "gamma": 1.0}
    moved = values(table, "moved", quantity="kl_source", ratio="token", **replay)[1]
    bias = values(table, "moved", quantity="bias", ratio="token", **replay)[1]
    assert line(ratios, "token ratios, γ = 1")[1] == bias[1:]
    assert line(ratios, "token ratios, γ = 1")[0] == moved[1:]
    variance = values(table, "moved", quantity="variance_ratio", ratio="sequence", **replay)[1]
    assert line(noise, "response ratios, 32 tokens")[1] == variance
