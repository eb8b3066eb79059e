"""The `opd report` command."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.command import parse_options
from opd.report.build import LARGE_PAGE_BYTES, render_page, report_data


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one self-contained HTML page about runs."""

    runs: Positional[tuple[Path, ...]]
    """run folders"""
    out: Path = Path("report.html")
    """file of the page"""
    tokens: int = 20000
    """largest number of tokens shown in the rollout viewer"""
    watch: bool = False
    """serve the page and update it while runs go on"""
    port: int = 8000
    """port of --watch; 0: any free port"""
    models: bool = False
    """also read tokenizers outside the run folders that the runs refer to; only for runs that you
    trust"""


def main(argv: list[str]) -> None:
    """Run `opd report RUN [RUN ...] [--out FILE] [--models] [--watch [--port N]]`."""
    options = parse_options(ReportOptions, argv, "opd report")
    if not options.runs:
        raise InvalidInput("no run folder is given; see `opd report --help`")
    if options.tokens < 0:
        raise InvalidInput(
            f"--tokens is {options.tokens}; use 0 or more (0 shows one rollout per batch)"
        )
    if options.watch:
        from opd.report.server import serve

        serve(list(options.runs), options.tokens, options.port, options.models)
        return
    text = render_page(report_data(list(options.runs), options.tokens, options.models))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, text)
    size = len(text.encode())
    print(f"{options.out}  {size / 1e6:.1f} MB", file=sys.stderr)
    if size > LARGE_PAGE_BYTES:
        advice = "it opens slowly; use fewer runs, or a smaller --tokens"
        print(
            f"{options.out} is larger than {LARGE_PAGE_BYTES / 1e6:.0f} MB: {advice}",
            file=sys.stderr,
        )
    print(options.out)
