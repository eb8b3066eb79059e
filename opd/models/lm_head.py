"""The LM head: logits from hidden states, for all ids or for a few ids per token.

logit_v = cap(scale * (<h, W_v> + b_v)), cap(x) = softcap * tanh(x / softcap) where a model has one.

Shapes: n or N flat tokens, D hidden size, R rows of the head, V shared vocabulary (V <= R), K ids.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from diagnostics.errors import InvalidInput
from opd.models.gathered_head import gathered_product


@dataclass(frozen=True, eq=False)
class LmHead:
    """What a model computes after its last hidden state."""

    weight: Tensor | None
    """(R, D), or None where the "hidden states" already are the model's logits."""
    vocabulary: int
    """V, the number of rows that are used."""
    bias: Tensor | None = None
    """(R,) bias."""
    scale: float = 1.0
    """Factor of the logits, as in the module's docstring."""
    softcap: float | None = None
    """Soft-cap of the logits, as in the module's docstring."""


def head_products(hidden: Tensor, head: LmHead) -> Tensor:
    """Return <h, W_r> + b_r of every head row, before scale and soft-cap, without gradient.

    On CUDA the sums of half-precision products stay float32; elsewhere they are rounded to half
    precision, as the model's own logits are.

    Args:
        hidden: (n, D) hidden states.
        head: The head.

    Returns:
        (n, R) float32, or float64 for float64 input.
    """
    weight, bias = head.weight, head.bias
    if weight is None:
        return _at_least_float32(hidden).detach()
    with torch.no_grad():
        if not is_half_on_cuda(weight):
            return _at_least_float32(linear(hidden.to(weight.dtype), weight, bias))
        z = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
        return z if bias is None else z.add_(bias)


def apply_scale_and_softcap(products: Tensor, head: LmHead) -> Tensor:
    """Convert products (..., any ids) to logits of the same shape."""
    logits = products if head.scale == 1 else products * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def logit_derivatives(logits: Tensor, head: LmHead) -> Tensor:
    """Return the derivatives scale (1 - (logit/softcap)^2) of logits (..., V) by their products."""
    if head.softcap is None:
        return torch.full_like(logits, head.scale)
    return head.scale * (1 - (logits / head.softcap).square())


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by the temperature, without a copy at temperature 1."""
    return logits if temperature == 1 else logits / temperature


def full_logits(hidden: Tensor, head: LmHead) -> Tensor:
    """Return (n, V) float32 logits of (n, D) states, without gradient; see `chunk_slices`."""
    return apply_scale_and_softcap(head_products(hidden, head)[..., : head.vocabulary], head)


def gathered_logits(hidden: Tensor, head: LmHead, ids: Tensor) -> Tensor:
    """Return the logits of K ids per token without computing the others.

    The numbers are those of `full_logits(...).gather(-1, ids)`, but not rounded to half precision
    and with gradient to hidden, weight and bias. Time and memory do not depend on V, except that
    the gradient of the weight has its shape.

    Args:
        hidden: (N, D) hidden states.
        head: The head.
        ids: (N, K) long.

    Returns:
        (N, K) float32 logits.
    """
    if head.weight is None:
        return apply_scale_and_softcap(_at_least_float32(hidden.gather(-1, ids)), head)
    products = gathered_product(hidden, head.weight, ids)
    if head.bias is not None:
        products = products + head.bias[ids]
    return apply_scale_and_softcap(products, head)


def chunk_slices(count: int, vocabulary: int, max_elements: int) -> list[slice]:
    """Return slices of at most max_elements / vocabulary tokens, and of at least one."""
    size = max(1, max_elements // vocabulary)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def two_stage_topk(logits: Tensor, k: int, block: int = 128) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each row, exactly.

    The maximum of every block of ids is computed first. The k blocks with the largest maxima
    contain k numbers at least as large as any other, so only their k * block numbers are compared.
    Values are those of `torch.topk`, and so are the ids unless several ids tie for the last place;
    which of them is returned is then unspecified, as in torch.

    Args:
        logits: (..., V).
        k: Number of ids per row.
        block: Ids per block.

    Returns:
        Values and ids (..., k), in descending order.

    Raises:
        InvalidInput: k is larger than V.
    """
    vocabulary = logits.shape[-1]
    if k > vocabulary:
        raise InvalidInput(f"k is {k}, but the vocabulary has {vocabulary} ids; choose a smaller K")
    num_blocks = vocabulary // block
    if num_blocks <= 4 * k:  # with so few blocks a single pass is as fast
        topk = logits.topk(k, -1)
        return topk.values, topk.indices
    blocks = logits[..., : num_blocks * block].unflatten(-1, (num_blocks, block))
    top_blocks = blocks.amax(-1).topk(k, -1, sorted=False).indices
    candidates = blocks.gather(-2, top_blocks[..., None].expand(*top_blocks.shape, block)).flatten(
        -2
    )
    offsets = torch.arange(block, device=logits.device)
    ids = (top_blocks[..., None] * block + offsets).flatten(-2)
    if num_blocks * block < vocabulary:
        remaining_ids = torch.arange(num_blocks * block, vocabulary, device=logits.device)
        candidates = torch.cat([candidates, logits[..., num_blocks * block :]], -1)
        ids = torch.cat([ids, remaining_ids.expand(*ids.shape[:-1], len(remaining_ids))], -1)
    values, positions = candidates.topk(k, -1)
    return values, ids.gather(-1, positions)


def find_head(network: Any, vocabulary: int) -> LmHead | None:
    """Read the head from a model's public API and configuration.

    Args:
        network: Hugging Face model.
        vocabulary: V, the number of rows to use.

    Returns:
        The head, or None if the model does not describe it.

    Raises:
        InvalidInput: An adapter is attached to the head.
    """
    output = network.get_output_embeddings()
    if any(hasattr(output, name) for name in ("base_layer", "original_module")):
        raise InvalidInput(
            "an adapter is attached to the model's head, so its logits are not those of one "
            "matrix; remove the head (lm_head, embed_out) from target_modules and "
            "modules_to_save, or merge the adapter first"
        )
    weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    config = network.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factors = (getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier"))
    scale = 1.0 / divisor
    for factor in factors:
        scale *= 1.0 if factor is None else factor
    softcap = getattr(config, "final_logit_softcapping", None)
    return LmHead(weight, vocabulary, getattr(output, "bias", None), scale, softcap)


def is_half_on_cuda(x: Tensor) -> bool:
    """Return whether a product with x can have half-precision factors and a float32 sum."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32 unless the dtype is float64."""
    return x if x.dtype == torch.float64 else x.float()
