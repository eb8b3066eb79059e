"""Causal language models split into hidden states and head.

Shapes: B responses, L sequence positions, N supervised tokens (flat), D hidden size, V shared
vocabulary.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.models.lm_head import Head, LmHead, LogitsHead, find_head

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids, attention mask, positions), (B, L) each -> (B, L, D)."""


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal LM, split into the computation of hidden states and the LM head."""

    network: Any
    """The Hugging Face model."""
    hidden: Forward
    """Forward pass up to the head."""
    get_head: Callable[[], Head]
    """Returns the current LM head (FSDP re-creates its weights, see `opd.models.fsdp`)."""
    vocabulary: int
    """V, the ids that student and teacher share, to which the head is cut."""

    @property
    def head(self) -> Head:
        """The current LM head."""
        return self.get_head()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.network.parameters()).device


def split_head(network: Any, vocabulary: int) -> CausalLM:
    """Split a model in evaluation mode at its head, verified against its own logits on random ids.

    Scale and soft-cap are read from the configuration; adapters of peft stay in the decoder. A
    model that is not a single head on its decoder's hidden states is used through `.logits`, which
    needs (B, L, V) memory and gives a warning.

    Args:
        network: Hugging Face model.
        vocabulary: V, the ids that student and teacher share.

    Returns:
        The split model.

    Raises:
        InvalidInput: An adapter is attached to the head.
    """
    base = base_model(network)
    decoder = base.get_decoder()
    head = find_head(base, vocabulary) if decoder is not base else None

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        out = decoder(
            input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False
        )
        return out.last_hidden_state

    def logits(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        out = network(
            input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False
        )
        return out.logits

    if head is not None and _head_matches_logits(network, hidden, logits, head):
        return CausalLM(network, hidden, lambda: head, vocabulary)
    size = network.config.get_text_config().vocab_size
    warnings.warn(
        f"the head and configuration of {type(base).__name__} do not reproduce its logits; falling "
        f"back to `.logits`, which keeps {size} numbers for every token of a micro-batch",
        stacklevel=2,
    )
    return CausalLM(network, logits, lambda: LogitsHead(vocabulary), vocabulary)


def context_length(network: Any) -> int | None:
    """Return the most token positions that a network was made for; None if it does not say."""
    length = network.config.get_text_config().to_dict().get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else None


def base_model(network: Any) -> Any:
    """Return the Hugging Face model itself; adapters of peft are inside it and stay active."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _head_matches_logits(network: Any, hidden: Forward, logits: Forward, head: LmHead) -> bool:
    """Return whether head and hidden states reproduce the model's own logits on random ids."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(head.vocabulary, (2, 8), generator=generator).to(device)
    probe = (ids, torch.ones_like(ids), torch.arange(8, device=device).expand(2, 8))
    with torch.no_grad():
        states = hidden(*probe)
        if states.shape[-1] != head.weight.shape[1]:
            return False
        head_logits = head.logits(states.flatten(0, 1))
        model_logits = logits(*probe).flatten(0, 1)[:, : head.vocabulary]
    rounding = max(2 * torch.finfo(model_logits.dtype).eps, 1e-4)
    max_difference = (head_logits - model_logits.float()).abs().nan_to_num().max()
    same_nan = bool((head_logits.isnan() == model_logits.isnan()).all())
    return same_nan and float(max_difference) <= rounding * float(
        model_logits.float().abs().nan_to_num().max()
    )
