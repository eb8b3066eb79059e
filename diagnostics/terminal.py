"""Text that is safe to show: escape sequences from names, templates, records and servers are inert.

`visible` spells out what a terminal would obey or hide. `protect_terminal` applies it to everything
that a command writes; `diagnostics.errors` applies it to every message written for the user.
"""

import os
import re
import sys
from typing import Any, TextIO

_CURSOR_UP = re.compile("(?:\x1b\\[A)+")


def visible(text: str) -> str:
    """The text with every control, mark of direction, invisible character and lone surrogate as
    its escape: \\u001b, \\u202e, \\u200b, \\ud800, \\U000e0001.

    Line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


class _Protected:
    """A text stream that writes `visible` text.

    Progress bars stay: the carriage return that begins a bar's text, and a write that only moves
    the cursor up. With `colours` False the stream says that it is no terminal, so that libraries
    write no colours of their own.
    """

    def __init__(self, stream: TextIO, colours: bool) -> None:
        self._stream, self._colours = stream, colours

    def write(self, text: str) -> int:
        if _CURSOR_UP.fullmatch(text):
            return self._stream.write(text)
        start = "\r" if text.startswith("\r") else ""
        return self._stream.write(start + visible(text[len(start) :]))

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return self._colours and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_terminal() -> None:
    """Make stdout and stderr write `visible` text from here on, tracebacks and warnings included.

    For the entry point of a command, which ends with the process.
    """
    os.environ.setdefault("PYTHON_COLORS", "0")  # tracebacks of Python 3.13 and later
    if not isinstance(sys.stdout, _Protected):
        sys.stdout = _Protected(sys.stdout, colours=False)
    if not isinstance(sys.stderr, _Protected):
        sys.stderr = _Protected(sys.stderr, colours=True)
