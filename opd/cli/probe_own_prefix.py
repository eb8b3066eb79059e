"""The `opd probe-own-prefix` command."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from diagnostics.io.command import parse_options


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Score the teacher on its own and on the student's responses."""

    run: Positional[Path]
    """a finished run folder"""
    problems: int = 64
    """number of held-out problems"""
    trust_remote_code: bool = False
    """run Python code that comes with a model; review it first"""


def main(argv: list[str]) -> None:
    """Run `opd probe-own-prefix RUN [--problems N] [--trust-remote-code]`."""
    options = parse_options(ProbeOptions, argv, "opd probe-own-prefix")
    from opd.analysis.own_prefix import probe_own_prefix

    for path in probe_own_prefix(options.run, options.problems, options.trust_remote_code):
        print(path)
