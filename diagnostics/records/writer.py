"""Writing of records: batches or plain rows, as JSONL or parquet.

`diagnostics.records.columns` describes the columns. Shapes: T response positions, K ids.
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
from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import atomic_write
from diagnostics.io.packages import load_package
from diagnostics.missing import Missing
from diagnostics.records.columns import CONSTANTS
from diagnostics.tensor_fields import flatten

SUFFIXES = (".jsonl", ".parquet")


def batch_rows(batch: Rollouts) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch as plain values, each cut after its last sampled position.

    Settings (temperature and so on) are repeated in every row. When read back, per-token floats are
    float32, and ids of a support are 0 where nothing was sampled.

    Args:
        batch: The batch; missing fields are left out.

    Yields:
        One row per response.
    """
    host = {name: x.detach().cpu() for name, x in flatten(batch).items()}
    values = vars(batch)
    settings = {
        name: values[name]
        for name in CONSTANTS[:5]
        if name in values and not isinstance(values[name], Missing)
    }
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


def save_records(path: str | Path, rows: Iterable[Rollouts | Mapping[str, Any]]) -> int:
    """Write batches or plain rows to .jsonl or .parquet, atomically.

    Args:
        path: The file.
        rows: Batches, or rows as mappings.

    Returns:
        Number of rows.

    Raises:
        InvalidInput: Another suffix, or no rows for parquet.
        MissingPackage: Parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InvalidInput(f"{path} has neither suffix .jsonl nor .parquet")
    plain = (
        row for x in rows for row in (batch_rows(x) if isinstance(x, Rollouts) else iter([dict(x)]))
    )
    write_rows = _write_parquet if path.suffix == ".parquet" else _write_jsonl
    with atomic_write(path) as temporary:
        return write_rows(temporary, plain)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with open(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row, default=_to_json_type) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], chunk_size: int = 64) -> int:
    arrow = load_pyarrow()
    from pyarrow import parquet

    rows, count, writer = iter(rows), 0, None
    while chunk := [_fill_nulls(row) for row in islice(rows, chunk_size)]:
        table = arrow.Table.from_pylist(chunk, schema=None if writer is None else writer.schema)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
        count += len(chunk)
    if writer is None:
        raise InvalidInput("no rows to write; a parquet file needs at least one row")
    writer.close()
    return count


def _fill_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Replace nulls that would leave a column without a type."""
    return {k: float("nan") if v is None and k == "reward" else v for k, v in row.items()}


def load_pyarrow() -> Any:
    """Import pyarrow."""
    return load_package("pyarrow", "parquet", "data")


def _to_json_type(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic | Tensor) else str(value)
