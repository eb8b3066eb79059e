"""Reading of dataset rows from files, folders, the Hugging Face hub and objects, as dictionaries.

Messages count rows from 0 and lines of a file from 1.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed, UserError
from diagnostics.io.files import parse_json, read_text, short_repr
from diagnostics.io.packages import load_package
from diagnostics.io.parquet import open_parquet

Row = dict[str, Any]
OBJECT_PREFIX = "dataset:"
"""Begins the name of rows that were passed as an object; a hash of their contents follows."""


def rows_of_object(data: Iterable[Mapping[str, Any]]) -> tuple[str, list[Row]]:
    """Return the name and the rows of a data set that is an object.

    Args:
        data: A `datasets.Dataset`, or another collection of mappings.

    Returns:
        A name that depends on the contents only, and the rows.

    Raises:
        InvalidInput: The object has no length, or its elements are not mappings.
    """
    if not isinstance(data, Sized) or not isinstance(data, Iterable):
        raise InvalidInput(
            f"the data set is a {type(data).__name__}, which has no length; give a "
            "datasets.Dataset or a list of rows, such as list(dataset.take(1000))"
        )
    rows = list[Row]()
    for number, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise InvalidInput(
                f"row {number} of the data set, a {type(data).__name__}, is {short_repr(row)}, not "
                "a mapping of column names to values; give one split (dataset['train']), or rows "
                "(frame.to_dict('records'))"
            )
        rows.append(dict(row))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return f"{OBJECT_PREFIX}{digest.hexdigest()[:12]}", rows


def read_rows(source: str) -> list[Row]:
    """Read all rows of a source.

    Args:
        source: A .jsonl, .json or .parquet file; a folder saved by `datasets` or holding data
            files; or `hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME:CONFIG:SPLIT`, where NAME is such a
            folder or a dataset on the hub and the split defaults to "train".

    Returns:
        The rows.

    Raises:
        MissingFile: The file does not exist.
        InvalidInput: A line or an element is not a JSON object, or the file has another format.
        OperationFailed: The file or the dataset cannot be read.
    """
    path = Path(source)
    if source.startswith(OBJECT_PREFIX):
        raise InvalidInput(
            f"task {source} is a data set that was passed to opd.train as an object, which a run "
            "folder does not hold; pass it to opd.train again, or save it to a file, and name that "
            "as the task"
        )
    if source.startswith("hf:") or path.is_dir():
        return read_dataset(source.removeprefix("hf:"))
    if not path.exists():
        raise MissingFile(
            f'task {source!r} is neither "lab" nor an existing file or folder; '
            "for a dataset on the hub use hf:NAME"
        )
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix not in (".jsonl", ".json"):
        raise InvalidInput(
            f"{path} is not a .jsonl, .json or .parquet file; decompress it if it is compressed, "
            "and convert other formats to one JSON object per line"
        )
    return read_json_rows(path)


def read_json_rows(path: Path) -> list[Row]:
    """Read the objects of a JSON file, one per line or in one array; skip a byte-order mark."""
    text = read_text(path).removeprefix("\ufeff")
    if text.lstrip()[:1] == "[":
        rows = read_json_array(path, text)
        if rows is not None:
            return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{path} line {number}")
        except InvalidInput as error:
            if number == 1 and is_json_object(text) and not is_json_object(line):
                raise InvalidInput(
                    f"{path} is one JSON object; expected an array of objects, or one object per "
                    f"line"
                ) from error
            raise
        if not isinstance(row, dict):
            raise InvalidInput(f"{path} line {number} is not a JSON object: {line[:80]!r}")
        rows.append(row)
    return rows


def read_json_array(path: Path, text: str) -> list[Row] | None:
    """Read the objects of a JSON array.

    Args:
        path: The file, for messages; .jsonl files may hold one value per line instead.
        text: Its text.

    Returns:
        The objects, or None if a .jsonl file is not one array of objects.

    Raises:
        InvalidInput: The text is not JSON, or an element is not an object.
    """
    is_json_lines = path.suffix == ".jsonl"
    try:
        values = parse_json(text, str(path))
    except InvalidInput:
        if is_json_lines:
            return None
        raise
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            if is_json_lines:
                return None
            raise InvalidInput(f"{path} row {number} is not a JSON object: {short_repr(value)}")
    return values


def is_json_object(text: str) -> bool:
    """Return whether a text is one JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_parquet(path: Path) -> list[Row]:
    """Read the rows of a parquet file."""
    file = open_parquet(path)
    try:
        return file.read().to_pylist()
    except Exception as error:  # pyarrow raises many types for corrupt pages
        raise InvalidInput(f"{path} is not a complete parquet file ({error})") from error


def read_dataset(source: str) -> list[Row]:
    """Read the rows of `NAME[:[CONFIG:]SPLIT]` with the `datasets` library."""
    datasets = load_package("datasets", repr(source), "data")
    path, *parts = source.split(":")
    if not path or len(parts) > 2 or "" in parts:
        raise InvalidInput(
            f"cannot read {source!r}; write hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT"
        )
    split = parts[-1] if parts else "train"
    config = parts[0] if len(parts) == 2 else None
    folder = Path(path)
    try:
        if not any(
            (folder / file_name).exists() for file_name in ("state.json", "dataset_dict.json")
        ):
            return datasets.load_dataset(path, config, split=split).to_list()
        dataset = datasets.load_from_disk(path)
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise InvalidInput(f"{path} has no split {split!r}; it has {', '.join(dataset)}")
            dataset = dataset[split]
        return dataset.to_list()
    except UserError:
        raise
    except Exception as error:  # errors of the library have no common base class
        lines = str(error).strip().splitlines() or [""]
        raise OperationFailed(
            f"the dataset {path!r}, split {split!r}, cannot be read ({type(error).__name__}: "
            f"{lines[0]}); check its name, configuration and split, and the network"
        ) from error
