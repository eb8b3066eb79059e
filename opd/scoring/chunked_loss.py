"""A loss of chunks of tokens from the products of all head rows, with gradient in one pass.

The products of a chunk and their gradients are matrix products over all its tokens. What lies
between them is computed in blocks of a chunk, which on a CPU fit its cache.

Shapes: N flat tokens, n tokens of a block, D hidden size, R rows of the head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diagnostics.errors import OperationFailed
from opd.models.lm_head import Head, block_slices, chunk_slices

BlockLoss = Callable[[Tensor, slice], Tensor]
"""Function of the (n, R) products of a block and its slice of the tokens that returns a scalar."""
ChunkLoss = Callable[[slice], BlockLoss]
"""Prepares a chunk, whose slice of the tokens it gets, and returns the loss of its blocks."""


def chunked_loss(
    hidden: Tensor,
    head: Head,
    loss: ChunkLoss,
    max_elements: int,
    block_elements: int | None = None,
) -> Tensor:
    """Return the sum of `loss` over chunks of tokens, with gradient to hidden states and head.

    Neither forward nor backward keeps (N, R) values; gradients of the head are summed in float32.
    The result cannot be differentiated twice, and `backward` can run once only.

    Args:
        hidden: (N, D) student states.
        head: The student's head.
        loss: Loss of a chunk.
        max_elements: Products that exist at once.
        block_elements: Products of a block; None if each chunk is a single block.

    Returns:
        Scalar loss.
    """
    total: Tensor = _ChunkedLoss.apply(
        head, loss, max_elements, block_elements, hidden, *head.parameters
    )
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        loss: ChunkLoss,
        max_elements: int,
        block_elements: int | None,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wants_hidden, *wanted = ctx.needs_input_grad[4:]
        hidden_gradient = torch.zeros_like(hidden) if wants_hidden else None
        sums = [
            torch.zeros_like(x, dtype=_sum_dtype(x)) if wants_gradient else None
            for x, wants_gradient in zip(parameters, wanted, strict=True)
        ]
        total = hidden.new_zeros((), dtype=_sum_dtype(hidden))
        for c in chunk_slices(len(hidden), head.num_products(hidden), max_elements):
            z, block_loss = head.products(hidden[c]), loss(c)
            wants_gradient = any((wants_hidden, *wanted))
            is_view = z.untyped_storage() is hidden.untyped_storage()
            dz = torch.empty_like(z) if wants_gradient and is_view else z  # in place of products
            for block in block_slices(c, z.shape[1], block_elements):
                rows = slice(block.start - c.start, block.stop - c.start)
                if not wants_gradient:
                    total += block_loss(z[rows], block)
                    continue
                leaf = z[rows].detach().requires_grad_()
                with torch.enable_grad():
                    value = block_loss(leaf, block)
                dz[rows] = torch.autograd.grad(value, leaf)[0]
                total += value.detach()
            if hidden_gradient is not None:
                hidden_gradient[c] = head.backproject(dz, hidden.shape[1])
            if wants_gradient:
                head.add_parameter_gradients(sums, dz, hidden[c])
        ctx.gradients = [hidden_gradient, *sums]
        ctx.dtypes = [x.dtype for x in (hidden, *parameters)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise OperationFailed(
                "backward was already called on this loss; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if x is None else x.mul_(scale).to(dtype)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (None, None, None, None, *scaled)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
