"""Attribute docstrings of dataclasses, which Python does not keep at run time."""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the attribute docstrings of a class and its bases, each as one line.

    Args:
        cls: The class.

    Returns:
        Name of a field -> its docstring; fields without one are left out.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
            assert isinstance(body, ast.ClassDef)
            docs |= _docs_in_body(body)
    return docs


def _docs_in_body(body: ast.ClassDef) -> dict[str, str]:
    """Return the string that follows each annotated name of a class body."""
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if is_field and is_text and isinstance(following.value.value, str):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    """Return a cell in which bars do not end it and `<` begins a line break only."""
    parts = text.replace("|", r"\|").split("`")
    parts[::2] = [re.sub("<(?!br>)", "&lt;", part) for part in parts[::2]]
    return "`".join(parts)


def default_text(field: "dataclasses.Field[Any]") -> str:
    """Return a field's default as code, or "required"."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "required"
