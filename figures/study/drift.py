"""The three failure modes in the drift chain."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import line, pick

COLUMNS = (
    "quantity",
    "uninformed",
    "enter",
    "distance",
    "stop",
    "gamma",
    "position",
    "iteration",
    "k",
    "value",
    "low",
    "high",
)
SHOWN: dict[str, Any] = {"uninformed": "flat", "enter": 0.02, "distance": 0.7, "stop": 0.0}


def draw(table: pd.DataFrame) -> Figure:
    """Four panels: signal by position, where the student is, what the tag does, training."""
    figure, (signal, region, tag, training) = style.panels(2, 2, 5.2)
    by_position(signal, table)
    regions(region, table)
    special(tag, table)
    loops(training, table)
    return figure


def by_position(axes: Any, table: pd.DataFrame) -> None:
    parts = {q: pick(table, q, "position", **SHOWN) for q in ("signal_05", "signal_95")}
    low, high = parts["signal_05"], parts["signal_95"]
    axes.fill_between(
        low["position"],
        low["value"],
        high["value"],
        color=style.BLUE,
        alpha=0.15,
        label="5 to 95 %",
    )
    for quantity, label in (
        ("signal_05", "5 to 95 %, teacher sure of its own"),
        ("signal_95", None),
    ):
        sure = pick(table, quantity, "position", **SHOWN | {"uninformed": "sure"})
        axes.plot(sure["position"], sure["value"], ":", color=style.ORANGE, lw=1, label=label)
    middle = pick(table, "signal_50", "position", **SHOWN)
    mean = pick(table, "mean_signal", "position", **SHOWN)
    line(axes, middle, "position", color=style.BLUE, label="median")
    line(axes, mean, "position", color=style.RED, label="mean (the tag pulls it down)")
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="position", ylabel="signal log q − log p, nats")
    axes.set_title("A lopsided signal that drifts with the prefix")
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.42))


def regions(axes: Any, table: pd.DataFrame) -> None:
    for quantity, label, colour in (
        ("loop_mass", "loop: the teacher repeats too", style.RED),
        ("uninformed_mass", "teacher is flat", style.ORANGE),
    ):
        rows = pick(table, quantity, "position", **SHOWN)
        line(axes, rows, "position", color=colour, label=label)
    for enter, dash in ((0.005, ":"), (0.05, "--")):
        rows = pick(table, "loop_mass", "position", **SHOWN | {"enter": enter})
        axes.plot(
            rows["position"],
            rows["value"],
            dash,
            color=style.RED,
            lw=1,
            label=f"loop, entered with {enter:g}",
        )
    left = pick(table, "loop_mass", "position", **SHOWN | {"stop": 0.02})
    line(axes, left, "position", color=style.PURPLE, label="loop, of responses that may end")
    axes.set(xlabel="position", ylabel="probability of being there", ylim=(0, 1))
    axes.set_title("Where the student goes")
    axes.legend(loc="upper left")


def special(axes: Any, table: pd.DataFrame) -> None:
    rows = pick(table, "variance_factor", "gamma", **SHOWN)
    spread = [(rows["value"] - rows["low"]).clip(lower=0), rows["high"] - rows["value"]]
    axes.bar(range(len(rows)), rows["value"], yerr=spread, color=style.BLUE, width=0.6, ecolor="k")
    axes.set_xticks(range(len(rows)), [f"γ = {g:g}" for g in rows["gamma"]])
    axes.axhline(1, color="black", lw=0.6)
    angle = pick(table, "tag_cosine", "gamma", **SHOWN)
    top = pick(table, "topk_tag_cosine", "k", **SHOWN)
    words = ", ".join(f"{v:.2f}" for v in angle["value"])
    kept = ", ".join(f"K={k:g}: {v:.2f}" for k, v in zip(top["k"], top["value"], strict=True))
    axes.set_ylabel("variance with the tag / with it masked")
    axes.set_ylim(top=1.5 * float(rows["high"].max()))
    axes.text(
        0.02,
        0.97,
        f"cosine with the masked gradient: {words}\nteacher's top K: {kept}",
        transform=axes.transAxes,
        va="top",
        fontsize=6.5,
    )
    axes.set_title("One tag in fifty tokens poisons the gradient")


def loops(axes: Any, table: pd.DataFrame) -> None:
    rows = pick(table, "loop_path", "iteration", **SHOWN)
    gammas = sorted(rows["gamma"].unique())
    for gamma, colour in zip(gammas, style.shades(len(gammas)), strict=True):
        line(axes, rows[rows["gamma"] == gamma], "iteration", color=colour, label=f"γ = {gamma:g}")
    axes.set(xlabel="iteration of exact descent", ylabel="mass in the loop at the end", ylim=(0, 1))
    axes.set_title("Sequence level enters the loop on its way")
    axes.legend(loc="upper left")
