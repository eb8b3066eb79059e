"""Time and memory of a call on a CPU or a CUDA device."""

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def synchronize(device: str) -> None:
    """Wait for the work of a CUDA device."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock_seconds(device: str) -> float:
    """Return the time in seconds; on a CPU the process's CPU time."""
    synchronize(device)
    return time.process_time() if device == "cpu" else time.perf_counter()


def milliseconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median time of a call after one warm-up; on a CPU, that of the main thread.

    On CUDA each call lies between two events of the current stream, so its first launch from the
    host counts and what the host does afterwards does not. The warm-up compiles kernels and fills
    the allocator's cache.
    """
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.process_time()
            work()
            times.append(1000 * (time.process_time() - begin))
    return sorted(times[1:])[repeats // 2]


class LiveMemory(TorchDispatchMode):
    """Bytes of the live storages returned by operations, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        input_storages = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)
        }
        for x in filter(is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            if storage._cdata not in input_storages and storage._cdata not in self.seen:
                self.seen[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.seen.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.seen.values()))
        return out


def is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


@contextmanager
def extra_memory(device: str) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the peak memory beyond the start, in MiB."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start_bytes = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - start_bytes) / 2**20
    else:
        with LiveMemory() as alive:
            yield lambda: alive.peak / 2**20
