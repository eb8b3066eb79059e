"""The `opd report` command."""

import argparse
import sys
from pathlib import Path

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from opd.report.build import LARGE_PAGE_BYTES, render_page, report_data


def main(argv: list[str]) -> None:
    """Run `opd report RUN [RUN ...] [--out FILE] [--models] [--watch [--port N]]`."""
    parser = argparse.ArgumentParser(prog="opd report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument(
        "--tokens",
        type=int,
        default=20000,
        help="largest number of tokens shown in the rollout viewer",
    )
    parser.add_argument(
        "--watch", action="store_true", help="serve the page and update it while runs go on"
    )
    parser.add_argument("--port", type=int, default=8000, help="port of --watch; 0: any free port")
    parser.add_argument(
        "--models",
        action="store_true",
        help="also read tokenizers outside the run folders that the runs refer to; only for runs "
        "that you trust",
    )
    args = parser.parse_args(argv)
    if args.tokens < 0:
        raise InvalidInput(
            f"--tokens is {args.tokens}; use 0 or more (0 shows one rollout per batch)"
        )
    if args.watch:
        from opd.report.server import serve

        serve(args.runs, args.tokens, args.port, args.models)
        return
    text = render_page(report_data(args.runs, args.tokens, args.models))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, text)
    size = len(text.encode())
    print(f"{args.out}  {size / 1e6:.1f} MB", file=sys.stderr)
    if size > LARGE_PAGE_BYTES:
        advice = "it opens slowly; use fewer runs, or a smaller --tokens"
        print(
            f"{args.out} is larger than {LARGE_PAGE_BYTES / 1e6:.0f} MB: {advice}", file=sys.stderr
        )
    print(args.out)
