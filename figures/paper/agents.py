"""An agent in a household text game before and after distillation: success rate and behaviour."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diagnostics.errors import InvalidInput
from diagnostics.records import run_tables
from figures import style
from figures.collect.paired import (
    accuracy_interval,
    interval_columns,
    last_evaluations,
    outcome_matrix,
    paired_gain,
)
from figures.collect.steps import check_same_problems, label_runs, pivot_metrics, seed_means
from figures.labels import method_label

COLUMNS = (
    *("group", "method", "seed", "step", "task", "where"),
    *("won", "turns", "inadmissible", "cost_1", "cost_2", "cost_4", "cost_8", "outcomes"),
)
CAPTION = (
    "An agent in a household game in text (`env:household`): 3 to 5 places, 1 or 2 objects to "
    "bring to one of them, at most 16 turns. As in the paper, each turn is a training sample. "
    "Games alone: the agent trained on games; games and sorting: on games alternating with "
    "sorting digits, each task with its own teacher. Games won and problems solved: share of the "
    "same held-out games and problems, on one scale. Whiskers: 95 % intervals over seeds and "
    "games, or over seeds for turns, inadmissible actions and KL (Student's t). Dotted: the "
    "teacher of the games, its interval in grey. Dashed: trained on games and sorting (the axis "
    "is the share of the training, which is twice as long there). KL by turn: mean of log p - log "
    "q over the student's own tokens at that turn, for games alone, in the first five steps "
    "(hollow) and the last five (filled). Local support (V1) samples its rollouts at top-p 0.9. "
    "Student and teachers have 0.3 million weights and the same writing style; the student was "
    "pretrained on demonstrations of both tasks in which a player and a sorter make one error in "
    "ten. The paper's agents have 7B parameters and play ALFWorld, alternating with mathematics."
)
METHODS = {
    "sampled": (style.RED, "o"),
    "lsm": (style.SKY, "s"),
    "lsm_whole": (style.BLUE, "^"),
}
"""Color and mark of each method."""
DODGE = 0.025
"""Distance between the marks of two methods, as a share of the axis."""
TEACHER = "teacher"
DARK = "#444444"
GROUPS = {"games": ("Games alone", "-"), "agents": ("Games and sorting", "--")}
GAMES, PROBLEMS = "rooms", "sort"
TURNS, NUM_END_STEPS = (1, 2, 4, 8), 5
HELD_OUT, ROLLOUTS = "held out", "rollouts"
EPISODE_METRICS = {"episodes/turns": "turns", "episodes/invalid_share": "inadmissible"}
COST_METRICS = {f"turn={n}/divergence/k1": f"cost_{n}" for n in TURNS}
"""Metrics of rows and evaluations -> columns of the table."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw success on games and problems, inadmissible actions, turns, and KL by turn."""
    evaluations = select_evaluations(table)
    narrow = style.is_column(width)
    if narrow:
        figure, axes = style.make_panels(3, 2, 6.2, width=width)
    else:
        figure, axes = style.make_panels(2, 3, 4.4, width=width)
    games = evaluations[evaluations["task"] == GAMES]
    teacher = games[games["method"] == TEACHER]
    separator = "\n" if narrow else ": "
    for ax, (group, (title, _)) in zip(axes, GROUPS.items(), strict=False):
        draw_wins(ax, games[games["group"] == group], teacher)
        ax.set_title(f"{title}{separator}games won")
    draw_wins(axes[2], evaluations[evaluations["task"] == PROBLEMS], teacher[:0])
    axes[2].set_title(f"Games and sorting{separator}solved")
    lowest = min(ax.get_ylim()[0] for ax in axes[:3])
    for ax in axes[:3]:
        ax.set_ylim(lowest, 1.0)
    draw_metric(axes[3], games, "inadmissible")
    axes[3].yaxis.set_major_formatter("{x:g}")
    axes[3].set_title(f"Inadmissible{separator}share of turns")
    draw_metric(axes[4], games, "turns")
    axes[4].set_title("Turns per game")
    draw_cost(axes[5], table[(table["where"] == ROLLOUTS) & (table["group"] == "games")])
    add_legend(figure, [*dict.fromkeys(evaluations["method"])], 2 if narrow else 4)
    return figure


def add_legend(figure: Figure, methods: list[str], num_columns: int) -> None:
    """Explain methods, dashes, and hollow and filled marks below the panels."""
    handles = [
        Line2D([], [], color=colour, marker=mark, ms=3, label=method_label(method))
        for method, (colour, mark) in METHODS.items()
        if method in methods
    ]
    dark: dict[str, Any] = {"color": DARK, "lw": 1}
    if TEACHER in methods:
        handles.append(Line2D([], [], ls=":", label="teacher of the games", **dark))
    handles += [
        Line2D([], [], ls=dash, label=f"trained on {title.lower()}", **dark)
        for title, dash in GROUPS.values()
    ]
    dark |= {"ls": "", "marker": "o", "ms": 3.5}
    handles += [
        Line2D([], [], mfc="white", label=f"first {NUM_END_STEPS} steps", **dark),
        Line2D([], [], label=f"last {NUM_END_STEPS} steps", **dark),
        Line2D([], [], color=DARK, marker="|", ls="", ms=8, label="95 % interval"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=num_columns)


def mark_options(method: str) -> dict[str, Any]:
    """Return the options of `Axes.errorbar` for a method."""
    colour, mark = METHODS[method]
    return {"color": colour, "marker": mark, "ms": 3, "lw": 1.2, "elinewidth": 0.8}


def dodge(method: str, length: float) -> float:
    """Return how far a method's marks are moved on an axis of the given length."""
    return DODGE * length * (list(METHODS).index(method) - (len(METHODS) - 1) / 2)


def draw_wins(axes: Any, evaluations: pd.DataFrame, teacher: pd.DataFrame) -> None:
    """Draw the success rate on held-out games or problems, with intervals over seeds and games."""
    for method in METHODS:
        method_rows = evaluations[evaluations["method"] == method]
        points = [
            (step, *accuracy_interval(outcome_array(step_rows, method)))
            for step, step_rows in method_rows.groupby("step")
        ]
        if points:
            x, y, low, high = np.array(points, float).T
            shifted = x + dodge(method, max(x))
            axes.errorbar(shifted, y, yerr=[y - low, high - y], **mark_options(method))
    if len(teacher):
        share, bottom, top = accuracy_interval(outcome_array(teacher, TEACHER))
        axes.axhline(share, ls=":", lw=1, color=DARK, zorder=1)
        axes.axhspan(bottom, top, color=DARK, alpha=0.08, lw=0)
    axes.set_xlabel("step")


def draw_metric(axes: Any, games: pd.DataFrame, column: str) -> None:
    """Draw a metric of held-out games during training; dashed: trained on problems as well."""
    for method in METHODS:
        for group, (_, dash) in GROUPS.items():
            group_rows = games[(games["method"] == method) & (games["group"] == group)]
            mean = seed_means(group_rows, column)
            if len(mean):
                x = mean["step"] / mean["step"].max() + dodge(method, 1)
                spread = [mean["value"] - mean["low"], mean["high"] - mean["value"]]
                options = mark_options(method) | {"ls": dash}
                axes.errorbar(x + (dash == "--") * DODGE / 2, mean["value"], yerr=spread, **options)
    for value in games[games["method"] == TEACHER][column]:
        axes.axhline(value, ls=":", lw=1, color=DARK, zorder=1)
    axes.set_xlabel("share of the training")
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))


def draw_cost(axes: Any, table: pd.DataFrame) -> None:
    """Draw the KL at each turn of TURNS in the first and in the last NUM_END_STEPS steps."""
    for index, (method, (colour, mark)) in enumerate(METHODS.items()):
        method_rows = table[table["method"] == method]
        final = method_rows["step"].max()
        for step_range, fill in (
            ((0, NUM_END_STEPS - 1), "white"),
            ((final - NUM_END_STEPS + 1, final), colour),
        ):
            rows = method_rows[method_rows["step"].between(*step_range)]
            seed_values = rows.groupby("seed").mean(numeric_only=True)
            for i, turn in enumerate(TURNS):
                mean = mean_of_seeds(seed_values[f"cost_{turn}"])
                if len(mean):
                    value, low, high = mean[["value", "low", "high"]].iloc[0]
                    x = i + (index - (len(METHODS) - 1) / 2) * 0.24
                    options: dict[str, Any] = {"fmt": mark, "ms": 3.5, "color": colour, "mfc": fill}
                    options["elinewidth"] = 0.8
                    axes.errorbar(x, value, yerr=[[value - low], [high - value]], **options)
    axes.set_xticks(range(len(TURNS)), [str(turn) for turn in TURNS])
    axes.set(title="KL by turn, nats", xlabel="turn of the game")
    axes.set_ylim(bottom=0)


def mean_of_seeds(values: pd.Series) -> pd.DataFrame:
    """Return the mean of one value a seed with its interval, empty if there is none."""
    table = pd.DataFrame({"step": 0, "seed": values.index, "value": values.to_numpy()})
    return seed_means(table, "value")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Compute success before and after training, the gain, and the difference to the first method.

    Args:
        table: A table with COLUMNS.

    Returns:
        A table with the columns group, task, method, seeds and count (games or problems); before,
        won, gain and away (difference to the first method), each with _low and _high; and
        inadmissible_before and inadmissible, the share of turns with an inadmissible action. The
        teacher has no gain.

    Raises:
        InvalidInput: The table has no evaluation of the groups and tasks.
    """
    evaluations = select_evaluations(table)
    records = []
    for group in GROUPS:
        for task in (GAMES, PROBLEMS):
            task_rows = evaluations[(evaluations["group"] == group) & (evaluations["task"] == task)]
            final, first = last_evaluations(task_rows), task_rows[task_rows["step"] == 0]
            for method in [m for m in (*METHODS, TEACHER) if m in set(task_rows["method"])]:
                row = {"group": group, "task": task, "method": method}
                records.append(row | summarize_method(final, first, method))
    return pd.DataFrame(records)


def select_evaluations(table: pd.DataFrame) -> pd.DataFrame:
    """Select the evaluations that this figure is about.

    Args:
        table: A table with COLUMNS.

    Returns:
        Its evaluations of GROUPS on both tasks, by METHODS and the teacher.

    Raises:
        InvalidInput: There are none.
    """
    is_evaluation = table["where"] == HELD_OUT
    is_evaluation &= table["group"].isin(GROUPS) & table["task"].isin((GAMES, PROBLEMS))
    is_evaluation &= table["method"].isin((*METHODS, TEACHER))
    if not is_evaluation.any():
        raise InvalidInput(
            f"no evaluation of the groups {', '.join(GROUPS)} on {GAMES} or {PROBLEMS}; run "
            "folders must be named GROUP/METHOD-SEED, as by `opd paper --groups games agents`"
        )
    return table[is_evaluation]


def summarize_method(final: pd.DataFrame, first: pd.DataFrame, method: str) -> dict[str, Any]:
    """Compute the row of `summary` for a method.

    Args:
        final: Last evaluations of a group and task.
        first: Evaluations at step 0 of the same.
        method: The method.

    Returns:
        The columns of `summary` but group, task and method.
    """
    final_outcomes, initial_outcomes = outcome_matrix(final, method), outcome_matrix(first, method)
    row: dict[str, Any] = {"seeds": len(final_outcomes), "count": final_outcomes.shape[1]}
    row |= interval_columns("won", accuracy_interval(final_outcomes.to_numpy(float)))
    inadmissible_shares = [x[x["method"] == method]["inadmissible"].mean() for x in (first, final)]
    row |= dict(zip(("inadmissible_before", "inadmissible"), inadmissible_shares, strict=True))
    if method != TEACHER:
        row |= interval_columns("before", accuracy_interval(initial_outcomes.to_numpy(float)))
        row |= interval_columns("gain", paired_gain(final_outcomes, initial_outcomes))
    if method in list(METHODS)[1:]:
        row |= interval_columns(
            "away", paired_gain(final_outcomes, outcome_matrix(final, next(iter(METHODS))))
        )
    return row


def outcome_array(evaluations: pd.DataFrame, method: str) -> np.ndarray:
    """Return the (seeds, games) outcomes of a method."""
    return outcome_matrix(evaluations, method).to_numpy(float)


def markdown(results: pd.DataFrame) -> str:
    """Render the tables of `summary` as Markdown."""
    base = method_label(next(iter(METHODS)))
    parts = [
        "Brackets: 95 % intervals over seeds and games; gains and differences are paired by seed "
        "and game. Inadmissible: share of turns with an action that the game does not allow."
    ]
    for (group, task), group_rows in results.groupby(["group", "task"], sort=False):
        unit = {GAMES: "games", PROBLEMS: "problems"}[str(task)]
        lines = [
            f"### {GROUPS[str(group)][0]}: {group_rows['count'].max()} held-out {unit}",
            "",
            f"| model | seeds | before | after | gain | minus {base} | inadmissible |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            "| " + " | ".join(format_cells(row)) + " |" for row in group_rows.to_dict("records")
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def format_cells(row: dict[Any, Any]) -> list[str]:
    """Format the cells of one row of a Markdown table."""
    cells = [method_label(row["method"]), str(row["seeds"])]
    for name, number_format in (
        ("before", ".3f"),
        ("won", ".3f"),
        ("gain", "+.3f"),
        ("away", "+.3f"),
    ):
        ends = [row.get(x, np.nan) for x in (name, f"{name}_low", f"{name}_high")]
        value, low, high = (format(x, number_format) for x in ends)
        cells.append("" if np.isnan(ends[0]) else f"{value} [{low}, {high}]")
    inadmissible_before, inadmissible_after = row["inadmissible_before"], row["inadmissible"]
    inadmissible = (
        f"{inadmissible_after:.3f}"
        if row["method"] == TEACHER
        else f"{inadmissible_before:.3f} to {inadmissible_after:.3f}"
    )
    return [*cells, "" if np.isnan(inadmissible_after) else inadmissible]


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of rollouts and evaluations.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS, one row a step (where: "rollouts") and one an evaluation of a task
        (where: "held out").

    Raises:
        InvalidInput: Runs were evaluated on different games or problems.
    """
    rollouts = pivot_metrics(run_tables.steps_table(runs)).assign(where=ROLLOUTS)
    evaluations = run_tables.evaluations_table(runs).assign(where=HELD_OUT)
    rollouts = rollouts.rename(columns={"response/reward": "won"} | COST_METRICS)
    evaluations = evaluations.rename(columns={"accuracy": "won"})
    table = pd.concat([rollouts, evaluations]).rename(columns=EPISODE_METRICS)
    table["task"] = table["task"].replace("", GAMES)
    check_same_problems(table[table["where"] == HELD_OUT], runs, ["task"])
    table = label_runs(table, runs).sort_values("run", kind="stable", ignore_index=True)
    return table.reindex(columns=list(COLUMNS))
