"""The `opd probe-continuation` command."""

import argparse
from pathlib import Path

from opd.analysis.continuation import continuation
from opd.config.settings import TRUST


def main(argv: list[str]) -> None:
    """`opd probe-continuation RUN [--lengths L ...] [--problems N] [--trained]`."""
    parser = argparse.ArgumentParser(
        prog="opd probe-continuation",
        description="the teacher goes on where the student has got to",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 16, 32, 64, 128])
    parser.add_argument("--problems", type=int, default=128, help="held-out problems")
    parser.add_argument("--trained", action="store_true", help="the student as it was trained")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    given = parser.parse_args(argv)
    found = continuation(
        given.run, given.lengths, given.problems, given.trained, given.trust_remote_code
    )
    print("prefix  problems  teacher goes on  student  gain [95 %]")
    for row in found:
        line = "{length:6}  {problems:8}  {teacher:15.3f}  {student:7.3f}  "
        print((line + "{gain:+.3f} [{low:+.3f}, {high:+.3f}]").format(**row))
