"""Rows of data sets from files, folders and the Hugging Face hub, as plain dictionaries.

Rows are counted from 0 in every message, lines of a file from 1.
"""

import json
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed, UserError
from diagnostics.io.files import parse_json, read_text, short
from diagnostics.io.packages import load_package
from diagnostics.io.parquet import open_parquet

Row = dict[str, Any]


def read_rows(source: str) -> list[Row]:
    """All rows of `source`.

    source: a .jsonl, .json or .parquet file; a folder that datasets saved or that holds data files;
    or `hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME:CONFIG:SPLIT`, where NAME is such a folder or a dataset
    on the hub and the split is "train" if not given.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line or an element is not a JSON object, or the file is of another kind.
      RuntimeError: the file or the data set cannot be read.
    """
    path = Path(source)
    if source.startswith("hf:") or path.is_dir():
        return read_dataset(source.removeprefix("hf:"))
    if not path.exists():
        raise MissingFile(
            f'task {source!r} is neither "lab" nor an existing file or folder; '
            "a dataset on the hub is written hf:NAME"
        )
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix not in (".jsonl", ".json"):
        raise InvalidInput(
            f"{path} is neither a .jsonl nor a .parquet file, nor .json; convert it first, a table "
            "of text to one JSON object a line, and unpack what is compressed"
        )
    return read_json_rows(path)


def read_json_rows(path: Path) -> list[Row]:
    """The objects of a JSON file, one a line or in one array; a byte-order mark is skipped."""
    text = read_text(path).removeprefix("\ufeff")
    if text.lstrip()[:1] == "[":
        rows = array_rows(path, text)
        if rows is not None:
            return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{path} line {number}")
        except InvalidInput as error:
            if number == 1 and is_object(text) and not is_object(line):
                raise InvalidInput(
                    f"{path} is one JSON object; expected an array of objects, or one object a line"
                ) from error
            raise
        if not isinstance(row, dict):
            raise InvalidInput(f"{path} line {number} is not a JSON object: {line[:80]!r}")
        rows.append(row)
    return rows


def array_rows(path: Path, text: str) -> list[Row] | None:
    """The objects of a file that is one JSON array; None where it may hold one value a line."""
    one_a_line = path.suffix == ".jsonl"
    try:
        values = parse_json(text, str(path))
    except InvalidInput:
        if one_a_line:
            return None
        raise
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            if one_a_line:
                return None
            raise InvalidInput(f"{path} row {number} is not a JSON object: {short(value)}")
    return values


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_parquet(path: Path) -> list[Row]:
    file = open_parquet(path)
    try:
        return file.read().to_pylist()
    except Exception as error:  # what pyarrow raises of broken pages has many types
        raise InvalidInput(f"{path} is not a whole parquet file ({error})") from error


def read_dataset(name: str) -> list[Row]:
    """Rows of `NAME[:[CONFIG:]SPLIT]` through the datasets library."""
    datasets = load_package("datasets", repr(name), "data")
    where, *rest = name.split(":")
    if not where or len(rest) > 2 or "" in rest:
        raise InvalidInput(
            f"cannot read {name!r}; write hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT"
        )
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    folder = Path(where)
    try:
        if not any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(where, config, split=split).to_list()
        saved = datasets.load_from_disk(where)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise InvalidInput(f"{where} has no split {split!r}; it has {', '.join(saved)}")
            saved = saved[split]
        return saved.to_list()
    except UserError:
        raise
    except Exception as error:  # the library's errors have no common type
        lines = str(error).strip().splitlines() or [""]
        raise OperationFailed(
            f"the data set {where!r}, split {split!r}, cannot be read ({type(error).__name__}: "
            f"{lines[0]}); check its name, configuration and split, and the network"
        ) from error
