"""The `opd report` command."""

import argparse
import sys
from pathlib import Path

from diagnostics.errors import InvalidInput
from opd.report.build import LIMIT, contents, page


def main(argv: list[str]) -> None:
    """`opd report RUN [RUN ...] [--out FILE] [--models] [--watch [--port N]]`."""
    parser = argparse.ArgumentParser(prog="opd report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument(
        "--tokens", type=int, default=20000, help="most tokens shown one by one, over all runs"
    )
    parser.add_argument("--watch", action="store_true", help="serve the page, with what is new")
    parser.add_argument("--port", type=int, default=8000, help="of --watch; 0 takes a free one")
    parser.add_argument(
        "--models",
        action="store_true",
        help="also read the tokenizers of the models that the runs name, outside their folders; "
        "for runs of your own",
    )
    given = parser.parse_args(argv)
    if given.tokens < 0:
        raise InvalidInput(f"--tokens is {given.tokens}; 0 shows one rollout of each batch")
    if given.watch:
        from opd.report.server import serve

        serve(given.runs, given.tokens, given.port, given.models)
        return
    text = page(contents(given.runs, given.tokens, given.models))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")
    size = len(text.encode())
    print(f"{given.out}  {size / 1e6:.1f} MB", file=sys.stderr)
    if size > LIMIT:
        advice = "it opens slowly; give fewer runs, or fewer --tokens"
        print(f"{given.out} is larger than {LIMIT / 1e6:.0f} MB: {advice}", file=sys.stderr)
    print(given.out)
