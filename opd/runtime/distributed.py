"""Process group of a run: one process, or the ranks started by torchrun or `accelerate launch`.

Every rank processes its shard of each step's prompts; metrics are reduced over all ranks, and
rank 0 writes the run folder. With one process all functions are no-ops and torch.distributed is not
used.
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

TIMEOUT_MARGIN = 1800.0
"""Seconds that collective operations wait for other ranks, in addition to the server timeout."""


def is_distributed() -> bool:
    """Return whether this process was started as one of several ranks."""
    has_variables = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return has_variables and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def process_group(device: str, timeout: float = 0.0) -> Iterator[str]:
    """Initialise the default process group, if there are several ranks, and destroy it at the end.

    The backend is NCCL on GPUs, where each rank uses the GPU of its LOCAL_RANK, and gloo on CPUs.
    A process group that exists already is used and not destroyed.

    Args:
        device: The configured device.
        timeout: Seconds that a rank may wait for a server; added to the timeout of the group.

    Yields:
        The device of this rank.

    Raises:
        InvalidInput: Fewer GPUs than processes on this machine.
    """
    if not is_distributed():
        yield device
        return
    import torch
    import torch.distributed as distributed

    on_gpu = device.startswith("cuda")
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise InvalidInput(
                f"local rank {local_rank} has no GPU, this machine has "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs, or set "
                "device to cpu"
            )
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    if distributed.is_initialized():
        yield device
        return
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout + TIMEOUT_MARGIN)
    )
    try:
        yield device
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def world_size() -> int:
    """Return the number of ranks."""
    import torch.distributed as distributed

    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0 on."""
    import torch.distributed as distributed

    return distributed.get_rank() if distributed.is_initialized() else 0


def barrier() -> None:
    """Wait until all ranks have reached this call."""
    if world_size() > 1:
        import torch.distributed as distributed

        distributed.barrier()


def shard_prompts(count: int, updates: int = 1) -> list[int]:
    """Return this rank's prompts of a step, equally many for each update.

    Args:
        count: Number of prompts of the step.
        updates: Number of updates per batch.

    Returns:
        Indices of the prompts.

    Raises:
        InvalidInput: The prompts cannot be divided equally.
    """
    if count % (updates * world_size()):
        updates_text = f"{updates} updates of " if updates > 1 else ""
        raise InvalidInput(
            f"{count} prompts per step cannot be divided equally among {updates_text}"
            f"{world_size()} processes; set prompts_per_step (of each task) to a multiple of "
            f"{updates * world_size()}, or start another number of processes"
        )
    update_size, shard_size = count // updates, count // (updates * world_size())
    return [
        u * update_size + rank() * shard_size + i for u in range(updates) for i in range(shard_size)
    ]


def shard_indices(count: int) -> list[int]:
    """Return this rank's indices of `count` items; ranks may have different numbers of items."""
    return list(range(rank(), count, world_size()))


def all_reduce_sum(x: "Tensor") -> "Tensor":
    """Sum a tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        import torch.distributed as distributed

        distributed.all_reduce(x)
    return x


def all_reduce_accumulators(totals: "Mapping[str, Accumulator]") -> "Mapping[str, Accumulator]":
    """Merge accumulators over all ranks; every rank must have the same names."""
    if world_size() == 1:
        return totals
    from diagnostics.monitor import all_reduce_totals

    return all_reduce_totals(totals)


def communication_device() -> str:
    """Return the device of tensors in collective operations: NCCL supports only CUDA tensors."""
    import torch.distributed as distributed

    return "cuda" if world_size() > 1 and distributed.get_backend() == "nccl" else "cpu"


def all_reduce_max(number: int) -> int:
    """Return the maximum of a number over all ranks."""
    if world_size() == 1:
        return number
    import torch
    import torch.distributed as distributed

    x = torch.tensor(number, device=communication_device())
    distributed.all_reduce(x, distributed.ReduceOp.MAX)
    return int(x)


def all_gather_object(x: Any) -> list[Any]:
    """Gather a JSON-serialisable object from every rank, in rank order."""
    if world_size() == 1:
        return [x]
    import torch

    from diagnostics.gradients.distributed import all_gather_rows

    raw = torch.frombuffer(bytearray(json.dumps(x).encode()), dtype=torch.uint8).to(
        communication_device()
    )
    return [json.loads(bytes(y.cpu().tolist())) for y in all_gather_rows(raw)]
