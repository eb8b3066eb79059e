"""Tables 1 to 4 of the paper in our measurements: final accuracy of every method."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.paired import accuracy, difference, holm, last, outcomes
from figures.steps import EVALUATION_COLUMNS, evaluations

COLUMNS = EVALUATION_COLUMNS
CAPTION = (
    "Held-out accuracy after training, mean over seeds and problems, with 95 % intervals that "
    "resample both; dotted: the student before training. The models are made for this: a "
    "byte-level student that spells its think tags and ends with <|im_end|>; a teacher of the "
    "task chain whose tags are single tokens and whose end is <|endoftext|>; a teacher of the "
    "task sort that writes as the student does. The paper's students have 7B parameters and its "
    "tasks are math and ALFWorld. The mismatch is like the paper's (log-probabilities of -15 for "
    "the student's tag and -18 for its end), and every response has it three times in 120 tokens,"
    " which is far more often."
)
TABLES = {
    "table1": (
        "Table 1: one task",
        "single",
        ("sampled", "sampled_mask", "lsm", "lsm_mask"),
    ),
    "table2": (
        "Table 2: two tasks by turns",
        "multi",
        ("sampled", "sampled_mask", "lsm", "lsm_mask"),
    ),
    "table3": (
        "Table 3: nucleus rollouts",
        "single",
        ("sampled", "sampled_top_p", "sampled_mask", "sampled_mask_top_p", "lsm_whole", "lsm"),
    ),
    "table4": (
        "Table 4: support variants",
        "single",
        (
            *("lsm", "v2_student_and_sampled", "v3_teacher_and_sampled"),
            *("v4_student_tail", "v5_teacher_tail", "lsm_mask", "v2_student_and_sampled_mask"),
            *("v3_teacher_and_sampled_mask", "v4_student_tail_mask", "v5_teacher_tail_mask"),
        ),
    ),
    "table4b": (
        "Table 4b: two tasks",
        "multi",
        (
            *("lsm", "v2_student_and_sampled", "v3_teacher_and_sampled"),
            *("v4_student_tail", "v5_teacher_tail"),
        ),
    ),
}
NAMES = {
    "sampled": "sampled token",
    "sampled_mask": "sampled token, mask",
    "sampled_top_p": "sampled token, top-p",
    "sampled_mask_top_p": "sampled token, mask, top-p",
    "lsm": "local support (V1)",
    "lsm_mask": "local support (V1), mask",
    "lsm_whole": "local support, no top-p",
    "v2_student_and_sampled": "student's top-K + sampled (V2)",
    "v3_teacher_and_sampled": "teacher's top-K + sampled (V3)",
    "v4_student_tail": "student's top-K, tail (V4)",
    "v5_teacher_tail": "teacher's top-K, tail (V5)",
    "v2_student_and_sampled_mask": "V2, mask",
    "v3_teacher_and_sampled_mask": "V3, mask",
    "v4_student_tail_mask": "V4, mask",
    "v5_teacher_tail_mask": "V5, mask",
}
LABELS = {
    "chain (its teacher writes otherwise)": style.BLUE,
    "sort (its teacher writes alike)": style.ORANGE,
}
TASKS = {"": style.BLUE, "chain": style.BLUE, "sort": style.ORANGE}


def draw(table: pd.DataFrame) -> Figure:
    """A panel a table, a row a method, a colour a task."""
    figure = Figure(figsize=(style.WIDTH, 6.4), layout="constrained")
    grid: dict[str, Any] = figure.subplot_mosaic(
        [["table1", "table2"], ["table3", "table4b"], ["table4", "table4"]],
        height_ratios=[4, 6, 10],
    )
    for name, axes in grid.items():
        title, group, methods = TABLES[str(name)]
        panel(axes, table[table["group"] == group].fillna({"task": ""}), methods)
        axes.set_title(title)
    for axes in (grid["table3"], grid["table4b"], grid["table4"]):
        axes.set_xlabel("held-out accuracy")
    handles = [
        figure.axes[0].errorbar([], [], fmt="o", ms=3.5, color=colour, label=label)
        for label, colour in LABELS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def panel(axes: Any, table: pd.DataFrame, methods: tuple[str, ...]) -> None:
    final, first = last(table), table[table["step"] == 0]
    shown = [method for method in methods if method in set(final["method"])]
    tasks = list(dict.fromkeys(final["task"]))
    for i, task in enumerate(tasks):
        start = first[first["task"] == task]["accuracy"].mean()
        axes.axvline(start, ls=":", lw=1, color=TASKS[task])
        for row, method in enumerate(shown):
            values = outcomes(final[final["task"] == task], method).to_numpy(float)
            mean, low, high = accuracy(values)
            place = row + (i - (len(tasks) - 1) / 2) * 0.28
            axes.errorbar(
                mean, place, xerr=[[mean - low], [high - mean]], fmt="o", ms=3.5, color=TASKS[task]
            )
    labels = [NAMES.get(method, method) for method in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set(xlim=(-0.03, 1.0), ylim=(len(shown) - 0.5, -0.5))


def markdown(table: pd.DataFrame) -> str:
    """All tables as Markdown: accuracy, and the difference to the first row of each."""
    parts = []
    for title, group, methods in TABLES.values():
        mine = table[table["group"] == group].fillna({"task": ""})
        if mine.empty:
            continue
        for task in dict.fromkeys(mine["task"]):
            parts.append(one_table(title, task, mine[mine["task"] == task], methods))
    return "\n\n".join(parts) + "\n"


def one_table(title: str, task: str, table: pd.DataFrame, methods: tuple[str, ...]) -> str:
    """One task's table; p is `paired.sign_flip` over problems, adjusted by Holm in the table."""
    final = last(table)
    shown = [method for method in methods if method in set(final["method"])]
    base = outcomes(final, shown[0])
    pairs = [difference(outcomes(final, method), base) for method in shown[1:]]
    adjusted = holm([pair["p"] for pair in pairs])
    first = pd.DataFrame(
        [list(map(float, x)) for x in table[table["step"] == 0]["outcomes"].unique()]
    )
    lines = [
        f"### {title}" + (f", task {task}" if task else ""),
        "",
        f"Student before training: {np.mean(first.to_numpy()):.3f}.",
        "",
        f"| method | seeds | accuracy [95 %] | minus {NAMES.get(shown[0], shown[0])} [95 %] | p |",
        "|---|---|---|---|---|",
    ]
    for i, method in enumerate(shown):
        values = outcomes(final, method)
        cell = "{:.3f} [{:.3f}, {:.3f}]".format(*accuracy(values.to_numpy(float)))
        away = p = ""
        if i:
            away = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**pairs[i - 1])
            p = f"{adjusted[i - 1]:.3g}"
        lines.append(f"| {NAMES.get(method, method)} | {len(values)} | {cell} | {away} | {p} |")
    return "\n".join(lines)


def collect(runs: list[Path]) -> pd.DataFrame:
    return evaluations(runs)
