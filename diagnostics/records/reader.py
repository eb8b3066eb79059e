"""Records: one JSONL or parquet row a response, from any trainer, as batches.

The columns stand in `diagnostics.records.columns`. Only `tokens` is needed: a batch lacks what its
file lacks, so that the panel computes what it can and `Monitor.missing` names the rest. Files
are streamed; memory is that of one batch and of a number for each distinct prompt.

    records = Records("dump.jsonl")
    row = monitor(0, records)

`diagnostics.records.writer` writes them. Shapes: B rows of a batch, T response positions, K
support ids.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.partial import lacking
from diagnostics.errors import InvalidInput
from diagnostics.io.files import parse_json, reading
from diagnostics.io.packages import load_package
from diagnostics.io.parquet import open_parquet
from diagnostics.records.columns import (
    CONSTANTS,
    LOGPS,
    NAMES,
    PREFIX,
    PREFIX_NEEDED,
    SUPPORT,
    Record,
    number_of,
    read_row,
)
from diagnostics.records.writer import SUFFIXES


class Records:
    """The rows of a file as `ScoredRollouts` batches; iterate as often as you like.

    Rows of one prompt are the sampling unit of every standard error: where they follow each other
    they come in one batch.

    columns: what the rows hold, by canonical name. unused: columns that mean nothing here.
    notes: what the reader should know of the numbers; complete after a whole pass.
    tasks: names of the task numbers, in order of appearance.

    Args:
      path: .jsonl or .parquet.
      positions: padded positions (B x T) of a batch, roughly; a batch ends at the next prompt.
      rename: further column names, to canonical ones.
      task: only the rows of this task.

    Raises:
      ValueError: the file has no rows or another kind; while iterating, a row is wrong, with file,
        row, field and value.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        positions: int = 2**17,
        rename: Mapping[str, str] | None = None,
        task: str | int | None = None,
    ) -> None:
        self.path, self.positions, self.task = Path(path), positions, task
        self.rename = dict(rename or {})
        unknown = sorted(set(self.rename.values()) - set(NAMES.values()))
        if unknown:
            raise InvalidInput(
                f"{unknown} are no columns; known: {', '.join(sorted(set(NAMES.values())))}"
            )
        self.tasks: list[str] = []
        self.notes: dict[str, str] = {}
        first = next(_raw(self.path), None)
        if first is None:
            raise InvalidInput(f"{path} holds no rows")
        where, raw = first
        row = read_row(raw, where, self.rename)
        self._first = tuple(raw)
        self.columns = frozenset(row)
        self.unused = tuple(key for key in raw if self._meaning(key) is None)
        self._constants = {name: row[name] for name in CONSTANTS if name in row}
        if not self.columns & {"prompt", "prompt_tokens"}:
            self.notes["prompt"] = (
                "no column tells which rows share a prompt; standard errors treat every response "
                "as independent, which is too small for groups"
            )

    def rows(self) -> Iterator[Record]:
        """Checked rows, each with the columns of the first."""
        for i, (where, raw) in enumerate(_raw(self.path)):
            row = read_row(raw, where, self.rename)
            if row.keys() != self.columns:
                raise InvalidInput(f"{where}: {self._difference(raw, row)}")
            for name, value in self._constants.items():
                if row[name] != value:
                    raise InvalidInput(
                        f"{where}, field {name}: {row[name]!r}, the first row has {value!r}; use "
                        "one file for each"
                    )
            if self.task is None or str(row.get("task")) == str(self.task):
                origin = row.get("prompt", row.get("prompt_tokens"))
                yield row | {"prompt": i if origin is None else number_of(origin)}

    def groups(self) -> Iterator[list[Record]]:
        """Rows of one batch each."""
        waiting: list[Record] = []
        seen: set[int] = set()
        width = 0  # of the rows that wait, in positions
        for row in self.rows():
            wide = width * len(waiting)
            changed = bool(waiting) and row["prompt"] != waiting[-1]["prompt"]
            full = wide >= self.positions and (changed or wide >= 8 * self.positions)
            longer = max(width, _width(row))
            # a long row beside many short ones would be padded to far more than the file holds
            if full or (waiting and longer * (len(waiting) + 1) >= 16 * self.positions):
                yield waiting
                seen |= {r["prompt"] for r in waiting}
                waiting, longer = [], _width(row)
            if row["prompt"] in seen:
                self.notes["order"] = (
                    "rows of one prompt are far apart; sort the file by prompt, or standard errors "
                    "come out too small"
                )
            waiting.append(row)
            width = longer
        if waiting:
            yield waiting

    def __iter__(self) -> Iterator[ScoredRollouts]:
        for rows in self.groups():
            yield self.batch(rows)

    def batch(self, rows: list[Record]) -> ScoredRollouts:
        """The rows as one checked batch, padded on the right, without what they lack."""
        width = max(1, *(len(row["tokens"]) for row in rows))

        def padded(name: str, dtype: torch.dtype) -> Tensor:
            inner = rows[0][name].shape[1:]
            out = torch.zeros((len(rows), width, *inner), dtype=dtype)
            for i, row in enumerate(rows):
                if row[name].shape[1:] != inner:
                    raise InvalidInput(
                        f"{self.path}: rows of one batch have {inner[0]} and "
                        f"{row[name].shape[1]} ids a position in {name}"
                    )
                out[i, : len(row[name])] = torch.from_numpy(row[name]).to(dtype)
            return out

        def floats(name: str) -> Tensor:
            known = name in self.columns
            return padded(name, torch.float32) if known else torch.zeros(len(rows), width)

        parts: dict[str, Any] = {name: floats(name) for name in LOGPS if name != "softmax_logp"}
        parts |= {n: floats(n) for n in ("softmax_logp", "baseline") if n in self.columns}
        if "sampled_mask" in self.columns:
            parts["sampled_mask"] = padded("sampled_mask", torch.bool)
        parts |= {k: v for k, v in self._constants.items() if k != "support.source"}
        scored = ScoredRollouts(
            tokens=padded("tokens", torch.long),
            mask=padded("mask", torch.bool),
            support=self._support(rows, padded),
            prefix=self._prefix(floats),
            **parts | self._by_response(rows),
        )
        needed = {"student_logp", "teacher_logp", "sampler_logp", "ended"}
        return lacking(scored.checked(), needed - self.columns)

    def _difference(self, raw: Mapping[str, Any], row: Record) -> str:
        """The fields that this row has and the first has not, or the other way round."""
        names = sorted(self.columns ^ row.keys())
        keys = [*raw, *self._first]
        told = {n: next((k for k in keys if self._meaning(k) == n and k != n), "") for n in names}
        odd = ", ".join(f"{n} (column {k})" if k else n for n, k in told.items())
        return (
            f"field {odd} is here or in the first row, not in both; write it in every row, or in "
            "none"
        )

    def _meaning(self, key: str) -> str | None:
        grouped = "prefix" if key in ("support", "prefix") else None
        return self.rename.get(key, NAMES.get(key, grouped))

    def _by_response(self, rows: list[Record]) -> dict[str, Tensor]:
        found = {
            "prompt": torch.tensor([row["prompt"] for row in rows]),
            "ended": torch.tensor([row.get("ended", False) for row in rows]),
        }
        if "reward" in self.columns:
            found["reward"] = torch.tensor([row["reward"] for row in rows], dtype=torch.float32)
        if "turn" in self.columns:
            found["turn"] = torch.tensor([row["turn"] for row in rows])
        if "task" in self.columns:
            found["task"] = torch.tensor([self._task_number(row["task"]) for row in rows])
        return found

    def _task_number(self, task: Any) -> int:
        if isinstance(task, int):
            return task
        if str(task) not in self.tasks:
            self.tasks.append(str(task))
        return self.tasks.index(str(task))

    def _support(
        self, rows: list[Record], padded: Callable[[str, torch.dtype], Tensor]
    ) -> Support | None:
        if "support.ids" not in self.columns:
            return None
        ids = padded("support.ids", torch.long)
        scope = "sampled_mask" if "sampled_mask" in self.columns else "mask"
        mask = padded(scope, torch.bool)[..., None]
        both = {
            name.removeprefix("support."): (
                padded(name, torch.float32) if name in self.columns else torch.zeros(ids.shape)
            )
            for name in SUPPORT
        }
        known = "support.present" in self.columns
        support = Support(
            ids=ids * mask,
            present=padded("support.present", torch.bool) if known else None,
            source=self._constants.get("support.source", "teacher"),
            **both,
        )
        unknown = [n.removeprefix("support.") for n in SUPPORT if n not in self.columns]
        return lacking(support, unknown, "the support of the records has")

    def _prefix(self, floats: Callable[[str], Tensor]) -> DistributionStats | None:
        lost = [name for name in PREFIX_NEEDED if name not in self.columns]
        if lost:
            if len(lost) < len(PREFIX_NEEDED):
                self.notes["prefix"] = (
                    f"prefix functionals need all of their columns; missing: {', '.join(lost)}"
                )
            return None
        known = [name for name in PREFIX if name in self.columns]
        return DistributionStats(**{name.removeprefix("prefix."): floats(name) for name in known})


def _width(row: Record) -> int:
    """Positions that a row takes in a batch; with a support of more than 64 ids, several times."""
    k = row["support.ids"].shape[1] if "support.ids" in row else 0
    return len(row["tokens"]) * max(1, k // 64)


def _raw(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row of the file."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix != ".jsonl":
        raise InvalidInput(f"{path} is none of {', '.join(SUFFIXES)}")
    with reading(path), path.open("rb") as file:
        for i, line in enumerate(file, 1):
            where = f"{path} row {i}"
            try:
                text = line.decode("utf-8-sig" if i == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidInput(f"{where} is not UTF-8 text ({error.reason})") from error
            if text.strip():
                yield where, parse_json(text, where)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    count = 0
    file = open_parquet(path)
    arrow = load_package("pyarrow", str(path), "data")
    try:
        for table in file.iter_batches(batch_size=64):
            for row in table.to_pylist():
                count += 1
                yield f"{path} row {count}", row
    except (arrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} cannot be read after row {count} ({error})") from error
