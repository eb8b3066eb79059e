"""Counts of operations against torch's own counters and plain arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd.analysis.plan.counts import Counts, OperationCounter, extrapolate
from tests.helpers.allocated_memory import allocated_peak
from tests.opd.analysis.plan.pairs import MACHINE, real_network


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_flops_and_peak_of_real_code_are_those_of_torch(name: str) -> None:
    network = real_network(name, "eager")
    ids = torch.arange(40).view(2, 20)

    def step() -> None:
        network(input_ids=ids).logits.log_softmax(-1).sum().backward()
        network.zero_grad()

    step()
    peak = allocated_peak(step)
    with FlopCounterMode(display=False) as torch_counter:
        step()
    with OperationCounter(MACHINE) as counter:
        step()
    counts = counter.counts()
    assert counts.flops == torch_counter.get_total_flops() > 0
    assert counts.peak == pytest.approx(peak, rel=0.05)


def test_bytes_and_seconds_of_single_operations() -> None:
    a = torch.zeros(100, 200, device="meta")
    b = torch.zeros(200, 300, device="meta")
    with OperationCounter(MACHINE) as counter:
        product = a @ b.T.contiguous().T
    copy, result = 4 * 200 * 300, 4 * 100 * 300
    counts = counter.counts()
    assert counts.operations == 2, "views are free"
    assert counts.flops == 2 * 100 * 200 * 300
    assert counts.moved_bytes == 2 * copy + (a.nbytes + copy + result)
    assert counts.peak == copy + result
    assert counts.kept_bytes == result, "the copy is freed"
    seconds = max(counts.flops / 0.5e12, (a.nbytes + copy + result) / 0.5e11)
    assert counts.seconds == pytest.approx(2e-6 + 2 * copy / 0.5e11 + seconds)
    with OperationCounter(MACHINE) as counter:
        product.exp_()
    assert counter.counts().peak == 0, "in place"
    assert counter.counts().seconds == pytest.approx(1e-6 + 2 * result / 1e10)


def test_a_lookup_reads_only_the_rows_that_it_returns() -> None:
    weight, ids = (
        torch.zeros(1000, 8, device="meta"),
        torch.zeros(5, dtype=torch.long, device="meta"),
    )
    with OperationCounter(MACHINE) as counter:
        torch.nn.functional.embedding(ids, weight)
    assert counter.counts().moved_bytes == 2 * 5 * 8 * 4 + 5 * 8


def test_half_precision_has_its_own_rate() -> None:
    def seconds(dtype: torch.dtype) -> float:
        a = torch.zeros(4096, 4096, device="meta", dtype=dtype)
        with OperationCounter(MACHINE) as counter:
            a @ a
        return counter.counts().seconds

    assert seconds(torch.float32) == pytest.approx(1e-6 + 2 * 4096**3 / 0.5e12)
    assert seconds(torch.bfloat16) == pytest.approx(1e-6 + 2 * 4096**3 / 1e12)


def test_a_restart_keeps_the_memory_in_use_and_skipped_operations_take_no_time() -> None:
    x = torch.zeros(10, device="meta")
    skipped = frozenset({torch.ops.aten.mul})
    with OperationCounter(MACHINE, skipped) as counter:
        y = x + 1
        (x + y).sum()
        counter.restart()
        z = y * 2
    counts = counter.counts()
    assert (counts.operations, counts.seconds, counts.peak) == (0, 0, 80)
    del y, z


def test_counts_follow_each_other_repeat_and_extrapolate() -> None:
    a = Counts(1, 2, 3, 4, peak=10, kept_bytes=5, gradients=1)
    b = Counts(10, 20, 30, 40, peak=7, kept_bytes=6, gradients=0)
    assert a.then(b) == Counts(11, 22, 33, 44, peak=10, kept_bytes=5, gradients=1)
    assert a.scaled(3) == Counts(3, 6, 9, 12, peak=10, kept_bytes=5, gradients=1)
    four_steps = Counts(28, 56, 84, 112, peak=1, kept_bytes=8, gradients=-2)
    assert extrapolate(a, b, (2, 3), 5) == four_steps
