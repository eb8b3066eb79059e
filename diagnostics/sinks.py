"""Sinks: where a monitor's rows go. A sink is any function of (step, row).

Others are one line: `lambda step, row: wandb.log(row, step=step)`, or for TensorBoard
`lambda step, row: [writer.add_scalar(name, x, step) for name, x in row.items()]`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diagnostics.rows import append
from diagnostics.terminal import visible

Sink = Callable[[int, Mapping[str, float]], object]
"""(step, the row without "step") -> nothing that is used."""


def to_file(path: str | Path) -> Sink:
    """Appends {"step": step, ...} as a line of JSON; read it with `diagnostics.rows.read`."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    return lambda step, row: append(file, {"step": step, **row})


def to_console(names: Sequence[str]) -> Sink:
    """Prints one line a step with the named columns that the row has; nothing if it has none."""

    def show(step: int, row: Mapping[str, float]) -> None:
        cells = [f"{name} {row[name]:.4g}" for name in names if name in row]
        if cells:
            print(visible("  ".join([f"step {step}", *cells])), flush=True)

    return show
