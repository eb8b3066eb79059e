"""Concurrent calls: order, cancellation and the error that is raised."""

import threading
import time

import pytest

from opd.serving.fan_out import run_all


def test_results_are_in_the_order_of_the_calls() -> None:
    def make_call(i: int):
        def call() -> int:
            time.sleep(0.02 * (3 - i % 4))
            return i

        return call

    assert run_all([make_call(i) for i in range(8)], concurrency=4, stop=lambda: None) == [
        *range(8)
    ]


def test_a_failure_stops_the_running_calls_and_drops_the_others() -> None:
    stopped, started = threading.Event(), list[int]()

    def wait(i: int) -> None:
        started.append(i)
        assert stopped.wait(10)
        raise RuntimeError("cancelled")

    def fail() -> None:
        time.sleep(0.05)
        raise ValueError("the cause")

    calls = [lambda: wait(0), fail, *(lambda i=i: wait(i) for i in range(1, 30))]
    with pytest.raises(ValueError, match="the cause"):
        run_all(calls, concurrency=2, stop=stopped.set)
    assert stopped.is_set()
    assert len(started) <= 3
