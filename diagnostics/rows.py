"""Rows on disk: one JSON object a line, as every trainer can write and every tool can read."""

import json
import math
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Add one JSON line; NaN and infinities become null, so that every reader can read it."""
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    with open(path, "a") as file:
        file.write(json.dumps(clean) + "\n")


def read(path: Path) -> list[Row]:
    """All whole rows; a last line that a kill cut short is left out, and a missing file is empty.

    Raises:
      ValueError: another line is not JSON.
    """
    if not path.exists():
        return []
    rows = []
    text = path.read_text("utf-8").removesuffix("\n")
    lines = text.split("\n")  # a string of a row may hold other ends of lines
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise InvalidInput(f"{path} line {i + 1} is not JSON: {line[:80]!r}") from None
    return rows
