"""Rows of a file as they are, with the location of each: JSON Lines, JSON, parquet, tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import parse_json, read_json, translate_read_errors
from diagnostics.io.packages import load_package
from diagnostics.io.parquet import open_parquet

TENSOR_SUFFIXES = (".pt", ".pth", ".pkl")
SUFFIXES = (".jsonl", ".parquet", ".json", *TENSOR_SUFFIXES)
"""Suffixes of files of rows that can be read."""


def iter_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file.

    Args:
        path: A file with one of SUFFIXES.

    Yields:
        (location, row); a line with a list of objects, as servers answer, has a row for each.

    Raises:
        InvalidInput: Another suffix, or content that cannot be parsed.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix in TENSOR_SUFFIXES:
        from diagnostics.formats.tensor_files import tensor_file_rows  # imports torch

        yield from tensor_file_rows(path)
    elif path.suffix == ".json":
        yield from _list_rows(f"{path}", read_json(path))
    elif path.suffix == ".jsonl":
        for location, value in _line_rows(path):
            yield from _list_rows(location, value)
    else:
        raise InvalidInput(f"{path} is none of {', '.join(SUFFIXES)}")


def _list_rows(location: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a list one by one; any other value itself."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        yield from ((f"{location}, object {i}", row) for i, row in enumerate(value, 1))
    else:
        yield location, value


def _line_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with translate_read_errors(path), path.open("rb") as file:
        for i, line in enumerate(file, 1):
            location = f"{path} row {i}"
            try:
                text = line.decode("utf-8-sig" if i == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidInput(f"{location} is not UTF-8 text ({error.reason})") from error
            if text.strip():
                yield location, parse_json(text, location)


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
