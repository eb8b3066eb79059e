"""The head: from hidden states to logits, all of a chunk's or only those of a few ids.

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
    """What a model does after its last hidden state.

    weight: (R, D), or None where the "hidden states" already are the model's logits; bias: (R,);
    scale, softcap: as in the module's docstring; vocabulary: V, the rows that count.
    """

    weight: Tensor | None
    vocabulary: int
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def products(hidden: Tensor, head: LmHead) -> Tensor:
    """(n, D) -> (n, R) float32: <h, W_r> + b_r of every row, before scale and soft-cap.

    Without gradient. On CUDA the sums of half-precision products stay float32; elsewhere they are
    rounded to half precision, as the model's own logits are.
    """
    weight, bias = head.weight, head.bias
    if weight is None:
        return _wide(hidden).detach()
    with torch.no_grad():
        if not half_on_gpu(weight):
            return _wide(linear(hidden.to(weight.dtype), weight, bias))
        z = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
        return z if bias is None else z.add_(bias)


def shaped(products: Tensor, head: LmHead) -> Tensor:
    """Logits of the products: (..., any ids) -> the same shape."""
    logits = products if head.scale == 1 else products * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def logit_slopes(logits: Tensor, head: LmHead) -> Tensor:
    """Derivatives of logits (..., V) by their products, (..., V): scale (1 - (logit/softcap)^2)."""
    if head.softcap is None:
        return torch.full_like(logits, head.scale)
    return head.scale * (1 - (logits / head.softcap).square())


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, without a copy at temperature 1."""
    return logits if temperature == 1 else logits / temperature


def full_logits(hidden: Tensor, head: LmHead) -> Tensor:
    """(n, D) -> (n, V) float32, no gradient. Keep n to a chunk: see `chunks`."""
    return shaped(products(hidden, head)[..., : head.vocabulary], head)


def gathered_logits(hidden: Tensor, head: LmHead, ids: Tensor) -> Tensor:
    """Logits of K ids a token, without those of the others: (N, D), (N, K) -> (N, K) float32.

    The same numbers as `full_logits(...).gather(-1, ids)`, but not rounded to half precision, with
    gradient to hidden, weight and bias. Time and memory do not depend on V, save that the
    gradient of the weight has its shape.
    """
    if head.weight is None:
        return shaped(_wide(hidden.gather(-1, ids)), head)
    some = gathered_product(hidden, head.weight, ids)
    if head.bias is not None:
        some = some + head.bias[ids]
    return shaped(some, head)


def chunks(count: int, vocabulary: int, elements: int) -> list[slice]:
    """Slices of at most elements / vocabulary tokens, but of one at least."""
    size = max(1, elements // vocabulary)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def two_stage_topk(logits: Tensor, k: int, block: int = 128) -> tuple[Tensor, Tensor]:
    """The k largest of each row, exactly: (..., V) -> values and ids (..., k), descending.

    Maxima of blocks of ids; the k blocks with the largest maxima hold k numbers that are as large
    as any other, so that only their k * block numbers are compared. The values are those of
    `torch.topk`, and so are the ids unless several ids tie for the last place: which of them is
    taken is then open here as there.

    Raises:
      ValueError: k is larger than V.
    """
    size = logits.shape[-1]
    if k > size:
        raise InvalidInput(f"{k} ids wanted of a vocabulary of {size}; choose a smaller K")
    count = size // block
    if count <= 4 * k:  # too few blocks to leave out: one pass is as fast
        best = logits.topk(k, -1)
        return best.values, best.indices
    whole = logits[..., : count * block].unflatten(-1, (count, block))
    chosen = whole.amax(-1).topk(k, -1, sorted=False).indices
    inside = whole.gather(-2, chosen[..., None].expand(*chosen.shape, block)).flatten(-2)
    within = torch.arange(block, device=logits.device)
    ids = (chosen[..., None] * block + within).flatten(-2)
    if count * block < size:
        rest = torch.arange(count * block, size, device=logits.device)
        inside = torch.cat([inside, logits[..., count * block :]], -1)
        ids = torch.cat([ids, rest.expand(*ids.shape[:-1], len(rest))], -1)
    values, at = inside.topk(k, -1)
    return values, ids.gather(-1, at)


def find_head(network: Any, vocabulary: int) -> LmHead | None:
    """The head as the model's public API and its configuration describe it; None if they do not.

    Raises:
      ValueError: an adapter sits on the head.
    """
    output = network.get_output_embeddings()
    if any(hasattr(output, name) for name in ("base_layer", "original_module")):
        raise InvalidInput(
            "an adapter sits on the model's head, so its logits are not those of one matrix; take "
            "the head (lm_head, embed_out) out of target_modules and modules_to_save, or merge "
            "the adapter first"
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


def half_on_gpu(x: Tensor) -> bool:
    """Whether a product with x can have half-precision factors and a float32 sum."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
