"""Bias and noise of gradients by where prefixes come from and how far the student has moved."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study import rows

COLUMNS = (
    *("quantity", "horizon", "source", "loss", "gamma", "ratio", "moved"),
    *("value", "low", "high"),
)
CAPTION = (
    "Exact gradients in random tabular worlds, responses of 32 tokens, as the student moves from "
    "its start (0) to its teacher (1) along the path of natural-gradient descent. On policy: the "
    "token-level reverse KL on the student's own prefixes; offline KL: the same loss on text that "
    "the teacher or another model wrote; mixed: half of the text is the teacher's; replayed: "
    "rollouts of the start. First panel: distance of the mean gradient from that of the sequence "
    "KL, relative to its length. Second: that from the same loss on the student's own prefixes, "
    "by the KL of a response between student and writer; 1/2 is the slope of Pinsker's bound. "
    "Bias of replayed rollouts by ratio and discount γ (drawn across a page): response ratios at "
    "γ = 1 have none. Last: variance at γ = 1 over that of fresh rollouts. Medians of worlds with "
    "95 % intervals."
)
HORIZON = 32
RATIO_LOOKS: dict[str, dict[str, Any]] = {
    "none": {"color": style.RED, "label": "no ratio"},
    "token": {"color": style.GREEN, "label": "token ratios"},
    "sequence": {"color": style.BLUE, "label": "response ratios"},
}
"""Options of the curve of each importance ratio."""


def curve_of(
    source: str, loss: str, label: str, *, ratio: str = "none", **look: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns that select a token-level curve, and its options of `Axes.plot`."""
    selection = {"source": source, "loss": loss, "ratio": ratio, "gamma": 0.0}
    return selection, {"label": label, "marker": "o", "ms": 2.2, **look}


ON_POLICY = curve_of("student", "reverse_kl", "on policy, token level", color="black")
TEACHER = curve_of("teacher", "reverse_kl", "offline KL, teacher's text", color=style.BLUE)
DATASET = curve_of("dataset", "reverse_kl", "offline KL, another model's", color=style.PURPLE)
MIXED = curve_of("mixed", "reverse_kl", "mixed, half the teacher's", color=style.SKY, ls="--")
SFT = curve_of("teacher", "sft", "SFT, teacher's text", color=style.ORANGE)
REPLAY = curve_of(
    "replay", "sampled_token", "replayed, token ratios", ratio="token", color=style.GREEN
)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw bias along the path, bias by KL, bias by ratio and variance by ratio."""
    column = style.is_column(width)
    if column:
        figure, (path, distance, noise) = style.make_panels(3, 1, 8.4, width=width)
    else:
        figure, (path, distance, ratios, noise) = style.make_panels(2, 2, 6.2, width=width)
        draw_ratios(ratios, table)
    draw_path(path, table)
    draw_distance(distance, table)
    draw_noise(noise, table)
    colors = {look["label"]: look["color"] for _, look in (ON_POLICY, TEACHER, DATASET)}
    colors |= {look["label"]: look["color"] for _, look in (MIXED, SFT, REPLAY)}
    figure.legend(
        handles=[*rows.legend_lines(colors), rows.band_mark()],
        loc="outside lower center",
        ncols=2 if column else 4,
    )
    return figure


def draw_path(axes: Any, table: pd.DataFrame) -> None:
    """Draw the relative bias for the sequence KL along the student's path, one line a source."""
    for selection, look in (SFT, TEACHER, MIXED, ON_POLICY, DATASET, REPLAY):
        curve = rows.select_rows(table, "bias", "moved", horizon=HORIZON, **selection)
        rows.plot_line(axes, curve, "moved", **look)
    style.set_log_axis(axes)
    axes.set(xlabel="share of the way to the teacher", ylabel="‖E g − ∇J‖ / ‖∇J‖")
    axes.set_title("Text of the teacher gets better,\nthat of others does not")


def draw_distance(axes: Any, table: pd.DataFrame) -> None:
    """Draw the bias that prefixes alone cause, by the KL between student and writer."""
    select = {"horizon": HORIZON}
    low, high = [], []
    for selection, look in (TEACHER, REPLAY, DATASET):
        bias = rows.select_rows(table, "bias_stated", "moved", **select, **selection)
        distance = rows.select_rows(table, "kl_source", "moved", **select, **selection)
        curve = bias.assign(distance=distance["value"].to_numpy()).query("distance > 1e-9")
        curve = curve.sort_values("distance")
        rows.plot_line(axes, curve, "distance", **look)
        low.append(curve["distance"].min())
        high.append(curve["distance"].max())
    replay = rows.select_rows(table, "exponent", "moved", **select, source="replay")
    middle = replay[replay["moved"] == 0.5]
    exponent = float(middle["value"].iloc[0])
    anchor = rows.select_rows(table, "bias_stated", "moved", **select, **REPLAY[0])["value"].iloc[
        -1
    ]
    top = rows.select_rows(table, "kl_source", "moved", **select, **REPLAY[0])["value"].iloc[-1]
    line = [2.2 * anchor * (x / top) ** 0.5 for x in (min(low), max(high))]
    axes.plot([min(low), max(high)], line, ":", color=style.GREY, lw=1.2)
    axes.text(
        min(low) * 1.2, line[0] * 2.2, "slope 1/2", color="#555555", fontsize=style.MIN_FONT_SIZE
    )
    axes.set(xscale="log", yscale="log", xlabel="KL(student ‖ writer of the prefixes), nats")
    axes.set_ylabel("bias of the prefixes alone\n(relative)")
    axes.set_title(f"Bias grows as the KL to the power {exponent:.2f},\nwhoever wrote the prefixes")


def draw_ratios(axes: Any, table: pd.DataFrame) -> None:
    """Draw the bias of replayed rollouts by ratio and discount, against the KL moved."""
    for ratio, gamma, dash in (
        ("none", 1.0, "-"),
        ("none", 0.0, "--"),
        ("token", 1.0, "-"),
        ("token", 0.0, "--"),
    ):
        curve = replay_curve(table, "bias", ratio, gamma, HORIZON)
        label = f"{RATIO_LOOKS[ratio]['label']}, γ = {gamma:g}"
        look = RATIO_LOOKS[ratio] | {"label": label, "ls": dash, "marker": "o", "ms": 2.2}
        rows.plot_line(axes, curve[curve["distance"] > 0], "distance", **look)
    style.set_log_axis(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 12)
    axes.set(xlabel="nats that the student has moved", ylabel="‖E g − ∇J‖ / ‖∇J‖")
    last = replay_curve(table, "bias", "none", 1.0, HORIZON)["value"].iloc[-1]
    axes.set_title(f"Replayed without ratios, the bias\nreaches {last:.1f} times the gradient")
    axes.legend(loc="upper left", ncols=2)


def draw_noise(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance of replayed rollouts at γ = 1 over that of fresh ones, by ratio."""
    for ratio, look in RATIO_LOOKS.items():
        for horizon in (HORIZON, 8):
            curve = replay_curve(table, "variance_ratio", ratio, 1.0, horizon)
            if len(curve) and (horizon == HORIZON or ratio == "sequence"):
                label = look["label"] + (f", {horizon} tokens" if ratio == "sequence" else "")
                dash = "-" if horizon == HORIZON else ":"
                options = look | {"label": label, "ls": dash, "marker": "o", "ms": 2.2}
                rows.plot_line(axes, curve, "distance", **options)
    axes.axhline(1, color="black", lw=0.6, zorder=1)
    axes.set_yscale("log")
    axes.set(xlabel="nats that the student has moved", ylabel="variance / that of\nfresh rollouts")
    whole, token = (
        replay_curve(table, "variance_ratio", ratio, 1.0, HORIZON)
        for ratio in ("sequence", "token")
    )
    less = whole[whole["value"].to_numpy() <= token["value"].to_numpy()]["distance"].max()
    axes.set_title(f"Response ratios: least noise up to\n{less:.1f} nats, then exponentially more")
    axes.legend(loc="upper left")


def replay_curve(
    table: pd.DataFrame, quantity: str, ratio: str, gamma: float, horizon: int
) -> pd.DataFrame:
    """Return a quantity of replayed rollouts with the column `distance`, the KL moved in nats."""
    select = {"horizon": horizon, "source": "replay", "ratio": ratio, "gamma": gamma}
    values = rows.select_rows(table, quantity, "moved", **select)
    moved = rows.select_rows(table, "kl_source", "moved", **select)
    return values.assign(distance=moved["value"].to_numpy().clip(min=0)).sort_values("distance")
