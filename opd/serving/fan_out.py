"""Concurrent calls to servers, of which the first failure cancels the others."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def run_all(
    calls: Sequence[Callable[[], T]],
    *,
    concurrency: int,
    stop: Callable[[], None],
    description: str = "",
) -> list[T]:
    """Run calls in threads and return their results in order.

    When a call raises, or this thread is interrupted, the calls that have not begun are dropped and
    `stop` is called, which makes the running ones raise.

    Args:
        calls: The calls.
        concurrency: Maximum number of calls that run at a time.
        stop: Cancels the running requests, such as `JsonEndpoint.stop`.
        description: Text of a progress bar; none if empty.

    Returns:
        The result of each call.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(call) for call in calls]
        progress = tqdm(
            total=len(calls),
            desc=description,
            delay=3,
            leave=False,
            disable=None if description else True,
        )
        try:
            for future in as_completed(futures):
                future.result()
                progress.update()
        except BaseException:
            for pending in futures:
                pending.cancel()
            stop()
            raise
        finally:
            progress.close()
    return [future.result() for future in futures]
