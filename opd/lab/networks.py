"""New networks of toy models, whose weights are drawn from a seed."""

from typing import Any

from opd.lab.previous_token_head import set_previous_token_head


def make_network(
    layers: int,
    width: int,
    tokenizer: Any,
    seed: int,
    *,
    positions: int = 512,
    spread: float = 0.02,
    previous_token_head: bool = False,
) -> Any:
    """Initialise a Qwen2 model without changing the caller's random state.

    Args:
        layers: Number of layers.
        width: Hidden width, a multiple of 32; a head has 32.
        tokenizer: Its tokenizer.
        seed: Seed of the weights.
        positions: Largest number of positions.
        spread: Standard deviation of the weights.
        previous_token_head: Whether a head attends to the previous token
            (`opd.lab.previous_token_head`).

    Returns:
        The model.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=positions,
        initializer_range=spread,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Qwen2ForCausalLM(config)
    if previous_token_head:
        set_previous_token_head(network)
    return network
