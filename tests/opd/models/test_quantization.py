"""Quantised teachers: their weights, their memory, and a run that learns from one."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.records.batch_files import load_batch
from opd.config.settings import TaskSettings, with_settings
from opd.data.chain_task import problems
from opd.lab.build import make_tokenizer
from opd.models.loading import load_model
from opd.training.train import train
from tests.helpers.processes.vllm_process import wide_pair
from tests.helpers.runs import settings
from tests.opd.training.test_prefetch_runs import prompts_of_step, row_by_row

LEVELS = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
SLACK = {"int8": 0.8, "nf4": 1e-4}
"""Required distance to the unpacked weights, relative to other weights: LLM.int8() also rounds
activations, and which ones depends on the batch.
"""


def unpacked(quantised: Any, plain: Any) -> Any:
    """Return the plain network with the dequantised weights of a quantised one."""
    from bitsandbytes import functional

    network = copy.deepcopy(plain)
    for name, module in quantised.named_modules():
        weight, kind = getattr(module, "weight", None), type(module).__name__
        if kind == "Linear4bit":
            weight_values = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif kind == "Linear8bitLt":
            weight_values = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            continue
        network.get_submodule(name).weight.data = weight_values.reshape(
            network.get_submodule(name).weight.shape
        ).float()
    return network


def nearest_levels(weight: torch.Tensor) -> torch.Tensor:
    """Each block of 64 in units of its largest, at the nearest NF4 level (QLoRA, appendix E)."""
    blocks = weight.flatten().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    place = (blocks[..., None] / scale[..., None] - torch.tensor(LEVELS)).abs().argmin(-1)
    return (torch.tensor(LEVELS)[place] * scale).reshape(weight.shape)


def by_rows(weight: torch.Tensor) -> torch.Tensor:
    """Each row in 127ths of its largest, rounded; LLM.int8() takes halves."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def layers(network: Any) -> list[torch.Tensor]:
    return [m.weight for m in network.model.layers.modules() if hasattr(m, "in_features")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build models whose rows have a multiple of 64 weights."""
    return wide_pair(tmp_path_factory.mktemp("pair"), tied=False)


@pytest.fixture(params=[True, False], ids=["AVX512-BF16", "no AVX512-BF16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make bitsandbytes believe that the processor supports AVX512-BF16, or that it does not."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: request.param)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(("layer", "outputs"), [("q_proj", 64), ("k_proj", 16)])
def test_four_bit_layers_compute_the_same_on_every_processor(
    tmp_path: Path, layer: str, outputs: int
) -> None:
    """Compare with the published levels in float64; 16 outputs do not fit a packed tile."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    _, network = load_model(str(tmp_path), "cpu", "float32", weights="nf4")
    _, unquantised = load_model(str(tmp_path), "cpu", "float32")
    name = f"model.layers.0.self_attn.{layer}"
    assert network.get_submodule(name).out_features == outputs
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = inputs.double() @ nearest_levels(unquantised.get_submodule(name).weight).double().T
    with torch.no_grad():
        for rows in (inputs, inputs[:1]):  # bitsandbytes uses different code for a single row
            result = network.get_submodule(name)(rows)
            torch.testing.assert_close(result, expected[: len(rows)].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("weights", SLACK)
def test_layers_are_quantised_and_the_head_is_not(pair, weights: str) -> None:
    tokenizer, network = load_model(str(pair[1]), "cpu", "float32", weights=weights)
    _, plain = load_model(str(pair[1]), "cpu", "float32")
    unpacked_network = unpacked(network, plain)
    for layer, plain_layer in zip(layers(unpacked_network), layers(plain), strict=True):
        want = (
            nearest_levels(plain_layer) if weights == "nf4" else by_rows(plain_layer.half().float())
        )
        slack = {"int8": 1e-3, "nf4": 1e-6}[weights] * plain_layer.abs().max()
        assert (
            float(((layer - want).abs() <= slack).float().mean()) > 0.99
        )  # ties may round either way
        assert not torch.equal(layer, plain_layer)
    assert torch.equal(network.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    bits = sum(x.numel() * x.element_size() for x in layers(network)) * 8
    assert bits == sum(x.numel() for x in layers(plain)) * {"int8": 8, "nf4": 4}[weights]
    ids = tokenizer.encode(problems("train", 1, 0)[0].solution, return_tensors="pt")
    with torch.no_grad():
        logp = [m(ids).logits.log_softmax(-1) for m in (network, unpacked_network, plain)]
    quantization_error = float((logp[0] - logp[1]).abs().mean())
    change = float((logp[0] - logp[2]).abs().mean())
    assert quantization_error < change * SLACK[weights]


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("weights", SLACK)
def test_a_run_learns_from_the_quantised_teacher(pair, tmp_path: Path, weights: str) -> None:
    changes: dict[str, Any] = {"steps": 1, "save_batch_every": 1, "eval_every": 0}
    changes |= {"eval_problems": 1}
    config = settings(pair, tmp_path / "run", teacher_weights=weights, **changes)
    two = tuple(
        TaskSettings(name=name, task="lab", teacher=str(teacher))
        for name, teacher in zip("ab", reversed(pair), strict=True)
    )
    tasks = with_settings(config, out=str(tmp_path / "tasks"), tasks=two, steps=2, lr=1e-30)
    batch = scored(train(config).folder, 0)
    prompts = prompts_of_step(Path(config.out), config, 0)
    kl_by_weights = {}
    for kind in (weights, "saved"):
        _, network = load_model(config.teacher, "cpu", "float32", weights=kind)
        gap = (row_by_row(network, prompts, batch) - batch.teacher_logp)[batch.mask]
        kl_by_weights[kind] = float(gap.abs().mean())
    assert kl_by_weights[weights] < kl_by_weights["saved"] * SLACK[weights]
    second = scored(train(tasks).folder, 1)  # its teacher is the student, which is still unchanged
    gap = (second.teacher_logp - second.student_logp)[second.mask]
    assert float(gap.abs().mean()) > 1e-3


def scored(folder: Path, step: int) -> ScoredRollouts:
    batch = load_batch(folder / "batches" / f"step_{step:06d}.safetensors")
    assert isinstance(batch, ScoredRollouts)
    return batch


def test_rows_that_end_within_a_block_are_refused_on_a_cpu(two_layer_pair) -> None:
    """On processors with AVX-512 wrong scales would cause errors as large as the weights."""
    with pytest.raises(ValueError, match=r"q_proj has 32 inputs, expected a multiple of 64.*int8"):
        load_model(str(two_layer_pair[1]), "cpu", "float32", weights="nf4")


def test_what_cannot_be_quantised_is_refused(two_layer_pair, tmp_path: Path, monkeypatch) -> None:
    for changes, words in (
        ({"offload_teacher": True}, "saved if offload_teacher is set"),
        ({"teacher": "ema", "reward_weight": 1.0}, r"derived from the student \(ema\)"),
    ):
        with pytest.raises(ValueError, match=words):
            train(
                with_settings(settings(two_layer_pair, tmp_path), teacher_weights="nf4", **changes)
            )
    with pytest.raises(ValueError, match="no teacher runs in this process"):
        train(
            settings(
                (two_layer_pair[0], "http://127.0.0.1:9/v1"),
                tmp_path / "far",
                teacher_weights="nf4",
            )
        )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'opdlab\[quantised\]'"):
        train(settings(two_layer_pair, tmp_path / "run", teacher_weights="int8"))
