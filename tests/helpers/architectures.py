"""Tiny random models of many architectures."""

from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
GPT = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64} | ENDS
ARCHITECTURES = {
    "Llama": SMALL,
    "Qwen2": SMALL | {"tie_word_embeddings": True},
    "Qwen3": SMALL | {"head_dim": 8},
    "Gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Cohere": SMALL | {"logit_scale": 0.25},
    "Granite": SMALL | {"logits_scaling": 3.0},
    "Phi": SMALL,
    "GPT2": GPT | {"initializer_range": 0.4},
    "GPTJ": GPT | {"rotary_dim": 4, "initializer_range": 0.4},
    "Mistral": SMALL | {"sliding_window": 5},
    "Mixtral": SMALL | {"num_local_experts": 4},
    "Falcon": SMALL | {"alibi": True, "new_decoder_architecture": False},
    "Bloom": SMALL | {"n_layer": 2, "n_head": 2},
    "Mamba": {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "OPT": {
        "vocab_size": 61,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
        "max_position_embeddings": 64,
        "init_std": 0.4,
    },
}


def random_network(name: str, **changes: object) -> Any:
    """Return a random model in evaluation mode, the same at every call."""

    config = getattr(transformers, f"{name}Config")(**(ARCHITECTURES[name] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        output = model.get_output_embeddings()
        if getattr(output, "bias", None) is not None:
            torch.nn.init.normal_(output.bias)
    return model.eval()
