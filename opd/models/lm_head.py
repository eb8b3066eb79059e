"""The LM head: logits from hidden states, for all ids or for a few ids per token.

logit_v = cap(scale * (<h, W_v> + b_v)), cap(x) = softcap * tanh(x / softcap) where a model has one.

Shapes: n or N flat tokens, D hidden size, R rows of the head, V shared vocabulary (V <= R), K ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from diagnostics.errors import InvalidInput
from opd.models.gathered_head import gathered_product
from opd.models.planned_device import device_kind

CPU_BLOCK, CPU_CHUNK = 1 << 19, 1 << 22
"""Largest numbers of elements: of a block that stays in the cache, and of an array whose memory the
allocator reuses (2 and 16 MiB of float32). Larger arrays are mapped anew each time, which costs as
much as filling them.
"""
CPU_CHUNK_TOKENS = 64
"""Tokens of a chunk in any case: with fewer, products would wait for the rows of the head."""


@dataclass(frozen=True, eq=False)
class LmHead:
    """A head that is one matrix, with what the model computes after it."""

    weight: Tensor
    """(R, D) rows of the head."""
    vocabulary: int
    """V, the number of rows that are used."""
    bias: Tensor | None = None
    """(R,) bias."""
    scale: float = 1.0
    """Factor of the logits, as in the module's docstring."""
    softcap: float | None = None
    """Soft-cap of the logits, as in the module's docstring."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that a loss can be differentiated by: weight and, if there is one, bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def is_linear(self) -> bool:
        """Whether the logits are the products themselves, without scale and soft-cap."""
        return self.softcap is None and self.scale == 1

    def num_products(self, hidden: Tensor) -> int:
        """Return R, the number of products of a state in `hidden`."""
        return len(self.weight)

    def products(self, hidden: Tensor) -> Tensor:
        """Return <h, W_r> + b_r of every head row, before scale and soft-cap, without gradient.

        On CUDA the sums of half-precision products stay float32; elsewhere they are rounded to half
        precision, as the model's own logits are.

        Args:
            hidden: (n, D) hidden states.

        Returns:
            (n, R) float32, or float64 for float64 input.
        """
        weight, bias = self.weight, self.bias
        with torch.no_grad():
            if not is_half_on_cuda(weight):
                return _at_least_float32(linear(hidden.to(weight.dtype), weight, bias))
            z = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
            return z if bias is None else z.add_(bias)

    def shape_products(self, products: Tensor) -> Tensor:
        """Convert products (..., any ids) to logits of the same shape: scale and soft-cap."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def derivatives(self, logits: Tensor) -> Tensor:
        """Return the derivatives scale (1 - (logit/softcap)^2) of logits (..., V) by products."""
        if self.softcap is None:
            return torch.full_like(logits, self.scale)
        return self.scale * (1 - (logits / self.softcap).square())

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (n, V) float32 logits of (n, D) states, without gradient; see `chunk_slices`."""
        return self.shape_products(self.products(hidden)[..., : self.vocabulary])

    def gather(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of K ids per token without computing the others.

        The numbers are those of `logits(hidden).gather(-1, ids)`, but not rounded to half precision
        and with gradient to hidden, weight and bias. Time and memory do not depend on V, except
        that the gradient of the weight has its shape.

        Args:
            hidden: (N, D) hidden states.
            ids: (N, K) long.

        Returns:
            (N, K) float32 logits.
        """
        products = gathered_product(hidden, self.weight, ids)
        if self.bias is not None:
            products = products + self.bias[ids]
        return self.shape_products(products)

    def backproject(self, gradient: Tensor, width: int) -> Tensor:
        """Map gradients of products to gradients of hidden states.

        Args:
            gradient: (n, r) gradients by the first r products.
            width: D.

        Returns:
            (n, D) gradients.
        """
        return gradient.to(self.weight.dtype) @ self.weight[: gradient.shape[1]]

    def add_parameter_gradients(
        self, sums: Sequence[Tensor | None], gradient: Tensor, hidden: Tensor
    ) -> None:
        """Add a chunk's gradients by `parameters` to their sums.

        Args:
            sums: One float32 or float64 sum per parameter; None where none is needed.
            gradient: (n, R) gradients by the products.
            hidden: (n, D) hidden states of the chunk.
        """
        if len(sums) > 1 and (bias_sum := sums[1]) is not None:
            bias_sum += gradient.sum(0)
        weight_sum = sums[0]
        if weight_sum is None:
            return
        if is_half_on_cuda(hidden):
            half = gradient.to(hidden.dtype).T
            torch.addmm(weight_sum, half, hidden, out_dtype=torch.float32, out=weight_sum)
        else:
            weight_sum.addmm_(gradient.T, hidden.to(gradient.dtype))


@dataclass(frozen=True, eq=False)
class LogitsHead:
    """The head of a model whose "hidden states" already are its logits; it has no parameters.

    Its methods are those of `LmHead`, with D = R.
    """

    vocabulary: int
    """V, the number of logits that are used."""
    parameters: tuple[Tensor, ...] = ()
    """Nothing: the head's weights belong to the network."""
    is_linear: bool = True
    """Logits are the products themselves."""

    def num_products(self, hidden: Tensor) -> int:
        """Return R, the width of `hidden`."""
        return hidden.shape[1]

    def products(self, hidden: Tensor) -> Tensor:
        """Return the (n, R) logits themselves, at least in float32, without gradient."""
        return _at_least_float32(hidden).detach()

    def shape_products(self, products: Tensor) -> Tensor:
        """Return the logits unchanged."""
        return products

    def derivatives(self, logits: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(logits)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the first V of the (n, R) logits."""
        return self.products(hidden)[..., : self.vocabulary]

    def gather(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the (N, K) logits of the ids, with gradient."""
        return _at_least_float32(hidden.gather(-1, ids))

    def backproject(self, gradient: Tensor, width: int) -> Tensor:
        """Pad (n, r) gradients to (n, D) with 0."""
        return torch.nn.functional.pad(gradient, (0, width - gradient.shape[1]))

    def add_parameter_gradients(
        self, sums: Sequence[Tensor | None], gradient: Tensor, hidden: Tensor
    ) -> None:
        """Do nothing: there are no parameters."""


Head = LmHead | LogitsHead
"""The head of a model."""


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by the temperature, without a copy at temperature 1."""
    return logits if temperature == 1 else logits / temperature


def chunk_slices(count: int, vocabulary: int, max_elements: int) -> list[slice]:
    """Return slices of at most max_elements / vocabulary tokens, and of at least one."""
    size = max(1, max_elements // vocabulary)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def block_slices(chunk: slice, vocabulary: int, max_elements: int | None) -> list[slice]:
    """Split a slice of tokens as `chunk_slices` does; a single block if `max_elements` is None.

    Args:
        chunk: Slice of tokens.
        vocabulary: Numbers of a token.
        max_elements: Numbers of a block.

    Returns:
        The blocks, slices of the same tokens as the chunk.
    """
    if max_elements is None:
        return [chunk]
    blocks = chunk_slices(chunk.stop - chunk.start, vocabulary, max_elements)
    return [slice(chunk.start + b.start, chunk.start + b.stop) for b in blocks]


def cached_elements(device: torch.device) -> int | None:
    """Return how many float32 numbers of a block stay in a CPU's cache; None elsewhere."""
    return CPU_BLOCK if device_kind(device) == "cpu" else None


def chunk_elements(max_elements: int, vocabulary: int, device: torch.device) -> int:
    """Return how many elements a chunk may have: `max_elements`, fewer on a CPU (`CPU_CHUNK`).

    Args:
        max_elements: Numbers that may exist at once.
        vocabulary: Numbers of a token.
        device: Where they are computed.

    Returns:
        The numbers of a chunk.
    """
    if device_kind(device) != "cpu":
        return max_elements
    return min(max_elements, max(CPU_CHUNK, CPU_CHUNK_TOKENS * vocabulary))


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
