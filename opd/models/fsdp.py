"""Sharding: every process keeps a part of each weight, its gradient and its moments (FSDP2).

Parts are float32, the masters of what the network computes in. While the student samples and scores
(`whole`) every process holds all of it in the computing precision, so that no two have to run
equally often; in the update layers are gathered one after the other, forward and backward.
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
from opd.models.lm_head import LmHead, find_head
from opd.models.model import CausalLM, bare
from opd.runtime import distributed


@dataclass(frozen=True, eq=False)
class Sharded(CausalLM):
    """A model whose weights are shared out.

    root: what was shared out; skeleton: its network without weights; dtype: of computing.
    """

    root: Any
    skeleton: Any
    dtype: torch.dtype


class _Root(nn.Module):
    """A network as FSDP's root, whose forward pass ends before the head.

    The head's weights are gathered with the root's and stay until the backward pass is over.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        states: Tensor = (
            bare(self.network)
            .get_decoder()(
                input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False
            )
            .last_hidden_state
        )
        return states


def sharded(model: CausalLM) -> Sharded:
    """The model with its weights shared out among all processes.

    Raises:
      ValueError: a model that is not one head on its decoder's hidden states, or without layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    network, dtype = model.network, model.network.dtype
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if model.head.weight is None or not layers:
        raise InvalidInput(
            f"{type(network).__name__} cannot be sharded: it is not known layers and a head; set "
            "sharding none"
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
    for module in _parts(root):
        module.set_gradient_divide_factor(1.0)  # the loss's denominators count everybody's tokens
        module.set_force_sum_reduction_for_comms(True)

    made = Sharded(
        network=network,
        hidden=root,
        find=partial(_found, network, model.vocabulary),
        vocabulary=model.vocabulary,
        root=root,
        skeleton=skeleton,
        dtype=dtype,
    )
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        root(one, one + 1, one)  # the first pass says which module is the root
    root.reshard()  # which stays whole after it
    return made


@contextmanager
def whole(model: CausalLM) -> Iterator[None]:
    """All weights are here inside the block, to be used and not to be changed."""
    with ExitStack() as stack:
        if isinstance(model, Sharded):
            for module in _parts(model.root):
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
                stack.callback(_share_out, module, module is not model.root)
        yield


def plain(model: CausalLM) -> Any:
    """The network as an ordinary one; of a sharded model a copy in the first process's memory.

    Every process has to call; the others get None of a sharded model.
    """
    if not isinstance(model, Sharded):
        return model.network
    held: dict[str, Tensor] = model.network.state_dict()
    state: dict[str, Tensor] = {}
    for name, x in held.items():
        gathered = _all_of(x)
        if distributed.rank() == 0:
            state[name] = gathered.to("cpu", model.dtype)
    if distributed.rank() > 0:
        return None
    network = copy.deepcopy(model.skeleton)
    network.load_state_dict(state, assign=True)
    bare(network).tie_weights()
    return network.eval()


def _all_of(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def _found(network: Any, vocabulary: int) -> LmHead:
    head = find_head(bare(network), vocabulary)
    assert head is not None, "there was one before"
    return head


def _parts(root: Any) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _share_out(module: Any, after_forward: bool) -> None:
    module.set_reshard_after_forward(after_forward, recurse=False)
    module.reshard()
