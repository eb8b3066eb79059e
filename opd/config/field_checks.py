"""Checks of single values against the annotations and ranges of their fields.

Does not import torch. Settings come from a command line, a TOML or JSON file, or Python code; only
the command line parser checks types itself.
"""

import math
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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


def value_problem(name: str, value: Any, kind: Any, within: str | tuple[str, ...]) -> str:
    """Check a value of a setting.

    Args:
        name: Name of the setting, for the message.
        value: The value.
        kind: Its annotation: a plain type, Literal, a tuple of these, or one of them or None.
        within: Its range, see `opd.config.fields.SettingRules`. None is in every range.

    Returns:
        A message if the value has the wrong type or is out of range, otherwise "".
    """
    expected = expected_type(value, kind)
    if expected is not None:
        return f"{name} is {short_repr(value)}; it must be {expected}"
    parts = value if isinstance(value, tuple) else (value,)
    for i, part in enumerate(parts):
        if isinstance(part, str) and not _is_complete_text(part):
            label = f"{name}[{i}]" if isinstance(value, tuple) else name
            return f"{label} is {short_repr(part)}; it must be text without NUL or half characters"
        words = within if isinstance(within, str) else within[i]
        if words and part is not None and not RANGE_CHECKS[words](part):
            label = f"{name}[{i}]" if isinstance(value, tuple) else name
            return f"{label} is {short_repr(part)}; it must be {words}"
    return ""


@cache
def annotations(kind: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass by field name."""
    return get_type_hints(kind)


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


def _is_complete_text(text: str) -> bool:
    """Return whether text can be written to a file and be a file's name."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # an unpaired surrogate
        return False


class _NoValue:
    """A value that has none of the types of settings."""
