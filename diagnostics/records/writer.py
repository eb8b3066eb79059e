"""Writing records: batches, or rows of one's own, as JSONL or parquet.

`diagnostics.records.columns` says what the columns mean. Shapes: T response positions, K ids.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.core.partial import absent
from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import atomic_write
from diagnostics.io.packages import load_package
from diagnostics.records.columns import CONSTANTS

SUFFIXES = (".jsonl", ".parquet")


def rows_of(batch: Rollouts) -> Iterator[dict[str, Any]]:
    """The rows of a batch as plain values, each cut after its last sampled position.

    Settings (temperature and so on) are repeated in every row. Read back, per-token floats are
    float32, and ids of a support are 0 where nothing was sampled.
    """
    lost = absent(batch)
    held = {k: v for k, v in batch._tensors().items() if k not in lost}
    flat: dict[str, Tensor] = {}
    for name, value in held.items():
        if isinstance(value, Tensor):
            flat[name] = value
        else:
            inner = value._tensors().items()
            flat |= {f"{name}.{k}": v for k, v in inner if k not in absent(value)}
    host = {name: x.detach().cpu() for name, x in flat.items()}
    settings = {name: vars(batch)[name] for name in CONSTANTS[:4] if name in vars(batch)}
    support = getattr(batch, "support", None)
    if support is not None:
        settings["support.source"] = support.source
    sampled = host.get("sampled_mask", host["mask"])
    used = sampled.int() * torch.arange(1, sampled.shape[1] + 1)
    for i, stop in enumerate(used.amax(1).tolist()):
        row: dict[str, Any] = {}
        for name, x in host.items():
            value = x[i, :stop].tolist() if x.dim() > 1 else x[i].item()
            row[name] = None if isinstance(value, float) and value != value else value
        yield row | settings


def write(path: str | Path, rows: Iterable[Rollouts | Mapping[str, Any]]) -> int:
    """Write batches, or rows of one's own, to .jsonl or .parquet (whole or not at all); how many.

    Raises:
      ValueError: another suffix. ImportError: parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InvalidInput(f"{path} is neither .jsonl nor .parquet")
    plain = (
        row for x in rows for row in (rows_of(x) if isinstance(x, Rollouts) else iter([dict(x)]))
    )
    write_rows = _write_parquet if path.suffix == ".parquet" else _write_jsonl
    with atomic_write(path) as temporary:
        return write_rows(temporary, plain)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with open(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row, default=_plain) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], at_once: int = 64) -> int:
    arrow = pyarrow_installed()
    from pyarrow import parquet

    rows, count, writer = iter(rows), 0, None
    while some := [_dense(row) for row in islice(rows, at_once)]:
        table = arrow.Table.from_pylist(some, schema=None if writer is None else writer.schema)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
        count += len(some)
    if writer is None:
        raise InvalidInput("no rows to write")
    writer.close()
    return count


def _dense(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without nulls that would leave a column without a type."""
    return {k: float("nan") if v is None and k == "reward" else v for k, v in row.items()}


def pyarrow_installed() -> Any:
    return load_package("pyarrow", "parquet", "data")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic | Tensor) else str(value)
