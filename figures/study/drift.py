"""The three failure modes of sampled-token distillation in the drift chain."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study import rows

COLUMNS = (
    *("quantity", "uninformed", "enter", "distance", "stop", "gamma", "position", "iteration", "k"),
    *("value", "low", "high"),
)
CAPTION = (
    "Exact measurements of a small chain with the three failure modes of sampled-token "
    "distillation. Signal: log q − log p of a sampled token under teacher q and student p. Loop: a "
    "state that the student enters with a small probability per token and in which the teacher "
    "repeats as readily as the student; uninformed: states in which the teacher is flat or, "
    "dotted, sure of tokens of its own. Tag: a token that the student writes once in fifty tokens "
    "and the teacher rejects; bars: variance of the gradient with the tag over that with the tag "
    "masked, with the cosine of the two mean gradients, also for the teacher's top K. Training: "
    "exact gradient descent with discount γ of later costs. Medians over random chains; bands "
    "and bars: 95 % bootstrap intervals, of the signal its 5 to 95 % range."
)
WORLD: dict[str, Any] = {"uninformed": "flat", "enter": 0.02, "distance": 0.7, "stop": 0.0}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the signal by position, the student's states, the effect of the tag, and training."""
    if style.is_column(width):  # one panel a failure mode: special tokens, the teacher, loops
        figure, (tag, signal, training) = style.make_panels(3, 1, 6.6, width=width)
    else:
        figure, (signal, region, tag, training) = style.make_panels(2, 2, 5.8, width=width)
        draw_regions(region, table)
    draw_signal(signal, table)
    draw_tag_effect(tag, table)
    draw_loops(training, table)
    return figure


def draw_signal(axes: Any, table: pd.DataFrame) -> None:
    """Draw the distribution of the signal log q - log p by position."""
    low, high = (rows.select_rows(table, f"signal_{x}", "position", **WORLD) for x in ("05", "95"))
    band = {"color": style.BLUE, "alpha": 0.15, "linewidth": 0, "label": "5 to 95 %"}
    axes.fill_between(low["position"], low["value"], high["value"], **band)
    for quantity, label in (("signal_05", "5 and 95 %, sure teacher"), ("signal_95", None)):
        sure = rows.select_rows(table, quantity, "position", **WORLD | {"uninformed": "sure"})
        axes.plot(sure["position"], sure["value"], ":", color=style.ORANGE, lw=1.4, label=label)
    middle = rows.select_rows(table, "signal_50", "position", **WORLD)
    mean = rows.select_rows(table, "mean_signal", "position", **WORLD)
    rows.plot_line(axes, middle, "position", color=style.BLUE, label="median")
    rows.plot_line(axes, mean, "position", color=style.RED, label="mean (lowered by the tag)")
    axes.axhline(0, color="black", lw=0.6, zorder=1)
    axes.set(xlabel="position (tokens)", ylabel="log q − log p (nats)")
    sure = rows.select_rows(table, "signal_05", "position", **WORLD | {"uninformed": "sure"})
    ends = [f"{part['value'].iloc[-1]:.1f}".replace("-", "−") for part in (low, sure)]
    axes.set_title(
        f"5 % of the signals are below {ends[0]} nats\nat the end, or {ends[1]} with a sure teacher"
    )
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.45))


def draw_regions(axes: Any, table: pd.DataFrame) -> None:
    """Draw the probability of being in the loop or where the teacher is flat, by position."""
    loop = rows.select_rows(table, "loop_mass", "position", **WORLD)
    for enter, dash in ((0.05, "--"), (0.02, "-"), (0.005, ":")):
        part = rows.select_rows(table, "loop_mass", "position", **WORLD | {"enter": enter})
        label = f"loop, entered with {enter:g} per token"
        axes.plot(part["position"], part["value"], dash, color=style.RED, label=label)
    stopping = rows.select_rows(table, "loop_mass", "position", **WORLD | {"stop": 0.02})
    label = f"loop, {WORLD['enter']:g}, if responses may end"
    rows.plot_line(axes, stopping, "position", color=style.PURPLE, label=label)
    uninformed = rows.select_rows(table, "uninformed_mass", "position", **WORLD)
    rows.plot_line(axes, uninformed, "position", color=style.ORANGE, label="teacher is uninformed")
    axes.set(xlabel="position (tokens)", ylabel="probability of the state", ylim=(0, 1.15))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    end = loop["value"].iloc[-1]
    axes.set_title(f"At the end {100 * end:.0f} % of the\nresponses are in the loop")
    axes.legend(loc="upper left")


def draw_tag_effect(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance with the tag over that with the tag masked, by discount."""
    factor = rows.select_rows(table, "variance_factor", "gamma", **WORLD)
    angle = rows.select_rows(table, "tag_cosine", "gamma", **WORLD)
    spread = [(factor["value"] - factor["low"]).clip(lower=0), factor["high"] - factor["value"]]
    bars = {"color": style.SKY, "width": 0.6, "ecolor": "black"}
    axes.bar(range(len(factor)), factor["value"], yerr=spread, **bars)
    names = [
        f"γ = {g:g}\ncosine {x:.2f}" for g, x in zip(factor["gamma"], angle["value"], strict=True)
    ]
    axes.set_xticks(range(len(factor)), names, fontsize=7)
    none = axes.axhline(1, color="black", lw=0.8, ls="--", label="no effect")
    axes.set_ylabel("variance with tag\n/ with tag masked")
    axes.set_ylim(top=1.75 * float(factor["high"].max()))
    top = rows.select_rows(table, "topk_tag_cosine", "k", **WORLD)
    text = "cosine, teacher's top K:\n" + ", ".join(
        f"{x:.2f} (K = {k:g})" for k, x in zip(top["k"], top["value"], strict=True)
    )
    axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", fontsize=7)
    interval = rows.interval_mark()
    interval.set_color("black")
    axes.legend(handles=[none, interval], loc="upper left", bbox_to_anchor=(0, 0.84), ncols=2)
    ends = sorted([factor["value"].iloc[0], factor["value"].iloc[-1]])
    axes.set_title(
        f"One tag in fifty tokens multiplies\nthe variance by {ends[0]:.0f} to {ends[1]:.0f}"
    )


def draw_loops(axes: Any, table: pd.DataFrame) -> None:
    """Draw the mass in the loop by iteration of exact descent, one line a discount."""
    path = rows.select_rows(table, "loop_path", "iteration", **WORLD)
    gammas = sorted(path["gamma"].unique())
    axes.set_ylim(0, 1)
    curves = [
        (path[path["gamma"] == gamma], {"color": color, "label": f"γ = {gamma:g}"})
        for gamma, color in zip(gammas, style.sequential_colors(len(gammas)), strict=True)
    ]
    rows.plot_curves(axes, curves, "iteration")
    axes.set(xlabel="iteration of exact descent", ylabel="loop at the end of\na response (share)")
    last = curves[-1][0]["value"]
    axes.set_title(
        f"Training at γ = {gammas[-1]:g}: loop from {last.iloc[0]:.2f}\n"
        f"to at most {last.max():.2f}, then {last.iloc[-1]:.2f}"
    )
    colors = {look["label"]: look["color"] for _, look in curves}
    handles = [*rows.legend_lines(colors), rows.band_mark()]
    axes.legend(handles=handles, loc="upper left", ncols=3)
