"""Descent on free logits: the student's mass on the teacher's top K, and what becomes of the KL."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line, pick

COLUMNS = ("quantity", "objective", "start", "k", "iteration", "value", "low", "high")
NAMES = {
    "teacher_topk": "renormalised (paper's)",
    "teacher_topk_unnormalised": "un-normalised",
    "teacher_topk_stopped": "stopped head",
    "teacher_topk_bucket": "tail bucket",
    "teacher_topk_sampled_tail": "sampled tail",
    "teacher_topk_published_tail": "published tail",
    "full_reverse_kl": "full reverse KL",
}
K = 4


def draw(table: pd.DataFrame) -> Figure:
    """Four panels: p(S) from the teacher and from afar; reverse KL and entropy from afar."""
    figure, (same, afar, kl, entropy) = style.panels(2, 2, 5.4)
    curves(same, table, "mass", "teacher", "p(S)")
    same.set_title("From a student that equals its teacher")
    curves(afar, table, "mass", "afar", "p(S)")
    afar.set_title("From a student far from its teacher")
    start = pick(table, "mass", "iteration", objective="teacher_topk", start="teacher", k=K)
    teacher = start["value"].iloc[0]
    for axes in (same, afar):
        axes.axhline(teacher, color=style.GREY, lw=0.8, ls="--")
        axes.axhline(teacher / 2.718281828, color=style.GREY, lw=0.8, ls=":")
        axes.text(0, teacher, "q(S)", va="bottom", fontsize=7, color="#444444")
        axes.text(0, teacher / 2.718281828, "q(S)/e", va="bottom", fontsize=7, color="#444444")
        axes.set_ylim(0, 1)
    curves(kl, table, "kl", "teacher", "reverse KL to the teacher, nats")
    kl.set_title("The teacher is forgotten")
    curves(entropy, table, "entropy", "teacher", "student's entropy, nats")
    entropy.set_title("and the student flattens")
    kl.legend(loc="upper left", fontsize=6)
    return figure


def curves(axes: Any, table: pd.DataFrame, quantity: str, start: str, label: str) -> None:
    for (name, text), colour in zip(NAMES.items(), style.CYCLE, strict=True):
        rows = pick(table, quantity, "iteration", objective=name, start=start, k=K)
        line(axes, rows, "iteration", color=colour, label=text)
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="iteration", ylabel=label)
