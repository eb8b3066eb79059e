"""Peak memory of a device or of this process."""

import resource
import sys

import torch

GIB = 1 << 30


def start_peak(device: torch.device) -> None:
    """Begin a new interval of `peak_gib` on a CUDA device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Return the most memory that was in use.

    Args:
        device: The device.

    Returns:
        GiB: what torch allocated on a CUDA device since `start_peak`; elsewhere the resident memory
        of the process since it began, which cannot be reset.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
