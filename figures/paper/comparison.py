"""Final accuracy of every method: our measurements for tables 1 to 4 of the paper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

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

COLUMNS = EVALUATION_COLUMNS
CAPTION = (
    "Held-out accuracy after training: mean over seeds and problems, with 95 % intervals over "
    "both. Vertical strokes: single runs; dotted: the untrained student. Rollouts use top-p 0.9 "
    "for local supports and variants, as in the paper; evaluation uses top-p 1 (0.9 in the "
    "paper). The models are built for this comparison: a byte-level student that spells its think "
    "tags in bytes and ends with <|im_end|>; a teacher of the task chain with single-token tags "
    "and the EOS <|endoftext|>; a teacher of the task sort with the student's tags and EOS. The "
    "paper's students have 7B parameters and its tasks are mathematics and ALFWorld. The mismatch "
    "is like the paper's (see `segmentation`), but every response of about a hundred tokens has "
    "it three times, which is far more often. That unmasked methods fall to 0 is an effect of "
    "this scale."
)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
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
NAMES = {
    "sampled": "sampled token",
    "sampled_mask": "sampled token, mask",
    "sampled_top_p": "sampled token, top-p",
    "sampled_mask_top_p": "sampled token, mask, top-p",
    "lsm": "local support (V1)",
    "lsm_mask": "local support (V1), mask",
    "lsm_whole": "local support, no top-p",
    "v2_student_and_sampled": "V2: student's K + sampled",
    "v3_teacher_and_sampled": "V3: teacher's K + sampled",
    "v4_student_tail": "V4: student's K, tail",
    "v5_teacher_tail": "V5: teacher's K, tail",
    "v2_student_and_sampled_mask": "V2, mask",
    "v3_teacher_and_sampled_mask": "V3, mask",
    "v4_student_tail_mask": "V4, mask",
    "v5_teacher_tail_mask": "V5, mask",
}
LABELS = {
    "chain (teacher uses other tags and EOS)": style.BLUE,
    "sort (teacher uses the same tags and EOS)": style.ORANGE,
}
TASKS = {"": style.BLUE, "chain": style.BLUE, "sort": style.ORANGE}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel a table, one row a method, one color a task."""
    figure = Figure(figsize=(width, 6.4), layout="constrained")
    grid: dict[str, Any] = figure.subplot_mosaic(
        [["table1", "table2"], ["table3", "table4b"], ["table4", "table4"]],
        height_ratios=[4, 6, 10],
    )
    results = summary(table)
    for name, axes in grid.items():
        final = last_evaluations(
            table[table["group"] == TABLES[str(name)].group].fillna({"task": ""})
        )
        draw_panel(axes, results[results["table"] == name], final)
        axes.set_title(TABLES[str(name)].title)
    for axes in (grid["table3"], grid["table4b"], grid["table4"]):
        axes.set_xlabel("held-out accuracy")
    handles = [
        figure.axes[0].errorbar([], [], fmt="o", ms=3.5, color=colour, label=label)
        for label, colour in LABELS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def draw_panel(axes: Any, results: pd.DataFrame, final: pd.DataFrame) -> None:
    """Draw the rows of `summary` of one table, and the accuracy of every run."""
    methods, tasks = (list(dict.fromkeys(results[name])) for name in ("method", "task"))
    for row in results.itertuples():
        colour = TASKS[row.task]
        if row.method == methods[0]:
            axes.axvline(row.before, ls=":", lw=1, color=colour)
        y = methods.index(row.method) + (tasks.index(row.task) - (len(tasks) - 1) / 2) * 0.28
        errors = [[row.accuracy - row.low], [row.high - row.accuracy]]
        axes.errorbar(row.accuracy, y, xerr=errors, fmt="o", ms=3.5, color=colour)
        runs = final[(final["method"] == row.method) & (final["task"] == row.task)]["accuracy"]
        axes.plot(runs, [y] * len(runs), "|", ms=6, mew=0.8, color=colour, alpha=0.7)
    axes.set_yticks(range(len(methods)), [NAMES.get(method, method) for method in methods])
    axes.set(xlim=(-0.03, 1.0), ylim=(len(methods) - 0.5, -0.5))


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
    for method in present_methods:
        values = outcome_matrix(final, method)
        mean, low, high = accuracy_interval(values.to_numpy(float))
        row = {"method": method, "seeds": len(values), "before": first["accuracy"].mean()}
        row |= {"accuracy": mean, "low": low, "high": high}
        if method != present_methods[0]:
            gain = paired_difference(values, outcome_matrix(final, present_methods[0]))
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
        base_name = NAMES.get(str(base.method), str(base.method))
        lines = [
            f"### {TABLES[str(name)].title}" + (f", task {task}" if task else ""),
            "",
            f"Student before training: {base.before:.3f}.",
            "",
            f"| method | seeds | accuracy [95 %] | minus {base_name} [95 %] | p | p over seeds |",
            "|---|---|---|---|---|---|",
        ]
        for row in task_rows.itertuples():
            cells = [NAMES.get(row.method, row.method), str(row.seeds)]
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
