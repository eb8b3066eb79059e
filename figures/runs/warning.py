"""Early-warning timeline: which indicators leave their healthy range before a collapse."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from diagnostics.errors import InvalidInput
from figures import style
from figures.labels import method_label, metric_label

COLUMNS = ("run", "seed", "kind", "step", "indicator", "value", "z", "alarm", "collapse")
CAPTION = (
    "Which indicators warn of a collapse? One panel for each method whose runs collapse. Colors: "
    "z, the indicator's distance from the healthy runs at that step in their standard deviations "
    "(median over the runs); white is the healthy range. Triangles: the indicator's built-in alarm "
    "fires in a run. Vertical lines: the collapses, defined by reward and truncated responses "
    "alone; those of several runs may coincide. Bars: share of the runs that collapse in which "
    "the alarm fires, or |z| first exceeds 5, before the collapse, and share of the healthy runs "
    "in which the same ever happens, which is a false alarm. Numbers: steps from the warning to "
    "the collapse, median over the warned runs. An indicator of the outcomes themselves, such as "
    "truncated responses, detects a collapse rather than predicts it. In one column: only the "
    "indicators that warn of at least half of the collapses of a method, and bars of |z| only."
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
FAR_Z, MAX_KINDS = 5.0, 4
Z_LEVELS = (-100, -30, -10, -5, -2, 2, 5, 10, 30, 100)
"""Boundaries of the colors; the middle one is the healthy range."""
WARNINGS = {
    "alarm": "share of runs\nwith an alarm",
    "far": f"share of runs\nwith |z| > {FAR_Z:g}",
}
"""Boolean column of a warning, and the label of its bars."""
WARNED_COLOR, FALSE_COLOR = style.RED, "#A0A0A0"
COLLAPSE_THRESHOLD, COLLAPSE_STEPS = 0.5, 3
"""A run collapses at the first of COLLAPSE_STEPS consecutive steps with a reward below
COLLAPSE_THRESHOLD times that of its first COLLAPSE_STEPS steps, or with a truncated share above
COLLAPSE_THRESHOLD."""
ALARM_STYLE: dict[str, Any] = {
    **{"marker": ">", "ls": "", "ms": 4.5},
    **{"color": "black", "mec": "white", "mew": 0.5},
}
COLLAPSE_STYLE: dict[str, Any] = {
    **{"color": "black", "lw": 1.2},
    "path_effects": [withStroke(linewidth=2, foreground="white")],
}


@dataclass(frozen=True)
class Warnings:
    """How often an indicator warns of the collapses of a method, and how early."""

    warned: int
    """Runs in which the first warning comes before the collapse."""
    collapsing: int
    false: int
    """Healthy runs with a warning."""
    healthy: int
    lead: float
    """Median steps from the warning to the collapse over the warned runs."""

    @property
    def warned_share(self) -> float:
        """Share of the collapses with a warning."""
        return self.warned / max(1, self.collapsing)

    @property
    def false_share(self) -> float:
        """Share of the healthy runs with a warning."""
        return self.false / max(1, self.healthy)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a kind of collapsing run: z by indicator and step, and bars of the warnings."""
    narrow = style.is_column(width)
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if kind != "healthy"][:MAX_KINDS]
    table = table.assign(alarm=table["alarm"].astype(bool), far=table["z"].abs() > FAR_Z)
    by_kind = {kind: count_warnings(table, kind) for kind in kinds}
    indicators = list(dict.fromkeys(table["indicator"]))
    columns = list(WARNINGS)
    if narrow:
        indicators, columns = often_warning(by_kind, indicators), ["far"]
    names = [fill(metric_label(x), 14 if narrow else 40) for x in indicators]
    row_height = 0.13 * max(x.count("\n") + 1 for x in names) if narrow else 0.155
    height = (1.6 if narrow else 1.15) + len(kinds) * (0.5 + row_height * len(names))
    figure, axes = style.make_panels(len(kinds), 1 + len(columns), height, width=width)
    axes[0].get_gridspec().set_width_ratios([1.6, 1] if narrow else [3.2, 1, 1])
    rows = [axes[i : i + 1 + len(columns)] for i in range(0, len(axes), 1 + len(columns))]
    for (timeline, *bars), (kind, warnings) in zip(rows, by_kind.items(), strict=True):
        image = draw_timeline(timeline, table[table["kind"] == kind], indicators)
        timeline.set_yticks(range(len(names)), names, fontsize=7, linespacing=0.9)
        set_heading(timeline, kind, {x: warnings[x, "far"] for x in indicators}, narrow)
        for ax, column in zip(bars, columns, strict=True):
            draw_warnings(ax, [warnings[x, column] for x in indicators])
    for ax in axes[: -1 - len(columns)]:
        ax.tick_params(labelbottom=False)
    for ax, label in zip(rows[-1], ["step", *(WARNINGS[x] for x in columns)], strict=True):
        ax.set_xlabel(label)
    add_color_bar(figure, image, axes, narrow)
    add_legend(figure, axes[0], narrow)
    return figure


def count_warnings(table: pd.DataFrame, kind: str) -> dict[tuple[str, str], Warnings]:
    """Count the warnings of the collapses of a kind, by indicator and column of WARNINGS."""
    counts = {}
    for indicator, rows in table.groupby("indicator"):
        healthy, failing = (rows[rows["kind"] == x] for x in ("healthy", kind))
        collapse = failing.groupby("run")["collapse"].first().dropna()
        for column in WARNINGS:
            first = failing[failing[column]].groupby("run")["step"].min().reindex(collapse.index)
            early = (collapse - first)[lambda x: x > 0]
            false = healthy.groupby("run")[column].any()
            counts[str(indicator), column] = Warnings(
                len(early), len(collapse), int(false.sum()), len(false), float(early.median())
            )
    return counts


def often_warning(
    by_kind: dict[str, dict[tuple[str, str], Warnings]], indicators: list[str]
) -> list[str]:
    """Return the indicators that leave their range before half of the collapses of some kind."""
    often = [
        x
        for x in indicators
        if any(counts[x, "far"].warned_share >= 0.5 for counts in by_kind.values())
    ]
    return often or indicators


def set_heading(axes: Any, kind: str, warnings: dict[str, Warnings], narrow: bool) -> None:
    """Title a timeline with its method, and the indicator whose z warns best."""
    best = max(
        warnings,
        key=lambda x: (warnings[x].warned_share - warnings[x].false_share, warnings[x].warned),
    )
    found = warnings[best]
    runs = f"{found.collapsing} run{'s' if found.collapsing > 1 else ''}"
    text = "no indicator's z warns of most collapses"
    if found.warned_share > 0.5 and found.warned_share > found.false_share:
        steps = f"{found.lead:g} step{'' if found.lead == 1 else 's'}"
        text = (
            f"z of {metric_label(best)} warns {steps} early in {found.warned} of {found.collapsing}"
        )
    heading = f"{method_label(kind)} ({runs}):"
    axes.set_title("\n".join(fill(x, 38 if narrow else 80) for x in (heading, text)))


def draw_timeline(axes: Any, rows: pd.DataFrame, indicators: list[str]) -> Any:
    """Draw z by indicator and step, the alarms, and the collapses.

    Args:
        axes: Axes to draw on.
        rows: Rows of one kind of collapsing run.
        indicators: Names of the indicators, from top to bottom.

    Returns:
        The image, for a color bar.
    """
    z = rows.pivot_table(index="indicator", columns="step", values="z", aggfunc="median")
    z = z.reindex(indicators)
    steps = z.columns.to_numpy(float)
    ends = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1))
    edges = np.arange(len(indicators) + 1) - 0.5
    norm = mpl.colors.BoundaryNorm(Z_LEVELS, 256, extend="both")
    image = axes.pcolormesh(ends, edges, z.to_numpy(), norm=norm, cmap="PuOr", rasterized=True)
    for y, indicator in enumerate(indicators):
        alarms = rows[(rows["indicator"] == indicator) & rows["alarm"]]
        first = alarms.groupby("run")["step"].min()
        axes.plot(first + 0.5, [y] * len(first), **ALARM_STYLE)
    for step in rows.groupby("run")["collapse"].first().dropna():
        axes.axvline(step, **COLLAPSE_STYLE)
    axes.set_ylim(edges[-1], edges[0])
    axes.grid(visible=False)
    return image


def draw_warnings(axes: Any, warnings: list[Warnings]) -> None:
    """Draw the share of warned collapses over that of false alarms, and the median lead."""
    y = np.arange(len(warnings))
    axes.barh(y - 0.2, [x.warned_share for x in warnings], 0.36, color=WARNED_COLOR)
    axes.barh(y + 0.2, [x.false_share for x in warnings], 0.36, color=FALSE_COLOR)
    for position, found in enumerate(warnings):
        if found.warned:
            axes.text(1.06, position, f"{found.lead:g}", fontsize=7, va="center")
    axes.set(xlim=(0, 1.45), ylim=(len(warnings) - 0.5, -0.5))
    axes.set_xticks([0, 1], ["0", "100 %"])
    axes.tick_params(labelleft=False, left=False)
    axes.grid(visible=False, axis="y")


def add_color_bar(figure: Figure, image: Any, axes: list[Any], narrow: bool) -> None:
    """Add the color bar of z below the panels."""
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=45, pad=0.02)
    bar.set_ticks(Z_LEVELS, labels=[f"{z:g}".replace("-", "−") for z in Z_LEVELS])
    text = "z: standard deviations from the healthy runs (median over runs)"
    bar.set_label(fill(text, 48 if narrow else 80), fontsize=7)
    bar.ax.tick_params(labelsize=7)


def add_legend(figure: Figure, axes: Any, narrow: bool) -> None:
    """Explain the marks below the panels; `axes` are any to make the handles with."""
    (collapse,) = axes.plot([], [], **COLLAPSE_STYLE)
    (alarm,) = axes.plot([], [], **ALARM_STYLE)
    (blank,) = axes.plot([], [], " ")
    marks = {
        "collapse of a run": collapse,
        "alarm in a run": alarm,
        "runs warned in time": Patch(color=WARNED_COLOR),
        "healthy runs warned": Patch(color=FALSE_COLOR),
        "number: lead in steps": blank,
    }
    figure.legend(
        marks.values(),
        marks,
        loc="outside lower center",
        ncols=2 if narrow else 3,
        columnspacing=1.0,
    )


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
