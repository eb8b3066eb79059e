"""Sinks for the rows of a monitor. A sink is any function of (step, row).

Other loggers take one line: `lambda step, row: wandb.log(row, step=step)`, or for TensorBoard
`lambda step, row: [writer.add_scalar(name, x, step) for name, x in row.items()]`.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Protocol, runtime_checkable

from diagnostics.io.atomic import write_text
from diagnostics.records.rows import append_row, read_rows
from diagnostics.terminal import escape_control_chars

Sink = Callable[[int, Mapping[str, float]], object]
"""(step, the row without "step"); the return value is ignored."""


@runtime_checkable
class Rewindable(Protocol):
    """A sink that can drop the rows of steps that are repeated after a resume."""

    def rewind(self, step: int) -> object:
        """Drop the rows after `step`; the run continues from there (0 at its beginning)."""


class RowFile:
    """Sink that appends {"step": step, ...} as a JSON line; read it with `read_rows`.

    Args:
        path: The file; its folder is created.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row."""
        append_row(self.path, {"step": step, **row})

    def rewind(self, step: int) -> None:
        """Drop the rows after `step` and a truncated last line.

        At step 0, rows of an earlier run are moved to another file in the same folder, with a
        warning.

        Args:
            step: The last step to keep.
        """
        rows = read_rows(self.path)
        if not rows:
            self.path.unlink(missing_ok=True)  # at most one truncated line
        elif step == 0:
            names = (self.path.with_name(f"{self.path.name}.{n}") for n in count(1))
            backup_path = next(path for path in names if not path.exists())
            self.path.rename(backup_path)
            warnings.warn(
                f"{self.path} held the rows of an earlier run; moved to {backup_path}",
                stacklevel=2,
            )
        else:
            remaining_rows = [row for row in rows if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in remaining_rows))


def to_file(path: str | Path) -> RowFile:
    """Return a sink that writes rows to this file; its folder is created."""
    return RowFile(path)


def to_console(names: Sequence[str]) -> Sink:
    """Return a sink that prints one line per step with the named columns that the row has."""

    def print_row(step: int, row: Mapping[str, float]) -> None:
        cells = [f"{name} {row[name]:.4g}" for name in names if name in row]
        if cells:
            print(escape_control_chars("  ".join([f"step {step}", *cells])), flush=True)

    return print_row
