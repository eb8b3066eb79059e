"""The `opd probe-continuation` command."""

import argparse
from pathlib import Path

from opd.analysis.continuation import probe_continuation
from opd.config.settings import TRUST_HELP


def main(argv: list[str]) -> None:
    """Run `opd probe-continuation RUN [--lengths L ...] [--problems N] [--trained]`."""
    parser = argparse.ArgumentParser(
        prog="opd probe-continuation",
        description="accuracy of the teacher when continuing from student prefixes",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 16, 32, 64, 128])
    parser.add_argument("--problems", type=int, default=128, help="number of held-out problems")
    parser.add_argument(
        "--trained", action="store_true", help="use the trained student instead of the initial one"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args(argv)
    rows = probe_continuation(
        args.run, args.lengths, args.problems, args.trained, args.trust_remote_code
    )
    print("prefix  problems  teacher (cont.)  student  gain [95 %]")
    for row in rows:
        line = "{length:6}  {problems:8}  {teacher:15.3f}  {student:7.3f}  "
        print((line + "{gain:+.3f} [{low:+.3f}, {high:+.3f}]").format(**row))
