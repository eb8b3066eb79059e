"""The `opd probe-continuation` command."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from diagnostics.io.command import parse_options


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Accuracy of the teacher when continuing from student prefixes."""

    run: Positional[Path]
    """a run folder"""
    lengths: tuple[int, ...] = (0, 16, 32, 64, 128)
    """lengths of the student prefixes, in tokens"""
    problems: int = 128
    """number of held-out problems"""
    trained: bool = False
    """use the trained student instead of the initial one"""
    trust_remote_code: bool = False
    """run Python code that comes with a model; review it first"""


def main(argv: list[str]) -> None:
    """Run `opd probe-continuation RUN [--lengths L ...] [--problems N] [--trained]`."""
    options = parse_options(ProbeOptions, argv, "opd probe-continuation")
    from opd.analysis.continuation import probe_continuation

    rows = probe_continuation(
        options.run,
        list(options.lengths),
        options.problems,
        options.trained,
        options.trust_remote_code,
    )
    print("prefix  problems  teacher (cont.)  student  gain [95 %]")
    for row in rows:
        line = "{length:6}  {problems:8}  {teacher:15.3f}  {student:7.3f}  "
        print((line + "{gain:+.3f} [{low:+.3f}, {high:+.3f}]").format(**row))
