"""What training changes beside accuracy: confidence, diversity, recovery and another task."""

from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.collect.final_measures import COLUMNS as TABLE_COLUMNS
from figures.collect.final_measures import COSTS, START, measures_table, summarize_measures
from figures.collect.regimes import regimes_of
from figures.labels import method_label
from figures.regimes.dose import FAMILY

COLUMNS = TABLE_COLUMNS
CAPTION = (
    "What methods change beside accuracy. Over-confidence: mean probability of the stated answer, "
    "given the model's own reasoning, minus its accuracy. Gap: pass@4 minus pass@1, what sampling "
    "more could still solve. Cost of an error: accuracy of responses that are continued from a "
    "random place, minus the same after a wrong digit there. Other task: change of the accuracy on "
    "sorting problems, which the student was taught before and which are not trained. Marks: "
    "density of foreign tokens, by their measured share; bars: 95 % intervals over pairs of models "
    "that were trained apart, and their problems. SFT and offline KL have a learning rate three "
    "times that of the others, which decides most of what SFT forgets. Seconds are those of the "
    "recording, two runs at once."
)
PANELS = {
    "over_confidence": ("Over-confidence", "confidence - accuracy"),
    "gap": ("Gap", "pass@4 - pass@1"),
    "recovery_loss": ("Cost of an error", "accuracy lost"),
    "other_gain": ("Other task", "accuracy gained"),
}
"""Column to the title and the label of its panel."""
METHODS = (START, "sampled", "sampled_mask", "lsm", "lsm_mask", "full_kl", "offline_kl", "sft")
"""Methods that are drawn, from the top."""
MARKS = "osD^vP"
DARK = "#444444"
SECTIONS = {
    "Accuracy and cost": {
        "accuracy": "accuracy",
        "closed": "lead closed",
        "gap": "gap",
        "response_tokens": "tokens learned from",
        "student_tokens": "sampled",
        "teacher_tokens": "read by the teacher",
        "seconds": "seconds",
    },
    "Confidence": {
        "over_confidence": "over-confidence",
        "brier": "Brier",
        "ece": "ECE",
        "vote_over_confidence": "over-confidence of the vote",
    },
    "An error, and another task": {
        "unperturbed": "continued",
        "perturbed": "continued after an error",
        "recovery_loss": "cost of the error",
        "other_accuracy": "other task",
        "other_gain": "change of it",
    },
}
"""Title of a table to its columns and their heads."""
SIGNED = frozenset({"over_confidence", "vote_over_confidence", "other_gain"})
"""Columns that are printed with their sign."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw each of PANELS by method, a mark a density."""
    narrow = style.is_column(width)
    results = summarize_measures(table)
    results = results[results["family"] == FAMILY]
    methods = [name for name in METHODS if name in set(results["method"])]
    regimes = regimes_of(table, FAMILY)
    rows = 0 if results.empty else len(PANELS) if narrow else 1
    height = len(PANELS) * 1.75 + 0.5 if narrow else 3.4
    figure, axes = style.make_panels(rows, 1 if narrow else len(PANELS), height, width=width)
    colors = style.sequential_colors(len(regimes))
    for ax, (column, (title, label)) in zip(axes, PANELS.items(), strict=True):
        for number, regime in enumerate(regimes):
            offset = 0.16 * (number - (len(regimes) - 1) / 2)
            rows_of_regime = results[results["regime"] == regime].set_index("method")
            share = rows_of_regime["foreign_share"].mean()
            draw_marks(
                ax,
                rows_of_regime.reindex(methods)[[column, f"{column}_low", f"{column}_high"]],
                offset,
                color=colors[number],
                marker=MARKS[number % len(MARKS)],
                label=f"{share:.1%} foreign tokens",
            )
        ax.axvline(0.0, lw=0.8, color=DARK, zorder=1)
        ax.set(title=title, xlabel=label, ylim=(len(methods) - 0.5, -0.5))
        ax.set_yticks(range(len(methods)), [method_label(name) for name in methods])
        ax.grid(axis="y", visible=False)
        if not narrow and ax is not axes[0]:
            ax.tick_params(labelleft=False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if narrow else 4)
    return figure


def draw_marks(ax: Any, rows: pd.DataFrame, offset: float, **options: Any) -> None:
    """Draw a mark with its interval for every method.

    Args:
        ax: Axes.
        rows: Value, low and high, one row a method; NaN where there is no value.
        offset: Distance of the marks below the middle of their methods.
        **options: Options of the marks.
    """
    value, low, high = (rows[name].to_numpy(float) for name in rows)
    ax.errorbar(
        value,
        [number + offset for number in range(len(rows))],
        xerr=[value - low, high - value],
        ls="none",
        ms=3,
        elinewidth=0.8,
        **options,
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the mean of every measure of every method in every regime (`summarize_measures`)."""
    return summarize_measures(table)


def markdown(results: pd.DataFrame) -> str:
    """Render the measures of `summary` as Markdown, a table for each of SECTIONS."""
    parts = [
        "Means over pairs of models; brackets: 95 % intervals over pairs and problems, of one pair "
        "over problems, of a cost over pairs. [Evaluation](../../docs/evaluation.md) defines the "
        "measures: the share of the teacher's lead that is closed (in parentheses: pairs where it "
        "is defined, if not all), pass@k minus the accuracy, over-confidence and errors of the "
        "answer's probability and over-confidence of the vote, the accuracy of responses continued "
        "from a random place without and with an error there, and the accuracy on a task that was "
        "not trained. Tokens: of the responses of all steps; those of them that the student "
        "sampled; those that the teacher read, prompts included. SFT and offline KL take responses "
        "of the teacher from a file, whose sampling is not counted."
    ]
    is_start = results["method"] == START
    ordered = pd.concat([results[is_start], results[~is_start]])
    for title, heads in SECTIONS.items():
        names = ["regime", "method", "pairs", *heads.values()]
        lines = [f"### {title}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for regime in dict.fromkeys(results["regime"]):
            for row in ordered[ordered["regime"] == regime].to_dict("records"):
                cells = [regime, method_label(str(row["method"])), str(row["pairs"])]
                cells += [cost_cell(row, x) if x in COSTS else share_cell(row, x) for x in heads]
                lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def share_cell(row: dict[str, Any], name: str) -> str:
    """Return a measure with its interval, and the number of pairs where some lack it."""
    if isnan(row[name]):
        return ""
    sign = "+" if name in SIGNED else ""
    value, low, high = (f"{row[name + end]:{sign}.3f}" for end in ("", "_low", "_high"))
    count = "" if row[f"{name}_pairs"] == row["pairs"] else f" ({row[f'{name}_pairs']})"
    return f"{value} [{low}, {high}]{count}"


def cost_cell(row: dict[str, Any], name: str) -> str:
    """Return a cost with its interval over pairs, if there are two."""
    if isnan(row[name]):
        return ""
    digits = 1 if name == "seconds" else 0
    value, low, high = (f"{row[name + end]:,.{digits}f}" for end in ("", "_low", "_high"))
    return value if isnan(row[f"{name}_low"]) else f"{value} [{low}, {high}]"


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of measures from the run folders of a map that was evaluated."""
    return measures_table(runs)
