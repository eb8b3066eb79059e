"""Sharding with FSDP2: every process holds a shard of each weight, gradient and optimizer state.

Shards are float32 master weights; the network computes in its own precision. While the student
samples and scores (`unsharded`) every process holds all weights in the compute precision, so ranks
may run different numbers of forward passes. In the update layers are gathered one after another, in
the forward and the backward pass.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.errors import InvalidInput
from opd.models.lm_head import LmHead, LogitsHead, find_head
from opd.models.model import CausalLM, base_model
from opd.runtime import distributed


@dataclass(frozen=True, eq=False)
class ShardedCausalLM(CausalLM):
    """A model whose weights are sharded over all processes."""

    root: Any
    """Root module of FSDP."""
    skeleton: Any
    """The network without weights, on the meta device."""
    dtype: torch.dtype
    """Precision of the computation."""


class _Root(nn.Module):
    """FSDP root module around a network, with a forward pass that ends before the head.

    The head's weights are gathered with the root's and stay until the backward pass is over.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """Return the (B, L, D) last hidden states."""
        states: Tensor = (
            base_model(self.network)
            .get_decoder()(
                input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False
            )
            .last_hidden_state
        )
        return states


def shard_model(model: CausalLM) -> ShardedCausalLM:
    """Shard the weights of a model over all processes.

    Args:
        model: A model with a separate head.

    Returns:
        The sharded model.

    Raises:
        InvalidInput: The model has no separate head on its decoder's hidden states, or no layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    network, dtype = model.network, model.network.dtype
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if isinstance(model.head, LogitsHead) or not layers:
        raise InvalidInput(
            f"{type(network).__name__} cannot be sharded: its layers or its head are not "
            "recognised; set sharding to none"
        )
    skeleton = copy.deepcopy(network).to("meta")
    network.float()
    root: Any = _Root(network)
    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None, reduce_dtype=torch.float32
    )
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in _fsdp_modules(root):
        module.set_gradient_divide_factor(
            1.0
        )  # the loss denominators count the tokens of all ranks
        module.set_force_sum_reduction_for_comms(True)

    sharded_model = ShardedCausalLM(
        network=network,
        hidden=root,
        get_head=partial(_current_head, network, model.vocabulary),
        vocabulary=model.vocabulary,
        root=root,
        skeleton=skeleton,
        dtype=dtype,
    )
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        root(token, token + 1, token)  # FSDP determines the root module in the first pass
    root.reshard()  # FSDP leaves the root unsharded after a forward pass
    return sharded_model


@contextmanager
def unsharded(model: CausalLM) -> Iterator[None]:
    """Gather all weights inside the block, for reading only.

    Args:
        model: A model; nothing happens unless it is sharded.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        if isinstance(model, ShardedCausalLM):
            for module in _fsdp_modules(model.root):
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
                stack.callback(_reshard, module, module is not model.root)
        yield


def gather_network(model: CausalLM) -> Any:
    """Return an ordinary network; of a sharded model a copy in the memory of the first process.

    Every process has to call this function.

    Args:
        model: A model.

    Returns:
        The network; None for a sharded model on processes other than the first.
    """
    if not isinstance(model, ShardedCausalLM):
        return model.network
    sharded_state: dict[str, Tensor] = model.network.state_dict()
    state: dict[str, Tensor] = {}
    for name, x in sharded_state.items():
        gathered = _full_tensor(x)
        if distributed.rank() == 0:
            state[name] = gathered.to("cpu", model.dtype)
    if distributed.rank() > 0:
        return None
    network = copy.deepcopy(model.skeleton)
    network.load_state_dict(state, assign=True)
    base_model(network).tie_weights()
    return network.eval()


def _full_tensor(x: Tensor) -> Tensor:
    """Gather a sharded tensor."""
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def _current_head(network: Any, vocabulary: int) -> LmHead:
    """Return the head with its present weights."""
    head = find_head(base_model(network), vocabulary)
    assert head is not None, "shard_model checked that there is a head"
    return head


def _fsdp_modules(root: Any) -> list[Any]:
    """Return the modules that FSDP manages."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _reshard(module: Any, after_forward: bool) -> None:
    """Free the gathered weights of a module and restore its behaviour after a forward pass."""
    module.set_reshard_after_forward(after_forward, recurse=False)
    module.reshard()
