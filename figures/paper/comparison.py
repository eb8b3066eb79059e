"""Final accuracy of every method: our measurements for tables 1 to 4 of the paper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from diagnostics.errors import InvalidInput
from figures import style
from figures.collect.paired import (
    accuracy_interval,
    holm_adjust,
    last_evaluations,
    outcome_matrix,
    paired_difference,
)
from figures.collect.steps import EVALUATION_COLUMNS, evaluations_table
from figures.labels import method_label

COLUMNS = EVALUATION_COLUMNS
CAPTION = (
    "Held-out accuracy after training. A dot is a run (a seed); the stroke is the mean over runs "
    "and problems, the band its 95 % interval over both. Where some runs fall to 0 (an accuracy "
    "below 0.01) and others do not, the mean is typical of neither: the number of such runs is "
    "written next to it. Dotted: the student before training, in the color of the task. Local "
    "support (V1) is the renormalised reverse KL on the teacher's top K; V2 to V5 take another "
    "support or add a correction for its tail; a mask leaves tags and EOS out of the loss. The "
    "panels correspond to the paper's tables: objective and mask to 1 (one task) and 2 (two "
    "tasks), rollouts from the nucleus to 3, variants of the support to 4 (in one column of a "
    "page: 1, 2 and 4 on one task). Rollouts use top-p 0.9 for local supports and variants, as in "
    "the paper; evaluation uses top-p 1 (0.9 in the paper). The models are built for this "
    "comparison: a byte-level student that spells its think tags in bytes and ends with "
    "<|im_end|>; a teacher of the task chain with single-token tags and the EOS <|endoftext|>; a "
    "teacher of the task sort with the student's tags and EOS. The paper's students have 7B "
    "parameters and its tasks are mathematics and ALFWorld. The mismatch is like the paper's (see "
    "`segmentation`), but every response of about a hundred tokens has it three times, which is "
    "far more often. That unmasked methods fall to 0 is an effect of this scale."
)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    """Title in the Markdown tables; figures have TITLES."""
    group: str
    """Group of its runs."""
    methods: tuple[str, ...]
    """Methods, the first being the one to which the others are compared."""


TABLES: dict[str, PaperTable] = {
    "table1": PaperTable(
        "Table 1: one task",
        "single",
        ("sampled", "sampled_mask", "lsm", "lsm_mask"),
    ),
    "table2": PaperTable(
        "Table 2: two tasks",
        "multi",
        ("sampled", "sampled_mask", "lsm", "lsm_mask"),
    ),
    "table3": PaperTable(
        "Table 3: nucleus rollouts",
        "single",
        ("sampled", "sampled_top_p", "sampled_mask", "sampled_mask_top_p", "lsm_whole", "lsm"),
    ),
    "table4": PaperTable(
        "Table 4: support variants",
        "single",
        (
            *("lsm", "v2_student_and_sampled", "v3_teacher_and_sampled"),
            *("v4_student_tail", "v5_teacher_tail", "lsm_mask", "v2_student_and_sampled_mask"),
            *("v3_teacher_and_sampled_mask", "v4_student_tail_mask", "v5_teacher_tail_mask"),
        ),
    ),
    "table4b": PaperTable(
        "Table 4b: variants, two tasks",
        "multi",
        (
            *("lsm", "v2_student_and_sampled", "v3_teacher_and_sampled"),
            *("v4_student_tail", "v5_teacher_tail"),
        ),
    ),
}
TITLES = {
    "table1": "One task: objective and mask",
    "table2": "Two tasks in turn: objective and mask",
    "table3": "One task: rollouts from the nucleus",
    "table4": "One task: variants of the support",
    "table4b": "Two tasks in turn: variants of the support",
}
"""What each of TABLES compares."""
PAGE_ROWS = (("table1", "table4"), ("table3", "table4"), ("table2", "table4b"))
COLUMN_ROWS = (("table1",), ("table2",), ("table4",))
"""Tables drawn in one column: the main comparison, and the variants with runs that collapse."""
TASKS = {
    "": ("chain (teacher uses other tags and EOS)", style.BLUE),
    "chain": ("chain (teacher uses other tags and EOS)", style.BLUE),
    "sort": ("sort (teacher uses the same tags and EOS)", style.RED),
}
COLLAPSED = 0.01
"""Accuracy below which a run is counted as being at 0."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel a table of the paper, one row a method and task, one dot a run."""
    results = summary(table)
    rows = COLUMN_ROWS if style.is_column(width) else PAGE_ROWS
    heights = [max(4, count_lines(results, names[0])) for names in rows]
    figure = Figure(figsize=(width, 1.5 + 0.23 * sum(heights)), layout="constrained")
    grid: dict[str, Any] = figure.subplot_mosaic([*map(list, rows)], height_ratios=heights)
    for name, axes in grid.items():
        group = table[table["group"] == TABLES[name].group].fillna({"task": ""})
        draw_panel(axes, results[results["table"] == name], last_evaluations(group))
        axes.set_title(TITLES[name], x=1.0, ha="right")
    for names in (rows[-1], *([PAGE_ROWS[1]] if len(rows[0]) > 1 else [])):
        for name in names:
            grid[name].set_xlabel("held-out accuracy")
    add_legend(figure, [*dict.fromkeys(results["task"])], 1 if style.is_column(width) else 2)
    return figure


def count_lines(results: pd.DataFrame, name: str) -> int:
    """Return the number of methods and tasks of a table."""
    return int((results["table"] == name).sum())


def task_style(task: str) -> tuple[str, str]:
    """Return the printed name and the color of a task."""
    return TASKS.get(task, (f"task {task}", style.GREEN))


def draw_panel(axes: Any, results: pd.DataFrame, final: pd.DataFrame) -> None:
    """Draw the rows of `summary` of one table, and the accuracy of every run."""
    methods, tasks = (list(dict.fromkeys(results[name])) for name in ("method", "task"))
    for row in results.itertuples():
        _, colour = task_style(row.task)
        if row.method == methods[0]:
            axes.axvline(row.before, ls=":", lw=1.2, color=colour, zorder=1)
        y = methods.index(row.method) + (tasks.index(row.task) + 0.5) / len(tasks) - 0.5
        runs = final[(final["method"] == row.method) & (final["task"] == row.task)]["accuracy"]
        draw_row(axes, row, y, 0.9 / len(tasks), sorted(runs), colour)
    axes.set_yticks(range(len(methods)), [method_label(method) for method in methods])
    axes.set(xlim=(-0.03, 1.0), ylim=(len(methods) - 0.45, -0.55), xticks=(0, 0.25, 0.5, 0.75, 1))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    for y in range(len(methods) - 1):
        axes.axhline(y + 0.5, color="#E6E6E6", lw=0.5, zorder=0)


def draw_row(axes: Any, row: Any, y: float, size: float, runs: list[float], colour: str) -> None:
    """Draw the runs of a method and task, spread over a row, on their mean with its interval.

    Args:
        axes: Axes to draw on.
        row: A row of `summary`.
        y: Middle of the row.
        size: Height of the row.
        runs: Accuracy of each run, sorted.
        colour: Color of the task.
    """
    axes.plot([row.low, row.high], [y, y], lw=5, color=colour, alpha=0.25, solid_capstyle="butt")
    axes.plot([row.accuracy] * 2, [y - 0.4 * size, y + 0.4 * size], lw=1.6, color=colour)
    spread = [(i + 0.5) / len(runs) - 0.5 for i in range(len(runs))]
    heights = [y + 0.75 * size * x for x in spread]
    options: dict[str, Any] = {"color": colour, "mec": "white", "mew": 0.4, "zorder": 3}
    axes.plot(runs, heights, "o", ms=3.4, **options)
    count = sum(x < COLLAPSED for x in runs)
    if count:
        text = f"{count} of {len(runs)} at 0"
        x = max(row.accuracy, COLLAPSED) + 0.03
        label = axes.text(x, y, text, va="center", fontsize=style.MIN_FONT_SIZE, color=colour)
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])


def add_legend(figure: Figure, tasks: list[str], num_columns: int) -> None:
    """Explain the marks and the colors of the tasks below the panels."""
    styles = dict.fromkeys(task_style(task) for task in tasks)
    handles = [Line2D([], [], marker="s", ls="", color=c, label=name) for name, c in styles]
    grey: dict[str, Any] = {"color": "#555555"}
    handles += [
        Line2D([], [], marker="o", ls="", ms=3.4, label="one run", **grey),
        Line2D([], [], marker="|", ls="", ms=8, mew=1.6, label="mean of the runs", **grey),
        Line2D([], [], lw=5, alpha=0.4, label="95 % interval of the mean", **grey),
        Line2D([], [], ls=":", lw=1.2, label="student before training", **grey),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=num_columns)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the accuracy of every method and its difference to the first method of its table.

    Args:
        table: A table of evaluations.

    Returns:
        A table with the columns table, task, method, seeds, before (accuracy of the untrained
        student), accuracy, low and high; and, of the difference to the first method, pairs (seeds
        that both have), away, away_low, away_high, p and p_seeds (see `paired_difference`). Both p
        values are adjusted by Holm's method within a table and task. For the first method these
        columns are NaN.

    Raises:
        InvalidInput: No run belongs to a group and a method of the tables.
    """
    parts = []
    for name, paper_table in TABLES.items():
        group, methods = paper_table.group, paper_table.methods
        group_rows = table[table["group"] == group].fillna({"task": ""})
        for task in dict.fromkeys(group_rows["task"]):
            task_results = summarize_table(group_rows[group_rows["task"] == task], methods)
            task_results.insert(0, "table", name)
            task_results.insert(1, "task", task)
            parts.append(task_results)
    if not parts or all(part.empty for part in parts):
        known_methods = sorted({f"{x.group}/{m}" for x in TABLES.values() for m in x.methods})
        raise InvalidInput(
            "no run belongs to a group and method of the tables; run folders must be named "
            f"GROUP/METHOD-SEED, as by `opd paper`: {', '.join(known_methods)}"
        )
    return pd.concat(parts, ignore_index=True)


def summarize_table(table: pd.DataFrame, methods: tuple[str, ...]) -> pd.DataFrame:
    """Compute `summary` for one table and task.

    Args:
        table: Evaluations of a group and task.
        methods: Methods of the table; the first is the baseline.

    Returns:
        One row for each method that has runs.
    """
    final, first = last_evaluations(table), table[table["step"] == 0]
    records = []
    present_methods = [method for method in methods if method in set(final["method"])]
    matrices = {method: outcome_matrix(final, method) for method in present_methods}
    for method, values in matrices.items():
        mean, low, high = accuracy_interval(values.to_numpy(float))
        row = {"method": method, "seeds": len(values), "before": first["accuracy"].mean()}
        row |= {"accuracy": mean, "low": low, "high": high}
        if method != present_methods[0]:
            gain = paired_difference(values, matrices[present_methods[0]])
            row |= {"pairs": gain["seeds"], "away": gain["value"]}
            row |= {"away_low": gain["low"], "away_high": gain["high"]}
            row |= {"p": gain["p"], "p_seeds": gain["p_seeds"]}
        records.append(row)
    results = pd.DataFrame(records)
    for name in {"p", "p_seeds"} & set(results):
        results.loc[1:, name] = holm_adjust(results.loc[1:, name].tolist())
    return results


def markdown(results: pd.DataFrame) -> str:
    """Render the tables of `summary` as Markdown."""
    parts = [
        "Brackets: 95 % intervals over runs and problems. p: sign-flip test over problems, about "
        "these runs; p over seeds: sign-flip test over seeds, about runs like them; with n seeds "
        "it "
        f"is at least 2^(1-n) ({2.0 ** (1 - results['pairs'].max()):.4g} with the most seeds) "
        "before "
        "Holm's correction within a table, which is applied to both."
    ]
    for (name, task), task_rows in results.groupby(["table", "task"], sort=False):
        base, *_ = task_rows.itertuples()
        base_name = method_label(str(base.method))
        lines = [
            f"### {TABLES[str(name)].title}" + (f", task {task}" if task else ""),
            "",
            f"Student before training: {base.before:.3f}.",
            "",
            f"| method | seeds | accuracy [95 %] | minus {base_name} [95 %] | p | p over seeds |",
            "|---|---|---|---|---|---|",
        ]
        for row in task_rows.itertuples():
            cells = [method_label(row.method), str(row.seeds)]
            cells.append(f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]")
            if row.method == base.method:
                cells += ["", "", ""]
            else:
                gain = f"{row.away:+.3f} [{row.away_low:+.3f}, {row.away_high:+.3f}]"
                cells += [gain, f"{row.p:.3g}", f"{row.p_seeds:.3g}"]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of evaluations of the runs."""
    return evaluations_table(runs)
