"""What the counted passes share: shapes, the split model, masks, few layers for many.

Shapes: B rows of a pass, P prompt and T response positions, L = P + T - 1 positions that a model
reads, N = B T response tokens, n tokens of a chunk, D hidden size, V shared vocabulary, K ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.analysis.plan.counts import Counts, extrapolate
from opd.analysis.plan.networks import MetaNetwork, has_equal_layers, layer_list, with_layers
from opd.models.lm_head import LogitsHead, find_head
from opd.models.model import CausalLM, base_model


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Shape of a pass."""

    count: int
    """B."""
    prompt: int
    """P."""
    response: int
    """T."""

    @property
    def is_padded(self) -> bool:
        """Whether rows may differ in length, so that attention needs a mask."""
        return self.count > 1

    @property
    def tokens(self) -> int:
        """N."""
        return self.count * self.response


def split_model(model: MetaNetwork, vocabulary: int) -> CausalLM:
    """Split a network on the meta device at its head, as `opd.models.model.split_head` does.

    The head is not verified, since there are no numbers.

    Args:
        model: The network.
        vocabulary: V.

    Returns:
        The model.
    """
    network = model.network
    base = base_model(network)
    decoder = base.get_decoder()
    head = find_head(base, vocabulary) if decoder is not base else None

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        states: Tensor = run_network(
            decoder,
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return states

    def logits(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = run_network(
            network,
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            use_cache=False,
        ).logits
        return out

    if head is None:
        return CausalLM(network, logits, lambda: LogitsHead(vocabulary), vocabulary)
    return CausalLM(network, hidden, lambda: head, vocabulary)


def run_network(network: Any, **inputs: Any) -> Any:
    """Run the code of a model on tensors without numbers.

    Args:
        network: A network of transformers, or its decoder.
        **inputs: Its arguments.

    Returns:
        Its outputs.

    Raises:
        InvalidInput: Its code depends on numbers, or refuses the meta device, masks or a cache.
    """
    try:
        return network(**inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise refusal(network, str(error).strip().splitlines()[0]) from error


def refusal(network: Any, reason: str) -> InvalidInput:
    """Return the error that says that a model cannot be planned, and why."""
    return InvalidInput(
        f"{type(base_model(network)).__name__} cannot be planned: its code depends on numbers or "
        f"refuses tensors without any ({reason}); plan a model of a similar size, such as one of "
        "the presets"
    )


def over_layers(
    model: MetaNetwork, count: Callable[[], Counts], layer_counts: tuple[int, int] = (2, 3)
) -> Counts:
    """Count with a few layers where all are equal, and extrapolate to all of them.

    Args:
        model: The network that the pass runs.
        count: Counts the pass with the layers that are there.
        layer_counts: The two numbers of layers that are counted.

    Returns:
        Counts with all layers.
    """
    layers = layer_list(model.network)
    if layers is None or len(layers) <= layer_counts[1] or not has_equal_layers(model.network):
        return count()
    results = []
    for size in layer_counts:
        with with_layers(model.network, size):
            results.append(count())
    return extrapolate(results[0], results[1], layer_counts, len(layers))


def attention_mask(model: MetaNetwork, rows: Rows, queries: int, keys: int) -> Tensor | None:
    """Return the mask of a pass, as the model's attention reads it.

    Args:
        model: The network.
        rows: Shape of the pass.
        queries: Number of query positions.
        keys: Number of key positions.

    Returns:
        (B, 1, queries, keys), bool or, for attention without a kernel, in the precision of the
        model; None for rows without padding.
    """
    text_config = base_model(model.network).config.get_text_config()
    implementation = text_config._attn_implementation
    if implementation == "eager":
        return torch.zeros(rows.count, 1, queries, keys, dtype=model.dtype, device="meta")
    if not rows.is_padded:
        return None
    return torch.ones(rows.count, 1, queries, keys, dtype=torch.bool, device="meta")


def meta_ids(rows: int, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return (rows, length) ids and positions on the meta device."""
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    return ids, torch.arange(first, first + length, device="meta").expand(rows, length)


def response_states(model: CausalLM, meta: MetaNetwork, rows: Rows, count: int) -> Tensor:
    """Return (count, D) states of response tokens, with the selection of `forward.py`.

    Args:
        model: The model.
        meta: Its network.
        rows: Shape of the pass.
        count: Number of tokens, at most N.

    Returns:
        The states.
    """
    length = rows.prompt + rows.response - 1
    ids, positions = meta_ids(rows.count, length)
    states = model.hidden(ids, attention_mask(meta, rows, length, length), positions)  # type: ignore[arg-type]
    row, column = (torch.zeros(count, dtype=torch.long, device="meta") for _ in range(2))
    return states[:, rows.prompt - 1 :][row, column]


def make_states(model: CausalLM, meta: MetaNetwork, count: int) -> Tensor:
    """Return (count, D) states on the meta device."""
    head = model.head
    width = meta.head_rows if isinstance(head, LogitsHead) else head.weight.shape[1]
    return torch.zeros(count, width, dtype=meta.dtype, device="meta")
