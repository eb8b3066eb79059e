"""Early-warning timeline: which indicators leave their healthy range before a collapse."""

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
    "Indicators of runs that collapse, by step, in standard deviations from the healthy runs at "
    "that step (median over seeds, clipped at ±10). Triangles: the indicator's alarm fires in a "
    "seed. Vertical lines: collapse, defined by reward and truncated responses alone. Right: "
    "steps from the alarm, and from the first |z| above 5, to the collapse (medians over the "
    "seeds with a warning); in brackets the seeds with a warning, then the healthy runs in which "
    "the same happened. An indicator of the outcomes themselves detects a collapse rather than "
    "predicts it."
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
MAX_Z, FAR_Z, MAX_KINDS = 10.0, 5.0, 4
LEAD_STYLE: dict[str, Any] = {"fontsize": 6, "va": "center", "ha": "center"}
HEADER_STYLE = LEAD_STYLE | {"va": "bottom", "fontweight": "bold"}
COLLAPSE_THRESHOLD, COLLAPSE_STEPS = 0.5, 3
"""A run collapses at the first of COLLAPSE_STEPS consecutive steps with a reward below
COLLAPSE_THRESHOLD times that of its first COLLAPSE_STEPS steps, or with a truncated share above
COLLAPSE_THRESHOLD."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel a kind of collapsing run and one row an indicator."""
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if kind != "healthy"][:MAX_KINDS]
    indicators = list(dict.fromkeys(table["indicator"]))
    table = table.assign(alarm=table["alarm"].astype(bool), far=table["z"].abs() > FAR_Z)
    healthy = table[table["kind"] == "healthy"]
    height = 0.7 + len(kinds) * (0.35 + 0.15 * len(indicators))
    figure, axes = style.make_panels(len(kinds), 1, height, width=width)
    norm = mpl.colors.Normalize(-MAX_Z, MAX_Z)
    for ax, kind in zip(axes, kinds, strict=True):
        image = draw_timeline(ax, table[table["kind"] == kind], healthy, indicators, norm)
        seeds = table[table["kind"] == kind]["run"].nunique()
        ax.set_title(f"{kind} ({seeds} seed{'s' if seeds > 1 else ''})")
    axes[-1].set_xlabel("step")
    figure.set_layout_engine("constrained", rect=(0, 0, 0.93, 1))  # space for the leads
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=50, shrink=0.6, pad=0.01)
    bar.set_label("standard deviations from healthy runs")
    return figure


def draw_timeline(
    axes: Any, rows: pd.DataFrame, healthy: pd.DataFrame, indicators: list[str], norm: Any
) -> Any:
    """Draw z by indicator and step, alarms, collapses, and the lead of each indicator.

    Args:
        axes: Axes to draw on.
        rows: Rows of one kind of collapsing run.
        healthy: Rows of the healthy runs.
        indicators: Names of the indicators, from top to bottom.
        norm: Color scale.

    Returns:
        The image, for a color bar.
    """
    z = rows.pivot_table(index="indicator", columns="step", values="z", aggfunc="median")
    z = z.reindex(indicators).clip(-MAX_Z, MAX_Z)
    steps = z.columns.to_numpy(float)
    width = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
    edges = np.arange(len(indicators) + 1) - 0.5
    image = axes.pcolormesh(width, edges, z.to_numpy(), norm=norm, cmap="PuOr", rasterized=True)
    axes.text(1.08, edges[0], "alarm", transform=axes.get_yaxis_transform(), **HEADER_STYLE)
    axes.text(1.26, edges[0], "|z| > 5", transform=axes.get_yaxis_transform(), **HEADER_STYLE)
    for y, indicator in enumerate(indicators):
        indicator_rows, healthy_rows = (x[x["indicator"] == indicator] for x in (rows, healthy))
        first = indicator_rows[indicator_rows["alarm"]].groupby("run")["step"].min()
        axes.plot(first + 0.5, [y] * len(first), ">", ms=3.5, color="black", mec="white", mew=0.4)
        for x, column in ((1.08, "alarm"), (1.26, "far")):
            text = format_lead(indicator_rows, healthy_rows, column)
            axes.text(x, y, text, transform=axes.get_yaxis_transform(), **LEAD_STYLE)
    for step in rows.groupby("run")["collapse"].first().dropna():
        axes.axvline(step, color="black", lw=1)
    axes.set_yticks(range(len(indicators)), indicators, fontsize=6)
    axes.set_ylim(edges[-1], edges[0])
    axes.grid(visible=False)
    return image


def format_lead(rows: pd.DataFrame, healthy: pd.DataFrame, column: str) -> str:
    """Format the lead of an indicator, such as '5 [2/3, 0/8]'.

    Args:
        rows: Rows of one indicator in the collapsing runs.
        healthy: Its rows in the healthy runs.
        column: Boolean column: "alarm", or "far" for a large z.

    Returns:
        Median lead in steps, runs warned before their collapse, and healthy runs warned.
    """
    collapse = rows.groupby("run")["collapse"].first().dropna()
    first = rows[rows[column]].groupby("run")["step"].min().reindex(collapse.index)
    early = (collapse - first)[lambda x: x > 0]
    false = healthy.groupby("run")[column].any()
    count = f"[{len(early)}/{len(collapse)}, {int(false.sum())}/{len(false)}]"
    return f"{early.median():g} {count}" if len(early) else f"– {count}"


def collect(runs: list[Path]) -> pd.DataFrame:
    """Collect the indicators of all runs; a run whose outcomes never collapse is healthy.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS. z = (value - mean) / sd over the healthy runs at the steps within 2 of
        this one. Of healthy runs only the first step and rows with an alarm or a large z are kept,
        so that tables stay small.

    Raises:
        InvalidInput: Fewer than 2 runs are healthy, or none collapses.
    """
    from diagnostics.alarms.alarms import replay
    from diagnostics.records.run_folder import RunFolder
    from diagnostics.records.run_groups import group_by_method

    records = []
    for method, method_runs in group_by_method(runs).items():
        for run in method_runs:
            record = RunFolder(run).rows()
            end = collapse_step(record)
            raised = {(alarm.rule.metric, alarm.step) for alarm in replay(record)}
            seed = run.name.rsplit("-", 1)[-1]
            labels = {"run": run.name, "seed": seed, "kind": method if end else "healthy"}
            records += [
                labels
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
            "timeline needs at least 2 healthy runs and one that collapses"
        )
    table["z"] = z_scores(table, healthy)
    informative = (table["kind"] != "healthy") | table["alarm"] | (table["z"].abs() > FAR_Z)
    first = ~table.duplicated(["run", "indicator"])
    return table.loc[informative | first, list(COLUMNS)]


def z_scores(table: pd.DataFrame, healthy: pd.DataFrame) -> pd.Series:
    """Compute z of every row from the healthy runs' values of its indicator within 2 steps."""
    scores = pd.Series(np.nan, index=table.index)
    for indicator, rows in table.groupby("indicator"):
        reference = healthy[healthy["indicator"] == indicator]
        for step, step_rows in rows.groupby("step"):
            nearby = reference[(reference["step"] - step).abs() <= 2]["value"]
            spread = nearby.std()
            if spread > 0:
                scores[step_rows.index] = ((step_rows["value"] - nearby.mean()) / spread).round(2)
    return scores


def collapse_step(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the step of the collapse, or None; see COLLAPSE_THRESHOLD."""
    start = np.mean([row["response/reward"] for row in rows[:COLLAPSE_STEPS]])
    bad = [
        row["response/reward"] < COLLAPSE_THRESHOLD * start
        or row["response/truncated_share"] > COLLAPSE_THRESHOLD
        for row in rows
    ]
    for i in range(len(bad) - COLLAPSE_STEPS + 1):
        if all(bad[i : i + COLLAPSE_STEPS]):
            return float(rows[i]["step"])
    return None
