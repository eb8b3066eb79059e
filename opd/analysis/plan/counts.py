"""Operations of a piece of code counted as they are dispatched: memory, FLOPs, traffic and time.

On tensors of the meta device, which have shapes and no numbers, code of any size runs in
milliseconds. So the plan counts what the models and losses themselves do, not a description of it.
"""

import weakref
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from opd.analysis.plan.machines import Machine
from opd.analysis.plan.operation_times import LONGEST

ATEN = torch.ops.aten
PARTLY_READ = {
    ATEN.embedding,
    ATEN.index_select,
    ATEN.index,
    ATEN.gather,
    ATEN._embedding_bag,
    ATEN._embedding_bag_forward_only,
    ATEN._embedding_bag_per_sample_weights_backward,
}
"""Operations that read a part of their first input, as large as what they write."""
ELEMENTWISE = {
    "aten::exp",
    "aten::log",
    "aten::logsumexp",
    "aten::_log_softmax",
    "aten::_softmax",
    "aten::_log_softmax_backward_data",
    "aten::_softmax_backward_data",
    "aten::tanh",
    "aten::sigmoid",
    "aten::silu",
    "aten::silu_backward",
    "aten::gelu",
    "aten::gelu_backward",
    "aten::pow",
    "aten::cumsum",
    "aten::sort",
    "aten::topk",
    "aten::amax",
    "aten::searchsorted",
}
"""Operations that a CPU computes more slowly than its memory could deliver; those that work in
place have the same names with an underscore."""
OWN_FLOPS: dict[Any, Any] = {}
"""Formulas of FLOPs that torch's own table lacks."""


@dataclass(frozen=True)
class Counts:
    """What a piece of code did."""

    flops: float = 0.0
    """Floating-point operations of products and attention (a multiplication and an addition are
    two)."""
    moved_bytes: float = 0.0
    """Bytes read and written by operations; those of views are 0."""
    operations: float = 0.0
    """Number of operations that compute something."""
    seconds: float = 0.0
    """Sum of the operations' times on the machine."""
    peak: float = 0.0
    """Largest sum of bytes of the tensors that the code made and that lived together."""
    kept_bytes: float = 0.0
    """Bytes of such tensors that lived at the end, or at `OperationCounter.mark_kept`."""
    gradients: float = 0.0
    """Bytes of weight gradients at the time of the peak."""

    def scaled(self, factor: float) -> "Counts":
        """Return the counts of the code repeated `factor` times; memory stays."""
        sums = {name: factor * getattr(self, name) for name in SUMS}
        return Counts(**sums, peak=self.peak, kept_bytes=self.kept_bytes, gradients=self.gradients)

    def then(self, next_counts: "Counts") -> "Counts":
        """Return the counts of this code followed by another, after all memory was freed."""
        sums = {name: getattr(self, name) + getattr(next_counts, name) for name in SUMS}
        larger = self if self.peak >= next_counts.peak else next_counts
        memory = {name: getattr(larger, name) for name in ("peak", "kept_bytes", "gradients")}
        return Counts(**sums, **memory)


SUMS = ("flops", "moved_bytes", "operations", "seconds")
"""Fields of `Counts` that add up."""


def extrapolate(first: Counts, second: Counts, sizes: tuple[int, int], size: int) -> Counts:
    """Return the counts of `size` layers from those of two numbers of layers, linearly.

    Args:
        first: Counts with `sizes[0]` layers.
        second: Counts with `sizes[1]` layers.
        sizes: The two numbers of layers.
        size: Number of layers.

    Returns:
        The counts.
    """
    steps = (size - sizes[0]) / (sizes[1] - sizes[0])
    values = {}
    for field in fields(Counts):
        a, b = getattr(first, field.name), getattr(second, field.name)
        values[field.name] = a + steps * (b - a)
    return Counts(**values)


class OperationCounter(TorchDispatchMode):
    """Counts the operations inside a `with` block.

    Args:
        machine: Machine whose seconds are summed.
        skipped: Operations that the planned code does without; they count for memory only.
    """

    def __init__(self, machine: Machine, skipped: frozenset[Any] = frozenset()) -> None:
        super().__init__()
        self.machine, self.skipped = machine, skipped
        self.flops = self.moved_bytes = self.operations = self.seconds = 0.0
        self.live = self.peak = self.kept_bytes = 0
        self.live_gradients = self.gradients_at_peak = 0
        self._bytes_by_storage: dict[int, int] = {}
        self._traffic = 0.0
        self._touched: dict[int, float] = {}
        self._outside: dict[int, int] = {}

    def counts(self) -> Counts:
        """Return the counts so far."""
        return Counts(
            self.flops,
            self.moved_bytes,
            self.operations,
            self.seconds,
            float(self.peak),
            float(self.kept_bytes or self.live),
            float(self.gradients_at_peak),
        )

    def restart(self) -> None:
        """Forget what was counted, except for the memory that is in use."""
        self.flops = self.moved_bytes = self.operations = self.seconds = 0.0
        self.peak, self.gradients_at_peak = self.live, self.live_gradients

    def mark_kept(self) -> None:
        """Note what lives now, such as the activations after a forward pass."""
        self.kept_bytes = self.live

    def add_operation(self, moved_bytes: float) -> None:
        """Count an operation on float32 numbers that the meta device lacks."""
        self.moved_bytes += moved_bytes
        self.operations += 1
        self.seconds += self.machine.start_seconds(False)
        self.seconds += self.machine.work_seconds(0.0, moved_bytes, 4, True)

    def add_gradient(self, gradient: Tensor) -> None:
        """Note that a tensor is a weight's gradient."""
        self.live_gradients += gradient.nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in inputs:  # those that are unknown were made outside of the block
            key = id(x.untyped_storage())
            if key not in self._bytes_by_storage:
                self._outside[key] = x.untyped_storage().nbytes()
            self._track(x, 0)
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in outputs:
            self._track(x, x.untyped_storage().nbytes())
        if not is_view(func):
            self._count(func, inputs, outputs, (args, kwargs, out))
        return out

    def _count(
        self, func: Any, inputs: list[Tensor], outputs: list[Tensor], call: tuple[Any, Any, Any]
    ) -> None:
        packet = func._overloadpacket
        if packet in self.skipped:
            return
        args, kwargs, out = call
        flops = 0.0
        if packet in flop_registry:
            flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet in OWN_FLOPS:
            flops = float(OWN_FLOPS[packet](*args, **kwargs))
        written_bytes = sum(map(stored_bytes, outputs))
        read_bytes = sum(stored_bytes(x) for x in (inputs[1:] if packet in PARTLY_READ else inputs))
        moved_bytes = written_bytes + read_bytes + (written_bytes if packet in PARTLY_READ else 0)
        item = min((x.element_size() for x in inputs if x.is_floating_point()), default=4)
        self.flops += flops
        self.moved_bytes += moved_bytes
        self.operations += 1
        seconds = self.machine.work_seconds(
            flops, moved_bytes, item, func._schema.name.rstrip("_") in ELEMENTWISE
        )
        times = self.machine.operation_times
        if times is not None and seconds < LONGEST:
            measured = times.seconds(func, (args, kwargs), self.is_cached)
            seconds = seconds if measured is None else measured
        # with gradients a checkpointed layer is computed again, which Python starts
        is_backward = torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()
        self.seconds += self.machine.start_seconds(is_backward) + seconds
        self._traffic += moved_bytes
        for x in (*inputs, *outputs):
            self._touched[id(x.untyped_storage())] = self._traffic

    def is_cached(self, x: Tensor) -> bool:
        """Return whether a tensor is in the cache: little was read and written since its last use.

        Weights are not, unless all of them fit: few layers are counted for many, which would read
        more between two uses of a weight.
        """
        key = id(x.untyped_storage())
        if key in self._outside and sum(self._outside.values()) > self.machine.cache_bytes:
            return False
        touched = self._touched.get(key)
        return touched is not None and self._traffic - touched < self.machine.cache_bytes

    def _track(self, x: Tensor, num_bytes: int) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._bytes_by_storage:
            return
        self._bytes_by_storage[key] = num_bytes
        weakref.finalize(storage, self._free, key)
        self.live += num_bytes
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.live_gradients

    def _free(self, key: int) -> None:
        self.live -= self._bytes_by_storage.pop(key)
        self._touched.pop(key, None)
        self._outside.pop(key, None)


def stored_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor that differ in memory; those of an expanded one count once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def is_view(func: Any) -> bool:
    """Return whether an operation only returns another view of its input."""
    arguments = func._schema.arguments
    aliases = [a.alias_info for a in arguments if a.alias_info is not None]
    if func._schema.name in ("aten::detach", "aten::_unsafe_view", "aten::alias"):
        return True
    return bool(aliases) and not any(alias.is_write for alias in aliases)
