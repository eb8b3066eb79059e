"""Jinja templates of the user's message that the teacher reads, and the names that they may use."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import read_text

PROBLEM_NAMES = ("prompt", "messages", "answer", "solution")
"""Names of what is known of a problem before there is a response."""
RESPONSE_NAMES = ("response", "reward", "feedback")
"""Names of what the grader says about the response that the teacher is about to score."""
PEER_NAMES = ("peers",)
"""Name of the other responses to the same prompt, with their grades."""
GAME_NAMES = ("goal", "observation", "turns")
"""Names of the state of a game before a turn."""
RESERVED_NAMES = frozenset((*PROBLEM_NAMES, *RESPONSE_NAMES, *PEER_NAMES, *GAME_NAMES))
"""Names that are no columns of the data."""


@dataclass(frozen=True, eq=False)
class ViewTemplate:
    """A compiled template of the teacher's message."""

    path: str
    """File that it was read from, for messages."""
    names: frozenset[str]
    """Names of the values that it uses."""
    compiled: Template
    """The template."""
    function_names: frozenset[str] = frozenset()
    """Names of Jinja's own functions, such as range, that it shows and does not call: columns of
    the data that have the same names."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that it uses, besides those that every problem has."""
        return tuple(sorted(self.names - RESERVED_NAMES))

    @property
    def reads_response(self) -> bool:
        """Whether it uses the response that the teacher is about to score, or its grade."""
        return not self.names.isdisjoint(RESPONSE_NAMES)

    @property
    def reads_peers(self) -> bool:
        """Whether it uses other responses to the same prompt."""
        return not self.names.isdisjoint(PEER_NAMES)


def load_view_template(path: str) -> ViewTemplate:
    """Read and compile a template.

    It runs in a sandbox without access to files or to the attributes of Python's own objects.

    Args:
        path: Jinja file.

    Returns:
        The template.

    Raises:
        InvalidInput: The file is empty or is not a template; the message has the line.
        MissingFile: It does not exist.
    """
    if not Path(path).is_file():
        raise MissingFile(f"teacher_view {path} does not exist; give the path of a Jinja file")
    return compile_view_template(read_text(path), path)


def compile_view_template(text: str, path: str) -> ViewTemplate:
    """Compile the text of a template; see `load_view_template`.

    Args:
        text: The template.
        path: Its file, for messages.

    Returns:
        The template.

    Raises:
        InvalidInput: The text is empty or is not a template.
    """
    if not text.strip():
        raise InvalidInput(f"teacher_view {path} is empty; give the text of a template")
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    try:
        tree = environment.parse(text)
        names = meta.find_undeclared_variables(tree)
        compiled = environment.from_string(text)
    except TemplateSyntaxError as error:
        raise InvalidInput(
            f"teacher_view {path}, line {error.lineno}: {error.message}; correct the template"
        ) from error
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    shown = {name.name for name in tree.find_all(nodes.Name) if id(name) not in called}
    function_names = frozenset(shown & environment.globals.keys())
    return ViewTemplate(path, frozenset(names), compiled, function_names)


def render_view(template: ViewTemplate, values: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
        template: The template.
        values: Values by name.

    Returns:
        The text.

    Raises:
        InvalidInput: A name is unknown, the template fails, or it renders to nothing.
    """
    try:
        text = template.compiled.render(values)
    except UndefinedError as error:
        raise InvalidInput(
            f"teacher_view {template.path} fails: {error.message}; here it may use "
            f"{', '.join(sorted(values))}. A row without a value, such as null, has no such name: "
            "fill it in, or ask with `is defined`"
        ) from error
    except Exception as error:  # a template is a program and can raise anything
        raise InvalidInput(
            f"teacher_view {template.path} fails with {type(error).__name__}: {error}; here it may "
            f"use {', '.join(sorted(values))}"
        ) from error
    if not text.strip():
        raise InvalidInput(
            f"teacher_view {template.path} renders to nothing; the teacher needs a message"
        )
    return text
