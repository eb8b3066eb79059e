"""The processes of a run: one alone, or the ranks that torchrun or `accelerate launch` started.

Every rank takes its share of each step's prompts and sees the numbers of all; the first one writes
the record. With one process every function here does nothing, and torch.distributed is not used.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

    from diagnostics.core.totals import Accumulator

SPARE = 1800.0
"""Seconds that a rank waits for the others beyond its own patience with a server."""


def several() -> bool:
    """Whether this process was started as one of several."""
    known = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return known and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined(device: str, patience: float = 0.0) -> Iterator[str]:
    """Join the other processes, if there are any; gives the device of this one.

    Ranks on GPUs meet over NCCL, each on the GPU of its LOCAL_RANK; on CPUs over gloo. A group that
    the caller made is used, and left as it is.

    Raises:
      ValueError: fewer GPUs than processes on this machine.
    """
    if not several():
        yield device
        return
    import torch
    import torch.distributed as distributed

    on_gpu = device.startswith("cuda")
    if on_gpu:
        place = int(os.environ["LOCAL_RANK"])
        if place >= torch.cuda.device_count():
            raise InvalidInput(
                f"process {place} of this machine has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start that many processes, or set device cpu"
            )
        torch.cuda.set_device(place)
        device = f"cuda:{place}"
    if distributed.is_initialized():
        yield device
        return
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=patience + SPARE)
    )
    try:
        yield device
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def size() -> int:
    """Number of processes."""
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0 on."""
    import torch.distributed as distributed

    return distributed.get_rank() if distributed.is_initialized() else 0


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        import torch.distributed as distributed

        distributed.barrier()


def own(count: int, updates: int = 1) -> list[int]:
    """The prompts of a step, of `count`, that are this process's: equally many of every update's.

    Raises:
      ValueError: they cannot be shared equally.
    """
    if count % (updates * size()):
        each = f"{updates} updates of " if updates > 1 else ""
        raise InvalidInput(
            f"{count} prompts a step cannot be shared equally by {each}{size()} processes; set "
            f"prompts_per_step (of each task) to a multiple of {updates * size()}, or start "
            "another number of processes"
        )
    part, some = count // updates, count // (updates * size())
    return [u * part + rank() * some + i for u in range(updates) for i in range(some)]


def strided(count: int) -> list[int]:
    """Which of `count` things this process does, of things that need not be shared equally."""
    return list(range(rank(), count, size()))


def summed(x: "Tensor") -> "Tensor":
    """The sum of all processes' tensors, in place."""
    if size() > 1:
        import torch.distributed as distributed

        distributed.all_reduce(x)
    return x


def added(totals: "Mapping[str, Accumulator]") -> "Mapping[str, Accumulator]":
    """The totals of all processes; all have to hold the same ones."""
    if size() == 1:
        return totals
    from diagnostics.monitor import across_ranks

    return across_ranks(totals)


def wire() -> str:
    """The device of tensors that the processes exchange: NCCL takes those on GPUs alone."""
    import torch.distributed as distributed

    return "cuda" if size() > 1 and distributed.get_backend() == "nccl" else "cpu"


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if size() == 1:
        return number
    import torch
    import torch.distributed as distributed

    x = torch.tensor(number, device=wire())
    distributed.all_reduce(x, distributed.ReduceOp.MAX)
    return int(x)


def told(x: Any) -> list[Any]:
    """What each process says, in their order; anything that JSON can hold."""
    if size() == 1:
        return [x]
    import torch

    from diagnostics.gradients.distributed import rows_of_ranks

    raw = torch.frombuffer(bytearray(json.dumps(x).encode()), dtype=torch.uint8).to(wire())
    return [json.loads(bytes(y.cpu().tolist())) for y in rows_of_ranks(raw)]
