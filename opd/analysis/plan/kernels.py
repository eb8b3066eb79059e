"""Attention and experts on the meta device, as the kernels compute them on a CPU or a GPU.

On the meta device torch would choose the plainest attention, which keeps all weights of attention,
and grouped products of experts are refused. These functions take the places of both. They allocate
what the usual kernels of scaled dot-product attention keep for the backward pass: queries, keys
and values (repeated for grouped queries where there is a mask), the mask in the precision of the
queries, outputs, and one normaliser for each query.
"""

from typing import Any

import torch
from torch import Tensor

from opd.analysis.plan.counts import ATEN, OWN_FLOPS

NAME = "opd_plan"
"""Name of both functions in transformers."""


def register_kernels() -> None:
    """Make attention and experts of the meta device known to transformers."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(NAME, attention)
    ExpertsInterface.register(NAME, experts)
    OWN_FLOPS[ATEN._scaled_dot_product_flash_attention_for_cpu] = attention_flops
    OWN_FLOPS[ATEN._scaled_dot_product_flash_attention_for_cpu_backward] = attention_backward_flops


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers' interface.

    Args:
        module: The layer.
        query: (B, H, L, d).
        key: (B, G, M, d), G key-value heads.
        value: (B, G, M, e).
        attention_mask: (B, 1, L, M) bool, or None for plain causal attention.
        dropout: Unused; the models run in evaluation mode.
        scaling: Factor of the products.

    Returns:
        (B, L, H, e) outputs, and None for the weights.
    """
    rows, heads, length, _width = query.shape
    groups = heads // key.shape[1]
    if groups > 1 and attention_mask is not None:
        if length == 1:
            query = query.reshape(rows, key.shape[1], groups, query.shape[-1])
        else:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = attention_mask
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
    if key.shape[-1] != value.shape[-1]:
        weights = query @ key.transpose(-1, -2)
        weights = (weights if mask is None else weights + mask).softmax(-1)
        out = weights @ value
    else:
        is_causal = mask is None and length > 1
        out = ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling
        )[0]
    out = out.reshape(rows, -1, length, value.shape[-1])
    return out.transpose(1, 2).contiguous(), None


def experts(module: Any, hidden: Tensor, top_ids: Tensor, top_weights: Tensor) -> Tensor:
    """Compute a layer of experts that each get equally many tokens, for transformers' interface.

    Args:
        module: The experts.
        hidden: (N, D) states.
        top_ids: (N, E) ids of each token's experts.
        top_weights: (N, E) their weights.

    Returns:
        (N, D) states.
    """
    num_tokens, width = hidden.shape
    num_pairs = top_ids.numel()
    order = top_ids.reshape(-1).sort().indices
    first = module.gate_up_proj if module.has_gate else module.up_proj
    num_used = min(len(first), num_pairs)
    rows_each = -(-num_pairs // num_used)
    chosen_states = hidden[order // top_ids.shape[1]]
    padding = num_used * rows_each - num_pairs
    states = torch.nn.functional.pad(chosen_states, (0, 0, 0, padding))
    states = states.view(num_used, rows_each, width)
    states = states @ _matrix(module, first, num_used)
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = (states @ _matrix(module, module.down_proj, num_used)).view(-1, width)[:num_pairs]
    weighted = (states * top_weights.reshape(-1)[order, None])[order]
    return weighted.view(num_tokens, -1, width).sum(1).to(hidden.dtype)


def _matrix(module: Any, weight: Tensor, count: int) -> Tensor:
    """Return (count, inputs, outputs) matrices of the first experts."""
    matrices = weight if count == len(weight) else weight[:count]
    return matrices if module.is_transposed else matrices.transpose(1, 2)


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    """Return the FLOPs of the two products of attention; masked pairs count."""
    rows, heads, length, width = query.shape
    return 2.0 * rows * heads * length * key.shape[2] * (width + value.shape[-1])


def attention_backward_flops(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> float:
    """Return the FLOPs of the five products of the backward pass."""
    rows, heads, length, width = query.shape
    return 2.0 * rows * heads * length * key.shape[2] * (3 * width + 2 * value.shape[-1])
