"""Gradient signal against remaining loss: does the gradient vanish before the divergence does?"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style

COLUMNS = ("method", "runs", "run", "step", "loss", "loss_error", "signal", "low", "high", "ratio")
CAPTION = (
    "Left: squared norm of the expected sampled-token gradient of the LM head, an unbiased "
    "estimate to which minibatch noise does not add, against the remaining reverse KL; one point "
    "per probe, one trail per run, from open to filled. Whiskers: 95 % intervals over prompts; "
    "triangles: the interval reaches 0. Right: learning-signal ratio |G|² / 2 KL by step. A run "
    "that learns moves down and to the left. A run that does not keeps its KL: it moves down if "
    "the signal vanishes, and up if its own objective does not follow the signal. Head only: "
    "other layers may still learn."
)


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the signal against the reverse KL, and their ratio by step."""
    figure, (phase, ratio) = style.make_panels(1, 2, 3.1, width=width)
    methods = list(dict.fromkeys(table["method"]))
    floor = table.loc[table["signal"] > 0, "signal"].min() / 3
    for method, colour in zip(methods, style.CYCLE * len(methods), strict=False):
        for _, run_rows in table[table["method"] == method].groupby("run"):
            draw_trail(phase, run_rows.sort_values("step"), colour, floor)
            draw_ratio(ratio, run_rows.sort_values("step"), colour)
        ratio.plot([], [], color=colour, label=method)
    phase.set(xscale="log", yscale="log", xlabel="remaining reverse KL, nats per token")
    phase.set(ylabel="|G|², squared norm of the mean gradient", ylim=(floor, None))
    phase.set_title("Gradient signal against remaining KL")
    ratio.set(yscale="log", xlabel="step", ylabel="|G|² / 2 KL")
    ratio.set_title("Learning-signal ratio")
    ratio.legend()
    return figure


def draw_trail(axes: Any, rows: pd.DataFrame, colour: str, floor: float) -> None:
    """Draw the probes of one run; an estimate that is not positive is drawn at the floor."""
    x, y = rows["loss"].to_numpy(), rows["signal"].clip(lower=floor).to_numpy()
    axes.plot(x, y, color=colour, lw=0.8, alpha=0.6)
    fill = np.linspace(0.05, 1, len(rows))
    for i, (_, row) in enumerate(rows.iterrows()):
        low, high = max(row["low"], floor), max(row["high"], floor)
        axes.plot([x[i]] * 2, [low, high], color=colour, lw=0.6)
        half_width = 1.96 * row["loss_error"]
        axes.plot(
            [max(x[i] - half_width, x[i] / 3), x[i] + half_width], [y[i]] * 2, color=colour, lw=0.6
        )
        if row["low"] <= 0:
            axes.plot(x[i], floor * 1.15, "v", ms=3, color=colour)
        axes.plot(x[i], y[i], "o", ms=4, mec=colour, mfc=lighten(colour, fill[i]), zorder=4)


def lighten(colour: str, share: float) -> tuple[float, float, float]:
    """Mix a color with white, keeping `share` of it."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def draw_ratio(axes: Any, rows: pd.DataFrame, colour: str) -> None:
    """Draw the ratio by step with the interval of the signal."""
    half = 2 * rows["loss"]
    floor = 1e-3 * rows["ratio"].abs().max()
    value = rows["ratio"].clip(lower=floor)
    low, high = (rows["low"] / half).clip(lower=floor), (rows["high"] / half).clip(lower=floor)
    style.plot_band(axes, rows["step"], value, low, high, color=colour, marker="o", ms=3)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Collect the gradient probes of runs with --probe-every.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS.

    Raises:
        InvalidInput: No run has a probe.
    """
    from diagnostics.records.run_folder import RunFolder
    from diagnostics.records.run_groups import group_by_method
    from diagnostics.stats import round_significant

    records = []
    for method, method_runs in group_by_method(runs).items():
        for run in method_runs:
            for row in RunFolder(run).rows():
                if row.get("gradient/signal") is None:
                    continue
                loss, signal = row["divergence/reverse_kl"], row["gradient/signal"]
                values = {
                    "loss": loss,
                    "loss_error": row["divergence/reverse_kl_se"],
                    "signal": signal,
                }
                values |= {end: row[f"gradient/signal_{end}"] for end in ("low", "high")}
                values["ratio"] = signal / (2 * loss)
                labels = {
                    "method": method,
                    "runs": len(method_runs),
                    "run": run.name,
                    "step": row["step"],
                }
                records.append(labels | {k: round_significant(v) for k, v in values.items()})
    if not records:
        raise InvalidInput(
            f"no gradient probe in {[str(r) for r in runs]}; train with --probe-every"
        )
    return pd.DataFrame(records)
