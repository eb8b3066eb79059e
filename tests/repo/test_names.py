"""Names say what a value is: bare pronouns, prepositions and participles are below 1 %."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

FOLDERS = ("opd", "diagnostics", "synthetic", "figures", "benchmarks", "tests")
LIMIT = 0.01
"""Largest share of empty names in a folder; a few words of the list are right in places."""

EMPTY_NAMES = frozenset(
    [
        "at",
        "of",
        "by",
        "to",
        "on",
        "off",
        "up",
        "down",
        "here",
        "there",
        "below",
        "above",
        "away",
        "beside",
        "behind",
        "beyond",
        "before",
        "after",
        "again",
        "anew",
        "apart",
        "ahead",
        "mine",
        "own",
        "ours",
        "theirs",
        "his",
        "hers",
        "its",
        "one",
        "ones",
        "other",
        "others",
        "some",
        "any",
        "whole",
        "what",
        "which",
        "who",
        "whom",
        "how",
        "where",
        "when",
        "why",
        "both",
        "each",
        "every",
        "none",
        "nothing",
        "something",
        "somebody",
        "anything",
        "everything",
        "rest",
        "more",
        "less",
        "most",
        "few",
        "many",
        "much",
        "such",
        "same",
        "else",
        "found",
        "made",
        "kept",
        "told",
        "asked",
        "given",
        "known",
        "drawn",
        "chosen",
        "shown",
        "seen",
        "said",
        "held",
        "taken",
        "left",
        "gone",
        "done",
        "put",
        "got",
        "met",
        "felt",
        "lost",
        "wanted",
        "needed",
        "missing",
        "lacking",
        "joined",
        "split",
        "shared",
        "written",
        "read",
        "recorded",
        "measured",
        "counted",
        "spared",
        "awake",
        "asleep",
        "ready",
        "waiting",
        "due",
        "played",
        "spoken",
        "heard",
        "named",
        "called",
        "labelled",
        "marked",
        "sorted",
        "ordered",
        "moved",
        "changed",
        "added",
        "removed",
        "cut",
    ]
)
"""Words that say nothing of a value when they are the whole name."""

KEYWORDS_ESCAPED = {"in_", "all_", "this_", "that_", "set_", "split_", "read_", "sorted_"}
"""Further empty names: words that Python's keywords and built-ins force to end in an underscore."""


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of every variable, parameter and function that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno


def is_empty(name: str) -> bool:
    return name in KEYWORDS_ESCAPED or name.strip("_").lower() in EMPTY_NAMES


def empty_names(folder: Path) -> tuple[list[str], int]:
    """Return the empty names of a folder as "file:line name", and the number of all names."""
    places, num_names = [], 0
    for path in sorted(folder.rglob("*.py")):
        for name, line in bound_names(ast.parse(path.read_text())):
            num_names += 1
            if is_empty(name):
                places.append(f"{path.relative_to(ROOT)}:{line} {name}")
    return places, num_names


@pytest.mark.parametrize("folder", FOLDERS)
def test_few_names_are_empty(folder: str) -> None:
    places, num_names = empty_names(ROOT / folder)
    assert num_names > 1000
    words = Counter(place.rpartition(" ")[2] for place in places).most_common(5)
    assert len(places) <= LIMIT * num_names, (
        f"{len(places)} of {num_names} names in {folder} say nothing of their value, most often "
        f"{words}; name what the value is (docs/glossary.md): {places[:20]}"
    )


def test_an_empty_name_is_found_wherever_it_is_bound() -> None:
    code = (
        "def found(given, x=1):\n"
        "    def _told(*, own): return own\n"
        "    return [at for at in given if (whole := at)]\n"
    )
    names = [name for name, _ in bound_names(ast.parse(code)) if is_empty(name)]
    assert sorted(names) == ["_told", "at", "found", "given", "own", "whole"]
