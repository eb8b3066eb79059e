"""A real pretrained model before and after distillation: accuracy by seed, KL and truncation."""

from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.records import run_tables
from figures import style
from figures.collect.paired import (
    accuracy_interval,
    interval_columns,
    last_evaluations,
    outcome_matrix,
    paired_gain,
)
from figures.collect.steps import check_same_problems, label_runs, pivot_metrics, select_methods
from figures.labels import method_label, metric_label

STEP_METRICS = {
    "response/reward": "accuracy",
    "response/length": "length",
    "response/truncated_share": "truncated",
    "divergence/k1": "cost",
}
"""Metrics of rows -> columns of the table."""
COLUMNS = (
    *("group", "method", "seed", "step", "task", "where"),
    *("accuracy", "length", "truncated", "cost", "outcomes"),
)
CAPTION = (
    "A pretrained model taught by its own copy: both are SmolLM2-135M-Instruct after supervised "
    "fine-tuning of LoRA adapters on word problems of two or three sums, the student for 12 and "
    "the teacher for 72 steps of eight demonstrations. Left: share of the held-out test problems "
    "solved with greedy decoding, before (grey) and after 24 steps of 16 responses (the sampled "
    "token also after 48), a mark a seed; "
    "whiskers: 95 % intervals over problems; dotted: the teacher, its interval in grey. Middle and "
    "right: KL per token, estimated by log p - log q of the sampled tokens, and share of truncated "
    "responses, of the rollouts of each step; thin: seeds, thick: their mean over five steps. The "
    "learning rate was chosen on other problems."
)
GROUP, TEACHER = "pretrained", "teacher"
METHODS = {
    "sampled_token": (style.RED, "o"),
    "sampled_token_long": (style.ORANGE, "^"),
    "teacher_topk": (style.BLUE, "s"),
}
"""Color and mark of each method."""
DARK = "#444444"
HELD_OUT, ROLLOUTS = "held out", "rollouts"
CURVES = {"cost": "KL per token, nats", "truncated": metric_label("response/truncated_share")}
"""Column of the rollouts to the title of its panel."""
WINDOW = 5
"""Steps that the thick lines average."""
TICK_WIDTH = 8
"""Characters of a line of a method's name below its marks."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw accuracies by seed, and KL and truncated responses by step."""
    rows = select_methods(table, GROUP, METHODS)
    narrow = style.is_column(width)
    shape = (3, 1, 6.6) if narrow else (1, 3, 2.9)
    figure, axes = style.make_panels(*shape, width=width)
    draw_accuracy(axes[0], table)
    for ax, (column, title) in zip(axes[1:], CURVES.items(), strict=True):
        draw_curves(ax, rows[rows["where"] == ROLLOUTS], column)
        ax.set_title(title)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def draw_accuracy(axes: Any, table: pd.DataFrame) -> None:
    """Draw the accuracy of the student and of every run, with intervals over problems."""
    evaluations = table[(table["where"] == HELD_OUT) & (table["group"] == GROUP)]
    final, first = last_evaluations(evaluations), evaluations[evaluations["step"] == 0]
    names = [name for name in METHODS if name in set(evaluations["method"])]
    starts = outcome_matrix(first, names[0]).to_numpy(float)[:1]
    points = [(0.0, starts, DARK, "D")]
    for position, name in enumerate(names, 1):
        outcomes = outcome_matrix(final, name).to_numpy(float)
        for i in range(len(outcomes)):
            x = position + 0.24 * (i - (len(outcomes) - 1) / 2)
            points.append((x, outcomes[i : i + 1], *METHODS[name]))
    for x, outcomes, color, mark in points:
        share, low, high = accuracy_interval(outcomes)
        options: dict[str, Any] = {"fmt": mark, "ms": 4, "color": color}
        # an interval that ends at 0 or 1 may miss it by a rounding error
        whiskers = [[max(0.0, share - low)], [max(0.0, high - share)]]
        axes.errorbar(x, share, yerr=whiskers, **options)
    teacher = outcome_matrix(final, TEACHER).to_numpy(float)
    if len(teacher):
        share, low, high = accuracy_interval(teacher)
        axes.axhline(share, ls=":", lw=1, color=DARK, zorder=1)
        axes.axhspan(low, high, color=DARK, alpha=0.08, lw=0)
    axes.set_xticks(
        range(len(names) + 1),
        ["before", *(fill(method_label(name), TICK_WIDTH) for name in names)],
    )
    axes.set(xlim=(-0.5, len(names) + 0.5), ylim=(0, 1))
    axes.set_title("Test problems solved")
    axes.yaxis.set_major_formatter("{x:g}")


def draw_curves(axes: Any, rollouts: pd.DataFrame, column: str) -> None:
    """Draw a column of the rollouts by step: every seed, and the mean of seeds and WINDOW steps."""
    steps = rollouts.groupby("method")["step"].max()
    # shorter runs above longer ones, which begin alike
    for name in sorted((name for name in METHODS if name in steps), key=lambda name: -steps[name]):
        color, _ = METHODS[name]
        values = rollouts[rollouts["method"] == name].pivot_table(
            index="step", columns="seed", values=column
        )
        for seed in values:
            axes.plot(values.index, values[seed], color=color, lw=0.5, alpha=0.5)
        mean = values.mean(axis=1).rolling(WINDOW, center=True, min_periods=1).mean()
        axes.plot(mean.index, mean, color=color, lw=1.6, label=method_label(name))
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the accuracy before and after, the gain, and what local support adds.

    Args:
        table: A table with COLUMNS.

    Returns:
        A table with the columns method, seed ("all" for the mean over seeds), problems, before,
        after, gain and away (minus the sampled token with the same seeds), each of the last three
        with _low and _high over problems or, for all seeds, over seeds and problems; and length
        and truncated, after training. The teacher has neither before nor gain.

    Raises:
        InvalidInput: The table has no run of the group.
    """
    evaluations = select_methods(table, GROUP, (*METHODS, TEACHER))
    evaluations = evaluations[evaluations["where"] == HELD_OUT]
    final, first = last_evaluations(evaluations), evaluations[evaluations["step"] == 0]
    baseline = outcome_matrix(final, next(iter(METHODS)))
    records = []
    for name in [n for n in (*METHODS, TEACHER) if n in set(evaluations["method"])]:
        after, before = outcome_matrix(final, name), outcome_matrix(first, name)
        ends = final[final["method"] == name].set_index("seed")
        groups: list[tuple[str, list[Any]]] = [(str(seed), [seed]) for seed in after.index]
        groups += [("all", list(after.index))] * (len(after) > 1)
        for label, seeds in groups:
            outcomes = after.loc[seeds]
            row: dict[str, Any] = {"method": name, "seed": label, "problems": after.shape[1]}
            row |= interval_columns("after", accuracy_interval(outcomes.to_numpy(float)))
            row |= {column: ends.loc[seeds, column].mean() for column in ("length", "truncated")}
            if name != TEACHER:
                row["before"] = before.loc[seeds].to_numpy(float).mean()
                row |= interval_columns("gain", paired_gain(outcomes, before.loc[seeds]))
            common_seeds = outcomes.index.intersection(baseline.index)
            if name not in (TEACHER, next(iter(METHODS))) and len(common_seeds):
                row |= interval_columns("away", paired_gain(outcomes, baseline))
            records.append(row)
    return pd.DataFrame(records)


def markdown(results: pd.DataFrame) -> str:
    """Render the table of `summary` as Markdown."""
    base = method_label(next(iter(METHODS)))
    lines = [
        f"{results['problems'].max()} test problems, greedy decoding. Brackets: 95 % intervals "
        "over problems and, for all seeds, over seeds and problems; gains and differences are "
        "paired by both.",
        "",
        f"| model | seed | before | after | gain | minus {base} | length | truncated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results.to_dict("records"):
        cells = [method_label(row["method"]), row["seed"]]
        cells.append("" if pd.isna(row.get("before")) else f"{row['before']:.3f}")
        cells += [format_interval(row, "after", ".3f")]
        cells += [format_interval(row, name, "+.3f") for name in ("gain", "away")]
        cells += [f"{row['length']:.0f}", f"{row['truncated']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_interval(row: dict[Any, Any], name: str, number_format: str) -> str:
    """Format a value with its interval; "" where the row has none."""
    if pd.isna(row.get(name)):
        return ""
    value, low, high = (format(row[f"{name}{end}"], number_format) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of rollouts and evaluations.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS, one row a step (where: "rollouts") and one an evaluation (where: "held
        out").

    Raises:
        InvalidInput: Runs were evaluated on different problems.
    """
    rollouts = pivot_metrics(run_tables.steps_table(runs)).assign(where=ROLLOUTS)
    evaluations = run_tables.evaluations_table(runs).assign(where=HELD_OUT)
    check_same_problems(label_runs(evaluations, runs), runs, ["group"])
    table = pd.concat([rollouts.rename(columns=STEP_METRICS), evaluations])
    table = label_runs(table, runs).sort_values("run", kind="stable", ignore_index=True)
    return table.reindex(columns=list(COLUMNS))
