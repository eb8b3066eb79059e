"""Quantised teachers: the model that they are, what they cost, and that a run learns from it."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.batch import Scored
from diagnostics.batch import load as load_batch
from opd.config import TaskSettings
from opd.model import load
from opd.problems import problems
from opd.train import train
from tests.test_ahead import asked_of, row_by_row
from tests.test_train import settings

LEVELS = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
SLACK = {"int8": 0.8, "nf4": 1e-4}
"""How much nearer the same weights have to be than others: LLM.int8() rounds activations too, and
which ones depends on the batch."""


def unpacked(quantised: Any, plain: Any) -> Any:
    """The plain network with the weights that a quantised one stands for."""
    from bitsandbytes import functional

    network = copy.deepcopy(plain)
    for name, module in quantised.named_modules():
        weight, kind = getattr(module, "weight", None), type(module).__name__
        if kind == "Linear4bit":
            found = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif kind == "Linear8bitLt":
            found = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            continue
        network.get_submodule(name).weight.data = found.reshape(
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


@pytest.mark.parametrize("weights", SLACK)
def test_layers_are_quantised_and_the_head_is_not(tiny_pair, weights: str) -> None:
    pytest.importorskip("bitsandbytes")
    tokenizer, network = load(str(tiny_pair[1]), "cpu", "float32", weights=weights)
    _, plain = load(str(tiny_pair[1]), "cpu", "float32")
    meant = unpacked(network, plain)
    for ours, theirs in zip(layers(meant), layers(plain), strict=True):
        want = nearest_levels(theirs) if weights == "nf4" else by_rows(theirs.half().float())
        slack = {"int8": 1e-3, "nf4": 1e-6}[weights] * theirs.abs().max()
        assert float(((ours - want).abs() <= slack).float().mean()) > 0.99  # ties fall either way
        assert not torch.equal(ours, theirs)
    assert torch.equal(network.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    bits = sum(x.numel() * x.element_size() for x in layers(network)) * 8
    assert bits == sum(x.numel() for x in layers(plain)) * {"int8": 8, "nf4": 4}[weights]
    ids = tokenizer.encode(problems("train", 1, 0)[0].solution, return_tensors="pt")
    with torch.no_grad():
        logp = [m(ids).logits.log_softmax(-1) for m in (network, meant, plain)]
    apart = float((logp[0] - logp[1]).abs().mean())
    other = float((logp[0] - logp[2]).abs().mean())
    assert apart < other * SLACK[weights]


@pytest.mark.parametrize("weights", SLACK)
def test_a_run_learns_from_the_quantised_teacher(tiny_pair, tmp_path: Path, weights: str) -> None:
    pytest.importorskip("bitsandbytes")
    changes: dict[str, Any] = {"steps": 2, "batch_every": 1, "eval_every": 0}
    config = settings(tiny_pair, tmp_path / "run", teacher_weights=weights, **changes)
    two = tuple(
        TaskSettings(name=name, task="lab", teacher=str(teacher))
        for name, teacher in zip("ab", reversed(tiny_pair), strict=True)
    )
    tasks = replace(config, out=str(tmp_path / "tasks"), tasks=two, lr=1e-30)
    batch = scored(train(config), 0)
    prompts = asked_of(Path(config.out), config, 0)
    apart = {}
    for kind in (weights, "saved"):
        _, network = load(config.teacher, "cpu", "float32", weights=kind)
        gap = (row_by_row(network, prompts, batch) - batch.teacher_logp)[batch.mask]
        apart[kind] = float(gap.abs().mean())
    assert apart[weights] < apart["saved"] * SLACK[weights]
    second = scored(train(tasks), 1)  # its teacher is the student, which has not moved
    gap = (second.teacher_logp - second.student_logp)[second.mask]
    assert float(gap.abs().mean()) > 1e-3


def scored(folder: Path, step: int) -> Scored:
    batch = load_batch(folder / "batches" / f"step_{step:06d}.safetensors")
    assert isinstance(batch, Scored)
    return batch


def test_what_cannot_be_quantised_is_refused(tiny_pair, tmp_path: Path, monkeypatch) -> None:
    for changes, words in (
        ({"offload_teacher": True}, "saved where offload_teacher moves them"),
        ({"teacher": "ema", "outcome": 1.0}, r"made of the student \(ema\)"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(settings(tiny_pair, tmp_path), teacher_weights="nf4", **changes)
    with pytest.raises(ValueError, match="no teacher is in this process"):
        train(
            settings(
                (tiny_pair[0], "http://127.0.0.1:9/v1"), tmp_path / "far", teacher_weights="nf4"
            )
        )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'opdlab\[quantised\]'"):
        train(settings(tiny_pair, tmp_path / "run", teacher_weights="int8"))
