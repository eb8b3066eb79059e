"""A tiny random pair with a real tokenizer, saved as ordinary Hugging Face folders."""

from pathlib import Path

import pytest
import torch

from opd.lab import make_tokenizer


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher) folders; the student's generation config is hostile on purpose."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("student", "teacher")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=len(make_tokenizer()),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    max_position_embeddings=256,
                    initializer_range=0.3,
                )
            )
        model.generation_config.repetition_penalty = 1.5
        model.generation_config.top_k = 3
        model.generation_config.do_sample = True
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder / "student", folder / "teacher"
