"""What a teacher is shown: accuracy of its students during training, and alarms of the runs."""

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style
from figures.collect.matched import (
    COLLAPSE_SHARE,
    MATCHED_COLUMNS,
    collapsed_seeds,
    learning_curve,
    matched_table,
)
from figures.collect.paired import (
    accuracy_interval,
    last_evaluations,
    outcome_matrix,
    paired_difference,
)
from figures.labels import method_label

COLUMNS = MATCHED_COLUMNS
CAPTION = (
    "On-policy distillation from a teacher that reads the worked solution of the problem, that of "
    "another problem, or an empty place for one, behind the prompt that the student reads alone. "
    "Frozen copy: the teacher is the student before training; moving average: the average of the "
    "student's weights, with decay 0.9 an update; student itself: its present weights; strong: the "
    "model from which the students were made by further training on demonstrations with errors, in "
    "which one intermediate result in ten is wrong unless the right solution is shown. A step has "
    "48 responses and two updates. Lines: mean held-out accuracy over five students and 200 "
    "problems, solved without a solution in view; bands: 95 % intervals over both. Dotted: the "
    "students before training."
)
GROUP = "views"
TEACHERS = {
    "frozen": "Frozen copy",
    "moving": "Moving average",
    "live": "Student itself",
    "strong": "Strong teacher",
}
VIEWS = {
    "solution": (style.BLUE, "-", "o"),
    "another": (style.RED, "--", "s"),
    "empty": (style.GREY, ":", "^"),
}
"""What the teacher is shown to color, dash and mark."""
FIRST = "solution"
"""View to which the others are compared."""


def method_name(teacher: str, view: str) -> str:
    """Return the name of a method in the group."""
    return f"{teacher}_{view}"


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel a teacher with the learning curve of every view."""
    evaluations = select_group(table)
    present = set(evaluations["method"])
    teachers = [t for t in TEACHERS if any(method_name(t, view) in present for view in VIEWS)]
    narrow = style.is_column(width)
    rows, columns = (len(teachers), 1) if narrow else (1, len(teachers))
    height = 0.6 + 1.9 * len(teachers) if narrow else 2.7
    figure, axes = style.make_panels(rows, columns, height, width=width)
    for ax, teacher in zip(axes, teachers, strict=True):
        for view, (color, dash, mark) in VIEWS.items():
            name = method_name(teacher, view)
            if name in present:
                curve = learning_curve(evaluations, name)
                options: dict[str, Any] = {"color": color, "ls": dash, "marker": mark, "ms": 3}
                style.plot_band(
                    ax,
                    curve["step"],
                    curve["accuracy"],
                    curve["low"],
                    curve["high"],
                    label=method_label(view),
                    **options,
                )
                ax.axhline(curve["accuracy"].iloc[0], ls=":", lw=0.8, color="#444444", zorder=1)
        ax.set(title=TEACHERS[teacher], ylim=(0, 1.02), xlim=(0, None))
        ax.yaxis.set_major_formatter("{x:g}")
    for ax in axes if narrow else axes[:1]:
        ax.set_ylabel("held-out accuracy")
    for ax in axes[-1:] if narrow else axes:
        ax.set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if narrow else 3)
    return figure


def select_group(table: pd.DataFrame) -> pd.DataFrame:
    """Select the evaluations of TEACHERS and VIEWS.

    Args:
        table: A table with COLUMNS.

    Returns:
        Its rows of the group.

    Raises:
        InvalidInput: There are none.
    """
    methods = [method_name(teacher, view) for teacher in TEACHERS for view in VIEWS]
    rows = table[(table["group"] == GROUP) & table["method"].isin(methods)]
    if rows.empty:
        raise InvalidInput(
            f"no run of the group {GROUP}; run folders must be named GROUP/METHOD-SEED, as by "
            f"`opd paper --groups {GROUP}`: {', '.join(methods)}"
        )
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the accuracy before, at best and at the end of training, collapses and alarms.

    Args:
        table: A table with COLUMNS.

    Returns:
        A table with the columns teacher, view, seeds, before, best (largest mean accuracy over
        students), best_step, accuracy (after the last step), low and high; late, late_low and
        late_high (change since half of the steps, paired by student and problem); collapsed (runs
        that fall below COLLAPSE_SHARE of their best), alarm (the most frequent first alarm of a
        run, "" if none), alarms (runs with that first alarm) and alarm_step (its median step); and,
        of the difference to FIRST, paired by student and problem, away, away_low, away_high and
        p_seeds.
    """
    evaluations = select_group(table)
    final = last_evaluations(evaluations)
    present = set(evaluations["method"])
    records = []
    for teacher in TEACHERS:
        for view in VIEWS:
            name = method_name(teacher, view)
            if name not in present:
                continue
            curve = learning_curve(evaluations, name)
            outcomes = outcome_matrix(final, name)
            accuracy, low, high = accuracy_interval(outcomes.to_numpy(float))
            best = curve.loc[curve["accuracy"].idxmax()]
            row = {"teacher": teacher, "view": view, "seeds": len(outcomes)}
            row |= {"before": curve["accuracy"].iloc[0], "best": best["accuracy"]}
            row |= {"best_step": int(best["step"]), "accuracy": accuracy, "low": low, "high": high}
            middle = curve.loc[(curve["step"] - curve["step"].max() / 2).abs().idxmin(), "step"]
            late = paired_difference(
                outcomes, outcome_matrix(evaluations[evaluations["step"] == middle], name)
            )
            row |= {"late": late["value"], "late_low": late["low"], "late_high": late["high"]}
            row |= {"collapsed": len(collapsed_seeds(evaluations, name))}
            row |= first_alarm(final[final["method"] == name])
            if view != FIRST and method_name(teacher, FIRST) in present:
                gain = paired_difference(
                    outcomes, outcome_matrix(final, method_name(teacher, FIRST))
                )
                row |= {"away": gain["value"], "away_low": gain["low"], "away_high": gain["high"]}
                row |= {"p_seeds": gain["p_seeds"]}
            records.append(row)
    return pd.DataFrame(records)


def first_alarm(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the alarm that most runs of a method raise first.

    Args:
        runs: One row of COLUMNS a run.

    Returns:
        `alarm` ("" if no run raises one), `alarms` (runs that raise it first) and `alarm_step`
        (median over them).
    """
    names = [str(name) for name in runs["alarm"].fillna("") if name]
    if not names:
        return {"alarm": "", "alarms": 0, "alarm_step": float("nan")}
    name, count = Counter(names).most_common(1)[0]
    steps = runs[runs["alarm"] == name]["alarm_step"]
    return {"alarm": name, "alarms": count, "alarm_step": float(steps.median())}


def markdown(results: pd.DataFrame) -> str:
    """Render the table of `summary` as Markdown."""
    lines = [
        "Brackets: 95 % intervals over students and problems; differences are paired by both. p: "
        "sign-flip test over students, not adjusted. Since half: change of the accuracy since half "
        "of the steps. Collapsed: runs in which an evaluation falls below "
        f"{COLLAPSE_SHARE:g} of their best earlier one. First alarm: the alarm that most runs "
        "raise first, in how many runs, and the median of its step.",
        "",
        "| teacher | shown | students | before | best (step) | last [95 %] | since half [95 %] "
        "| minus solution [95 %] | p | collapsed | first alarm |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results.itertuples():
        cells = [TEACHERS[str(row.teacher)].lower(), method_label(str(row.view)), f"{row.seeds}"]
        cells += [f"{row.before:.3f}", f"{row.best:.3f} ({row.best_step})"]
        cells.append(f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]")
        cells.append(f"{row.late:+.3f} [{row.late_low:+.3f}, {row.late_high:+.3f}]")
        if row.view == FIRST:
            cells += ["", ""]
        else:
            cells.append(f"{row.away:+.3f} [{row.away_low:+.3f}, {row.away_high:+.3f}]")
            cells.append(f"{row.p_seeds:.3g}")
        cells.append(f"{row.collapsed} of {row.seeds}")
        cells.append(f"{row.alarm}, {row.alarms} runs, {row.alarm_step:g}" if row.alarm else "none")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of evaluations of the runs, with the first alarm of each."""
    return matched_table(runs)
