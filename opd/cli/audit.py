"""The `opd audit` command."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from tyro.conf import Positional

from diagnostics.errors import UserError
from diagnostics.io.atomic import write_text
from diagnostics.io.command import parse_options

NOT_JUDGED = 2
"""Exit status where a loss could not be judged."""
TIME_LIMIT = 180
"""Seconds after which an audit gives up: a loss that takes minutes, or never returns."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Say what a distillation loss estimates, how noisily, and which known faults it has.

    Exit status: 0 for the verdicts ok and warn, 1 for faulty, 2 if the loss could not be judged.
    """

    target: Annotated[
        Positional[str],
        tyro.conf.arg(
            metavar="TARGET",
            help="MODULE:FUNCTION or FILE.py:FUNCTION, a loss of your own (docs/audit.md); "
            "ours:NAME[,setting=value...]; trl:TRAINER[,setting=value...]; "
            "verl:MODE[,setting=value...]",
        ),
    ]
    json: bool = False
    """print the card as JSON"""
    html: Path | None = None
    """write the card as a page to this file, too"""
    claims: str | None = None
    """what its author says that it estimates, such as token_reverse_kl"""
    full: bool = False
    """use more worlds"""


def main(argv: list[str]) -> None:
    """Run `opd audit TARGET [--json] [--html FILE] [--claims NAME] [--full]`.

    Args:
        argv: Command-line arguments.

    Raises:
        SystemExit: 1 for the verdict faulty, 2 if the loss could not be judged.
    """
    options = parse_options(AuditOptions, argv, "opd audit")
    previous = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(TIME_LIMIT)
    try:
        status = run(options)
    except (UserError, TimeLimitReached) as error:
        print(f"opd audit: {error}", file=sys.stderr)
        status = NOT_JUDGED
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if status:
        raise SystemExit(status)


def run(options: AuditOptions) -> int:
    """Audit, print the card, and return the exit status."""
    from opd.objectives.audit.audit import audit
    from opd.objectives.audit.card import to_html, to_text
    from opd.objectives.audit.named import load_loss

    card = audit(load_loss(options.target), claims=options.claims, full=options.full)
    print(card.to_json() if options.json else to_text(card))
    if options.html is not None:
        write_text(options.html, to_html(card))
    return card.exit_status


class TimeLimitReached(BaseException):
    """The audit takes too long; no `Exception`, so that neither the loss nor a check catches it."""


def _give_up(_signal: int, _frame: FrameType | None) -> None:
    """End an audit that takes too long."""
    raise TimeLimitReached(
        f"the audit did not end within {TIME_LIMIT} s; the loss is too slow, or waits for something"
    )
