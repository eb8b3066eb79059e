"""Models: loading a pair, and from token ids to the hidden states that predict the responses.

The one place that aligns hidden states with response tokens. Shapes: B responses, P prompt
positions, T response positions, L = P + T, N supervised tokens (flat), D hidden size, V shared
vocabulary.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.models.lm_head import LmHead, find_head, full_logits

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids, attention mask, positions), (B, L) each -> (B, L, D)."""


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal LM, split into what makes hidden states and what turns them into logits.

    network: the Hugging Face model; hidden: what it does before its head; find: the head as it is
    now, since the weights of a sharded model come and go (opd.models.fsdp); vocabulary: V, the ids
    that the pair shares, to which the head is cut.
    """

    network: Any
    hidden: Forward
    find: Callable[[], LmHead]
    vocabulary: int

    @property
    def head(self) -> LmHead:
        return self.find()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def split(network: Any, vocabulary: int) -> CausalLM:
    """Split a model in evaluation mode at its head, checked against its own logits on a probe.

    Scale and soft-cap are read from the configuration, adapters of peft stay in the decoder. A
    model that is not one head on its decoder's hidden states is used through `.logits`; that costs
    (B, L, V) memory, and a warning says so.

    Raises:
      ValueError: an adapter sits on the head.
    """
    base = bare(network)
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

    if head is not None and _agree(network, hidden, logits, head):
        return CausalLM(network, hidden, lambda: head, vocabulary)
    size = network.config.get_text_config().vocab_size
    warnings.warn(
        f"{type(base).__name__} has logits that its head and configuration do not explain; falling "
        f"back to `.logits`, which keeps {size} numbers for every token of a micro-batch",
        stacklevel=2,
    )
    return CausalLM(network, logits, lambda: LmHead(None, vocabulary), vocabulary)


def bare(network: Any) -> Any:
    """The Hugging Face model itself; adapters of peft sit inside it and stay active."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _agree(network: Any, hidden: Forward, logits: Forward, head: LmHead) -> bool:
    """Whether the head makes the model's own logits from its hidden states, on random ids."""
    device = next(network.parameters()).device
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(head.vocabulary, (2, 8), generator=seeded).to(device)
    probe = (ids, torch.ones_like(ids), torch.arange(8, device=device).expand(2, 8))
    with torch.no_grad():
        states = hidden(*probe)
        if head.weight is None or states.shape[-1] != head.weight.shape[1]:
            return False
        ours = full_logits(states.flatten(0, 1), head)
        theirs = logits(*probe).flatten(0, 1)[:, : head.vocabulary]
    rounding = max(2 * torch.finfo(theirs.dtype).eps, 1e-4)
    far = (ours - theirs.float()).abs().nan_to_num().max()
    same_nan = bool((ours.isnan() == theirs.isnan()).all())
    return same_nan and float(far) <= rounding * float(theirs.float().abs().nan_to_num().max())
