"""The three failure modes of sampled-token distillation in the drift chain."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study.rows import plot_line, select_rows

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
WORLD: dict[str, Any] = {"uninformed": "flat", "enter": 0.02, "distance": 0.7, "stop": 0.0}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the signal by position, the student's states, the effect of the tag, and training."""
    figure, (signal, region, tag, training) = style.make_panels(2, 2, 5.2, width=width)
    draw_signal(signal, table)
    draw_regions(region, table)
    draw_tag_effect(tag, table)
    draw_loops(training, table)
    return figure


def draw_signal(axes: Any, table: pd.DataFrame) -> None:
    """Draw the distribution of the signal log q - log p by position."""
    parts = {q: select_rows(table, q, "position", **WORLD) for q in ("signal_05", "signal_95")}
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
        ("signal_05", "5 to 95 %, teacher sure where uninformed"),
        ("signal_95", None),
    ):
        sure = select_rows(table, quantity, "position", **WORLD | {"uninformed": "sure"})
        axes.plot(sure["position"], sure["value"], ":", color=style.ORANGE, lw=1, label=label)
    middle = select_rows(table, "signal_50", "position", **WORLD)
    mean = select_rows(table, "mean_signal", "position", **WORLD)
    plot_line(axes, middle, "position", color=style.BLUE, label="median")
    plot_line(axes, mean, "position", color=style.RED, label="mean (lowered by the tag)")
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="position", ylabel="signal log q − log p, nats")
    axes.set_title("Signal by position")
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.42))


def draw_regions(axes: Any, table: pd.DataFrame) -> None:
    """Draw the probability of being in the loop or where the teacher is flat, by position."""
    for quantity, label, colour in (
        ("loop_mass", "loop: the teacher repeats too", style.RED),
        ("uninformed_mass", "teacher is uninformed", style.ORANGE),
    ):
        rows = select_rows(table, quantity, "position", **WORLD)
        plot_line(axes, rows, "position", color=colour, label=label)
    for enter, dash in ((0.005, ":"), (0.05, "--")):
        rows = select_rows(table, "loop_mass", "position", **WORLD | {"enter": enter})
        axes.plot(
            rows["position"],
            rows["value"],
            dash,
            color=style.RED,
            lw=1,
            label=f"loop, entry probability {enter:g}",
        )
    stopping = select_rows(table, "loop_mass", "position", **WORLD | {"stop": 0.02})
    plot_line(axes, stopping, "position", color=style.PURPLE, label="loop, if responses may end")
    axes.set(xlabel="position", ylabel="probability of the state", ylim=(0, 1))
    axes.set_title("States visited by the student")
    axes.legend(loc="upper left")


def draw_tag_effect(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance with the tag over that with the tag masked, by discount."""
    rows = select_rows(table, "variance_factor", "gamma", **WORLD)
    spread = [(rows["value"] - rows["low"]).clip(lower=0), rows["high"] - rows["value"]]
    axes.bar(range(len(rows)), rows["value"], yerr=spread, color=style.BLUE, width=0.6, ecolor="k")
    axes.set_xticks(range(len(rows)), [f"γ = {g:g}" for g in rows["gamma"]])
    axes.axhline(1, color="black", lw=0.6)
    angle = select_rows(table, "tag_cosine", "gamma", **WORLD)
    top = select_rows(table, "topk_tag_cosine", "k", **WORLD)
    cosines = ", ".join(f"{v:.2f}" for v in angle["value"])
    top_k_cosines = ", ".join(
        f"K={k:g}: {v:.2f}" for k, v in zip(top["k"], top["value"], strict=True)
    )
    axes.set_ylabel("variance with tag / with tag masked")
    axes.set_ylim(top=1.5 * float(rows["high"].max()))
    axes.text(
        0.02,
        0.97,
        f"cosine with the masked gradient: {cosines}\nteacher's top K: {top_k_cosines}",
        transform=axes.transAxes,
        va="top",
        fontsize=6.5,
    )
    axes.set_title("Effect of one tag in fifty tokens")


def draw_loops(axes: Any, table: pd.DataFrame) -> None:
    """Draw the mass in the loop by iteration of exact descent, one line a discount."""
    rows = select_rows(table, "loop_path", "iteration", **WORLD)
    gammas = sorted(rows["gamma"].unique())
    for gamma, colour in zip(gammas, style.sequential_colors(len(gammas)), strict=True):
        plot_line(
            axes, rows[rows["gamma"] == gamma], "iteration", color=colour, label=f"γ = {gamma:g}"
        )
    axes.set(xlabel="iteration of exact descent", ylabel="final mass in the loop", ylim=(0, 1))
    axes.set_title("Loop mass during training")
    axes.legend(loc="upper left")
