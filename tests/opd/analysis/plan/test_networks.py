"""Networks without numbers against real ones, published sizes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Mamba2Config, MambaConfig

from diagnostics.errors import InvalidInput, MissingFile
from opd.analysis.plan.networks import (
    gathered_bytes,
    has_equal_layers,
    layer_list,
    make_network,
    quantised_bytes,
    read_model_config,
    with_layers,
)
from opd.analysis.plan.plan import make_plan
from opd.models.lora import add_lora
from tests.opd.analysis.plan.pairs import MACHINE, MODELS, real_network, saved, settings

PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
}
"""Numbers of weights that the models' pages and files state."""


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_real_model(name: str, tmp_path: Path) -> None:
    real = real_network(name, "eager")
    meta = make_network(saved(tmp_path, name), torch.bfloat16)
    assert meta.num_weights == sum(weight.numel() for weight in real.parameters())
    assert meta.weight_bytes == 2 * meta.num_weights
    assert meta.num_trainable == 0, "a frozen network"
    assert meta.head_rows == 1000


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_weights(name: str) -> None:
    assert make_network(name.upper(), torch.bfloat16).num_weights == PUBLISHED[name]


def test_adapters_are_trained_and_the_rest_is_frozen(tmp_path: Path) -> None:
    config = settings(saved(tmp_path, "qwen2"), "", lora_rank=3)
    meta = make_network(config.student, torch.float32, config=config)
    real = add_lora(real_network("qwen2"), config)
    trained = [weight.numel() for weight in real.parameters() if weight.requires_grad]
    assert meta.num_trainable == sum(trained) > 0
    assert meta.num_weights == sum(weight.numel() for weight in real.parameters())


def test_bytes_of_quantised_layers(tmp_path: Path) -> None:
    meta = make_network(saved(tmp_path, "qwen2", tie_word_embeddings=False), torch.bfloat16)
    real = real_network("qwen2")
    int8 = nf4 = 0.0
    for name, weight in real.named_parameters():
        is_layer = "proj" in name and name.endswith("weight")
        int8 += weight.numel() + 4 * len(weight) if is_layer else 2 * weight.numel()
        nf4 += weight.numel() / 2 + weight.numel() / 64 * 4 if is_layer else 2 * weight.numel()
    assert quantised_bytes(meta, "int8") == int8
    assert quantised_bytes(meta, "nf4") == nf4
    assert quantised_bytes(meta, "saved") == meta.weight_bytes


def test_layers_are_removed_inside_a_block_only(tmp_path: Path) -> None:
    network = make_network(saved(tmp_path, "qwen2"), torch.float32).network
    layers = layer_list(network)
    assert isinstance(layers, nn.ModuleList)
    layers_before = list(layers)
    with with_layers(network, 2):
        assert list(layers) == layers_before[:2]
    assert list(layers) == layers_before
    assert has_equal_layers(network)
    gemma = make_network(saved(tmp_path / "gemma", "gemma2"), torch.float32).network
    assert not has_equal_layers(gemma), "sliding and full attention alternate"


def test_bytes_that_sharding_gathers(tmp_path: Path) -> None:
    meta = make_network(saved(tmp_path, "qwen2"), torch.bfloat16)
    real = real_network("qwen2").model.layers[0]
    layer = sum(weight.numel() for weight in real.parameters())
    assert gathered_bytes(meta) == 2 * (meta.num_weights - layer), "two of three layers"


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"has no config.json"):
        read_model_config(str(tmp_path))
    with pytest.raises(MissingFile, match=r"'qwen9-7b' does not exist.*qwen2.5-7b"):
        read_model_config("qwen9-7b")
    with pytest.raises(InvalidInput, match="no model given"):
        read_model_config("")
    (tmp_path / "config.json").write_text('{"model_type": "quantum"}')
    with pytest.raises(InvalidInput, match=r"architecture of .* is unknown.*quantum"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InvalidInput, match="is no causal language model"):
        make_network(str(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1), "without any"),
        (
            Mamba2Config(
                vocab_size=64,
                hidden_size=16,
                num_hidden_layers=1,
                num_heads=4,
                head_dim=8,
                n_groups=1,
            ),
            "recurrent state",
        ),
    ],
)
def test_a_model_whose_code_cannot_run_without_numbers_is_named(
    config: Any, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match=rf"Mamba\S* cannot be planned.*{reason}"):
        make_plan(settings(str(tmp_path), str(tmp_path), support_k=4), MACHINE)
