"""Token-level dumps: a parquet file a step, one row a token, that any data tool reads and so do we.

Columns, in this order; those in brackets only where the batch has them. B responses, K support ids.

| column | type | meaning |
|---|---|---|
| step | int64 | the step; one a file |
| response | int32 | row of the response in its batch, before sampling |
| prompt | int64 | prompt id, the sampling unit of every standard error |
| position | int32 | index on the response axis, 0 at the first token after the prompt |
| id | int64 | token id |
| mask | bool | the student chose this token and it is supervised |
| [sampled_mask] | bool | the student chose this token |
| sampler_logp, student_logp, teacher_logp | float | log-probabilities in nats; 0 if not sampled |
| [softmax_logp], [baseline] | float | as in `Rollouts` and `ScoredRollouts` |
| ended, task, turn, age, reward | bool, 3 int64, float | of the response, on all its tokens |
| [in_support] | bool | the token is one of the support's ids; derived |
| [prefix.NAME] | float | fields of `DistributionStats`: entropies, exact KL, teacher_rank, ... |
| [support.ids, .student_logp, .teacher_logp, .present] | list of K | fields of `Support` |

A response has its rows from position 0 up to its last sampled token, holes included; one without
a sampled token keeps position 0. Temperatures, top-p, the mask's rule and the support's
source are in the file's metadata, key "opdlab". Writing and reading need pyarrow.
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
from diagnostics.records.batch_files import PARTS, assembled

FORMAT = "opdlab-dump-1"
AXES = ("response", "position")
MOST_CELLS, MOST_PADDING = 1 << 26, 64
"""Values of a padded tensor that are always read, and how many times a file's own beyond them."""
PER_RESPONSE = ("prompt", "ended", "task", "turn", "age", "reward")


@dataclass(frozen=True, kw_only=True)
class Dumps:
    """Writes a sample of each batch it is given into a folder of bounded size.

    responses: drawn from a batch without replacement, equally likely, by (seed, step) alone.
    file_bytes: of a file; fewer responses are kept where they do not fit.
    total_bytes: of the folder's dumps; the oldest go, except the very first, what a run looked
      like at its start.
    """

    folder: Path
    responses: int = 16
    seed: int = 0
    file_bytes: int = 1 << 22
    total_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        if self.responses < 1:
            raise InvalidInput(f"responses is {self.responses}, expected at least 1")
        if self.total_bytes < 2 * self.file_bytes:
            raise InvalidInput(
                f"total_bytes is {self.total_bytes}; it must hold the first file and the newest, "
                f"twice file_bytes, {2 * self.file_bytes}"
            )

    def __call__(self, step: int, batch: ScoredRollouts) -> Path | None:
        """Write the step's file and return it; None, with a warning, if no response fits."""
        chosen = sampled(len(batch), self.responses, self.seed, step)
        data = encoded(batch, step, chosen)
        while len(data) > self.file_bytes and len(chosen) > 1:
            chosen = chosen[: max(1, int(len(chosen) * min(0.9, self.file_bytes / len(data))))]
            data = encoded(batch, step, chosen)
        if len(data) > self.file_bytes:
            warnings.warn(
                f"step {step}: one response takes {len(data)} bytes, more than file_bytes, "
                f"{self.file_bytes}; nothing dumped",
                stacklevel=2,
            )
            return None
        path = self.folder / f"step_{step:08d}.parquet"
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
        self._shorten()
        return path

    def _shorten(self) -> None:
        """Remove the second oldest until the folder fits."""
        files = sorted(self.folder.glob("step_*.parquet"))
        sizes = [file.stat().st_size for file in files]
        while sum(sizes) > self.total_bytes and len(files) > 2:
            files.pop(1).unlink()
            sizes.pop(1)


def sampled(size: int, count: int, seed: int, step: int) -> list[int]:
    """`count` of `size` row numbers, or all of them, in the order in which they were drawn."""
    drawn = np.random.default_rng((seed, step)).permutation(size)
    return [int(i) for i in drawn[:count]]


def save_dump(path: str | Path, batch: ScoredRollouts, step: int = 0) -> None:
    """Write every response of a batch as one dump file.

    Raises:
      ImportError: pyarrow is not installed.
    """
    Path(path).write_bytes(encoded(batch, step, list(range(len(batch)))))


def encoded(batch: ScoredRollouts, step: int, chosen: list[int]) -> bytes:
    """The bytes of a dump of the `chosen` responses, by rising row number."""
    pyarrow, parquet = _arrow()
    chosen = sorted(chosen)
    columns, settings = _columns(batch.rows(chosen).to("cpu"), step, chosen)
    table = pyarrow.table({name: _array(x) for name, x in columns.items()})
    header = {"format": FORMAT, "settings": settings}
    table = table.replace_schema_metadata({"opdlab": json.dumps(header)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _columns(
    batch: ScoredRollouts, step: int, rows: list[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Columns (N, ...) of the tokens up to each response's last sampled one; plain settings."""
    real = batch.sampled.long().flip(1).cumsum(1).flip(1) > 0
    real[:, 0] = True
    response, position = real.nonzero(as_tuple=True)
    found = {
        "step": torch.full_like(response, step),
        "response": torch.tensor(rows, dtype=torch.int32)[response],
        "prompt": batch.prompt[response],
        "position": position.int(),
    }
    flat, settings = _flat(batch)
    for name, x in flat.items():
        found["id" if name == "tokens" else name] = x[response] if x.dim() == 1 else x[real]
    if batch.support is not None:
        found["in_support"] = batch.support.contains(batch.tokens)[real]
    return found, settings


def _flat(batch: ScoredRollouts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by dotted name, and what is a number or text, of the batch and its parts."""
    flat: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for owner, part in (("", batch), ("support.", batch.support), ("prefix.", batch.prefix)):
        for name, x in vars(part).items() if part is not None else ():
            if isinstance(x, Tensor):
                flat[owner + name] = x.detach()
            elif isinstance(x, float | str):
                settings[owner + name] = x
    return flat, settings


def _array(x: Tensor) -> Any:
    """A column: floats narrower than 32 bits are widened, (N, K) becomes lists of K."""
    pyarrow, _ = _arrow()
    if x.dtype.is_floating_point and x.dtype.itemsize < 4:
        x = x.float()
    flat = pyarrow.array(x.contiguous().flatten().numpy())
    return flat if x.dim() == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, x.shape[1])


def load_dump(path: str | Path) -> ScoredRollouts:
    """The responses of a dump file as a batch, padded to the longest, checked.

    Columns that the schema does not know are left out, so that a file may be enriched.

    Raises:
      InvalidInput: not a dump, a column of another type or with nulls, rows that a response lacks
        or has twice, more padding than memory, or impossible values. MissingPackage: no pyarrow.
    """
    pyarrow, _ = _arrow()
    file = open_parquet(path)
    about = (file.schema_arrow.metadata or {}).get(b"opdlab", b"{}")
    header = parse_json(about.decode("utf-8", "replace"), f"{path}, its metadata")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise InvalidInput(f"{path} has format {found!r}, expected {FORMAT!r}")
    check_fields(header, {"settings": dict}, f"{path}, its metadata")
    try:
        table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} cannot be read ({error})") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise InvalidInput(f"{path} has a column twice: {', '.join(sorted(table.column_names))}")
    columns = {
        name: _tensor(table[column], f"{path}, column {column}")
        for column in table.column_names
        if _known(name := "tokens" if column == "id" else column) or name in AXES
    }
    if lacking := [name for name in AXES if name not in columns]:
        raise InvalidInput(f"{path} lacks the columns {', '.join(lacking)}")
    row, position = (_whole(columns.pop(name), f"{path}, column {name}") for name in AXES)
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
    return assembled(ScoredRollouts, values, str(path))


def _require_constant(x: Tensor, first: Tensor, where: str) -> None:
    """Refuse a column of responses, (N,), that is not on all tokens what it is on the first."""
    wrong = (x != first) & ~(x.isnan() & first.isnan())
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise InvalidInput(
            f"{where}: {x[i].item()} in token row {i}, {first[i].item()} at the first token of the "
            "same response"
        )


def _checked_shape(
    path: str | Path, row: Tensor, position: Tensor, columns: dict[str, Tensor]
) -> tuple[int, int]:
    """Responses and positions of the batch, before it is allocated.

    row: (N,) number of each token's response, from 0 on; position: (N,).

    Raises:
      InvalidInput: a response without some of its positions, or with one twice; a batch of far
        more positions than tokens.
    """
    if not len(row):
        raise InvalidInput(f"{path} holds no tokens")
    counts = row.bincount()
    last = torch.zeros_like(counts).scatter_reduce(0, row, position, "amax")
    wrong = position < 0 if bool((position < 0).any()) else (last + 1 != counts)[row]
    if not bool(wrong.any()):  # as many rows as positions: one that is twice hides one that lacks
        place, again = (row * len(row) + position).unique(return_inverse=True)
        wrong = (again.bincount(minlength=len(place)) > 1)[again]
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise InvalidInput(
            f"{path}: position {int(position[i])} in a response of {int(counts[row[i]])} rows; it "
            "lacks rows of a response, or has some twice; dump it again"
        )
    b, t = len(counts), int(last.max()) + 1
    width = max((x.shape[1] for x in columns.values() if x.dim() > 1), default=1)
    if b * t * width > max(MOST_CELLS, MOST_PADDING * len(row) * width):
        raise InvalidInput(
            f"{path} holds {len(row)} tokens, and its {b} responses padded to {t} positions of "
            f"{width} values are {b * t * width}: split it"
        )
    return b, t


def _known(name: str) -> bool:
    """The column is a field of `ScoredRollouts` or of one of its parts."""
    owner, _, own = name.rpartition(".")
    kind = PARTS.get(owner, ScoredRollouts if not owner else None)
    return kind is not None and own in {f.name for f in fields(kind)}


def _whole(x: Tensor, where: str) -> Tensor:
    if x.dim() > 1 or x.dtype.is_floating_point or x.dtype == torch.bool:
        raise InvalidInput(f"{where} does not hold whole numbers")
    return x.long()


def _tensor(column: Any, where: str) -> Tensor:
    """A column as (N,) or, of fixed-size lists, (N, K)."""
    pyarrow, _ = _arrow()
    flat, kind = column.combine_chunks(), column.type
    width = 0
    if pyarrow.types.is_fixed_size_list(kind):
        if column.null_count:
            raise InvalidInput(f"{where}: {column.null_count} rows are null")
        width, kind, flat = kind.list_size, kind.value_type, flat.flatten()
    types = pyarrow.types
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise InvalidInput(f"{where} has type {column.type}, expected numbers or lists of them")
    if flat.null_count:
        raise InvalidInput(f"{where}: {flat.null_count} values are null")
    if types.is_unsigned_integer(kind):
        try:
            flat = flat.cast(pyarrow.int64())
        except pyarrow.ArrowException as error:
            raise InvalidInput(f"{where}: a number beyond 64 bits with sign ({error})") from error
    x = torch.from_numpy(flat.to_numpy(zero_copy_only=False).copy())
    return x.reshape(len(column), width) if width else x


def _arrow() -> tuple[Any, Any]:
    arrow = load_package("pyarrow", "a dump", "data")
    return arrow, load_package("pyarrow.parquet", "a dump", "data")
