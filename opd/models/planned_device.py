"""The device that tensors without numbers stand for.

The plan of a run (`opd.analysis.plan`) runs the code of training on torch's meta device. Where that
code cuts its work to suit a device, it asks here which one that is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_PLANNED_KIND: ContextVar[str] = ContextVar("planned device", default="meta")


def device_kind(device: torch.device) -> str:
    """Return the type of a device, such as "cpu"; for the meta device that of the planned one.

    Args:
        device: Device of a tensor.

    Returns:
        The type.
    """
    return _PLANNED_KIND.get() if device.type == "meta" else device.type


@contextmanager
def planned_device(kind: str) -> Iterator[None]:
    """Let tensors of the meta device stand for tensors of another device inside the block.

    Args:
        kind: Type of the device, "cpu" or "cuda".

    Yields:
        Nothing.
    """
    token = _PLANNED_KIND.set(kind)
    try:
        yield
    finally:
        _PLANNED_KIND.reset(token)
