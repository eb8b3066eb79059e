"""The `opd probe-own-prefix` command."""

import argparse
from pathlib import Path

from opd.analysis.own_prefix import control
from opd.config.settings import TRUST


def main(argv: list[str]) -> None:
    """`opd probe-own-prefix RUN [--problems N] [--trust-remote-code]`."""
    parser = argparse.ArgumentParser(
        prog="opd probe-own-prefix",
        description="the teacher on its own prefixes and on the student's",
    )
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--problems", type=int, default=64, help="held-out problems to answer")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    given = parser.parse_args(argv)
    for path in control(given.run, given.problems, given.trust_remote_code):
        print(path)
