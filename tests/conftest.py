"""A tiny random pair with a real tokenizer, saved as ordinary Hugging Face folders."""

import string
from pathlib import Path

import pytest
import torch


def tiny_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
    names = special + list(string.printable[:95])
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(names)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
    )


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
                    vocab_size=100,
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
        tiny_tokenizer().save_pretrained(folder / name)
    return folder / "student", folder / "teacher"
