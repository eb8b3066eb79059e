"""Forward passes over prompts and responses: hidden states, micro-batches and log-probabilities."""

import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts
from opd.models.lm_head import cooled, full_logits
from opd.models.model import CausalLM


def response_hidden(
    model: CausalLM, prompts: Prompts, batch: Rollouts, mask: Tensor | None = None
) -> Tensor:
    """(N, D) hidden states that predict the tokens of the mask, in row-major order.

    mask: (B, T) bool; the supervised tokens if None. The state at sequence position j predicts
    token j + 1, so response token t is predicted at P - 1 + t. Positions count real tokens only, so
    that left padding changes nothing.
    """
    ids = torch.cat([prompts.tokens, batch.tokens], 1)[:, :-1]
    real = torch.cat([prompts.mask, response_real(batch)], 1)[:, :-1].long()
    positions = (real.cumsum(1) - 1).clamp(min=0)
    states = model.hidden(ids, real, positions)
    width = prompts.tokens.shape[1]
    return states[:, width - 1 :][batch.mask if mask is None else mask]


def response_real(batch: Rollouts) -> Tensor:
    """(B, T) positions up to the last sampled one: masks may have holes, attention has none."""
    return batch.sampled.long().flip(1).cumsum(1).flip(1) > 0


def micro_batches(prompts: Prompts, batch: Rollouts, tokens: int) -> list[list[int]]:
    """Rows grouped by length so that rows x longest (prompt and response) stays under `tokens`."""
    ends = [int(x) for x in response_real(batch).sum(1)]
    sizes = [int(p) + e for p, e in zip(prompts.mask.sum(1), ends, strict=True)]
    groups: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        widest = sizes[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * widest <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def log_probabilities(model: CausalLM, hidden: Tensor, temperature: float) -> Tensor:
    """(n, D) -> (n, V) float32 log-softmax at the loss temperature."""
    return cooled(full_logits(hidden, model.head), temperature).log_softmax(-1)


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """(N, ...) row-major over the mask -> (B, T, ...), 0 elsewhere."""
    out = flat.new_zeros((*mask.shape, *flat.shape[1:]))
    out[mask] = flat
    return out
