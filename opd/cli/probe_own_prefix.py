"""The `opd probe-own-prefix` command."""

import argparse
from pathlib import Path

from opd.analysis.own_prefix import probe_own_prefix
from opd.config.settings import TRUST_HELP


def main(argv: list[str]) -> None:
    """Run `opd probe-own-prefix RUN [--problems N] [--trust-remote-code]`."""
    parser = argparse.ArgumentParser(
        prog="opd probe-own-prefix",
        description="score the teacher on its own and on the student's responses",
    )
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--problems", type=int, default=64, help="number of held-out problems")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args(argv)
    for path in probe_own_prefix(args.run, args.problems, args.trust_remote_code):
        print(path)
