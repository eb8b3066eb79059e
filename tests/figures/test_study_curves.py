"""Curves of the study's figures: those that coincide stay visible, and titles are true."""

from types import ModuleType

import pandas as pd
import pytest
from matplotlib.figure import Figure

from figures import style
from figures.registry import DATA, read_table
from figures.study import bias_variance, collapse, estimators, horizon, improvement, rows, support

NEAR, FAR = [1.0, 2.0, 3.0], [5.0, 6.0, 9.0]


def curve(values: list[float], color: str, **options: object) -> rows.Curve:
    table = pd.DataFrame({"n": [1.0, 2.0, 3.0], "value": values})
    return table.assign(low=table["value"] - 1, high=table["value"] + 1), {
        "color": color,
        **options,
    }


def titles(module: ModuleType, name: str) -> list[str]:
    return [ax.get_title() for ax in module.draw(read_table(DATA / f"{name}.csv")).axes]


def test_coinciding_curves_alternate_and_share_a_band() -> None:
    axes = Figure().subplots()
    curves = [curve(NEAR, style.BLUE), curve(FAR, style.RED), curve([1.0, 2.0, 3.1], style.GREEN)]
    empty = (curves[0][0].iloc[:0], {"color": style.GREY})
    assert [len(group) for group in rows.group_coinciding(curves, "n", log=False)] == [2, 1]
    rows.plot_curves(axes, [*curves, empty], "n")
    blue, green, red = axes.lines
    assert [line.get_color() for line in axes.lines] == [style.BLUE, style.GREEN, style.RED]
    assert (blue.get_linestyle(), green.get_linestyle(), red.get_linestyle()) == ("--", "--", "-")
    assert len(axes.collections) == 2
    # dashes of one curve lie in the gaps of the other
    offsets = [rows.interleaving(i, 3, {})["linestyle"][0] for i in range(3)]
    assert offsets == [0, 2 * rows.DASH, rows.DASH]


def test_what_coincides_depends_on_the_scale_and_the_limits() -> None:
    curves = [curve([1e-3, 1.0, 10.0], "red"), curve([1e-2, 1.0, 10.0], "blue")]
    assert len(rows.group_coinciding(curves, "n", log=False)) == 1
    assert len(rows.group_coinciding(curves, "n", log=True)) == 2
    close = [curve([1.0, 1.0, 1.0], "red"), curve([1.0, 1.0, 1.1], "blue")]
    assert len(rows.group_coinciding(close, "n", log=False)) == 2
    assert len(rows.group_coinciding(close, "n", log=False, limits=(0, 10))) == 1
    assert rows.group_coinciding([], "n", log=True) == []


def test_end_intervals_are_the_last_rows_beside_the_data() -> None:
    axes = Figure().subplots()
    curves = [curve(NEAR, style.BLUE), curve(FAR, style.RED)]
    rows.plot_curves(axes, curves, "n", bands=False)
    rows.plot_end_intervals(axes, curves, "n")
    bars = [[*line.get_ydata()] for line in axes.lines if len(line.get_ydata()) == 2]
    assert bars == [[2.0, 4.0], [8.0, 10.0]]
    last = axes.transAxes.inverted().transform(axes.transData.transform((3.0, 0.0)))[0]
    places = [line.get_xdata()[0] for line in axes.lines if len(line.get_ydata()) == 2]
    assert last < min(places) < max(places) < 1
    assert max(axes.get_xticks()) <= 3


def test_titles_state_what_the_table_says() -> None:
    table = read_table(DATA / "collapse.csv")
    assert collapse.describe_mass(table, "teacher") == "un-normalised ends at q(S)/e"
    assert collapse.describe_mass(table, "afar") == "renormalised ends at 0.51 q(S)"
    collapsed = table["quantity"] == "mass_over_fixed_point"
    other = table.assign(value=table["value"].where(~collapsed, 2.0))
    assert collapse.describe_mass(other, "teacher") == "mass on the support"

    drawn = titles(horizon, "horizon")
    assert drawn[2] == "γ = 1: a value baseline divides\nthe variance by 43 at T = 512"
    drawn = titles(support, "support")
    assert drawn[0] == "The teacher's top K: lowest is\nun-normalised, −0.08 at K = 4"
    assert "reaches 0.9 at n = 4,096" in titles(improvement, "improvement")[0]
    shares = read_table(DATA / "improvement.csv")
    low = shares.assign(**{name: shares[name] / 2 for name in ("value", "low", "high")})
    assert improvement.draw(low).axes[0].get_title() == "Sampled reverse KL"
    best = read_table(DATA / "bias_variance.csv")
    best = best[best["quantity"] == "best_gamma"]
    assert bias_variance.rises(best)
    assert not bias_variance.rises(best.assign(value=-best["value"]))


def test_a_column_of_estimators_is_a_selection_of_every_kind() -> None:
    table = pd.read_csv(DATA / "estimators.csv")
    figure = estimators.draw(table, style.COLUMN_WIDTH)
    labels = [tick.get_text().replace("\n", " ") for tick in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == len(labels) < 30
    for text in ("k1", "k3", "full reverse KL", "top K, sampled tail", "sampled reverse KL  γ=1"):
        assert text in labels
    assert sum("temp. 0.7" in label for label in labels) == 4
    bias = table[table["quantity"] == "bias"].set_index(["estimator", "gamma", "sampler", "length"])
    row = bias.loc[("k3", 0.0, "student", "sequence_sum")]
    points = [c for c in figure.axes[0].lines if len(c.get_xdata()) > 3]
    drawn = {y: x for line in points for x, y in zip(*line.get_data(), strict=True)}
    assert drawn[labels.index("k3")] == pytest.approx(row["value"])
