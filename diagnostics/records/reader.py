"""Reading of records: a file of any trainer or server, one row per response, as batches.

`diagnostics.records.columns` lists the columns, `diagnostics.formats` the dumps of other tools that
are converted to them. Only `tokens` is required: fields that the file does not have are missing in
the batch, so that the panel computes what it can and `Monitor.missing` lists the rest. JSONL and
parquet files are streamed; memory is that of one batch plus a number per distinct prompt.

    records = load_records("dump.jsonl")
    row = monitor(0, records)

`diagnostics.records.writer` writes such files. Shapes: B rows of a batch, T response positions, K
support ids.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import DumpFormat, ReadContext
from diagnostics.formats.registry import (
    FORMATS,
    convert_rows,
    find_format,
    recognise,
    rename_fields,
)
from diagnostics.formats.row_files import iter_rows
from diagnostics.missing import Missing
from diagnostics.ragged import right_pad
from diagnostics.records.columns import (
    CONSTANTS,
    LOGPS,
    NAMES,
    REQUIRED_STATS_COLUMNS,
    STATS_COLUMNS,
    SUPPORT,
    Record,
    integer_id,
    parse_record,
)

SAMPLER_NOTE = (
    "the dump has no log-probabilities of the scored student, so those of the sampler are read as "
    "the student's, and a lag between them cannot be seen; --scores sampler keeps them apart"
)


def load_records(
    path: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    task: str | int | None = None,
    dump_format: str | None = None,
) -> "Records":
    """Open a file of rollouts, which is read in batches while it is iterated.

    Args:
        path: The file, .jsonl, .parquet, .json or .pt.
        rename: Names of the file that differ, to a column of `diagnostics.records.columns` or to a
            field of the dump format.
        task: Only the rows of this task.
        dump_format: Name of a format of `diagnostics.formats.registry`; None to recognise it.

    Returns:
        An iterable of `ScoredRollouts`, for `Monitor`.

    Raises:
        InvalidInput: See `Records`.
        MissingFile: There is no such file.
        MissingPackage: The file is parquet and pyarrow is not installed.
    """
    return Records(path, rename=rename, task=task, dump_format=dump_format)


class Records:
    """The rows of a file as `ScoredRollouts` batches; can be iterated repeatedly.

    Rows of one prompt are the sampling unit of every standard error: consecutive rows of a prompt
    are put in one batch.

    Args:
        path: One of SUFFIXES.
        positions: Approximate number of padded positions (B x T) of a batch; a batch ends at the
            next prompt.
        rename: Names in the file -> a canonical column, or a field of the dump format; a dot enters
            an object.
        task: Only the rows of this task.
        dump_format: Name of the dump format; None to recognise it.
        context: What the conversion of a dump may use.

    Attributes:
        dump_format: Format of the rows; None for records.
        columns: Canonical names of the columns in the rows.
        unused: Unknown columns.
        notes: Warnings about the numbers; complete after a full pass.
        tasks: Names of the task numbers, in order of appearance.

    Raises:
        InvalidInput: The file has no rows or another format; while iterating, a wrong row, with
            file, row, field and value.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        positions: int = 2**17,
        rename: Mapping[str, str] | None = None,
        task: str | int | None = None,
        dump_format: str | None = None,
        context: ReadContext | None = None,
    ) -> None:
        self.path, self.positions, self.task = Path(path), positions, task
        self.rename, self._format_name = dict(rename or {}), dump_format
        self._context = context or ReadContext()
        allowed = {*NAMES, *(field for f in FORMATS for field in f.top_level_fields)}
        if unknown := sorted(set(self.rename.values()) - allowed):
            raise InvalidInput(
                f"rename: unknown columns {unknown}; known: "
                f"{', '.join(sorted(set(NAMES.values())))}"
            )
        self.tasks: list[str] = []
        self.notes: dict[str, str] = {}
        first_row = next(iter_rows(self.path), None)
        if first_row is None:
            raise InvalidInput(f"{path} holds no rows")
        self.dump_format = self._recognise(*first_row)
        location, raw = next(self._converted_rows())
        row = parse_record(raw, location)
        self._first = tuple(raw)
        self.columns = frozenset(row)
        self.unused = tuple(key for key in raw if self._canonical_name(key) is None)
        self._constants = {name: row[name] for name in CONSTANTS if name in row}
        if self.dump_format is not None and self.dump_format.notes:
            self.notes["format"] = f"{self.dump_format.title}: {self.dump_format.notes}"
        if not self.columns & {"prompt", "prompt_tokens"}:
            self.notes["prompt"] = (
                "no column says which rows share a prompt; standard errors treat every response "
                "as independent, and are too small for groups of rollouts"
            )

    def _recognise(self, location: str, value: Any) -> DumpFormat | None:
        """Return the format of the first row, or the named one."""
        if self._format_name is not None:
            return find_format(self._format_name)
        if not isinstance(value, Mapping):
            return None
        return recognise(rename_fields(value, self.rename, location))

    def _converted_rows(self) -> Iterator[tuple[str, Any]]:
        """Yield (location, row with our columns), not yet checked."""
        rows = convert_rows(iter_rows(self.path), self._format_name, self.rename, self._context)
        for location, row in rows:
            is_moved = (
                self.dump_format is not None
                and self._context.scores != "sampler"
                and "sampler_logp" in row
                and "student_logp" not in row
            )
            if is_moved:
                self.notes["sampler"] = SAMPLER_NOTE
                row = row | {"student_logp": row["sampler_logp"]}
                del row["sampler_logp"]
            yield location, row

    def rows(self) -> Iterator[Record]:
        """Yield checked rows, each with the columns of the first."""
        for i, (location, raw) in enumerate(self._converted_rows()):
            row = parse_record(raw, location)
            if row.keys() != self.columns:
                raise InvalidInput(f"{location}: {self._describe_difference(raw, row)}")
            for name, value in self._constants.items():
                if row[name] != value:
                    raise InvalidInput(
                        f"{location}, field {name}: {row[name]!r}, but the first row has "
                        f"{value!r}; split the file"
                    )
            if self.task is None or str(row.get("task")) == str(self.task):
                origin = row.get("prompt", row.get("prompt_tokens"))
                yield row | {"prompt": i if origin is None else integer_id(origin)}

    def groups(self) -> Iterator[list[Record]]:
        """Yield the rows of one batch each."""
        pending: list[Record] = []
        finished_prompts: set[int] = set()
        width = 0  # positions of the longest pending row
        for row in self.rows():
            padded_size = width * len(pending)
            is_new_prompt = bool(pending) and row["prompt"] != pending[-1]["prompt"]
            is_full = padded_size >= self.positions and (
                is_new_prompt or padded_size >= 8 * self.positions
            )
            new_width = max(width, _width(row))
            # one long row would pad many short ones to far more than the file holds
            if is_full or (pending and new_width * (len(pending) + 1) >= 16 * self.positions):
                yield pending
                finished_prompts |= {r["prompt"] for r in pending}
                pending, new_width = [], _width(row)
            if row["prompt"] in finished_prompts:
                self.notes["order"] = (
                    "rows of one prompt are not adjacent, so standard errors are too small; sort "
                    "the file by prompt"
                )
            pending.append(row)
            width = new_width
        if pending:
            yield pending

    def __iter__(self) -> Iterator[ScoredRollouts]:
        for rows in self.groups():
            yield self.batch(rows)

    def batch(self, rows: list[Record]) -> ScoredRollouts:
        """Build a checked batch, padded on the right, with missing fields marked.

        Args:
            rows: Checked rows.

        Returns:
            The batch.
        """
        width = max(1, *(len(row["tokens"]) for row in rows))

        def pad_rows(name: str, dtype: torch.dtype) -> Tensor:
            inner = rows[0][name].shape[1:]
            values = [row[name] for row in rows]
            if "support.present" in self.columns and inner:
                # slots that do not count, where rows have different numbers of ids
                inner = (max(x.shape[1] for x in values),)
                values = [np.pad(x, ((0, 0), (0, inner[0] - x.shape[1]))) for x in values]
            for x in values:
                if x.shape[1:] != inner:
                    raise InvalidInput(
                        f"{self.path}: rows of one batch have {inner[0]} and "
                        f"{x.shape[1]} ids per position in {name}"
                    )
            padded = right_pad(values, dtype)
            return padded if padded.shape[1] else padded.new_zeros(len(rows), width, *inner)

        def floats(name: str) -> Tensor:
            return pad_rows(name, torch.float32)

        parts: dict[str, Any] = {
            name: floats(name) for name in (*LOGPS, "baseline") if name in self.columns
        }
        if "sampled_mask" in self.columns:
            parts["sampled_mask"] = pad_rows("sampled_mask", torch.bool)
        parts |= {k: v for k, v in self._constants.items() if k != "support.source"}
        required_fields = {"student_logp", "teacher_logp", "sampler_logp", "ended"}
        missing = dict.fromkeys(required_fields - self.columns, Missing("the records have"))
        return ScoredRollouts(
            tokens=pad_rows("tokens", torch.long),
            mask=pad_rows("mask", torch.bool),
            support=self._support(rows, pad_rows),
            prefix=self._prefix(floats),
            **parts | self._by_response(rows) | missing,
        ).validate()

    def _describe_difference(self, raw: Mapping[str, Any], row: Record) -> str:
        """Describe the fields that only one of this row and the first has."""
        names = sorted(self.columns ^ row.keys())
        keys = [*raw, *self._first]
        aliases = {
            n: next((k for k in keys if self._canonical_name(k) == n and k != n), "") for n in names
        }
        field_list = ", ".join(f"{n} (column {k})" if k else n for n, k in aliases.items())
        return (
            f"field {field_list} is only in this or only in the first row; write it in every row, "
            "or in none"
        )

    def _canonical_name(self, key: str) -> str | None:
        grouped = "prefix" if key in ("support", "prefix") else None
        return NAMES.get(key, grouped)

    def _by_response(self, rows: list[Record]) -> dict[str, Tensor]:
        tensors = {"prompt": torch.tensor([row["prompt"] for row in rows])}
        if "ended" in self.columns:
            tensors["ended"] = torch.tensor([row["ended"] for row in rows])
        if "reward" in self.columns:
            tensors["reward"] = torch.tensor([row["reward"] for row in rows], dtype=torch.float32)
        if "turn" in self.columns:
            tensors["turn"] = torch.tensor([row["turn"] for row in rows])
        if "origin" in self.columns:
            tensors["origin"] = torch.tensor([row["origin"] for row in rows])
        if "task" in self.columns:
            tensors["task"] = torch.tensor([self._task_number(row["task"]) for row in rows])
        return tensors

    def _task_number(self, task: Any) -> int:
        if isinstance(task, int):
            return task
        if str(task) not in self.tasks:
            self.tasks.append(str(task))
        return self.tasks.index(str(task))

    def _support(
        self, rows: list[Record], pad_rows: Callable[[str, torch.dtype], Tensor]
    ) -> Support | None:
        if "support.ids" not in self.columns:
            return None
        ids = pad_rows("support.ids", torch.long)
        scope = "sampled_mask" if "sampled_mask" in self.columns else "mask"
        mask = pad_rows(scope, torch.bool)[..., None]
        logps: dict[str, Any] = {
            name.removeprefix("support."): (
                pad_rows(name, torch.float32)
                if name in self.columns
                else Missing("the support of the records has")
            )
            for name in SUPPORT
        }
        has_present = "support.present" in self.columns
        return Support(
            ids=ids * mask,
            present=pad_rows("support.present", torch.bool) if has_present else None,
            source=self._constants.get("support.source", "teacher"),
            **logps,
        )

    def _prefix(self, floats: Callable[[str], Tensor]) -> DistributionStats | None:
        missing_columns = [name for name in REQUIRED_STATS_COLUMNS if name not in self.columns]
        if missing_columns:
            if len(missing_columns) < len(REQUIRED_STATS_COLUMNS):
                self.notes["prefix"] = (
                    "distribution statistics need all of their columns; missing: "
                    f"{', '.join(missing_columns)}"
                )
            return None
        available_columns = [name for name in STATS_COLUMNS if name in self.columns]
        return DistributionStats(
            **{name.removeprefix("prefix."): floats(name) for name in available_columns}
        )


def _width(row: Record) -> int:
    """Return the positions that a row takes in a batch; several times more if K exceeds 64."""
    k = row["support.ids"].shape[1] if "support.ids" in row else 0
    return len(row["tokens"]) * max(1, k // 64)
