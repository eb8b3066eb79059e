"""The matrix products that a training step cannot do without, as a list that can be run.

A floor has no norms, rotations, softmaxes, samples, losses or optimizer: only the products of the
decoder's linear layers, of attention and of the heads, at the shapes of the step. Attention covers
the whole square of positions, as with a mask of padding. Every weight and every layer's cache is
memory of its own; activations share one buffer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OBJECTIVES = ("full_reverse_kl", "teacher_topk")


@dataclass(frozen=True)
class Product:
    """`batch` products of a (rows, inner) with an (inner, columns) matrix."""

    rows: int
    inner: int
    columns: int
    batch: int = 1
    left: str = "states"
    """Name of the left factor; factors of the same name share their memory."""
    right: str = "states"
    left_transposed: bool = False
    """Whether the left factor is stored as (inner, rows)."""
    right_transposed: bool = False
    """Whether the right factor is stored as (columns, inner), as weights of linear layers are."""

    @property
    def flops(self) -> int:
        """Two for each multiplication and addition."""
        return 2 * self.batch * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class ModelShape:
    """What a decoder and its head multiply."""

    name: str
    linears: tuple[tuple[int, int], ...]
    """Input and output width of every linear layer of the decoder."""
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    width: int
    vocabulary: int

    @classmethod
    def of(cls, name: str, config: Any) -> "ModelShape":
        """Read the shapes from a Hugging Face configuration, without memory for the weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        decoder = network.get_decoder()
        linears = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
        heads = config.num_attention_heads
        return cls(
            name=name,
            linears=tuple((m.in_features, m.out_features) for m in linears),
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            width=config.hidden_size,
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class Work:
    """The sizes of a step."""

    rows: int
    prompt: int
    response: int
    k: int = 32


def step_products(
    student: ModelShape, teacher: ModelShape, work: Work, objective: str
) -> dict[str, list[Product]]:
    """Return the products of a step by phase.

    The student is read once, with gradient: scores of the tokens that it just sampled follow from
    the same pass. The top-K objective needs K rows of the student's head per token, which are
    counted as if all tokens shared them.
    """
    length, tokens = work.prompt + work.response - 1, work.rows * work.response
    columns = student.vocabulary if objective == "full_reverse_kl" else work.k
    return {
        "rollout": rollout_products(student, work),
        "score": [
            *decoder(teacher, work.rows, length, length),
            head(teacher, tokens, teacher.vocabulary),
        ],
        "update": [
            *with_gradients(decoder(student, work.rows, length, length)),
            *with_gradients([head(student, tokens, columns)]),
        ],
    }


def rollout_products(shape: ModelShape, work: Work) -> list[Product]:
    """Return the products of the prompts' pass and of every decoding step with its cache."""
    one_token = head(shape, work.rows, shape.vocabulary)
    products = [*decoder(shape, work.rows, work.prompt, work.prompt), one_token]
    for i in range(1, work.response):
        products += [*decoder(shape, work.rows, 1, work.prompt + i), one_token]
    return products


def decoder(shape: ModelShape, rows: int, queries: int, keys: int) -> list[Product]:
    """Return the forward products of a decoder on `queries` new of `keys` positions."""
    products = [
        Product(
            rows * queries, inner, columns, right=f"{shape.name} weight {i}", right_transposed=True
        )
        for i, (inner, columns) in enumerate(shape.linears)
    ]
    group, batch = shape.heads // shape.kv_heads, rows * shape.kv_heads
    for i in range(shape.layers):
        cache = f"{shape.name} layer {i}"
        products += [
            Product(
                group * queries,
                shape.head_width,
                keys,
                batch,
                right=f"{cache} keys",
                right_transposed=True,
            ),
            Product(group * queries, keys, shape.head_width, batch, right=f"{cache} values"),
        ]
    return products


def head(shape: ModelShape, tokens: int, columns: int) -> Product:
    """Return the product of states with rows of the head."""
    return Product(tokens, shape.width, columns, right=f"{shape.name} head", right_transposed=True)


def with_gradients(products: Sequence[Product]) -> list[Product]:
    """Add the two products of the backward pass of each: by its left and by its right factor."""
    backward = [
        product
        for p in products
        for product in (
            Product(
                p.rows,
                p.columns,
                p.inner,
                p.batch,
                right=p.right,
                right_transposed=not p.right_transposed,
            ),
            Product(p.inner, p.rows, p.columns, p.batch, left_transposed=True)
            if not p.right_transposed
            else Product(p.columns, p.rows, p.inner, p.batch, left_transposed=True),
        )
    ]
    return [*products, *backward]


class Floor:
    """The products of every phase, ready to be timed.

    Args:
        phases: Products by phase.
        dtype: Dtype of all factors.
        device: Their device.
    """

    def __init__(
        self, phases: dict[str, list[Product]], dtype: torch.dtype, device: torch.device
    ) -> None:
        every = [p for products in phases.values() for p in products]
        sizes: dict[str, int] = {}
        for p in every:
            for name, size in (
                (p.left, p.batch * p.rows * p.inner),
                (p.right, p.batch * p.inner * p.columns),
                ("result", p.batch * p.rows * p.columns),
            ):
                sizes[name] = max(size, sizes.get(name, 0))
        self.device = device
        self.memory = {
            name: torch.full((size,), 0.01, dtype=dtype, device=device)
            for name, size in sizes.items()
        }
        self.calls = {name: list(map(self._call, products)) for name, products in phases.items()}

    def _call(self, p: Product) -> tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]:
        left = self._matrix(p.left, p.batch, p.rows, p.inner, p.left_transposed)
        right = self._matrix(p.right, p.batch, p.inner, p.columns, p.right_transposed)
        result = self._matrix("result", p.batch, p.rows, p.columns, False)
        if p.batch == 1:
            return torch.mm, left[0], right[0], result[0]
        return torch.bmm, left, right, result

    def _matrix(self, name: str, batch: int, rows: int, columns: int, transposed: bool) -> Tensor:
        flat = self.memory[name][: batch * rows * columns]
        return flat.view(batch, columns, rows).mT if transposed else flat.view(batch, rows, columns)

    @torch.no_grad()
    def seconds(self, phase: str) -> float:
        """Run a phase once; return its time (see `clock`)."""
        begin = clock(self.device)
        for function, left, right, result in self.calls[phase]:
            function(left, right, out=result)
        return clock(self.device) - begin


def clock(device: torch.device) -> float:
    """Return the time in seconds; on a CPU that of the process, which other work leaves alone."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
