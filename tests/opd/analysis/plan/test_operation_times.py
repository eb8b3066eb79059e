"""Measured operations: made-up numbers that every operation accepts, caches, and starts."""

from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from opd.analysis.plan.counts import OperationCounter
from opd.analysis.plan.operation_times import OperationTimes
from opd.models.gathered_head import gathered_product
from tests.opd.analysis.plan.pairs import MACHINE

MM = torch.ops.aten.mm.default


def product_seconds(times: OperationTimes, rows: int) -> float | None:
    a, b = torch.zeros(rows, 512, device="meta"), torch.zeros(512, 512, device="meta")
    return times.seconds(MM, ((a, b), {}), lambda _: True)


def test_a_larger_product_takes_longer_and_is_measured_once() -> None:
    times = OperationTimes()
    small, large = product_seconds(times, 4), product_seconds(times, 4096)
    assert small is not None
    assert large is not None
    assert large > 20 * small > 0
    assert product_seconds(times, 4) == small


def test_measuring_leaves_the_random_numbers_of_the_caller() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    x = torch.zeros(64, 64, device="meta")
    assert OperationTimes().seconds(torch.ops.aten.bernoulli.p, ((x, 0.5), {}), lambda _: False)
    assert torch.equal(torch.rand(4), expected)


def test_an_operation_that_refuses_made_up_numbers_has_no_time() -> None:
    a, b = torch.zeros(4, 5, device="meta"), torch.zeros(4, 5, device="meta")
    assert OperationTimes().seconds(MM, ((a, b), {}), lambda _: True) is None


def test_made_up_numbers_suit_lookups_bags_sorts_and_writes() -> None:
    times = OperationTimes()

    class Measure(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if tensors and "view" not in str(func):
                refused = times.seconds(func, (args, kwargs or {}), lambda _: False) is None
                assert not refused, func
            return out

    hidden, weight = torch.rand(6, 8, requires_grad=True), torch.rand(50, 8, requires_grad=True)
    ids = torch.randint(0, 50, (6, 3))
    with Measure():
        products = gathered_product(hidden, weight, ids)
        logp = products.log_softmax(-1)
        picked = logp.gather(-1, logp.topk(2).indices) + weight[ids[:, 0], ids[:, 1] % 8][:, None]
        picked.sum().backward()
        table = torch.zeros(6, 3)
        table[torch.arange(6), ids[:, 0] % 3] = hidden.detach()[:, 0]
        table.exp_().cumsum(-1, dtype=torch.float64)
        torch.searchsorted(torch.arange(9), ids)
        torch.where(ids > 3, 1.0, table.float())


def test_an_operand_leaves_the_cache_after_other_traffic() -> None:
    weight, x, large = (torch.zeros(size, device="meta") for size in ((10,), (10,), (10, 30)))
    with OperationCounter(replace(MACHINE, cache_bytes=1000.0)) as counter:
        y = x + 1
        assert [counter.is_cached(z) for z in (weight, x, y)] == [False, True, True]
        torch.zeros(500, device="meta").add_(1)
        assert [counter.is_cached(z) for z in (weight, x, y)] == [False, False, False]
        (weight + x) * torch.zeros(10, device="meta")
        assert [counter.is_cached(z) for z in (weight, x)] == [True, True]
        (y @ large)[:10] + y
        assert [counter.is_cached(z) for z in (weight, y)] == [False, True], "more than fits"


def test_python_starts_forward_passes_and_recomputation_and_autograd_the_rest() -> None:
    machine = replace(MACHINE, seconds_per_operation=1000.0, seconds_per_backward_operation=1.0)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x.sin().exp()

    def starts(checkpointed: bool) -> tuple[int, int]:
        x = torch.zeros(4, device="meta", requires_grad=True)
        with OperationCounter(machine) as counter:
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            y.sum().backward()
        seconds = round(counter.counts().seconds)
        return seconds // 1000, seconds % 1000

    forward, backward = starts(False)
    assert forward == 3 + 1, "sin, exp, sum, and the gradient that backward begins with"
    assert backward == 3, "cos and two products"
    assert starts(True) == (forward + 2, backward), "sin and exp again"
