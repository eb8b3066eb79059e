"""Gradients of selected weights below the LM head, sequence by sequence (E-1, E-2).

A linear layer with inputs a_t and gradients b_t at its outputs has the gradient sum_t b_t a_t^T for
a sequence. Its sketch is sum_t (R1 b_t)(R2 a_t)^T, so that neither the outer product of a token nor
the matrix of a sequence is formed; its squared length is exact, by whichever of two ways is cheaper
(`linear_squares`). Layers whose weights are vectors (norms) keep the gradients themselves. Biases
count, and so do the factors of adapters, which are linear layers of their own.

Norm layers are the cheap default: their noise scale follows that of the whole transformer
(2411.00999; verify it once for an architecture, here against `*mlp.down_proj` or the like).

Shapes: B sequences, L positions (padding included; it carries no gradient), O and I sizes of a
layer's outputs and inputs, F estimators, J copies of a sketch, m numbers a copy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from zlib import crc32

import torch
from torch import Tensor, nn

from diagnostics.errors import InvalidInput
from diagnostics.gradients.sketch import Projection, project, random_projection


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Layers that are measured together.

    The sketches of several layers are added, which with independent signs is a sketch of all of
    them.
    """

    name: str
    """The pattern that selected the layers."""
    layers: Mapping[str, nn.Module]
    """Modules by their name in the network."""
    projections: Mapping[str, Projection]
    """Of each layer if they are linear, else empty: then gradients are kept in full."""


def make_block(network: nn.Module, pattern: str, rows: int = 16, copies: int = 8) -> Block:
    """Select the trained layers whose names match a shell pattern.

    Containers do not count, nor do layers without trained weights.

    Args:
        network: The network.
        pattern: Shell pattern over module names, such as "*norm" or "*.3.mlp.down_proj".
        rows: Rows of each projection.
        copies: Independent copies of the sketch.

    Returns:
        The block.

    Raises:
        InvalidInput: No trained layer matches, or the matches are of both kinds or of another kind.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        if fnmatchcase(name, pattern) and _trained_parameters(module)
    }
    if not layers:
        trained_names = [
            name for name, module in network.named_modules() if _trained_parameters(module)
        ]
        raise InvalidInput(
            f"no trained layer matches {pattern!r}; trained layers: {', '.join(trained_names[:40])}"
        )
    linear = {name for name, module in layers.items() if isinstance(module, nn.Linear)}
    if linear and len(linear) < len(layers):
        raise InvalidInput(
            f"{pattern!r} matches linear layers ({min(linear)}) and others "
            f"({min(layers.keys() - linear)}); use a separate pattern for each kind"
        )
    for name, module in layers.items():
        if name not in linear and any(p.dim() > 1 for p in _trained_parameters(module).values()):
            raise InvalidInput(
                f"{name} is a {type(module).__name__} with a matrix; only linear layers and layers "
                "whose weights are vectors are supported"
            )
    projections = {
        name: random_projection(
            module.out_features, _input_width(module), crc32(name.encode()), rows, copies
        )
        for name, module in layers.items()
        if isinstance(module, nn.Linear)
    }
    return Block(name=pattern, layers=layers, projections=projections)


def _trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}


def _input_width(layer: nn.Linear) -> int:
    parameters = _trained_parameters(layer)
    return ("weight" in parameters) * layer.in_features + ("bias" in parameters)


def sequence_gradients(
    blocks: Iterable[Block], forward: Callable[[], Tensor], output_gradients: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute each block's gradients or sketches, and exact squared lengths, of every sequence.

    Cost: one forward pass, one backward pass an estimator down to the lowest block, without
    gradients of weights.
    Memory: the graph of the forward pass, and inputs and output gradients of the blocks' layers.
    Nothing is left in `.grad`.

    Args:
        blocks: Blocks to measure.
        forward: Runs the network once on (B, L) ids and returns any tensor computed from it: hidden
            states, or log-probabilities of the sampled tokens.
        output_gradients: For each estimator, the gradient of sum_i loss_i with respect to that
            tensor. With log-probabilities these are the weights of the tokens.

    Returns:
        Block name to (B, F, J, m) gradients or sketches, and (B, F) exact squared lengths.

    Raises:
        InvalidInput: A layer did not run exactly once in forward, or not on (B, L, I).
    """
    blocks = list(blocks)
    with torch.enable_grad(), _record_calls(blocks) as calls:
        output = forward()
    names = list({name: None for block in blocks for name in block.layers})
    if call_counts := {name: len(calls[name]) for name in names if len(calls[name]) != 1}:
        raise InvalidInput(
            f"layers must run exactly once in a forward pass; number of calls: {call_counts}"
        )
    layer_outputs = [calls[name][0][1] for name in names]
    gradients: dict[str, list[tuple[Tensor, Tensor]]] = {block.name: [] for block in blocks}
    for output_gradient in output_gradients:
        layer_gradients = torch.autograd.grad(
            output, layer_outputs, output_gradient, retain_graph=True, allow_unused=True
        )
        layer_tensors = {
            name: (
                calls[name][0][0],
                torch.zeros_like(layer_output) if layer_gradient is None else layer_gradient,
            )
            for name, layer_output, layer_gradient in zip(
                names, layer_outputs, layer_gradients, strict=True
            )
        }
        for block in blocks:
            gradients[block.name].append(_block_gradients(block, layer_tensors))
    return {
        name: (
            torch.stack([x for x, _ in layer_gradients], 1),
            torch.stack([squares for _, squares in layer_gradients], 1),
        )
        for name, layer_gradients in gradients.items()
    }


@contextmanager
def _record_calls(blocks: Iterable[Block]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Yield a dict that collects each layer's (input, output) of every call inside the context."""
    layers = {name: module for block in blocks for name, module in block.layers.items()}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if inputs[0].dim() != 3:
                raise InvalidInput(f"{name} ran on {tuple(inputs[0].shape)}, expected (B, L, I)")
            calls[name].append((inputs[0].detach(), output))

        return hook

    handles = [module.register_forward_hook(make_hook(name)) for name, module in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _block_gradients(
    block: Block, layer_tensors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return (B, J, m) and (B,) of one estimator, from each layer's inputs and output gradients."""
    if not block.projections:
        gradients = torch.cat(
            [
                vector_gradients(module, *layer_tensors[name])
                for name, module in block.layers.items()
            ],
            1,
        )
        return gradients[:, None], gradients.double().square().sum(1)
    sketches, squares = [], []
    for name, layer in block.layers.items():
        inputs, output_gradients = (
            _augment_inputs(layer, layer_tensors[name][0]),
            _at_least_float32(layer_tensors[name][1]),
        )
        projection = block.projections[name].to(inputs.device)
        sketches.append(linear_sketch(inputs, output_gradients, projection))
        squares.append(linear_squares(inputs, output_gradients))
    return torch.stack(sketches).sum(0), torch.stack(squares).sum(0)


def _augment_inputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the (B, L, I) inputs of the trained weights: a bias is a weight on a constant 1."""
    parameters, inputs = _trained_parameters(layer), _at_least_float32(inputs)
    parts = [inputs] * ("weight" in parameters) + [torch.ones_like(inputs[..., :1])] * (
        "bias" in parameters
    )
    return torch.cat(parts, -1)


@torch.no_grad()
def linear_sketch(inputs: Tensor, output_gradients: Tensor, projection: Projection) -> Tensor:
    """Sketch sum_t b_t a_t^T of each sequence.

    Args:
        inputs: (B, L, I) a.
        output_gradients: (B, L, O) b.
        projection: Projection of the layer.

    Returns:
        (B, J, m1 m2).
    """
    output_sketch, input_sketch = (
        project(x.flatten(0, 1), r).view(*x.shape[:2], *r.shape[1:])
        for x, r in ((output_gradients, projection.vocabulary), (inputs, projection.hidden))
    )
    return (
        torch.einsum("btja,btjc->bjac", output_sketch, input_sketch).flatten(2) * projection.scale
    )


@torch.no_grad()
def linear_squares(inputs: Tensor, output_gradients: Tensor) -> Tensor:
    """Return the exact (B,) |sum_t b_t a_t^T|^2 of each sequence.

    Short sequences by <a a^T, b b^T> in L^2 (I + O) products, long ones by the matrix in L I O.

    Args:
        inputs: (B, L, I) a.
        output_gradients: (B, L, O) b.

    Returns:
        (B,) float64.
    """
    length, break_even_length = (
        inputs.shape[1],
        inputs.shape[2] * output_gradients.shape[2] / (inputs.shape[2] + output_gradients.shape[2]),
    )
    if length < break_even_length:
        return (
            (inputs @ inputs.mT).double() * (output_gradients @ output_gradients.mT).double()
        ).sum((1, 2))
    return torch.stack(
        [(y.T @ x).double().square().sum() for x, y in zip(inputs, output_gradients, strict=True)]
    )


@torch.no_grad()
def vector_gradients(layer: nn.Module, inputs: Tensor, output_gradients: Tensor) -> Tensor:
    """Compute gradients of all P trained numbers of a layer, by running it again on its inputs.

    Args:
        layer: A layer whose weights are vectors.
        inputs: (B, L, I).
        output_gradients: (B, L, O).

    Returns:
        (B, P).
    """
    parameters = {name: p.detach() for name, p in _trained_parameters(layer).items()}

    def sequence_gradient(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def run(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(layer, weights, (x[None],))[0]

        return torch.func.vjp(run, parameters)[1](y)[0]

    gradients = torch.func.vmap(sequence_gradient)(inputs, output_gradients)
    return torch.cat([_at_least_float32(gradients[name]).flatten(1) for name in parameters], 1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
