"""Escaping of control characters in terminal output.

`escape_control_chars` shows what a terminal would interpret or hide. `protect_terminal` applies it
to everything that a command writes; `diagnostics.errors` applies it to every message for the user.
Names, templates, records and server answers may contain escape sequences.
"""

import os
import re
import sys
from typing import Any, TextIO

_CURSOR_UP = re.compile("(?:\x1b\\[A)+")


def escape_control_chars(text: str) -> str:
    r"""Replace control, bidirectional, invisible characters and lone surrogates by their escapes.

    Line ends and tabs stay. Examples of escapes: \u001b, \u202e, \u200b, \ud800, \U000e0001.

    Args:
        text: Any text.

    Returns:
        Text that is safe to print.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


class _EscapingStream:
    """A text stream that escapes control characters.

    Progress bars keep working: a carriage return at the start of a bar's text and a write that only
    moves the cursor up pass through.

    Args:
        stream: The wrapped stream.
        colours: Whether `isatty` may be True; with False, libraries write no colours.
    """

    def __init__(self, stream: TextIO, colours: bool) -> None:
        self._stream, self._colours = stream, colours

    def write(self, text: str) -> int:
        if _CURSOR_UP.fullmatch(text):
            return self._stream.write(text)
        start = "\r" if text.startswith("\r") else ""
        return self._stream.write(start + escape_control_chars(text[len(start) :]))

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return self._colours and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_terminal() -> None:
    """Make stdout and stderr escape control characters, in tracebacks and warnings too.

    For the entry point of a command: the streams are not restored.
    """
    os.environ.setdefault("PYTHON_COLORS", "0")  # tracebacks of Python 3.13 and later
    if not isinstance(sys.stdout, _EscapingStream):
        sys.stdout = _EscapingStream(sys.stdout, colours=False)
    if not isinstance(sys.stderr, _EscapingStream):
        sys.stderr = _EscapingStream(sys.stderr, colours=True)
