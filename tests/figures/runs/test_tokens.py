"""Figures of tokens: tables equal those of plain loops, and figures show their values."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.records import rows
from figures.collect.tokens import token_table
from figures.runs import (
    anatomy,
    heatmap,
    ledger,
    lorenz,
    pairs,
    quadrants,
)
from tests.helpers.records.saved_runs import STEPS, expected_tokens


def test_tokens_are_those_of_the_batches(saved_runs: list[Path]) -> None:
    data, expected = token_table(saved_runs[:2], 3), expected_tokens(saved_runs[:2], 3)
    assert len(data) == len(expected)
    for name in ("position", "id", "ended", "repeated", "impossible"):
        assert data[name].tolist() == [row[name] for row in expected], name
    for name, column in (("cost", "cost"), ("energy", "energy"), ("student_entropy", "entropy")):
        assert np.allclose(data[name], [row[column] for row in expected], rtol=1e-9), name
    cluster_pairs = {(a, row["cluster"]) for a, row in zip(data["cluster"], expected, strict=True)}
    assert (
        len(cluster_pairs) == data["cluster"].nunique() == len({row["cluster"] for row in expected})
    )


def test_the_ledger_counts_each_token_once(saved_runs: list[Path]) -> None:
    table = ledger.collect(saved_runs)
    start = [row["entropy"] for row in expected_tokens(saved_runs[:2], 0)]
    threshold = float(np.quantile(start, 0.8))

    def kind(row: dict) -> str:
        if row["id"] < 5:  # the lab tokenizer's special tokens come first
            return "special"
        if row["repeated"]:
            return "repeated"
        if row["impossible"]:
            return "excluded"
        return "uncertain" if row["entropy"] > threshold else "rest"

    plain_rows = table[(table["method"] == "plain") & (table["step"] == 3)]
    expected = expected_tokens(saved_runs[:2], 3)
    kinds = {kind(row) for row in expected}
    assert {"special", "uncertain", "rest"} <= kinds
    for quantity, weigh in (("energy", lambda row: row["energy"]), ("tokens", lambda _: 1.0)):
        quantity_rows = plain_rows[plain_rows["quantity"] == quantity].set_index("kind")
        assert set(quantity_rows.index) == kinds
        for name in kinds:
            part = sum(weigh(row) for row in expected if kind(row) == name)
            share = part / sum(weigh(row) for row in expected)
            assert quantity_rows.loc[name, "value"] == pytest.approx(share, rel=1e-4)
            assert quantity_rows.loc[name, "low"] <= share * 1.0001
            assert quantity_rows.loc[name, "high"] >= share * 0.9999
    e = np.array([row["energy"] for row in expected])
    spread = plain_rows[plain_rows["quantity"] == "n_eff_share"]["value"].item()
    assert spread == pytest.approx(e.sum() ** 2 / (e**2).sum() / len(e), rel=1e-4)
    figure = ledger.draw(table)
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    energy = table[(table["method"] == "plain") & (table["quantity"] == "energy")]
    assert sum(bars) == pytest.approx(len(STEPS), abs=1e-3)
    assert set(np.round(energy["value"], 5)) <= set(np.round(bars, 5))


def test_a_token_is_of_the_first_kind_that_it_is() -> None:
    names = ("special", "repeated", "excluded", "uncertain", "rest")
    data = pd.DataFrame(
        {
            "id": [1, 9, 9, 9, 9],
            "repeated": [True, True, False, False, False],
            "impossible": [True, True, True, False, False],
            "student_entropy": [2.0, 2.0, 2.0, 2.0, 0.5],
        }
    )
    assert (
        ledger.classify_tokens(data, frozenset({1}), 1.0).tolist() == list(names) == [*ledger.KINDS]
    )


def test_lorenz_curves_take_the_largest_tokens_first(saved_runs: list[Path]) -> None:
    table = lorenz.collect(saved_runs)
    for quantity, size in (
        ("signal", lambda row: abs(row["cost"])),
        ("update", lambda row: row["energy"] ** 0.5),
    ):
        x = sorted((size(row) for row in expected_tokens(saved_runs[:2], 3)), reverse=True)
        curve = table[(table["method"] == "plain") & (table["step"] == 3)]
        curve = curve[curve["quantity"] == quantity]
        for share, value in zip(curve["tokens"], curve["value"], strict=True):
            count = share * len(x)
            num_whole = int(count)
            part = sum(x[:num_whole]) + (count - num_whole) * (
                x[num_whole] if num_whole < len(x) else 0
            )
            assert value == pytest.approx(part / sum(x), rel=2e-4, abs=1e-6)
        assert all(a <= b + 1e-9 for a, b in pairwise(curve["value"]))
        assert (curve["low"] <= curve["value"] + 1e-4).all()
        assert (curve["high"] >= curve["value"] - 1e-4).all()
        row = rows.read_rows(saved_runs[2] / "rows.jsonl")[0]
        single = table[(table["method"] == "other") & (table["step"] == 0)]
        single = single[(single["quantity"] == quantity) & (single["tokens"] == 0.01)]
        name = {"signal": "signal", "update": "energy"}[quantity]
        assert single["value"].item() == pytest.approx(
            row[f"signal/{name}_top1_share"], rel=0.05
        )  # the panel's histogram has levels 9 % wide


def test_equal_clusters_leave_no_interval() -> None:
    x = np.tile([4.0, 2.0, 1.0, 1.0], 6)
    value, low, high = lorenz.lorenz_curve(x, np.repeat(np.arange(6), 4), np.random.default_rng(0))
    assert np.allclose(low, value)
    assert np.allclose(high, value)
    top_quarter = lorenz.TOKEN_SHARES <= 0.25
    assert np.allclose(value[top_quarter], 2 * lorenz.TOKEN_SHARES[top_quarter]), (
        "a quarter of the tokens, half of it all"
    )
    assert value[-1] == 1


def test_heat_maps_pool_runs_by_their_tokens(saved_runs: list[Path]) -> None:
    table = heatmap.collect(saved_runs)
    expected = expected_tokens(saved_runs[:2], 3)
    plain_rows = table[(table["method"] == "plain") & (table["step"] == 3)]
    for first, last in ((0, 1), (2, 3), (16, 31)):
        bin_tokens = [row for row in expected if first <= row["position"] <= last]
        values = plain_rows[plain_rows["first"] == first].set_index("quantity")
        assert values.loc["cost", "last"] == last
        assert values.loc["cost", "tokens"] == values.loc["cut", "tokens"] == len(bin_tokens)
        assert values.loc["cost", "value"] == pytest.approx(
            np.mean([row["cost"] for row in bin_tokens]), rel=1e-4
        )
        assert values.loc["cost_95", "value"] == pytest.approx(
            np.quantile([row["cost"] for row in bin_tokens], 0.95), rel=1e-4
        )
        truncated = np.mean([not row["ended"] for row in bin_tokens])
        assert values.loc["cut", "value"] == pytest.approx(truncated, abs=1e-4)
    figure = heatmap.draw(table)
    maps = [axes.collections[0] for axes in figure.axes if axes.get_xlabel() or axes.collections]
    tiles = [np.ravel(x.get_array()) for x in maps if x.get_array() is not None]
    drawn_values = np.ma.concatenate(tiles).compressed()
    expected_values = plain_rows[plain_rows["quantity"].isin(heatmap.LABELS)]["value"]
    assert set(np.round(expected_values, 6)) <= set(np.round(drawn_values, 6))


def test_the_anatomy_adds_up_and_pools(saved_runs: list[Path]) -> None:
    table = anatomy.collect(saved_runs)
    totals = table[table["first"].isna() & (table["method"] == "plain") & (table["step"] == 3)]
    parts = totals.set_index("part")
    assert parts.loc["parts", "value"] == pytest.approx(
        parts.loc[[*anatomy.PARTS], "value"].sum(), rel=1e-3
    )
    for part in (*anatomy.PARTS, "parts"):
        values = [rows.read_rows(run / "rows.jsonl")[1] for run in saved_runs[:2]]
        n = np.array([row["divergence/tokens"] for row in values])
        x = np.array([row[f"divergence/kl_{part}"] for row in values])
        e = np.array([row[f"divergence/kl_{part}_se"] for row in values])
        assert parts.loc[part, "value"] == pytest.approx((n * x).sum() / n.sum(), rel=1e-4)
        assert parts.loc[part, "error"] == pytest.approx(
            np.sqrt((n**2 * e**2).sum()) / n.sum(), rel=1e-4
        )
    binned = table[(table["method"] == "plain") & (table["step"] == 3) & (table["first"] == 16)]
    assert binned["tokens"].iloc[0] == sum(
        16 <= row["position"] <= 31 for row in expected_tokens(saved_runs[:2], 3)
    )


def test_quadrants_hold_every_token_once(saved_runs: list[Path]) -> None:
    table = quadrants.collect(saved_runs)
    expected = expected_tokens(saved_runs[:2], 3)
    start = expected_tokens(saved_runs[:2], 0)
    x, y = (float(np.quantile([row[c] for row in start], 0.8)) for c in ("entropy", "kl"))
    plain_rows = table[(table["method"] == "plain") & (table["step"] == 3)]
    assert plain_rows[plain_rows["kind"] == "cell"]["tokens"].sum() == len(expected)
    energies = plain_rows[plain_rows["kind"] == "energy"].set_index("quadrant")
    for is_undecided, is_apart in ((a, b) for a in (False, True) for b in (False, True)):
        name = f"{'undecided' if is_undecided else 'decided'}, {'apart' if is_apart else 'near'}"
        quadrant_tokens = [
            r for r in expected if (r["entropy"] > x) == is_undecided and (r["kl"] > y) == is_apart
        ]
        share = sum(r["energy"] for r in quadrant_tokens) / sum(r["energy"] for r in expected)
        assert energies.loc[name, "share"] == pytest.approx(share, rel=1e-3, abs=1e-6)
    figure = quadrants.draw(table)
    share = energies.loc["undecided, apart", "share"]
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert any(f"{100 * share:.0f} % energy" in text for text in texts)
    counts = figure.axes[1].collections[0].get_array()
    assert np.nansum(np.ma.filled(counts, 0)) == len(expected)


def test_pairs_show_the_same_numbers(saved_runs: list[Path]) -> None:
    table = pairs.collect([saved_runs[2]])
    expected = expected_tokens([saved_runs[2]], 0)
    dots = table[table["panel"] == "scatter"]
    assert len(dots) == min(pairs.NUM_POINTS, len(expected))
    costs = sorted(np.log(dots["x"] / dots["y"]))
    assert np.allclose(costs, sorted(row["cost"] for row in expected), atol=0.02)
    bin_signal = [-row["cost"] for row in expected if 16 <= row["position"] <= 31]
    series = table[(table["panel"] == "gap") & np.isclose(table["x"], np.sqrt(17 * 32), rtol=1e-3)]
    series = series.set_index("series")
    assert series.loc["mean", "y"] == pytest.approx(np.mean(bin_signal), rel=1e-3)
    assert series.loc["quantiles", "y"] == pytest.approx(np.median(bin_signal), rel=1e-3)
    assert series.loc["quantiles", "low"] == pytest.approx(np.quantile(bin_signal, 0.05), rel=1e-3)
    figure = pairs.draw(table)
    assert sorted(figure.axes[0].lines[0].get_xdata()) == sorted(dots["x"])
