"""Copies of batches with missing or other fields."""

from collections.abc import Iterable
from typing import TypeVar

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.errors import InvalidInput
from diagnostics.missing import Missing, optional_names

Part = TypeVar("Part", ScoredRollouts, Support)


def without_fields(part: Part, names: Iterable[str], subject: str = "the records have") -> Part:
    """Return the part without some fields; reading one then raises `MissingField`.

    Properties that are derived from them raise too.

    Args:
        part: A batch or its support.
        names: The fields.
        subject: Beginning of the error message, such as "the records have".

    Returns:
        The part without the fields.

    Raises:
        InvalidInput: A name is not a field that may be missing.
    """
    names = set(names)
    if unknown := sorted(names - optional_names(type(part))):
        raise InvalidInput(f"{type(part).__name__} has no fields {unknown} that may be missing")
    return part.with_fields(**dict.fromkeys(names, Missing(subject)))
