"""Sinks: where a monitor's rows go. A sink is any function of (step, row).

Others are one line: `lambda step, row: wandb.log(row, step=step)`, or for TensorBoard
`lambda step, row: [writer.add_scalar(name, x, step) for name, x in row.items()]`.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Protocol, runtime_checkable

from diagnostics.records.rows import append, read
from diagnostics.terminal import visible

Sink = Callable[[int, Mapping[str, float]], object]
"""(step, the row without "step") -> nothing that is used."""


@runtime_checkable
class Rewindable(Protocol):
    """A sink that can drop the rows of steps that come again."""

    def rewind(self, step: int) -> object:
        """The run goes on after `step`, 0 where it begins."""


class RowFile:
    """Appends {"step": step, ...} as a line of JSON; read it with `diagnostics.records.rows.read`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        append(self.path, {"step": step, **row})

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, and a last line that a kill cut short.

        Where a run begins, with step 0, rows of an earlier run are kept in a file beside this one.
        """
        rows = read(self.path)
        if not rows:
            self.path.unlink(missing_ok=True)  # at most a line that was cut short
        elif step == 0:
            names = (self.path.with_name(f"{self.path.name}.{n}") for n in count(1))
            aside = next(path for path in names if not path.exists())
            self.path.rename(aside)
            warnings.warn(
                f"{self.path} held the rows of an earlier run; they are now in {aside}",
                stacklevel=2,
            )
        else:
            part = self.path.with_name(self.path.name + ".part")
            kept = [row for row in rows if row["step"] <= step]
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            part.replace(self.path)


def to_file(path: str | Path) -> RowFile:
    """A sink that writes rows to this file; its folder is made."""
    return RowFile(path)


def to_console(names: Sequence[str]) -> Sink:
    """Prints one line a step with the named columns that the row has; nothing if it has none."""

    def show(step: int, row: Mapping[str, float]) -> None:
        cells = [f"{name} {row[name]:.4g}" for name in names if name in row]
        if cells:
            print(visible("  ".join([f"step {step}", *cells])), flush=True)

    return show
