"""Check the fields of a settings dataclass against their annotations and ranges, all at once.

Free of torch. A setting comes from a command line, a TOML or JSON file, or Python code; only the
first of these knows the types.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from diagnostics.io.files import KINDS, has_type, short

WITHIN = {
    "at least 1": lambda x: x >= 1,
    "not negative": lambda x: x >= 0,
    "positive": lambda x: x > 0,
    "above 1": lambda x: x > 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}
"""Ranges by the words of a message."""


def wrong_fields(settings: Any, ranges: Mapping[str, str]) -> Iterator[str]:
    """A message for every field with a value of the wrong type or outside its range.

    Args:
      settings: a dataclass instance with annotations of plain types, Literal, tuples and | None.
      ranges: field name to a key of WITHIN; of a tuple, of all its numbers, and "NAME.i" of one.
        A value of None is in every range.
    """
    kind: Any = type(settings)
    hints = annotations(kind)
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        expected = mismatch(value, hints[name])
        if expected is not None:
            yield f"{name} is {short(value)}; it must be {expected}"
            continue
        parts = value if isinstance(value, tuple) else (value,)
        for i, part in enumerate(parts):
            words = ranges.get(f"{name}.{i}", ranges.get(name))
            if words is not None and part is not None and not WITHIN[words](part):
                label = f"{name}[{i}]" if isinstance(value, tuple) else name
                yield f"{label} is {short(part)}; it must be {words}"


@cache
def annotations(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass, `Annotated` stripped."""
    hints = get_type_hints(kind)
    return {name: get_args(x)[0] if get_origin(x) is Annotated else x for name, x in hints.items()}


def mismatch(value: Any, kind: Any) -> str | None:
    """What a value of type `kind` would be, in words; None if the value is one."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, UnionType):
        wrong = [mismatch(value, one) for one in arguments]
        named = [words for words, one in zip(wrong, arguments, strict=True) if one is not NoneType]
        return None if None in wrong else " or ".join(map(str, [*named, "left out"]))
    if kind is NoneType:
        return None if value is None else "left out"
    if origin is tuple:
        return _mismatch_of_tuple(value, arguments)
    if kind not in KINDS:
        return None if isinstance(value, kind) else f"a {kind.__name__}"
    if not has_type(value, kind):
        return KINDS[kind]
    if kind is float and not math.isfinite(value):
        return "a finite number"
    return None


def _mismatch_of_tuple(value: Any, arguments: tuple[Any, ...]) -> str | None:
    several = arguments[-1] is Ellipsis
    kinds = [arguments[0]] * len(value) if several and isinstance(value, tuple) else arguments
    if isinstance(value, tuple) and len(value) == len(kinds):
        wrong = (mismatch(x, kind) for x, kind in zip(value, kinds, strict=True))
        if all(words is None for words in wrong):
            return None
    size = "values" if several else len(arguments)
    return f"a list of {size}, each {mismatch(_Nothing(), arguments[0])}"


class _Nothing:
    """A value of no type that a setting has."""
