"""Products of hidden states with a few rows of a head, without (N, V) or (N, K, D) intermediates.

z[n, k] = <h[n], W[ids[n, k]]>, and for a gradient dz: dh[n] = sum_k dz[n, k] W[ids[n, k]] and dW[v]
= sum of dz[n, k] h[n] over all (n, k) with ids = v. Memory traffic is N K D numbers each way,
independent of V; only dW itself has V rows. The sum of dW runs over the entries sorted by id,
segment by segment, so it has a fixed order and needs no atomics.

Shapes: N tokens, K ids per token, D hidden size, V rows of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

_ROWS_AT_ONCE = 512
"""Head rows that are copied and widened to float32 at once, where a product of two half-precision
vectors must not be rounded to half precision.
"""


def gathered_product(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Return z[n, k] = <hidden[n], weight[ids[n, k]]>, with gradient to both.

    Triton computes on CUDA where it is installed, torch elsewhere. Deterministic.

    Args:
        hidden: (N, D).
        weight: (V, D).
        ids: (N, K) long, repetition allowed, constant.

    Returns:
        (N, K), float64 for float64 input and else float32. Sums are float32 also for half-precision
        input; the gradients have the dtypes of hidden and weight.
    """
    product: Tensor = _GatheredProduct.apply(hidden, weight, ids)
    return product


class _GatheredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        hidden, weight, ids = hidden.contiguous(), weight.contiguous(), ids.contiguous()
        ctx.save_for_backward(hidden, weight, ids)
        return select_kernels(hidden).product(hidden, weight, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, ids = ctx.saved_tensors
        kernels, dz = select_kernels(hidden), dz.contiguous()
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        dh = kernels.hidden_gradient(dz, weight, ids).to(hidden.dtype) if needs_hidden else None
        dw = (
            kernels.weight_gradient(dz, hidden, ids, len(weight)).to(weight.dtype)
            if needs_weight
            else None
        )
        return dh, dw, None


def torch_product(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Compute z of the module's docstring with torch."""
    count, k = ids.shape
    if weight.dtype in (torch.float32, torch.float64) and hidden.dtype == weight.dtype:
        # <gradient of bag n, row of its sample (n, k)>: what a bag's weights get in its backward
        bag = torch.arange(count, device=ids.device)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            hidden, weight, ids.flatten(), bag * k, bag.repeat_interleave(k), 0
        ).view(count, k)
    out = torch.empty((count, k), dtype=torch.float32, device=hidden.device)
    step = max(1, _ROWS_AT_ONCE // max(k, 1))
    for c in (slice(i, i + step) for i in range(0, count, step)):
        out[c] = torch.bmm(weight[ids[c]].float(), hidden[c, :, None].float())[..., 0]
    return out


def torch_hidden_gradient(dz: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Compute dh with torch: each token is a bag of weighted head rows."""
    return embedding_bag(ids, weight, mode="sum", per_sample_weights=dz.to(weight.dtype))


def torch_weight_gradient(dz: Tensor, hidden: Tensor, ids: Tensor, rows: int) -> Tensor:
    """Compute dW with torch: each head row is a bag of weighted hidden states, empty if unused."""
    by_id, order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(by_id, torch.arange(rows, device=ids.device))
    token, factor = order // max(ids.shape[1], 1), dz.flatten()[order].to(hidden.dtype)
    return embedding_bag(token, hidden, starts, mode="sum", per_sample_weights=factor)


@dataclass(frozen=True)
class Kernels:
    """Functions that compute z, dh and dW."""

    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    hidden_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Tensor, int], Tensor]


_TORCH = Kernels(torch_product, torch_hidden_gradient, torch_weight_gradient)


def select_kernels(hidden: Tensor) -> Kernels:
    """Return Triton's kernels on CUDA if it is installed, else torch's, for contiguous inputs."""
    if hidden.is_cuda and hidden.dtype != torch.float64 and find_spec("triton") is not None:
        from opd.models import gathered_head_triton as on_gpu

        return Kernels(on_gpu.product, on_gpu.hidden_gradient, on_gpu.weight_gradient)
    return _TORCH
