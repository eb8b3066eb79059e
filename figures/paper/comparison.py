"""Tables 1 to 4 of the paper in our measurements: final accuracy of every method."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style
from figures.collect.paired import accuracy, difference, holm, last, outcomes
from figures.collect.steps import EVALUATION_COLUMNS, evaluations

COLUMNS = EVALUATION_COLUMNS
CAPTION = (
    "Held-out accuracy after training, mean over seeds and problems, with 95 % intervals over "
    "both; strokes: each run; dotted: the student before. Rollouts have top-p 0.9 for "
    "local supports and variants, as in the paper; evaluation is at top-p 1 (in the paper: 0.9). "
    "The models are made for this: a byte-level student that spells its think tags and ends "
    "with <|im_end|>; a teacher of the task chain whose tags are single tokens and whose end is "
    "<|endoftext|>; a teacher of the task sort that writes as the student does. The paper's "
    "students have 7B parameters and its tasks are math and ALFWorld. The mismatch is like the "
    "paper's (see `segmentation`), but every response has it three times within some hundred "
    "tokens, which is far more often: that unmasked methods fall to 0 is an effect of this scale."
)
TABLES = {
    "table1": (
        "Table 1: one task",
        "single",
        ("sampled", "sampled_mask", "lsm", "lsm_mask"),
    ),
    "table2": (
        "Table 2: two tasks",
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
    found = summary(table)
    for name, axes in grid.items():
        final = last(table[table["group"] == TABLES[str(name)][1]].fillna({"task": ""}))
        panel(axes, found[found["table"] == name], final)
        axes.set_title(TABLES[str(name)][0])
    for axes in (grid["table3"], grid["table4b"], grid["table4"]):
        axes.set_xlabel("held-out accuracy")
    handles = [
        figure.axes[0].errorbar([], [], fmt="o", ms=3.5, color=colour, label=label)
        for label, colour in LABELS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def panel(axes: Any, found: pd.DataFrame, final: pd.DataFrame) -> None:
    """Rows of `summary` of one table, and the runs behind them."""
    shown, tasks = (list(dict.fromkeys(found[name])) for name in ("method", "task"))
    for row in found.itertuples():
        colour = TASKS[row.task]
        if row.method == shown[0]:
            axes.axvline(row.before, ls=":", lw=1, color=colour)
        place = shown.index(row.method) + (tasks.index(row.task) - (len(tasks) - 1) / 2) * 0.28
        ends = [[row.accuracy - row.low], [row.high - row.accuracy]]
        axes.errorbar(row.accuracy, place, xerr=ends, fmt="o", ms=3.5, color=colour)
        runs = final[(final["method"] == row.method) & (final["task"] == row.task)]["accuracy"]
        axes.plot(runs, [place] * len(runs), "|", ms=6, mew=0.8, color=colour, alpha=0.7)
    axes.set_yticks(range(len(shown)), [NAMES.get(method, method) for method in shown])
    axes.set(xlim=(-0.03, 1.0), ylim=(len(shown) - 0.5, -0.5))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """All tables: accuracy of every method, and its difference to the first method of its table.

    Columns: table, task, method, seeds, before (accuracy of the student), accuracy, low, high, and
    of the difference pairs (seeds that both have), away, away_low, away_high, p, p_seeds: see
    `paired.difference`; both p are adjusted by Holm within a table and task. Differences of the
    first method are NaN.
    """
    parts = []
    for name, (_, group, methods) in TABLES.items():
        mine = table[table["group"] == group].fillna({"task": ""})
        for task in dict.fromkeys(mine["task"]):
            some = one_table(mine[mine["task"] == task], methods)
            some.insert(0, "table", name)
            some.insert(1, "task", task)
            parts.append(some)
    if not parts or all(part.empty for part in parts):
        known = sorted({f"{group}/{m}" for _, group, ms in TABLES.values() for m in ms})
        raise InvalidInput(
            "no run of a group and a method of the tables; a run folder is GROUP/METHOD-SEED, as "
            f"`opd paper` makes them: {', '.join(known)}"
        )
    return pd.concat(parts, ignore_index=True)


def one_table(table: pd.DataFrame, methods: tuple[str, ...]) -> pd.DataFrame:
    """`summary` of one table and task."""
    final, first = last(table), table[table["step"] == 0]
    found = []
    shown = [method for method in methods if method in set(final["method"])]
    for method in shown:
        values = outcomes(final, method)
        mean, low, high = accuracy(values.to_numpy(float))
        row = {"method": method, "seeds": len(values), "before": first["accuracy"].mean()}
        row |= {"accuracy": mean, "low": low, "high": high}
        if method != shown[0]:
            away = difference(values, outcomes(final, shown[0]))
            row |= {"pairs": away["seeds"], "away": away["value"]}
            row |= {"away_low": away["low"], "away_high": away["high"]}
            row |= {"p": away["p"], "p_seeds": away["p_seeds"]}
        found.append(row)
    whole = pd.DataFrame(found)
    for name in {"p", "p_seeds"} & set(whole):
        whole.loc[1:, name] = holm(whole.loc[1:, name].tolist())
    return whole


def markdown(table: pd.DataFrame) -> str:
    """All tables as Markdown."""
    found = summary(table)
    parts = [
        "Brackets: 95 % intervals over runs and problems. p: sign flips over problems, about "
        "these runs; p over seeds: sign flips over seeds, about runs like them, which with n seeds "
        f"is at least 2^(1-n) ({2.0 ** (1 - found['pairs'].max()):.4g} at most seeds) before "
        "Holm's correction within a table, which both have."
    ]
    for (name, task), mine in found.groupby(["table", "task"], sort=False):
        base, *_ = mine.itertuples()
        to = NAMES.get(str(base.method), str(base.method))
        lines = [
            f"### {TABLES[str(name)][0]}" + (f", task {task}" if task else ""),
            "",
            f"Student before training: {base.before:.3f}.",
            "",
            f"| method | seeds | accuracy [95 %] | minus {to} [95 %] | p | p over seeds |",
            "|---|---|---|---|---|---|",
        ]
        for row in mine.itertuples():
            cells = [NAMES.get(row.method, row.method), str(row.seeds)]
            cells.append(f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]")
            if row.method == base.method:
                cells += ["", "", ""]
            else:
                away = f"{row.away:+.3f} [{row.away_low:+.3f}, {row.away_high:+.3f}]"
                cells += [away, f"{row.p:.3g}", f"{row.p_seeds:.3g}"]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def collect(runs: list[Path]) -> pd.DataFrame:
    return evaluations(runs)
