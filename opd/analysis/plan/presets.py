"""Sizes of published models, so that a plan needs no files of theirs."""

from typing import Any


def _decoder(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }


def _qwen2(*sizes: int, tied: bool = False) -> tuple[str, dict[str, Any]]:
    return "qwen2", _decoder(*sizes, tied=tied)


def _qwen3(*sizes: int, tied: bool = False) -> tuple[str, dict[str, Any]]:
    return "qwen3", {**_decoder(*sizes, tied=tied), "head_dim": 128}


def _llama(*sizes: int, head: int = 128, tied: bool = False) -> tuple[str, dict[str, Any]]:
    return "llama", {**_decoder(*sizes, tied=tied), "head_dim": head}


PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, 151936, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, 151936, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, 151936, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, 151936),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, 151936),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, 151936),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head=64, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, tied=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
}
"""Name of a preset to the type of its configuration in transformers and its sizes."""
