"""The page of the commands: what `opd COMMAND --help` prints."""

import io
import os
from contextlib import redirect_stdout, suppress
from importlib import import_module
from unittest.mock import patch

from docs.generate.attributes import table
from opd.cli.main import COMMANDS

HEADER = """# Commands

*Generated from the help of every command by `python -m docs.generate`.*
"""

SUBCOMMANDS = {"study": ("study list", "study show", "study run")}
"""Command -> what is shown in place of its own help."""


def help_text(command: str) -> str:
    """Return what `opd COMMAND --help` prints on a terminal of 88 columns, with two processors."""
    name, *words = command.split()
    text = io.StringIO()
    terminal = {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    with (
        patch.dict(os.environ, terminal),
        patch("os.cpu_count", return_value=2),
        redirect_stdout(text),
        suppress(SystemExit),
    ):
        import_module(COMMANDS[name][0]).main([*words, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def page() -> str:
    """Return the page in Markdown."""
    rows = [(f"[`opd {name}`](#opd-{name})", text) for name, (_, text) in COMMANDS.items()]
    lines = [HEADER, *table(("command", "what it does"), rows)]
    for command in COMMANDS:
        lines += ["", f"## opd {command}"]
        if command == "train":
            lines += ["", "All settings are on the page [settings.md](settings.md)."]
        for name in SUBCOMMANDS.get(command, (command,)):
            lines += ["", "```text", help_text(name), "```"]
    return "\n".join(lines) + "\n"
