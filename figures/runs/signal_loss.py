"""Signal against loss: does the gradient vanish before the divergence does?"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style

COLUMNS = ("method", "runs", "run", "step", "loss", "loss_error", "signal", "low", "high", "ratio")
CAPTION = (
    "Left: squared norm of the expected sampled-token gradient of the head, from an unbiased "
    "estimate that the minibatch noise does not enter, against the reverse KL that is left; a "
    "point a probe, a trail a run, from open to filled. Whiskers: 95 % over prompts; a triangle "
    "where they reach 0. Right: the learning-signal ratio |G|² / 2 KL by step. A run that learns "
    "goes down to the left; one that is stuck stays at its KL, and falls where the signal "
    "vanishes, or rises where its own objective does not follow the signal. Head only: other "
    "layers may still learn."
)


def draw(table: pd.DataFrame) -> Figure:
    """The phase plot, and the ratio of both by step."""
    figure, (phase, ratio) = style.panels(1, 2, 3.1)
    methods = list(dict.fromkeys(table["method"]))
    floor = table.loc[table["signal"] > 0, "signal"].min() / 3
    for method, colour in zip(methods, style.CYCLE * len(methods), strict=False):
        for _, mine in table[table["method"] == method].groupby("run"):
            trail(phase, mine.sort_values("step"), colour, floor)
            trail_ratio(ratio, mine.sort_values("step"), colour)
        ratio.plot([], [], color=colour, label=method)
    phase.set(xscale="log", yscale="log", xlabel="reverse KL left, nats a token")
    phase.set(ylabel="|G|², squared norm of the mean gradient", ylim=(floor, None))
    phase.set_title("Signal against what is left to learn")
    ratio.set(yscale="log", xlabel="step", ylabel="|G|² / 2 KL")
    ratio.set_title("Learning-signal ratio")
    ratio.legend()
    return figure


def trail(axes: Any, rows: pd.DataFrame, colour: str, floor: float) -> None:
    """One run's probes; an estimate that is not positive stands at the floor of the axis."""
    x, y = rows["loss"].to_numpy(), rows["signal"].clip(lower=floor).to_numpy()
    axes.plot(x, y, color=colour, lw=0.8, alpha=0.6)
    fill = np.linspace(0.05, 1, len(rows))
    for i, (_, row) in enumerate(rows.iterrows()):
        low, high = max(row["low"], floor), max(row["high"], floor)
        axes.plot([x[i]] * 2, [low, high], color=colour, lw=0.6)
        wide = 1.96 * row["loss_error"]
        axes.plot([max(x[i] - wide, x[i] / 3), x[i] + wide], [y[i]] * 2, color=colour, lw=0.6)
        if row["low"] <= 0:
            axes.plot(x[i], floor * 1.15, "v", ms=3, color=colour)
        axes.plot(x[i], y[i], "o", ms=4, mec=colour, mfc=mixed(colour, fill[i]), zorder=4)


def mixed(colour: str, share: float) -> tuple[float, float, float]:
    """`share` of the colour in white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def trail_ratio(axes: Any, rows: pd.DataFrame, colour: str) -> None:
    """The ratio by step with the signal's interval."""
    half = 2 * rows["loss"]
    least = 1e-3 * rows["ratio"].abs().max()
    value = rows["ratio"].clip(lower=least)
    low, high = (rows["low"] / half).clip(lower=least), (rows["high"] / half).clip(lower=least)
    style.curve(axes, rows["step"], value, low, high, color=colour, marker="o", ms=3)


def collect(runs: list[Path]) -> pd.DataFrame:
    """The probes of runs with --probe-every.

    Raises:
      ValueError: none of the runs has one.
    """
    from diagnostics.records.run_folders import methods, recorded_rows, short

    records = []
    for method, mine in methods(runs).items():
        for run in mine:
            for row in recorded_rows(run):
                if row.get("gradient/signal") is None:
                    continue
                loss, signal = row["divergence/reverse_kl"], row["gradient/signal"]
                found = {
                    "loss": loss,
                    "loss_error": row["divergence/reverse_kl_se"],
                    "signal": signal,
                }
                found |= {end: row[f"gradient/signal_{end}"] for end in ("low", "high")}
                found["ratio"] = signal / (2 * loss)
                about = {"method": method, "runs": len(mine), "run": run.name, "step": row["step"]}
                records.append(about | {k: short(v) for k, v in found.items()})
    if not records:
        raise InvalidInput(
            f"no gradient probe in {[str(r) for r in runs]}; train with --probe-every"
        )
    return pd.DataFrame(records)
