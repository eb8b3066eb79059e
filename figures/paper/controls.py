"""Matched controls of distillation: accuracy at equal response tokens and at equal seconds."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style
from figures.collect.matched import (
    MATCHED_COLUMNS,
    common_budget,
    learning_curves,
    matched_table,
    step_within,
)
from figures.collect.paired import holm_adjust, outcome_matrix, paired_difference
from figures.labels import method_label

COLUMNS = MATCHED_COLUMNS
CAPTION = (
    "Six ways to train the same students, compared at equal response tokens and at equal seconds. "
    "Each seed is another student: the strong model after further training on demonstrations with "
    "errors, in which one intermediate result in ten is wrong. SFT and offline KL read responses "
    "that the teacher wrote once; mixed draws half of the responses from the teacher; reward only "
    "reads no teacher. Lines: mean held-out accuracy over five students and 200 problems; bands: "
    "95 % intervals over both. Dotted: the budget that all methods reach and a quarter of it, at "
    "which the table reads the accuracy. "
    "Seconds are those of generation, scoring and update on one thread of a busy machine, means "
    "over students, and compare methods only."
)
BASELINE = "on_policy_topk"
METHODS = {
    "on_policy_topk": (style.BLUE, "-", "o"),
    "on_policy_sampled": (style.SKY, "--", "s"),
    "mixed": (style.GREEN, "-.", "^"),
    "offline_kl": (style.ORANGE, "-", "v"),
    "sft": (style.RED, "--", "D"),
    "reward_only": (style.GREY, ":", "P"),
}
"""Method to color, dash and mark; all are compared with BASELINE, the first."""
GROUP = "controls"
BUDGETS = {"tokens": "response tokens, thousands", "seconds": "seconds of training"}
"""Column of a cost to the label of its axis."""
SCALE = {"tokens": 1e-3, "seconds": 1.0}
SHARES = (0.25, 1.0)
"""Shares of the common budget at which the methods are compared."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one panel for each of BUDGETS with the learning curve of every method."""
    evaluations = select_group(table)
    narrow = style.is_column(width)
    rows, columns, height = (2, 1, 5.4) if narrow else (1, 2, 3.1)
    figure, axes = style.make_panels(rows, columns, height, width=width)
    curves = learning_curves(evaluations, METHODS)
    for ax, (cost, label) in zip(axes, BUDGETS.items(), strict=True):
        for method, curve in curves.items():
            color, dash, mark = METHODS[method]
            options: dict[str, Any] = {"color": color, "ls": dash, "marker": mark, "ms": 3}
            x = curve[cost] * SCALE[cost]
            style.plot_band(
                ax,
                x,
                curve["accuracy"],
                curve["low"],
                curve["high"],
                label=method_label(method),
                **options,
            )
        for share in SHARES:
            budget = share * common_budget(curves, cost) * SCALE[cost]
            ax.axvline(budget, ls=":", lw=1, color="#444444")
        ax.set(xlabel=label, ylabel="held-out accuracy", xlim=(0, None))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_title(f"At equal {cost}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if narrow else 3)
    return figure


def select_group(table: pd.DataFrame) -> pd.DataFrame:
    """Select the evaluations of METHODS.

    Args:
        table: A table with COLUMNS.

    Returns:
        Its rows of the group and the methods.

    Raises:
        InvalidInput: There are none of them, or none of BASELINE.
    """
    rows = table[(table["group"] == GROUP) & table["method"].isin(METHODS)]
    if BASELINE not in set(rows["method"]):
        raise InvalidInput(
            f"no run of {GROUP}/{BASELINE}, with which the others are compared; run folders must "
            f"be named GROUP/METHOD-SEED, as by `opd paper --groups {GROUP}`"
        )
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Compute the accuracy of every method at equal tokens and seconds, and what BASELINE gains.

    Args:
        table: A table with COLUMNS.

    Returns:
        A table with the columns budget ("tokens" or "seconds"), share (of the common budget), the
        columns of `compare_within`, and one row a method.
    """
    evaluations = select_group(table)
    parts = [
        compare_within(evaluations, cost, share).assign(budget=cost, share=share)
        for cost in BUDGETS
        for share in SHARES
    ]
    return pd.concat(parts, ignore_index=True)


def compare_within(evaluations: pd.DataFrame, cost: str, share: float) -> pd.DataFrame:
    """Compare the methods within a share of the cost that all of them reach.

    Args:
        evaluations: Rows of `select_group`.
        cost: "tokens" or "seconds".
        share: Share of the common budget.

    Returns:
        A table with the columns method, seeds, step (the last evaluation within the budget), tokens
        and seconds (until then, means over seeds), before, accuracy, low and high; and, of the
        difference to BASELINE, paired by student and problem, pairs, away, away_low, away_high and
        p_seeds (adjusted by Holm's method).
    """
    curves = learning_curves(evaluations, METHODS)
    budget = share * common_budget(curves, cost)
    rows: list[dict[str, Any]] = []
    outcomes: dict[str, pd.DataFrame] = {}
    for name, curve in curves.items():
        step = step_within(curve, cost, budget)
        outcomes[name] = outcome_matrix(evaluations[evaluations["step"] == step], name)
        point = curve[curve["step"] == step].iloc[0].to_dict()
        row = {"method": name, "seeds": len(outcomes[name]), "before": curve["accuracy"].iloc[0]}
        row |= {**point, "step": step}
        if name != BASELINE:
            gain = paired_difference(outcomes[name], outcomes[BASELINE])
            row |= {"pairs": gain["seeds"], "away": gain["value"], "away_low": gain["low"]}
            row |= {"away_high": gain["high"], "p_seeds": gain["p_seeds"]}
        rows.append(row)
    adjusted = holm_adjust([row["p_seeds"] for row in rows[1:]])
    for row, p in zip(rows[1:], adjusted, strict=True):
        row["p_seeds"] = p
    return pd.DataFrame(rows)


def markdown(results: pd.DataFrame) -> str:
    """Render the tables of `summary` as Markdown."""
    parts = [
        "Brackets: 95 % intervals over students and problems; differences are paired by both. p: "
        "sign-flip test over students, adjusted by Holm's method within a table; with n students "
        f"it is at least 2^(1-n) ({2.0 ** (1 - results['pairs'].max()):.4g} with the most "
        "students) before the correction."
    ]
    for (cost, share), rows in results.groupby(["budget", "share"], sort=False):
        base = method_label(BASELINE)
        part = "" if share == 1 else f", {share:.0%} of them"
        lines = [
            f"### At equal {cost}{part}",
            "",
            f"Students before training: {rows['before'].mean():.3f}.",
            "",
            f"| method | students | steps | tokens | seconds | accuracy [95 %] | minus {base} "
            "[95 %] | p |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows.itertuples():
            cells = [method_label(str(row.method)), f"{row.seeds}", f"{row.step}"]
            cells += [f"{row.tokens:,.0f}", f"{row.seconds:.1f}"]
            cells.append(f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]")
            if row.method == BASELINE:
                cells += ["", ""]
            else:
                cells.append(f"{row.away:+.3f} [{row.away_low:+.3f}, {row.away_high:+.3f}]")
                cells.append(f"{row.p_seeds:.3g}")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def collect(runs: list[Path]) -> pd.DataFrame:
    """Build the table of evaluations of the runs, with their cost."""
    return matched_table(runs)
