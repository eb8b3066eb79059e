"""Token-level dumps: a parquet file per step, one row per token.

Columns, in this order; those in brackets only where the batch has them. B responses, K support ids.

| column | type | meaning |
|---|---|---|
| step | int64 | the step, constant in a file |
| response | int32 | row of the response in its batch, before sampling |
| prompt | int64 | prompt id, the sampling unit of every standard error |
| position | int32 | index on the response axis, 0 at the first token after the prompt |
| id | int64 | token id |
| mask | bool | the student sampled this token and it is in the loss |
| [sampled_mask] | bool | the student sampled this token |
| sampler_logp, student_logp, teacher_logp | float | log-probabilities in nats; 0 if not sampled |
| [softmax_logp], [baseline] | float | as in `Rollouts` and `ScoredRollouts` |
| ended, task, turn, age, reward | bool, 3 int64, float | of the response, on all its tokens |
| [in_support] | bool | the token is one of the support's ids; derived |
| [prefix.NAME] | float | fields of `DistributionStats`: entropies, exact KL, teacher_rank, ... |
| [support.ids, .student_logp, .teacher_logp, .present] | list of K | fields of `Support` |

A response has rows from position 0 to its last sampled token, including unsampled positions; one
without sampled tokens keeps position 0. Temperatures, top-p, the mask rule and the source of the
support are in the file's metadata, key "opdlab". Writing and reading need pyarrow.
"""

import io
import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import atomic_write
from diagnostics.io.files import check_fields, parse_json
from diagnostics.io.packages import load_package
from diagnostics.io.parquet import open_parquet
from diagnostics.records.batch_files import PARTS, build_batch

FORMAT = "opdlab-dump-1"
AXES = ("response", "position")
MAX_UNCHECKED_CELLS, MAX_PADDING_RATIO = 1 << 26, 64
"""Size of a padded tensor that is always allowed, and the largest padding ratio beyond it."""
PER_RESPONSE = ("prompt", "ended", "task", "turn", "age", "reward")


@dataclass(frozen=True, kw_only=True)
class DumpWriter:
    """Writes a sample of each batch into a folder of bounded size."""

    folder: Path
    responses: int = 16
    """Number of responses, sampled uniformly without replacement by (seed, step) alone."""
    seed: int = 0
    file_bytes: int = 1 << 22
    """Limit for one file; fewer responses are kept if they do not fit."""
    total_bytes: int = 1 << 28
    """Limit for the folder; the oldest files are removed, except the very first, which shows the
    run at its start.
    """

    def __post_init__(self) -> None:
        if self.responses < 1:
            raise InvalidInput(f"responses is {self.responses}, expected at least 1")
        if self.total_bytes < 2 * self.file_bytes:
            raise InvalidInput(
                f"total_bytes is {self.total_bytes}, expected at least {2 * self.file_bytes}, "
                "twice file_bytes, for the first file and the newest"
            )

    def __call__(self, step: int, batch: ScoredRollouts) -> Path | None:
        """Write the step's file.

        Args:
            step: Number of the step.
            batch: The batch.

        Returns:
            The file, or None, with a warning, if no response fits.
        """
        row_indices = sample_rows(len(batch), self.responses, self.seed, step)
        data = encode_dump(batch, step, row_indices)
        while len(data) > self.file_bytes and len(row_indices) > 1:
            row_indices = row_indices[
                : max(1, int(len(row_indices) * min(0.9, self.file_bytes / len(data))))
            ]
            data = encode_dump(batch, step, row_indices)
        if len(data) > self.file_bytes:
            warnings.warn(
                f"step {step}: one response takes {len(data)} bytes, more than file_bytes, "
                f"{self.file_bytes}; no dump is written",
                stacklevel=2,
            )
            return None
        path = self.folder / f"step_{step:08d}.parquet"
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
        self._shorten()
        return path

    def _shorten(self) -> None:
        """Remove the second oldest file until the folder fits."""
        files = sorted(self.folder.glob("step_*.parquet"))
        sizes = [file.stat().st_size for file in files]
        while sum(sizes) > self.total_bytes and len(files) > 2:
            files.pop(1).unlink()
            sizes.pop(1)


def sample_rows(size: int, count: int, seed: int, step: int) -> list[int]:
    """Sample `count` of `size` row numbers, or all of them, in random order."""
    permutation = np.random.default_rng((seed, step)).permutation(size)
    return [int(i) for i in permutation[:count]]


def save_dump(path: str | Path, batch: ScoredRollouts, step: int = 0) -> None:
    """Write every response of a batch as one dump file.

    Args:
        path: The parquet file.
        batch: The batch.
        step: Number of the step.

    Raises:
        MissingPackage: Pyarrow is not installed.
    """
    Path(path).write_bytes(encode_dump(batch, step, list(range(len(batch)))))


def encode_dump(batch: ScoredRollouts, step: int, row_indices: list[int]) -> bytes:
    """Encode a dump of some responses, by ascending row number.

    Args:
        batch: The batch.
        step: Number of the step.
        row_indices: Rows of the batch.

    Returns:
        The bytes of the parquet file.
    """
    pyarrow, parquet = _arrow()
    row_indices = sorted(row_indices)
    columns, settings = _columns(batch.rows(row_indices).to("cpu"), step, row_indices)
    table = pyarrow.table({name: _array(x) for name, x in columns.items()})
    header = {"format": FORMAT, "settings": settings}
    table = table.replace_schema_metadata({"opdlab": json.dumps(header)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _columns(
    batch: ScoredRollouts, step: int, rows: list[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return columns (N, ...) of the tokens up to each response's last sampled one; settings."""
    is_dumped = batch.attention_mask
    is_dumped[:, 0] = True
    response, position = is_dumped.nonzero(as_tuple=True)
    columns = {
        "step": torch.full_like(response, step),
        "response": torch.tensor(rows, dtype=torch.int32)[response],
        "prompt": batch.prompt[response],
        "position": position.int(),
    }
    flat, settings = _flat_fields(batch)
    for name, x in flat.items():
        columns["id" if name == "tokens" else name] = x[response] if x.dim() == 1 else x[is_dumped]
    if batch.support is not None:
        columns["in_support"] = batch.support.contains(batch.tokens)[is_dumped]
    return columns, settings


def _flat_fields(batch: ScoredRollouts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors by dotted name, and numbers and text, of the batch and its parts."""
    flat: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part_prefix, part in (("", batch), ("support.", batch.support), ("prefix.", batch.prefix)):
        for name, x in vars(part).items() if part is not None else ():
            if isinstance(x, Tensor):
                flat[part_prefix + name] = x.detach()
            elif isinstance(x, float | str):
                settings[part_prefix + name] = x
    return flat, settings


def _array(x: Tensor) -> Any:
    """Return an arrow column: floats have at least 32 bits, (N, K) becomes lists of K."""
    pyarrow, _ = _arrow()
    if x.dtype.is_floating_point and x.dtype.itemsize < 4:
        x = x.float()
    flat = pyarrow.array(x.contiguous().flatten().numpy())
    return flat if x.dim() == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, x.shape[1])


def load_dump(path: str | Path) -> ScoredRollouts:
    """Read the responses of a dump file as a checked batch, padded to the longest.

    Unknown columns are ignored, so that a file may be enriched.

    Args:
        path: The parquet file.

    Returns:
        The batch.

    Raises:
        InvalidInput: Not a dump, a column of another type or with nulls, missing or duplicate rows
            of a response, more padding than fits in memory, or impossible values.
        MissingPackage: Pyarrow is not installed.
    """
    pyarrow, _ = _arrow()
    file = open_parquet(path)
    metadata = (file.schema_arrow.metadata or {}).get(b"opdlab", b"{}")
    header = parse_json(metadata.decode("utf-8", "replace"), f"{path}, its metadata")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        actual_format = header.get("format") if isinstance(header, dict) else header
        raise InvalidInput(
            f"{path} has format {actual_format!r}, expected {FORMAT!r}; give a token dump"
        )
    check_fields(header, {"settings": dict}, f"{path}, its metadata")
    try:
        table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} cannot be read ({error})") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise InvalidInput(
            f"{path} has a duplicate column: {', '.join(sorted(table.column_names))}"
        )
    columns = {
        name: _column_tensor(table[column], f"{path}, column {column}")
        for column in table.column_names
        if _is_batch_field(name := "tokens" if column == "id" else column) or name in AXES
    }
    if missing_axes := [name for name in AXES if name not in columns]:
        raise InvalidInput(f"{path}: missing columns {', '.join(missing_axes)}")
    row, position = (_integer_column(columns.pop(name), f"{path}, column {name}") for name in AXES)
    row = row.unique(return_inverse=True)[1]
    shape = _checked_shape(path, row, position, columns)
    start = position == 0
    values: dict[str, Any] = dict(header["settings"])
    for name, x in columns.items():
        if name in PER_RESPONSE:
            values[name] = x[start][row[start].argsort()]
            _require_constant(x, values[name][row], f"{path}, column {name}")
        else:
            values[name] = x.new_zeros((*shape, *x.shape[1:]))
            values[name][row, position] = x
    return build_batch(ScoredRollouts, values, str(path))


def _require_constant(x: Tensor, first: Tensor, location: str) -> None:
    """Raise if a per-response column, (N,), is not constant within a response."""
    is_different = (x != first) & ~(x.isnan() & first.isnan())
    if bool(is_different.any()):
        i = int(is_different.nonzero()[0])
        raise InvalidInput(
            f"{location}: {x[i].item()} in token row {i}, but {first[i].item()} at the first token "
            "of the same response"
        )


def _checked_shape(
    path: str | Path, row: Tensor, position: Tensor, columns: dict[str, Tensor]
) -> tuple[int, int]:
    """Return the shape of the batch, checked before it is allocated.

    Args:
        path: The file, for messages.
        row: (N,) number of each token's response, from 0 on.
        position: (N,) response position.
        columns: The other columns.

    Returns:
        Number of responses and of positions.

    Raises:
        InvalidInput: A response with missing or duplicate positions; a batch of far more positions
            than tokens.
    """
    if not len(row):
        raise InvalidInput(f"{path} holds no tokens; write the dump again")
    counts = row.bincount()
    last = torch.zeros_like(counts).scatter_reduce(0, row, position, "amax")
    is_invalid = position < 0 if bool((position < 0).any()) else (last + 1 != counts)[row]
    if not bool(is_invalid.any()):
        # equal numbers of rows and positions: a duplicate hides a missing one
        unique_positions, inverse = (row * len(row) + position).unique(return_inverse=True)
        is_invalid = (inverse.bincount(minlength=len(unique_positions)) > 1)[inverse]
    if bool(is_invalid.any()):
        i = int(is_invalid.nonzero()[0])
        response = int(row[i])
        shown = int(position[i])
        if shown >= 0 and int(last[response]) + 1 != int(counts[response]):
            shown = int(last[response])
        raise InvalidInput(
            f"{path}: position {shown} in a response of {int(counts[response])} rows: "
            "rows of a response are missing or duplicated; write the dump again"
        )
    b, t = len(counts), int(last.max()) + 1
    width = max((x.shape[1] for x in columns.values() if x.dim() > 1), default=1)
    if b * t * width > max(MAX_UNCHECKED_CELLS, MAX_PADDING_RATIO * len(row) * width):
        raise InvalidInput(
            f"{path} holds {len(row)} tokens, but padding its {b} responses to {t} positions of "
            f"{width} values takes {b * t * width} values; split the file"
        )
    return b, t


def _is_batch_field(name: str) -> bool:
    """Return whether the column is a field of `ScoredRollouts` or of one of its parts."""
    owner, _, field_name = name.rpartition(".")
    kind = PARTS.get(owner, ScoredRollouts if not owner else None)
    return kind is not None and field_name in {f.name for f in fields(kind)}


def _integer_column(x: Tensor, location: str) -> Tensor:
    if x.dim() > 1 or x.dtype.is_floating_point or x.dtype == torch.bool:
        raise InvalidInput(f"{location} does not hold integers")
    return x.long()


def _column_tensor(column: Any, location: str) -> Tensor:
    """Return a column as (N,) or, for fixed-size lists, (N, K)."""
    pyarrow, _ = _arrow()
    flat, kind = column.combine_chunks(), column.type
    width = 0
    if pyarrow.types.is_fixed_size_list(kind):
        if column.null_count:
            raise InvalidInput(f"{location}: {column.null_count} rows are null")
        width, kind, flat = kind.list_size, kind.value_type, flat.flatten()
    types = pyarrow.types
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise InvalidInput(f"{location} has type {column.type}, expected numbers or lists of them")
    if flat.null_count:
        raise InvalidInput(f"{location}: {flat.null_count} values are null")
    if types.is_unsigned_integer(kind):
        try:
            flat = flat.cast(pyarrow.int64())
        except pyarrow.ArrowException as error:
            raise InvalidInput(f"{location}: a number exceeds signed 64 bits ({error})") from error
    x = torch.from_numpy(flat.to_numpy(zero_copy_only=False).copy())
    return x.reshape(len(column), width) if width else x


def _arrow() -> tuple[Any, Any]:
    arrow = load_package("pyarrow", "a dump", "data")
    return arrow, load_package("pyarrow.parquet", "a dump", "data")
