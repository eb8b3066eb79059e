"""Change one line of a module while a test runs."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType

import pytest


@dataclass(frozen=True)
class Mutations:
    """One-line mutations of a module."""

    module: ModuleType
    lines: dict[str, tuple[str, str]]
    """Name -> the line and the one that replaces it."""
    oracles: tuple[Callable[[], object], ...]
    """Tests, one of which must catch each mutation; cheap ones first."""


def functions(module: ModuleType) -> dict[str, FunctionType]:
    """Every function that a module defines, methods and properties included."""
    by_name = {}
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        parts = vars(value).items() if isinstance(value, type) else [("", value)]
        for part, inner in parts:
            if isinstance(inner, property):
                inner = inner.fget
            elif isinstance(inner, cached_property):
                inner = inner.func
            function = inspect.unwrap(inner)
            if isinstance(function, FunctionType):
                by_name[f"{name}.{part}"] = function
    return by_name


def mutate(module: ModuleType, line: tuple[str, str], patch: pytest.MonkeyPatch) -> None:
    """Give one function the code of a module with one line changed, wherever it is referred to."""
    source, (original_line, mutated_line) = Path(str(module.__file__)).read_text(), line
    assert original_line in source, "the mutated line no longer exists; update the mutation"
    mutant = ModuleType(module.__name__)
    exec(compile(source.replace(original_line, mutated_line, 1), "mutant", "exec"), vars(mutant))
    num_patched = 0
    mutants = functions(mutant)
    for name, function in functions(module).items():
        if name in mutants and function.__code__.co_filename != "mutant":
            num_patched += 1
            patch.setattr(function, "__code__", mutants[name].__code__)
    assert num_patched
