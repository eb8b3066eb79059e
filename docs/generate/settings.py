"""The page of the settings of `opd train`, from the dataclasses and their attribute docstrings."""

import dataclasses
import inspect
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docs.generate.attributes import attribute_docs, default_text, table
from opd.config import settings
from opd.config.fields import rules_of
from opd.config.recipes import RECIPES

HEADER = """# Settings of `opd train`

*Generated from `opd/config` by `python -m docs.generate`.*

Every setting is a field of a group of `Config`, a flag of the command and a key in a file:
`max_response` is `config.rollout.max_response`, `--max-response` and `max_response` below
`[rollout]`. `opd train RECIPE --help` prints the same list with the defaults of the recipe,
`opd train RECIPE --show` the values of all settings as a file. A recipe sets `student`, `teacher`,
`out` and whatever differs from the defaults below.

Below the name of a setting are its type or values, its default, and its range if it has one.
*Resumable* settings may be different when a run is resumed. A setting *by task* may differ between
the tasks of a run.
"""


def _value_type(hint: Any) -> str:
    """Return a type as text: the values of a Literal, or the type without module names."""
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return "`" + re.sub(r"\b(?:\w+\.)+", "", text) + "`"


def _rules_text(field: "dataclasses.Field[Any]") -> str:
    """Return the range of a setting, and where it may change or differ; empty without rules."""
    rules = rules_of(field)
    ranges = (rules.within,) if isinstance(rules.within, str) else rules.within
    words = [*ranges] if any(ranges) else []
    words += ["*resumable*"] * rules.resumable + ["*by task*"] * rules.per_task
    return "<br>" + ", ".join(words) if words else ""


def section(title: str, cls: type) -> list[str]:
    """Return the table of a dataclass's fields: what may be set below the name, description."""
    hints = get_type_hints(cls)
    docs = attribute_docs(cls)
    rows = [
        (
            f"`{field.name}`<br>{_value_type(hints[field.name])}, {default_text(field)}"
            f"{_rules_text(field)}",
            docs.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(hints[field.name])
    ]
    header = ("setting", "description")
    return [f"## {title}", "", inspect.getdoc(cls) or "", "", *table(header, rows), ""]


def page() -> str:
    """Return the page in Markdown."""
    lines = [HEADER, "## Recipes", ""]
    recipes = [
        (f"`{name}`", (inspect.getdoc(recipe) or "").partition("\n")[0])
        for name, recipe in RECIPES.items()
    ]
    lines += [*table(("recipe", "what it trains"), recipes), ""]
    lines += section("Config", settings.Config)
    groups = get_type_hints(settings.Config)
    for field in dataclasses.fields(settings.Config):
        if isinstance(cls := groups[field.name], type) and dataclasses.is_dataclass(cls):
            lines += section(field.name, cls)
    lines += section("Settings of one of several tasks", settings.TaskSettings)
    return "\n".join(lines).rstrip() + "\n"
