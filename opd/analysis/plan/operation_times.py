"""Times of operations on the CPU at hand, measured with the shapes that a step calls them with.

A CPU's rates differ by an order of magnitude with the shape: a product with eight rows reaches a
fraction of the rate of a square one, and an operand that has left the caches is read at another
rate than one that was just written. So every distinct operation of a plan is run a few times, on
made-up numbers. Those that take long by the machine's rates are not: for large ones rates suffice.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

ATEN = torch.ops.aten
LONGEST, SHORTEST = 0.03, 2e-4
"""Seconds of the longest operation that is measured, and of the shortest sample."""
NUM_SAMPLES = 5
"""Samples of an operation; their median is its time."""
POOL_BYTES = 1 << 27
"""Memory through which operands move that are not in the cache; larger than a CPU's caches."""
REUSED_BYTES = 30 << 20
"""Largest memory, nearly, that the C allocator of Linux keeps for reuse."""
LOOKUPS: dict[Any, tuple[int, int]] = {
    ATEN.embedding: (0, 0),
    ATEN.index: (0, 0),
    ATEN.index_select: (0, 0),
    ATEN.gather: (0, -1),
    ATEN._embedding_bag: (0, 0),
    ATEN._embedding_bag_forward_only: (0, 0),
    ATEN._embedding_bag_per_sample_weights_backward: (1, 0),
}
"""Operations whose first integer operand selects rows: from which operand and axis."""


class OperationTimes:
    """Measured times by operation, shapes of its operands, and which of them are in the cache."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float | None] = {}
        self._pools: dict[torch.dtype, Tensor] = {}
        self._cursor = 0
        # As in training, the C allocator then reuses smaller memory in place of mapping it anew.
        torch.empty(REUSED_BYTES, dtype=torch.uint8)

    def seconds(
        self, func: Any, call: tuple[Any, Any], is_cached: Callable[[Tensor], bool]
    ) -> float | None:
        """Return the CPU seconds of an operation and thread.

        Args:
            func: Operation of torch.
            call: Its arguments and named arguments; only the shapes of tensors are read.
            is_cached: Whether a tensor is in the cache when the operation begins.

        Returns:
            The seconds; None if the operation refuses made-up numbers.
        """
        leaves, structure = tree_flatten(call)
        cached = [isinstance(x, Tensor) and is_cached(x) for x in leaves]
        key = (func, tuple(call[1]), *map(_describe, leaves, cached))
        if key not in self._seconds:
            with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay the same
                torch.manual_seed(0)
                self._seconds[key] = self._measure(func, leaves, structure, cached)
        return self._seconds[key]

    @torch.no_grad()
    def _measure(
        self, func: Any, leaves: Sequence[Any], structure: TreeSpec, cached: Sequence[bool]
    ) -> float | None:
        """Return the median time of a few calls; None if the operation refuses its arguments."""
        fixed: dict[int, Any] = dict(_integers(func, leaves))
        written = _is_written(func, leaves)
        for i, x in enumerate(leaves):
            if isinstance(x, torch.device):
                fixed[i] = torch.device("cpu")
            elif isinstance(x, Tensor) and i not in fixed and (cached[i] or written[i]):
                fixed[i] = self._floats(x).clone() if written[i] else self._floats(x)

        def make_call() -> tuple[Any, Any]:
            real = [
                fixed[i] if i in fixed else self._floats(x) if isinstance(x, Tensor) else x
                for i, x in enumerate(leaves)
            ]
            args, kwargs = tree_unflatten(real, structure)
            return args, kwargs

        try:
            args, kwargs = make_call()
            func(*args, **kwargs)
        except (RuntimeError, IndexError, NotImplementedError):
            return None

        def sample(repeats: int) -> float:
            calls = [make_call() for _ in range(repeats)]
            begin = time.process_time()
            for args, kwargs in calls:
                func(*args, **kwargs)
            return (time.process_time() - begin) / repeats

        repeats = max(1, min(100, int(SHORTEST / max(sample(1), 1e-6))))
        samples = sorted(sample(repeats) for _ in range(NUM_SAMPLES))
        return samples[NUM_SAMPLES // 2] / torch.get_num_threads()

    def _floats(self, x: Tensor) -> Tensor:
        """Return numbers near 1 in the shape and strides of `x`, at the next place of the pool."""
        extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        extent = extent if x.numel() else 0
        pool = self._pools.get(x.dtype)
        if pool is None or len(pool) < extent:
            numbers = (torch.rand(1 << 16) + 0.5).to(x.dtype)
            size = max(extent, POOL_BYTES // x.element_size())
            pool = self._pools[x.dtype] = numbers.repeat(-(-size // len(numbers)))
        start = self._cursor // x.element_size()
        if start + extent > len(pool):
            start = 0
        self._cursor = -(-(start + extent) * x.element_size() // 64) * 64  # a line of the cache
        return pool.as_strided(x.shape, x.stride(), start)


def _describe(leaf: Any, is_cached: bool) -> Hashable:
    """Return what the time of an operation depends on of an argument."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, is_cached
    return str(leaf) if isinstance(leaf, torch.device) else leaf


def _is_written(func: Any, leaves: Sequence[Any]) -> list[bool]:
    """Return which arguments an operation writes; its outputs come first or last."""
    is_inplace = any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in func._schema.arguments
    )
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    ends = {tensors[0], tensors[-1]} if is_inplace and tensors else set()
    return [i in ends for i in range(len(leaves))]


def _integers(func: Any, leaves: Sequence[Any]) -> dict[int, Tensor]:
    """Return the integer operands of an operation, by the number of the argument.

    Rows to select are random, begins of bags are even, and everything else is 0, which is valid
    everywhere.
    """
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    packet = func._overloadpacket
    bound = 1
    if packet in LOOKUPS:
        number, axis = LOOKUPS[packet]
        sizes = tensors[number].shape
        bound = min(sizes) if packet is ATEN.index else sizes[axis]
    elif packet is ATEN.sort:
        bound = 1 << 15
    made: dict[int, Tensor] = {}
    for i, x in enumerate(leaves):
        if not isinstance(x, Tensor) or x.is_floating_point():
            continue
        if x.dtype == torch.bool:
            made[i] = torch.ones(x.shape, dtype=torch.bool)
        elif not made and bound > 1:
            made[i] = torch.randint(0, bound, x.shape, dtype=x.dtype)
            num_selected = x.numel()
        elif packet in LOOKUPS and "embedding_bag" in str(packet) and len(made) == 1:
            bags = torch.arange(x.numel(), dtype=x.dtype) * num_selected
            made[i] = (bags // max(1, x.numel())).view(x.shape)
        elif packet in LOOKUPS and packet is ATEN.index:
            made[i] = torch.randint(0, bound, x.shape, dtype=x.dtype)
        else:
            made[i] = torch.zeros(x.shape, dtype=x.dtype)
    return made
