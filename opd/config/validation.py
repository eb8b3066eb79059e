"""Validation of settings dataclasses against their annotations and ranges, all fields at once.

Does not import torch. Settings come from a command line, a TOML or JSON file, or Python code; only
the command line parser checks types itself.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from diagnostics.io.files import TYPE_NAMES, has_type, short_repr

RANGE_CHECKS = {
    "at least 1": lambda x: x >= 1,
    "not negative": lambda x: x >= 0,
    "positive": lambda x: x > 0,
    "above 1": lambda x: x > 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}
"""Description of a range, as in messages, to its test."""


def field_problems(settings: Any, ranges: Mapping[str, str]) -> Iterator[str]:
    """Check every field of a settings dataclass.

    Args:
        settings: A dataclass instance annotated with plain types, Literal, tuples and | None.
        ranges: Field name to a key of RANGE_CHECKS; for a tuple the range of all its numbers, and
            "NAME.i" that of one. None is in every range.

    Yields:
        A message for every field whose value has the wrong type or is out of range.
    """
    settings_type: Any = type(settings)
    hints = annotations(settings_type)
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        expected = expected_type(value, hints[name])
        if expected is not None:
            yield f"{name} is {short_repr(value)}; it must be {expected}"
            continue
        parts = value if isinstance(value, tuple) else (value,)
        for i, part in enumerate(parts):
            words = ranges.get(f"{name}.{i}", ranges.get(name))
            if words is not None and part is not None and not RANGE_CHECKS[words](part):
                label = f"{name}[{i}]" if isinstance(value, tuple) else name
                yield f"{label} is {short_repr(part)}; it must be {words}"


@cache
def annotations(kind: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass by field name, without `Annotated`."""
    hints = get_type_hints(kind)
    return {name: get_args(x)[0] if get_origin(x) is Annotated else x for name, x in hints.items()}


def expected_type(value: Any, kind: Any) -> str | None:
    """Describe the annotated type if a value does not have it.

    Args:
        value: The value.
        kind: The annotation.

    Returns:
        The expected type in words; None if the value has it.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, UnionType):
        descriptions = [expected_type(value, argument) for argument in arguments]
        alternatives = [
            words
            for words, argument in zip(descriptions, arguments, strict=True)
            if argument is not NoneType
        ]
        return None if None in descriptions else " or ".join(map(str, [*alternatives, "left out"]))
    if kind is NoneType:
        return None if value is None else "left out"
    if origin is tuple:
        return _expected_tuple(value, arguments)
    if kind not in TYPE_NAMES:
        return None if isinstance(value, kind) else f"a {kind.__name__}"
    if not has_type(value, kind):
        return TYPE_NAMES[kind]
    if kind is float and not math.isfinite(value):
        return "a finite number"
    return None


def _expected_tuple(value: Any, arguments: tuple[Any, ...]) -> str | None:
    variable_length = arguments[-1] is Ellipsis
    kinds = (
        [arguments[0]] * len(value) if variable_length and isinstance(value, tuple) else arguments
    )
    if isinstance(value, tuple) and len(value) == len(kinds):
        descriptions = (expected_type(x, kind) for x, kind in zip(value, kinds, strict=True))
        if all(words is None for words in descriptions):
            return None
    size = "values" if variable_length else len(arguments)
    return f"a list of {size}, each {expected_type(_NoValue(), arguments[0])}"


class _NoValue:
    """A value that has none of the types of settings."""
