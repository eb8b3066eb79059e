"""Run the parts one after another within a budget, each guarded, with results after every part."""

import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.gpu.result import Check, Outcome, Part, SkipPart
from benchmarks.gpu.setting import Setting


class BudgetSpent(BaseException):
    """The part ran past the end of the budget; no Exception, so that no part handles it."""


def run_parts(
    parts: Sequence[Part], setting: Setting, minutes: float, record: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run the parts that fit the budget.

    Args:
        parts: Parts, by priority.
        setting: Machine and sizes.
        minutes: Budget. A part is skipped if its expected time is more than what remains, and
            interrupted at the end of the budget.
        record: Called with all outcomes after each part.

    Returns:
        One outcome per part.
    """
    end = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts, 1):
        remaining = end - time.monotonic()
        expected = 0.1 if setting.toy else part.seconds
        print(f"[{number}/{len(parts)}] {part.name} ", end="", flush=True)
        if expected > remaining:
            reason = (
                f"budget of {minutes:g} minutes: it needs about {expected:g} s and "
                f"{max(0.0, remaining):.0f} s remain"
            )
            outcome = Outcome(part.name, part.kind, "skipped", reason=reason)
        else:
            outcome = run_part(part, setting, remaining)
        outcomes.append(outcome)
        record(outcomes)
        suffix = f": {outcome.reason}" if outcome.reason else ""
        print(f"{outcome.seconds:.1f} s {outcome.status}{suffix}", flush=True)
    return outcomes


def run_part(part: Part, setting: Setting, limit: float) -> Outcome:
    """Run a part for at most `limit` seconds; rows before an error are kept."""
    outcome = Outcome(part.name, part.kind, "ok")
    begin = time.monotonic()
    try:
        with time_limit(limit):
            for row in part.run(setting):
                outcome.rows.append(row)
            if not outcome.rows:
                raise RuntimeError(f"{part.name} reported nothing")
    except SkipPart as skip:
        outcome.status, outcome.reason = "skipped", str(skip)
    except BudgetSpent:
        outcome.status, outcome.reason = "skipped", f"budget: stopped after {limit:.0f} s"
    except Exception as error:
        outcome.status, outcome.traceback = "error", traceback.format_exc()
        outcome.reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if any(isinstance(row, Check) and not row.passed for row in outcome.rows):
        outcome.status = "failed"
        wrong = [row for row in outcome.rows if isinstance(row, Check) and not row.passed]
        outcome.reason = "; ".join(
            [f"{row.subject}: {row.deviation:.2g} > {row.limit:g}" for row in wrong[:3]]
            + [outcome.reason] * bool(outcome.reason)
        )
    outcome.seconds = time.monotonic() - begin
    release_memory(setting)
    return outcome


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 1 if a number was wrong or a part raised an error, else 0."""
    return int(any(outcome.status in ("failed", "error") for outcome in outcomes))


def release_memory(setting: Setting) -> None:
    """Give back what the part held, also after it ran out of memory."""
    gc.collect()
    if setting.device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # after an illegal access every call fails; parts say so
            print(f"(CUDA: {str(error).partition(chr(10))[0]}) ", end="")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `BudgetSpent` in the block after so many seconds; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise BudgetSpent

    previous_handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
