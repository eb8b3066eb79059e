"""Forward passes over prompts and responses: hidden states, micro-batches and log-probabilities."""

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.lm_head import Head, apply_temperature
from opd.models.model import CausalLM


def response_hidden_states(
    model: CausalLM, prompts: Prompts, batch: Rollouts, mask: Tensor | None = None
) -> Tensor:
    """Return the (N, D) hidden states that predict the tokens of the mask, in row-major order.

    The state at sequence position j predicts token j + 1, so response token t is predicted at P - 1
    + t. Positions count real tokens only, so left padding changes nothing.

    Args:
        model: The model.
        prompts: Prompts, left-padded to P positions.
        batch: Rollouts.
        mask: (B, T) bool; the supervised tokens if None.

    Returns:
        (N, D) hidden states.
    """
    ids = torch.cat([prompts.tokens, batch.tokens], 1)[:, :-1]
    real = torch.cat([prompts.mask, batch.attention_mask], 1)[:, :-1].long()
    positions = (real.cumsum(1) - 1).clamp(min=0)
    states = model.hidden(ids, real, positions)
    width = prompts.tokens.shape[1]
    return states[:, width - 1 :][batch.mask if mask is None else mask]


def micro_batches(prompts: Prompts, batch: Rollouts, max_tokens: int) -> list[list[int]]:
    """Group rows of similar length so that rows x longest sequence stays within `max_tokens`.

    Args:
        prompts: Prompts.
        batch: Rollouts.
        max_tokens: Padded tokens of prompt and response per micro-batch, with the longer prompt
            where the teacher reads another one; a longer row is a group of its own.

    Returns:
        Row indices of each micro-batch.
    """
    starts = prompts.mask.sum(1)
    if prompts.view is not None:
        starts = torch.maximum(starts, prompts.view.mask.sum(1))
    ends = [int(x) for x in batch.attention_mask.sum(1)]
    sizes = [int(p) + e for p, e in zip(starts, ends, strict=True)]
    groups: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        widest = sizes[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * widest <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def log_probabilities(model: CausalLM, hidden: Tensor, temperature: float) -> Tensor:
    """Return the (n, V) float32 log-softmax of (n, D) states at a temperature."""
    head = model.head
    return product_logp(head, head.products(hidden), temperature)


def product_logp(head: Head, products: Tensor, temperature: float) -> Tensor:
    """Return the (n, V) log-softmax of (n, R) products with the head's rows at a temperature."""
    return product_logits(head, products, temperature).log_softmax(-1)


def product_logits(head: Head, products: Tensor, temperature: float) -> Tensor:
    """Return the (n, V) logits of (n, R) products with the head's rows over a temperature."""
    return apply_temperature(head.shape_products(products[:, : head.vocabulary]), temperature)
