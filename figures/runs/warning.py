"""The early-warning timeline: which indicators left the healthy range before the collapse."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style

COLUMNS = ("run", "seed", "kind", "step", "indicator", "value", "z", "alarm", "collapse")
CAPTION = (
    "Indicators of runs that collapse, step by step, as standard deviations from the healthy runs "
    "at that step (median over seeds, cut at ±10). Triangles: the indicator's alarm goes off in a "
    "seed. Lines: collapse, told from outcomes alone. Right: how many steps before the collapse "
    "the alarm went off, and the z first passed ±5 (medians over the seeds that were warned); in "
    "brackets the seeds warned, then the healthy runs in which the same happened. An indicator of "
    "the outcomes themselves detects rather than predicts."
)
INDICATORS = (
    "divergence/reverse_kl",
    "divergence/outside_topk_expected",
    "divergence/student_entropy",
    "divergence/teacher_entropy",
    "signal/signal_top1_share",
    "tokens/confident_impossible_share",
    "grad_norm",
    "response/length",
    "repetition/repeated_share",
    "response/truncated_share",
)
CUT, FAR, MOST = 10.0, 5.0, 4
SMALL: dict[str, Any] = {"fontsize": 6, "va": "center", "ha": "center"}
HEAD = SMALL | {"va": "bottom", "fontweight": "bold"}
COLLAPSED, ROW = 0.5, 3
"""Collapse: a reward below this part of that of the first ROW steps, or a truncated share above
it, ROW steps in a row; the first of them counts."""


def draw(table: pd.DataFrame) -> Figure:
    """A panel a kind of failing run, a row an indicator."""
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if kind != "healthy"][:MOST]
    indicators = list(dict.fromkeys(table["indicator"]))
    table = table.assign(alarm=table["alarm"].astype(bool), far=table["z"].abs() > FAR)
    healthy = table[table["kind"] == "healthy"]
    height = 0.7 + len(kinds) * (0.35 + 0.15 * len(indicators))
    figure, axes = style.panels(len(kinds), 1, height)
    norm = mpl.colors.Normalize(-CUT, CUT)
    for place, kind in zip(axes, kinds, strict=True):
        image = timeline(place, table[table["kind"] == kind], healthy, indicators, norm)
        seeds = table[table["kind"] == kind]["run"].nunique()
        place.set_title(f"{kind} ({seeds} seed{'s' if seeds > 1 else ''})")
    axes[-1].set_xlabel("step")
    figure.set_layout_engine("constrained", rect=(0, 0, 0.93, 1))  # room for the leads
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=50, shrink=0.6, pad=0.01)
    bar.set_label("standard deviations from healthy runs")
    return figure


def timeline(
    axes: Any, rows: pd.DataFrame, healthy: pd.DataFrame, indicators: list[str], norm: Any
) -> Any:
    """z by indicator and step, alarms, collapses, and what the lead was."""
    z = rows.pivot_table(index="indicator", columns="step", values="z", aggfunc="median")
    z = z.reindex(indicators).clip(-CUT, CUT)
    steps = z.columns.to_numpy(float)
    width = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
    edges = np.arange(len(indicators) + 1) - 0.5
    image = axes.pcolormesh(width, edges, z.to_numpy(), norm=norm, cmap="PuOr", rasterized=True)
    axes.text(1.08, edges[0], "alarm", transform=axes.get_yaxis_transform(), **HEAD)
    axes.text(1.26, edges[0], "|z| > 5", transform=axes.get_yaxis_transform(), **HEAD)
    for y, indicator in enumerate(indicators):
        mine, others = (x[x["indicator"] == indicator] for x in (rows, healthy))
        first = mine[mine["alarm"]].groupby("run")["step"].min()
        axes.plot(first + 0.5, [y] * len(first), ">", ms=3.5, color="black", mec="white", mew=0.4)
        for x, column in ((1.08, "alarm"), (1.26, "far")):
            text = lead(mine, others, column)
            axes.text(x, y, text, transform=axes.get_yaxis_transform(), **SMALL)
    for step in rows.groupby("run")["collapse"].first().dropna():
        axes.axvline(step, color="black", lw=1)
    axes.set_yticks(range(len(indicators)), indicators, fontsize=6)
    axes.set_ylim(edges[-1], edges[0])
    axes.grid(visible=False)
    return image


def lead(rows: pd.DataFrame, healthy: pd.DataFrame, column: str) -> str:
    """'5 [2/3, 0/8]': median lead, seeds warned before their collapse, healthy runs warned."""
    collapse = rows.groupby("run")["collapse"].first().dropna()
    first = rows[rows[column]].groupby("run")["step"].min().reindex(collapse.index)
    early = (collapse - first)[lambda x: x > 0]
    false = healthy.groupby("run")[column].any()
    count = f"[{len(early)}/{len(collapse)}, {int(false.sum())}/{len(false)}]"
    return f"{early.median():g} {count}" if len(early) else f"– {count}"


def collect(runs: list[Path]) -> pd.DataFrame:
    """The indicators of all runs; a run whose outcomes never collapse is healthy.

    z = (value - mean) / sd over the healthy runs at the steps within 2 of this one. Of a healthy
    run only the first step and what went off are kept, so that tables stay small.

    Raises:
      ValueError: fewer than 2 runs are healthy, or none collapses.
    """
    from diagnostics.alarms.alarms import replay
    from diagnostics.records.run_folders import methods, recorded_rows

    records = []
    for method, mine in methods(runs).items():
        for run in mine:
            record = recorded_rows(run)
            end = collapse(record)
            raised = {(alarm.rule.metric, alarm.step) for alarm in replay(record)}
            seed = run.name.rsplit("-", 1)[-1]
            about = {"run": run.name, "seed": seed, "kind": method if end else "healthy"}
            records += [
                about
                | {"step": row["step"], "indicator": name, "value": float(f"{row[name]:.4g}")}
                | {"alarm": (name, row["step"]) in raised, "collapse": end}
                for row in record
                for name in INDICATORS
                if row.get(name) is not None
            ]
    table = pd.DataFrame(records)
    healthy = table[table["kind"] == "healthy"]
    if healthy["run"].nunique() < 2 or len(healthy) == len(table):
        raise InvalidInput(
            f"{healthy['run'].nunique()} of {table['run'].nunique()} runs are healthy; the "
            "timeline needs at least 2 healthy ones and one that collapses"
        )
    table["z"] = standardised(table, healthy)
    telling = (table["kind"] != "healthy") | table["alarm"] | (table["z"].abs() > FAR)
    first = ~table.duplicated(["run", "indicator"])
    return table.loc[telling | first, list(COLUMNS)]


def standardised(table: pd.DataFrame, healthy: pd.DataFrame) -> pd.Series:
    """z of every row against the healthy runs' values of its indicator within 2 steps."""
    found = pd.Series(np.nan, index=table.index)
    for indicator, rows in table.groupby("indicator"):
        at = healthy[healthy["indicator"] == indicator]
        for step, some in rows.groupby("step"):
            near = at[(at["step"] - step).abs() <= 2]["value"]
            spread = near.std()
            if spread > 0:
                found[some.index] = ((some["value"] - near.mean()) / spread).round(2)
    return found


def collapse(rows: Sequence[dict[str, Any]]) -> float | None:
    """The step of the collapse, or None; see COLLAPSED."""
    start = np.mean([row["response/reward"] for row in rows[:ROW]])
    bad = [
        row["response/reward"] < COLLAPSED * start or row["response/truncated_share"] > COLLAPSED
        for row in rows
    ]
    for i in range(len(bad) - ROW + 1):
        if all(bad[i : i + ROW]):
            return float(rows[i]["step"])
    return None
