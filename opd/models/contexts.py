"""Context managers that change how a model runs: dropout, activation checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diagnostics.errors import InvalidInput


@contextmanager
def activation_checkpointing(network: Any, enabled: bool) -> Iterator[None]:
    """Keep only the inputs of each layer and recompute it in the backward pass, if `enabled`.

    Only the layers themselves are set to train, which turns recomputation on; their submodules stay
    in evaluation mode, so that no dropout is applied.

    Args:
        network: Hugging Face model.
        enabled: Whether to recompute; without it nothing happens.

    Yields:
        Nothing.

    Raises:
        InvalidInput: The model has no layer that supports recomputation.
    """
    if not enabled:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers 5.17 has only the old names, 5.23 warns about them
    has_new_name = hasattr(network, "activation_checkpointing_enable")
    prefix = "activation" if has_new_name else "gradient"
    getattr(network, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InvalidInput(
            f"{type(network).__name__} has no layer that supports activation checkpointing; set "
            "gradient_checkpointing to False"
        )
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
        getattr(network, f"{prefix}_checkpointing_disable")()


@contextmanager
def evaluation_mode(network: Any) -> Iterator[None]:
    """Run the block in evaluation mode, without dropout and with a KV cache.

    The mode of every module is restored afterwards.

    Args:
        network: Hugging Face model.

    Yields:
        Nothing.
    """
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
