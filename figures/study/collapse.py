"""Gradient descent on free logits: student mass on the teacher's top K, reverse KL and entropy."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line, select_rows

COLUMNS = ("quantity", "objective", "start", "k", "iteration", "value", "low", "high")
NAMES = {
    "teacher_topk": "renormalised (paper's)",
    "teacher_topk_unnormalised": "un-normalised",
    "teacher_topk_stopped": "stop-gradient head",
    "teacher_topk_bucket": "tail bucket",
    "teacher_topk_sampled_tail": "sampled tail",
    "teacher_topk_published_tail": "published tail",
    "full_reverse_kl": "full reverse KL",
}
K = 4


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw p(S) from an equal and from a distant student; KL and entropy from the equal one."""
    figure, (from_teacher, from_afar, kl, entropy) = style.make_panels(2, 2, 5.4, width=width)
    draw_curves(from_teacher, table, "mass", "teacher", "p(S)")
    from_teacher.set_title("Start: student equals teacher")
    draw_curves(from_afar, table, "mass", "afar", "p(S)")
    from_afar.set_title("Start: student far from teacher")
    start = select_rows(table, "mass", "iteration", objective="teacher_topk", start="teacher", k=K)
    teacher = start["value"].iloc[0]
    for axes in (from_teacher, from_afar):
        axes.axhline(teacher, color=style.GREY, lw=0.8, ls="--")
        axes.axhline(teacher / 2.718281828, color=style.GREY, lw=0.8, ls=":")
        axes.text(0, teacher, "q(S)", va="bottom", fontsize=7, color="#444444")
        axes.text(0, teacher / 2.718281828, "q(S)/e", va="bottom", fontsize=7, color="#444444")
        axes.set_ylim(0, 1)
    draw_curves(kl, table, "kl", "teacher", "reverse KL to the teacher, nats")
    kl.set_title("Reverse KL (start: equal)")
    draw_curves(entropy, table, "entropy", "teacher", "student's entropy, nats")
    entropy.set_title("Entropy (start: equal)")
    kl.legend(loc="upper left", fontsize=6)
    return figure


def draw_curves(axes: Any, table: pd.DataFrame, quantity: str, start: str, label: str) -> None:
    """Draw a quantity by iteration, one line an objective."""
    for (name, text), colour in zip(NAMES.items(), style.CYCLE, strict=True):
        rows = select_rows(table, quantity, "iteration", objective=name, start=start, k=K)
        plot_line(axes, rows, "iteration", color=colour, label=text)
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="iteration", ylabel=label)
