"""Read the files that a user names; every failure is one line with the file and the remedy."""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed

LONGEST_VALUE = 60
"""Characters of a value in a message."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
"""What a field of each type is called in a message."""


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring = 3, 12, 6, LONGEST_VALUE


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Say in one line why the operating system does not give a file.

    Raises:
      MissingFile: there is no such file.
      OperationFailed: a folder, no permission, a disk that fails; the system's own words.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFile(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise OperationFailed(f"{path} is a folder; give the file in it") from error
    except PermissionError as error:
        raise OperationFailed(f"{path}: no permission to read it; change its mode") from error
    except OSError as error:
        raise OperationFailed(f"{path} cannot be read: {error.strerror or error}") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
      MissingFile, OperationFailed: see `reading`.
      InvalidInput: bytes that are no UTF-8; names the first.
    """
    with reading(path):
        data = Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}; "
            "save it as UTF-8, or name another file"
        ) from error


def parse_json(text: str, source: str) -> Any:
    """JSON text as plain data; `source`, the file and the row, opens every message.

    Raises:
      InvalidInput: no JSON, a key twice in one object, half a surrogate pair (which no file can
        hold as UTF-8), or nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_doubled_keys)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InvalidInput(
            f"{source} holds {half!r}, half of a character of UTF-16; write whole characters"
        ) from error
    except _DoubledKey as error:
        raise InvalidInput(f"{source} has the field {error} twice; keep one of them") from error
    except RecursionError as error:
        raise InvalidInput(f"{source} is nested too deeply to be read") from error
    except ValueError as error:  # the decoder's, or that of a number of thousands of digits
        raise InvalidInput(f"{source} is not JSON ({error}): {short(text)}") from error


def read_json(path: str | Path) -> Any:
    """The plain data of a JSON file; raises as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))


def read_object(path: str | Path, required: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The object of a JSON file, such as a run's config.json.

    Args:
      required: fields that it must have, and their types; a whole number is a float too.

    Raises:
      InvalidInput: another value, a field that lacks or has another type. Else as `read_json`.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise InvalidInput(f"{path} holds {short(data)}, expected a JSON object")
    check_fields(data, required or {}, str(path))
    return data


def check_fields(data: Mapping[str, Any], required: Mapping[str, type], source: str) -> None:
    """Refuse an object in which a required field lacks or is of another type.

    Raises:
      InvalidInput: with `source`, the field, its value and what is expected.
    """
    for name, kind in required.items():
        if name not in data:
            raise InvalidInput(f"{source} lacks the field {name!r}, {KINDS[kind]}")
        if not has_type(data[name], kind):
            raise InvalidInput(f"{source}, field {name}: {short(data[name])} is not {KINDS[kind]}")


def has_type(value: Any, kind: type) -> bool:
    """Whether plain data is of a type: true is no number, and a whole number is a float, unless it
    is larger than any of them."""
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float and isinstance(value, int) and value.bit_length() > 1023:
        return False
    return isinstance(value, int | float if kind is float else kind)


def short(value: Any) -> str:
    """A value as a message shows it; the text of a large one is never made."""
    text = _REPR.repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


class _DoubledKey(Exception):
    """The key that an object has twice."""

    def __str__(self) -> str:
        return repr(self.args[0])


def _without_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DoubledKey(next(name for name in names if names.count(name) > 1))
    return data
