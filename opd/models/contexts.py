"""Context managers that change how a model runs: device, dropout, activation checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diagnostics.errors import InvalidInput
from opd.models.model import CausalLM


@contextmanager
def awake(teacher: CausalLM, device: torch.device, offload: bool) -> Iterator[None]:
    """With `offload`, the teacher is on the device inside the block and in host memory outside."""
    if not offload:
        yield
        return
    teacher.network.to(device)
    try:
        yield
    finally:
        teacher.network.to("cpu")


@contextmanager
def recomputing(network: Any, wanted: bool) -> Iterator[None]:
    """With `wanted`, layers keep their inputs only and run again in the backward pass.

    Layers alone are set to train, which is what turns this on; what they are made of stays in
    evaluation mode, so that nothing is dropped out.
    """
    if not wanted:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers 5.17 has the old names alone, 5.23 warns of them
    new = hasattr(network, "activation_checkpointing_enable")
    kind = "activation" if new else "gradient"
    getattr(network, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InvalidInput(
            f"{type(network).__name__} has no layer that can be recomputed; set gradient_checkpointing to False"
        )
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
        getattr(network, f"{kind}_checkpointing_disable")()


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Evaluation mode: no dropout, and a cache in spite of checkpointing; then as it was."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
