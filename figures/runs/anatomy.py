"""KL anatomy: how much of the divergence is off the teacher's support, on it, and beyond it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style

COLUMNS = ("method", "runs", "step", "first", "last", "part", "tokens", "value", "error")
CAPTION = (
    "The reverse KL, nats a token, as an exact sum over a top-K support S: between S and the rest "
    "(student's mass off the support), within S, and beyond S (estimated without bias from sampled "
    "tokens). Left by step, then by position in the response at the first and the last step (bins "
    "double in width; at least 100 tokens). Black: the sum with its 95 % interval (prompts). A "
    "renormalised top-K loss sees the part within S only."
)
PARTS = {
    "binary": ("in or out of the support", style.RED),
    "head": ("within the support", style.BLUE),
    "tail": ("beyond it", style.ORANGE),
}
THIN, MOST = 100, 4


def draw(table: pd.DataFrame) -> Figure:
    """A row a method: by step, by position at the first step, by position at the last step."""
    methods = list(dict.fromkeys(table["method"]))[:MOST]
    figure, axes = style.panels(len(methods), 3, 0.7 + 1.65 * len(methods))
    for i, method in enumerate(methods):
        mine = table[table["method"] == method]
        whole, binned = mine[mine["first"].isna()], mine[mine["first"].notna()]
        left, *rest = axes[3 * i : 3 * i + 3]
        x = np.array(sorted(whole["step"].unique()), float)
        stack(left, whole, x, "step")
        left.set(ylabel="nats a token", xlabel="step" if i + 1 == len(methods) else "")
        left.set_title(method)
        steps = sorted(binned["step"].unique())
        for place, step in zip(rest, (steps[0], steps[-1]), strict=True):
            at = binned[(binned["step"] == step) & (binned["tokens"] >= THIN)]
            firsts = sorted(at["first"].unique())
            stack(place, at, np.arange(len(firsts), dtype=float), "first")
            place.set_xticks(range(len(firsts)), [f"{first:g}" for first in firsts], fontsize=6.5)
            place.set_title(f"step {step:g}", fontweight="normal")
            if i + 1 == len(methods):
                place.set_xlabel("position, from")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def stack(axes: Any, rows: pd.DataFrame, x: Any, by: str) -> None:
    """The parts on top of one another, and their sum with its interval."""
    parts = rows.pivot_table(index=by, columns="part", values="value").reindex(columns=[*PARTS])
    heights = [parts[part].to_numpy() for part in PARTS]
    labels, colours = zip(*PARTS.values(), strict=True)
    whole = rows[rows["part"] == "parts"].sort_values(by)
    error = 1.96 * whole["error"].to_numpy()
    if by == "step":
        axes.stackplot(x, np.maximum(heights, 0), labels=labels, colors=colours, lw=0)
        style.curve(axes, x, whole["value"], whole["value"] - error, whole["value"] + error, c="k")
        axes.lines[-1].set(lw=1, label="their sum")
        axes.margins(x=0)
    else:
        below = np.zeros(len(x))
        for height, colour in zip(heights, colours, strict=True):
            axes.bar(x, height, 0.85, bottom=below, color=colour)
            below = below + np.maximum(height, 0)
        axes.errorbar(x, whole["value"], yerr=error, fmt="k.", ms=3, lw=0.8)
        axes.grid(axis="x", visible=False)
    axes.axhline(0, color="black", lw=0.5)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Parts and their sum at every step, and by position at the first and the last one."""
    from diagnostics.records.run_folders import bins, methods, pooled, recorded_rows, short

    records = []
    for method, mine in methods(runs).items():
        steps = list(zip(*(recorded_rows(run) for run in mine), strict=False))
        name = support(dict(steps[0][0]), mine[0])
        for i, step in enumerate(steps):
            counts = [row["divergence/tokens"] for row in step]
            about = {"method": method, "runs": len(mine), "step": step[0]["step"]}
            for part in (*PARTS, "parts"):
                key = f"{name}_{part}"
                value, error = pooled(
                    [row[key] for row in step], [row[f"{key}_se"] for row in step], counts
                )
                records.append(
                    about
                    | {"part": part, "tokens": sum(counts)}
                    | {"value": short(value), "error": short(error)}
                )
                if i not in (0, len(steps) - 1):
                    continue
                whole = [bins(row, "divergence/tokens") for row in step]
                values = [bins(row, key) for row in step]
                errors = [
                    bins({k[:-3]: v for k, v in row.items() if k.endswith("_se")}, key)
                    for row in step
                ]
                for edge in values[0]:
                    have = [j for j, v in enumerate(values) if edge in v]
                    tokens = [whole[j][edge] for j in have]
                    value, error = pooled(
                        [values[j][edge] for j in have], [errors[j][edge] for j in have], tokens
                    )
                    records.append(
                        about
                        | {"part": part, "first": edge[0], "last": edge[1], "tokens": sum(tokens)}
                        | {"value": short(value), "error": short(error)}
                    )
    return pd.DataFrame(records, columns=list(COLUMNS))


def support(row: dict[str, Any], run: Path) -> str:
    """The metrics' name in a row up to the part: divergence/kl, or that of another support.

    Raises:
      ValueError: the run's objective keeps no support.
    """
    found = [key.removesuffix("_parts") for key in row if key.endswith("kl_parts")]
    if not found:
        raise InvalidInput(f"{run} has no support: its rows hold no divergence/kl_parts")
    return found[0]
