"""The dump formats, the recogniser, and the conversion of a file's rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import DumpFormat, ReadContext, Row
from diagnostics.formats.nemo_rl import NEMO_RL
from diagnostics.formats.openai import OPENAI
from diagnostics.formats.sglang import SGLANG
from diagnostics.formats.slime import SLIME
from diagnostics.formats.trl import TRL
from diagnostics.formats.verl import VERL, VERL_TEXT
from diagnostics.formats.vllm import VLLM
from diagnostics.io.files import short_repr

FORMATS = (VLLM, SGLANG, VERL, VERL_TEXT, SLIME, NEMO_RL, TRL, OPENAI)
"""All formats of other tools; a row has the first one whose fields it holds."""

RECORDS = "records"
"""Name of our own columns, which any row without another format is read as."""

BY_NAME = {f.name: f for f in FORMATS}


def find_format(name: str) -> DumpFormat | None:
    """Return the format of a name; None for records.

    Args:
        name: A name of `BY_NAME`, or `RECORDS`.

    Returns:
        The format.

    Raises:
        InvalidInput: There is no such format.
    """
    if name != RECORDS and name not in BY_NAME:
        raise InvalidInput(f"format {short_repr(name)} is none of {', '.join((RECORDS, *BY_NAME))}")
    return BY_NAME.get(name)


def recognise(row: Mapping[str, Any]) -> DumpFormat | None:
    """Return the format whose fields a row holds; None for records."""
    return next((f for f in FORMATS if f.matches(row)), None)


def rename_fields(row: Mapping[str, Any], rename: Mapping[str, str], location: str) -> Row:
    """Rename fields of a row.

    Args:
        row: A row of the file.
        rename: Name in the file -> name to read it as; a dot in the first enters an object.
        location: Beginning of every message.

    Returns:
        The row; a field of an object is moved out of it.

    Raises:
        InvalidInput: The row has both names, or an object instead of the field.
    """
    renamed = dict(row)
    for name, column in rename.items():
        value: Any = renamed.pop(name, None)
        if value is None and "." in name:
            value = row
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                renamed = without_field(renamed, name.split("."))
        if value is None:
            continue
        if column in row and row[column] is not None and not name.startswith(f"{column}."):
            raise InvalidInput(
                f"{location}: the row has both {name!r} and {column!r}, and --rename makes them "
                "one; remove one"
            )
        renamed[column] = value
    return renamed


def without_field(row: Mapping[str, Any], path: Sequence[str]) -> Row:
    """Return a copy of a row without one field, which may be within objects.

    Args:
        row: The row.
        path: Names of the objects from the outermost on, and of the field.

    Returns:
        The copy; objects that do not change are shared.
    """
    if len(path) == 1:
        return {name: value for name, value in row.items() if name != path[0]}
    parent = row[path[0]]
    if not isinstance(parent, Mapping):  # a field that another name was given to
        return dict(row)
    return {**row, path[0]: without_field(parent, path[1:])}


def convert_row(
    raw: Any,
    dump_format: DumpFormat | None,
    rename: Mapping[str, str],
    location: str,
    context: ReadContext,
) -> Iterator[tuple[str, Any]]:
    """Convert a row of the file to rows with our columns.

    Args:
        raw: The row as read, after `rename_fields`.
        dump_format: Its format; None for records.
        rename: As in `rename_fields`.
        location: File and row, the beginning of every message.
        context: What the conversion may use.

    Yields:
        (location, row); fields that the format does not declare are passed on.
    """
    if dump_format is None:
        yield location, raw
        return
    others = {k: v for k, v in raw.items() if k not in dump_format.top_level_fields}
    converted = list(dump_format.convert(raw, location, context))
    for i, row in enumerate(converted):
        place = location if len(converted) == 1 else f"{location}, response {i + 1}"
        clashes = sorted(row.keys() & others.keys() - set(rename.values()))
        if clashes:
            raise InvalidInput(
                f"{place}: the field {clashes[0]!r} is no field of {dump_format.title}, and the "
                "column of this name is made of others; remove it, or name the format with --format"
            )
        yield place, row | others


def convert_rows(
    rows: Iterable[tuple[str, Any]],
    name: str | None,
    rename: Mapping[str, str],
    context: ReadContext,
) -> Iterator[tuple[str, Any]]:
    """Convert the rows of a file, which must all have one format.

    Args:
        rows: (location, row) as read.
        name: Name of the format; None to recognise it.
        rename: As in `rename_fields`.
        context: What the conversion may use.

    Yields:
        (location, row with our columns).

    Raises:
        InvalidInput: Rows of different formats, with both locations, or a row without the fields
            of the named format.
    """
    first: tuple[str, DumpFormat | None] | None = None
    for location, value in rows:
        if not isinstance(value, Mapping):
            yield location, value
            continue
        raw = rename_fields(value, rename, location)
        if name is not None:
            dump_format = find_format(name)
            if dump_format is not None and not dump_format.matches(raw):
                raise InvalidInput(
                    f"{location} is no {dump_format.title}: {_lacking(raw, dump_format)}"
                )
        else:
            dump_format = recognise(raw)
            first = first or (location, dump_format)
            if dump_format is not first[1]:
                raise InvalidInput(
                    f"{location} is {_title(dump_format)}, but {first[0]} is {_title(first[1])}; "
                    "split the file by format"
                )
        yield from convert_row(raw, dump_format, rename, location, context)


def _title(dump_format: DumpFormat | None) -> str:
    return f"a {dump_format.title}" if dump_format is not None else "of no other tool's format"


def _lacking(row: Mapping[str, Any], dump_format: DumpFormat) -> str:
    """Return which fields the row lacks, by the signature that it comes closest to."""
    signature = min(dump_format.signatures, key=lambda x: len(x - row.keys()))
    return f"it has no {', '.join(sorted(signature - row.keys()))}"
