"""The page of the commands: what `opd COMMAND --help` prints."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from opd.cli.main import COMMANDS

HEADER = """# Commands

*Generated from the help of every command by `python -m docs.generate`.*

| command | what it does |
|---|---|"""

SUBCOMMANDS = {"study": ("study list", "study show", "study run")}
"""Command -> what is shown in place of its own help."""

ELSEWHERE = {
    "train": "`opd train RECIPE [--field value ...]`; [settings.md](settings.md) lists the recipes and "
    "all settings."
}
"""Command -> what is said in place of a help that another page holds."""


def help_text(command: str) -> str:
    """Return what `opd COMMAND --help` prints on a terminal of 88 columns without colours."""
    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    words = [sys.executable, "-m", "opd.cli.main", *command.split(), "--help"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())


def page() -> str:
    """Return the page in Markdown."""
    shown = [name for name in COMMANDS if name not in ELSEWHERE]
    names = [sub for name in shown for sub in SUBCOMMANDS.get(name, (name,))]
    with ThreadPoolExecutor(2) as executor:
        texts = dict(zip(names, executor.map(help_text, names), strict=True))
    lines = [HEADER]
    lines += [f"| [`opd {name}`](#opd-{name}) | {text} |" for name, (_, text) in COMMANDS.items()]
    for command in COMMANDS:
        lines += ["", f"## opd {command}", ""]
        if command in ELSEWHERE:
            lines += [ELSEWHERE[command]]
            continue
        for name in SUBCOMMANDS.get(command, (command,)):
            lines += ["```text", texts[name], "```", ""]
    return "\n".join(lines).rstrip() + "\n"
