"""What a teacher with a hidden context can teach, and what it cannot."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style
from figures.study import rows

COLUMNS = (
    *("quantity", "strength", "horizon", "student", "informed", "view", "estimator", "gamma"),
    *("value", "low", "high"),
)
CAPTION = (
    "Exact results in random worlds in which the teacher reads one of 4 contexts and the student "
    "does not. Remaining KL: of the best student, in its own objective, by response length; on the "
    "teacher's prefixes (SFT) it is the mutual information of context and response, at most the "
    "entropy of the context (dotted); on the student's, that of context and next token, summed; "
    "for the reverse KL a log-normaliser. Told: what a reader of the student's responses learns of "
    "the context. Contexts: mean reverse KL from the teacher with the right context to "
    "students trained with the right one, with that of another problem, and with none, by the "
    "weight that the prompt gives to its own context. Noise: variance of one response's gradient "
    "within and between contexts at the student where each estimator rests, over the squared "
    "gradient of the sequence KL at the start; without a hidden context it would be 0 there. "
    "Medians over worlds with 95 % intervals."
)
STRENGTH = 2.0
NUM_CONTEXTS = 4
STUDENTS: dict[str, dict[str, Any]] = {
    "sequence": {"color": style.RED, "label": "reverse KL, sequence level"},
    "token": {"color": style.ORANGE, "label": "reverse KL, token level"},
    "student_prefixes": {"color": style.PURPLE, "label": "forward KL, student's prefixes"},
    "teacher_prefixes": {"color": style.BLUE, "label": "forward KL, teacher's prefixes"},
}
"""Options of the curve of each best student."""
VIEWS: dict[str, dict[str, Any]] = {
    "other": {"color": style.RED, "label": "another problem's context"},
    "empty": {"color": style.GREY, "label": "no context"},
    "right": {"color": style.GREEN, "label": "the right context"},
}
"""Options of the curve of each control."""
SHOWN = {
    ("plain", 0.0): "sampled token, γ = 0",
    ("plain", 1.0): "sampled token, γ = 1",
    ("value", 1.0): "value baseline, γ = 1",
    ("rb_all", 0.0): "mean costs, γ = 0",
    ("rb_all", 1.0): "mean costs, γ = 1",
    ("full_forward_kl", 0.0): "forward KL",
    ("teacher_topk", 0.0): "teacher's top K",
    ("teacher_topk_bucket", 0.0): "with a tail bucket",
    ("student_topk", 0.0): "student's top K",
}
"""Printed name of each estimator whose noise at rest is drawn."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw what remains, what responses tell, the controls, and the noise at rest."""
    column = style.is_column(width)
    if column:
        figure, (remaining, told, views) = style.make_panels(3, 1, 8.2, width=width)
    else:
        figure, (remaining, told, views, noise) = style.make_panels(2, 2, 6.2, width=width)
        draw_noise(noise, table)
    draw_remaining(remaining, table)
    draw_told(told, table)
    draw_views(views, table)
    colors = {look["label"]: look["color"] for look in STUDENTS.values()}
    figure.legend(
        handles=[*rows.legend_lines(colors), rows.band_mark()],
        loc="outside lower center",
        ncols=1 if column else 3,
    )
    return figure


def draw_entropy(axes: Any) -> None:
    """Draw the entropy of the context as a dotted line."""
    entropy = float(np.log(NUM_CONTEXTS))
    axes.axhline(entropy, color="black", lw=0.9, ls=":", zorder=1)
    place = {"transform": axes.get_yaxis_transform(), "fontsize": style.MIN_FONT_SIZE}
    text = "entropy of the context"
    axes.text(0.98, entropy, text, va="bottom", ha="right", color="#444444", **place)


def label_lengths(axes: Any, curve: pd.DataFrame) -> None:
    """Label every second length of a curve on the horizontal axis."""
    lengths = sorted(curve["horizon"].unique())
    shown = lengths[(len(lengths) - 1) % 2 :: 2]
    axes.set_xticks(shown, [f"{t:g}" for t in shown])
    axes.set_xlabel("length of a response (tokens)")


def draw_remaining(axes: Any, table: pd.DataFrame) -> None:
    """Draw the KL that the best student leaves by response length, one line an objective."""
    axes.set_ylim(0, 1.05 * selected(table, "remaining")["high"].max())
    curves = [
        (selected(table, "remaining", student=name), look | {"marker": "o", "ms": 2.5})
        for name, look in STUDENTS.items()
    ]
    rows.plot_curves(axes, curves, "horizon")
    draw_entropy(axes)
    ends = {
        name: float(curve["value"].iloc[-1])
        for name, (curve, _) in zip(STUDENTS, curves, strict=True)
    }
    label_lengths(axes, curves[0][0])
    axes.set_ylabel("KL that remains (nats)")
    axes.set_title(
        f"On the teacher's prefixes {ends['teacher_prefixes']:.1f} nats remain,\n"
        f"on the student's {ends['student_prefixes']:.1f} and growing"
    )


def draw_told(axes: Any, table: pd.DataFrame) -> None:
    """Draw what the responses of each best student tell of the context, by length."""
    entropy = float(np.log(NUM_CONTEXTS))
    axes.set_ylim(0, 1.15 * entropy)
    curves = [
        (
            selected(table, "context_in_response", student=name),
            look | {"marker": "o", "ms": 2.5},
        )
        for name, look in STUDENTS.items()
    ]
    rows.plot_curves(axes, curves, "horizon")
    draw_entropy(axes)
    lost = selected(table, "context_lost", student="token")["value"].iloc[-1]
    label_lengths(axes, curves[0][0])
    axes.set_ylabel("told of the context (nats)")
    axes.set_title(
        f"Trained on its own prefixes, a student\nlearns to tell {100 * lost:.0f} % less"
    )


def draw_views(axes: Any, table: pd.DataFrame) -> None:
    """Draw the KL from the right-context teacher, by what the prompt tells, one line a context."""
    values = {view: rows.select_rows(table, "kl_by_view", "informed", view=view) for view in VIEWS}
    for view, look in VIEWS.items():
        rows.plot_line(axes, values[view], "informed", marker="o", ms=2.5, **look)
    axes.set(xlabel="weight that the prompt gives to its own context")
    axes.set_ylabel("KL(student ‖ right teacher), nats")
    axes.set_title("Where the prompt tells nothing, another\nproblem's context teaches the same")
    top = max(float(curve["high"].max()) for curve in values.values())
    axes.set_ylim(0, 1.75 * top)
    axes.legend(loc="upper left", title="the teacher reads")


def draw_noise(axes: Any, table: pd.DataFrame) -> None:
    """Draw the variance within and between contexts where each estimator rests."""
    left = float(noise_of(table, "noise_left", "plain", 0.0)["value"].iloc[0])
    y = np.arange(len(SHOWN))[::-1]
    for quantity, color, label, shift in (
        ("within_at_rest", style.SKY, "within a context", 0.15),
        ("between_at_rest", "black", "between contexts", -0.15),
    ):
        parts = pd.concat([noise_of(table, quantity, *key) for key in SHOWN])
        spread = [(parts["value"] - parts["low"]).clip(lower=0), parts["high"] - parts["value"]]
        axes.errorbar(
            parts["value"],
            y + shift,
            xerr=spread,
            fmt="o",
            ms=2.8,
            lw=0.9,
            color=color,
            label=label,
        )
    axes.set_yticks(y, list(SHOWN.values()), fontsize=style.MIN_FONT_SIZE)
    axes.set(xscale="log", xlabel="variance at rest / ‖∇J‖² at the start")
    axes.set_ylim(-0.6, len(SHOWN) + 0.9)
    axes.set_title(f"At the best student {100 * left:.0f} % of the\nsampled token's noise is left")
    axes.legend(loc="upper left", ncols=2)


def selected(table: pd.DataFrame, quantity: str, **filters: Any) -> pd.DataFrame:
    """Return rows by length at the strength that is drawn."""
    return rows.select_rows(table, quantity, "horizon", strength=STRENGTH, **filters)


def noise_of(table: pd.DataFrame, quantity: str, name: str, gamma: float) -> pd.DataFrame:
    """Return the row of a quantity of one estimator and discount."""
    return rows.select_rows(table, quantity, "gamma", estimator=name, gamma=gamma)
