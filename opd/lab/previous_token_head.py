"""An attention head that looks at the previous token from the start of training.

A model copies what it is shown with two heads in sequence: one writes the previous token into each
position, another finds the positions whose previous token is the current one. Small models on small
data take long to learn the first, without which the second has no gradient. Set by hand, a model of
`opd lab --view` follows a shown solution after 200 steps; without, it had not after 500.
"""

from typing import Any

STRENGTH = 6.0
"""Size of the biases; the head gives about 0.98 of its attention to the previous token."""
NUM_FREQUENCIES = 5
"""Fastest rotary frequencies used; the slower ones hardly tell neighbours apart."""


def set_previous_token_head(network: Any) -> None:
    """Set the biases of the first head of the first layer so that it attends to the previous token.

    A key's bias is the number s in each of the fastest rotary frequencies f, a query's s exp(-i f).
    Rotated to their positions n and m, their product is s^2 sum_f cos(f (m - n - 1)), which is
    largest where n = m - 1.

    Args:
        network: A Qwen2 model.
    """
    import torch

    attention = network.model.layers[0].self_attn
    frequencies = network.model.rotary_emb.inv_freq.float()
    half = len(frequencies)
    used = torch.arange(half) < NUM_FREQUENCIES
    key = torch.cat([used * STRENGTH, torch.zeros(half)])
    query = STRENGTH * torch.cat([used * frequencies.cos(), -(used * frequencies.sin())])
    with torch.no_grad():
        attention.q_proj.bias[: 2 * half] = query
        attention.k_proj.bias[: 2 * half] = key
