"""Checked reading of user files; every failure is a one-line error with the file and the remedy."""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed

MAX_VALUE_LENGTH = 60
"""Characters of a value in a message."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

TYPE_NAMES: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
}
"""Name of each field type in a message."""


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring = 3, 12, 6, MAX_VALUE_LENGTH


@contextmanager
def translate_read_errors(path: str | Path) -> Iterator[None]:
    """Translate operating-system errors on a file to one-line user errors.

    Args:
        path: The file that the block reads.

    Yields:
        Nothing.

    Raises:
        MissingFile: There is no such file.
        OperationFailed: A folder, no permission, or a failing disk, with the system's own message.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFile(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise OperationFailed(f"{path} is a folder; give a file in it") from error
    except PermissionError as error:
        raise OperationFailed(
            f"{path}: no permission to read it; change its permissions"
        ) from error
    except OSError as error:
        raise OperationFailed(f"{path} cannot be read: {error.strerror or error}") from error


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file.

    Args:
        path: The file.

    Returns:
        Its text.

    Raises:
        MissingFile: See `translate_read_errors`.
        OperationFailed: See `translate_read_errors`.
        InvalidInput: Bytes that are not UTF-8; names the first.
    """
    with translate_read_errors(path):
        data = Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}; "
            "save it as UTF-8, or give another file"
        ) from error


def parse_json(text: str, source: str) -> Any:
    """Parse JSON text.

    Args:
        text: The JSON text.
        source: File and row, the beginning of every message.

    Returns:
        Plain data.

    Raises:
        InvalidInput: Not JSON, a duplicate key in an object, an unpaired surrogate (which no file
            can hold as UTF-8), or nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_reject_duplicate_keys)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start]
        raise InvalidInput(
            f"{source} holds {surrogate!r}, an unpaired UTF-16 surrogate; write complete characters"
        ) from error
    except _DuplicateKey as error:
        raise InvalidInput(f"{source} has the duplicate field {error}; keep one of them") from error
    except RecursionError as error:
        raise InvalidInput(f"{source} is nested too deeply to be parsed") from error
    except ValueError as error:  # from the decoder, or for an integer with thousands of digits
        raise InvalidInput(f"{source} is not JSON ({error}): {short_repr(text)}") from error


def read_json(path: str | Path) -> Any:
    """Read the plain data of a JSON file; raises as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))


def read_object(path: str | Path, required: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read the object in a JSON file, such as a run's config.json.

    Args:
        path: The file.
        required: Fields that it must have, and their types; an integer is accepted as float.

    Returns:
        The object.

    Raises:
        InvalidInput: Not an object, or a required field is missing or has another type. Other
            errors as in `read_json`.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise InvalidInput(f"{path} holds {short_repr(data)}, expected a JSON object")
    check_fields(data, required or {}, str(path))
    return data


def check_fields(data: Mapping[str, Any], required: Mapping[str, type], source: str) -> None:
    """Raise unless an object has all required fields with the right types.

    Args:
        data: The object.
        required: Field names and their types.
        source: Beginning of the message.

    Raises:
        InvalidInput: Names `source`, the field, its value and what is expected.
    """
    for name, kind in required.items():
        if name not in data:
            raise InvalidInput(f"{source}: the field {name!r} ({TYPE_NAMES[kind]}) is missing")
        if not has_type(data[name], kind):
            raise InvalidInput(
                f"{source}, field {name}: {short_repr(data[name])} is not {TYPE_NAMES[kind]}"
            )


def has_type(value: Any, kind: type) -> bool:
    """Return whether plain data has a type.

    A bool is not a number. An integer is accepted as float unless it exceeds the largest float.

    Args:
        value: Plain data.
        kind: Str, bool, int, float, list or dict.

    Returns:
        Whether the value has the type.
    """
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float and isinstance(value, int) and value.bit_length() > 1023:
        return False
    return isinstance(value, int | float if kind is float else kind)


def short_repr(value: Any) -> str:
    """Return a value as text for a message; the full text of a large value is never built."""
    text = _REPR.repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 3] + "..."


class _DuplicateKey(Exception):
    """The key that occurs twice in an object."""

    def __str__(self) -> str:
        return repr(self.args[0])


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for name in names if names.count(name) > 1))
    return data
