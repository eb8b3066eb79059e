"""Gradients of chosen weights below the head, sequence by sequence (E-1, E-2).

A linear layer with inputs a_t and gradients b_t at its outputs has the gradient sum_t b_t a_t^T for
a sequence. Its sketch is sum_t (R1 b_t)(R2 a_t)^T, so that neither the outer product of a token nor
the matrix of a sequence is formed; its squared length is exact, by whichever of two ways is cheaper
(`linear_squares`). Layers whose weights are vectors (norms) keep the gradients themselves. Biases
count, and so do the factors of adapters, which are linear layers of their own.

Norm layers are the cheap default: their noise scale follows that of the whole transformer (2411.
00999; verify it once for an architecture, here against `*mlp.down_proj` or the like).

Shapes: B sequences, L positions (pads included; they carry no gradient), O and I sizes of a layer's
outputs and inputs, F members, J copies of a sketch, m numbers a copy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from zlib import crc32

import torch
from torch import Tensor, nn

from diagnostics.errors import InvalidInput
from diagnostics.gradients.sketch import Projection, projected, random_signs


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Layers that are measured as one, by name in the network.

    projections: of each layer if they are linear, else empty: then gradients are kept whole. The
    sketches of several layers are added, which with independent signs is a sketch of all of them.
    """

    name: str
    layers: Mapping[str, nn.Module]
    projections: Mapping[str, Projection]


def block(network: nn.Module, pattern: str, rows: int = 16, copies: int = 8) -> Block:
    """The trained layers whose names match a shell pattern, such as "*norm" or "*.3.mlp.down_proj".

    Containers do not count, nor layers of which nothing is trained.

    Raises:
      ValueError: nothing trained matches, matches are of both kinds or of another kind.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        if fnmatchcase(name, pattern) and _trained(module)
    }
    if not layers:
        own = [name for name, module in network.named_modules() if _trained(module)]
        raise InvalidInput(
            f"no trained layer is named {pattern!r}; there are {', '.join(own[:40])}"
        )
    linear = {name for name, module in layers.items() if isinstance(module, nn.Linear)}
    if linear and len(linear) < len(layers):
        raise InvalidInput(
            f"{pattern!r} names linear layers ({min(linear)}) and others "
            f"({min(layers.keys() - linear)}); give each kind a pattern of its own"
        )
    for name, module in layers.items():
        if name not in linear and any(p.dim() > 1 for p in _trained(module).values()):
            raise InvalidInput(
                f"{name} is a {type(module).__name__} with a matrix; blocks are linear layers, or "
                "layers whose weights are vectors"
            )
    projections = {
        name: random_signs(module.out_features, _width(module), crc32(name.encode()), rows, copies)
        for name, module in layers.items()
        if isinstance(module, nn.Linear)
    }
    return Block(name=pattern, layers=layers, projections=projections)


def _trained(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}


def _width(layer: nn.Linear) -> int:
    own = _trained(layer)
    return ("weight" in own) * layer.in_features + ("bias" in own)


def sequence_gradients(
    blocks: Iterable[Block], forward: Callable[[], Tensor], members: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Block name to (B, F, J, m) gradients or their sketches, and (B, F) exact squared lengths.

    Cost: one forward pass, one backward pass a member down to the lowest block, without gradients
    of weights. Memory: the graph of the forward pass, and inputs and output gradients of the
    blocks' layers. Nothing is left in `.grad`.

    Args:
      forward: runs the network once on (B, L) ids and returns any tensor made from it: hidden
        states, or log-probabilities of the sampled tokens.
      members: for each, the gradient of sum_i loss_i with respect to that tensor. With
        log-probabilities these are the weights of the tokens.

    Raises:
      ValueError: a layer ran not once in forward, or not on (B, L, I).
    """
    blocks = list(blocks)
    with torch.enable_grad(), _watched(blocks) as seen:
        out = forward()
    names = list({name: None for b in blocks for name in b.layers})
    if wrong := {name: len(seen[name]) for name in names if len(seen[name]) != 1}:
        raise InvalidInput(f"layers that do not run once in a forward pass, by times: {wrong}")
    ends = [seen[name][0][1] for name in names]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {b.name: [] for b in blocks}
    for member in members:
        parts = torch.autograd.grad(out, ends, member, retain_graph=True, allow_unused=True)
        at = {
            name: (seen[name][0][0], torch.zeros_like(end) if part is None else part)
            for name, end, part in zip(names, ends, parts, strict=True)
        }
        for b in blocks:
            found[b.name].append(_of_block(b, at))
    return {
        name: (torch.stack([x for x, _ in parts], 1), torch.stack([s for _, s in parts], 1))
        for name, parts in found.items()
    }


@contextmanager
def _watched(blocks: Iterable[Block]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Each layer's name to the (input, output) of every call of it inside."""
    layers = {name: module for b in blocks for name, module in b.layers.items()}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if inputs[0].dim() != 3:
                raise InvalidInput(f"{name} ran on {tuple(inputs[0].shape)}, expected (B, L, I)")
            seen[name].append((inputs[0].detach(), output))

        return keep

    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _of_block(b: Block, at: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(B, J, m) and (B,) of one member, from each layer's inputs and output gradients."""
    if not b.projections:
        whole = torch.cat([vector_gradients(m, *at[name]) for name, m in b.layers.items()], 1)
        return whole[:, None], whole.double().square().sum(1)
    sketches, squares = [], []
    for name, layer in b.layers.items():
        inputs, slopes = _augmented(layer, at[name][0]), _wide(at[name][1])
        projection = b.projections[name].to(inputs.device)
        sketches.append(linear_sketch(inputs, slopes, projection))
        squares.append(linear_squares(inputs, slopes))
    return torch.stack(sketches).sum(0), torch.stack(squares).sum(0)


def _augmented(layer: nn.Module, a: Tensor) -> Tensor:
    """(B, L, I) inputs of what is trained: a bias is a weight on a constant 1."""
    own, a = _trained(layer), _wide(a)
    parts = [a] * ("weight" in own) + [torch.ones_like(a[..., :1])] * ("bias" in own)
    return torch.cat(parts, -1)


@torch.no_grad()
def linear_sketch(a: Tensor, b: Tensor, projection: Projection) -> Tensor:
    """(B, J, m1 m2) sketches of sum_t b_t a_t^T by sequence; a (B, L, I), b (B, L, O)."""
    left, right = (
        projected(x.flatten(0, 1), r).view(*x.shape[:2], *r.shape[1:])
        for x, r in ((b, projection.vocabulary), (a, projection.hidden))
    )
    return torch.einsum("btja,btjc->bjac", left, right).flatten(2) * projection.scale


@torch.no_grad()
def linear_squares(a: Tensor, b: Tensor) -> Tensor:
    """(B,) |sum_t b_t a_t^T|^2 by sequence, exact; a (B, L, I), b (B, L, O).

    Short sequences by <a a^T, b b^T> in L^2 (I + O) products, long ones by the matrix in L I O.
    """
    length, width = a.shape[1], a.shape[2] * b.shape[2] / (a.shape[2] + b.shape[2])
    if length < width:
        return ((a @ a.mT).double() * (b @ b.mT).double()).sum((1, 2))
    return torch.stack([(y.T @ x).double().square().sum() for x, y in zip(a, b, strict=True)])


@torch.no_grad()
def vector_gradients(layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """(B, P) gradients of all P trained numbers of a layer, by running it again on its inputs."""
    own = {name: p.detach() for name, p in _trained(layer).items()}

    def one(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def run(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(layer, weights, (x[None],))[0]

        return torch.func.vjp(run, own)[1](y)[0]

    found = torch.func.vmap(one)(a, b)
    return torch.cat([_wide(found[name]).flatten(1) for name in own], 1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
