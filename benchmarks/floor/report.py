"""Markdown tables of measured steps and their floors."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.floor.trainers import PHASES

Steps = Sequence[dict[str, float]]


def comparison_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a row per trainer: each phase and the whole step, with its multiple of the floor."""
    lines = [
        "| trainer | rollout | score | update | record | whole step | floor | step / floor "
        "| TRL / step | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    trl = median(results["trl"]["steps"], "step") if "trl" in results else None
    for name, result in results.items():
        steps = result["steps"]
        cells = [name, *(phase_cell(steps, phase) for phase in PHASES)]
        record = median(steps, "record") if "record" in steps[0] else None
        step = median(steps, "step")
        cells.append("" if record is None else f"{record:.3f} s ({record / step:.1%})")
        cells += [
            f"{step:.2f} s",
            f"{statistics.median(map(floor_seconds, steps)):.2f} s",
            multiples([x["step"] / floor_seconds(x) for x in steps]),
            "" if trl is None else f"{trl / step:.2f}",
            f"{result['mebibytes']:.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def floor_seconds(step: dict[str, float]) -> float:
    """Return the floor of a whole step."""
    return sum(step[f"floor/{phase}"] for phase in PHASES)


def median(steps: Steps, name: str) -> float:
    """Return the median over steps."""
    return statistics.median(step[name] for step in steps)


def phase_cell(steps: Steps, phase: str) -> str:
    """Return a phase's seconds and multiple of its floor; of the floor alone for other trainers."""
    if phase not in steps[0]:
        return f"(floor {median(steps, f'floor/{phase}'):.2f} s)"
    ratios = [step[phase] / step[f"floor/{phase}"] for step in steps]
    return f"{median(steps, phase):.2f} s, {multiples(ratios)}"


def multiples(ratios: Sequence[float]) -> str:
    """Return the median and the range of ratios."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def growth_tables(results: dict[str, Sequence[tuple[int, dict[str, Any]]]], rows: int) -> str:
    """Return the slopes of each phase with the number of tokens and with the vocabulary."""
    units = {
        "response": ("seconds per 1,000 tokens", rows),
        "vocabulary": ("seconds per 1,000 ids", 1),
    }
    blocks = []
    for axis, points in results.items():
        unit, factor = units[axis]
        lines = [
            f"| {axis} {', '.join(f'{x:,}' for x, _ in points)}; {unit} | step | rollout | score "
            "| update | record | floor |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in points[0][1]:
            sizes, columns = [], dict[str, list[float]]()
            for x, trainers in points:
                for step in trainers[name]["steps"]:
                    sizes.append(x * factor / 1000)
                    for column in ("step", *PHASES, "record"):
                        columns.setdefault(column, []).append(step.get(column, np.nan))
                    columns.setdefault("floor", []).append(floor_seconds(step))
            cells = [slope_cell(sizes, values) for values in columns.values()]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def slope_cell(sizes: Sequence[float], values: Sequence[float]) -> str:
    """Return the slope of a fitted line and its standard error, over all steps."""
    if np.isnan(values).any():
        return ""
    slope, error = fit_slope(sizes, values)
    return f"{slope:.4f} ± {error:.4f}"


def fit_slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the least-squares slope and its standard error, which includes what is not linear."""
    x, y = np.asarray(sizes) - np.mean(sizes), np.asarray(values) - np.mean(values)
    slope = float(x @ y / (x @ x))
    residual = y - slope * x
    return slope, float(np.sqrt(residual @ residual / (len(x) - 2) / (x @ x)))
