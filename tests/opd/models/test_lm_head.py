"""Heads: products with a few rows, top-K, and real models split, against dense autograd."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from opd.models.gathered_head import gathered_product
from opd.models.lm_head import full_logits, gathered_logits, two_stage_topk
from opd.models.model import CausalLM, split
from opd.scoring.loss import chunked_loss


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def largest(parts: tuple[Tensor, ...], whole: tuple[Tensor, ...]) -> float:
    """Largest relative error of the first in units of the second's largest entries."""
    pairs = zip(parts, whole, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in pairs)


# --- the product with a few rows ----------------------------------------------------------------


@pytest.mark.parametrize("ids", [[[0, 3], [3, 3], [5, 0]], [[2], [2], [2]], [[6, 1, 1, 0]]])
def test_gathered_product_passes_gradcheck(ids: list[list[int]]) -> None:
    picked = torch.tensor(ids)
    hidden = normal(len(ids), 4).requires_grad_()
    weight = normal(7, 4, seed=1).requires_grad_()
    torch.testing.assert_close(
        gathered_product(hidden, weight, picked), (hidden @ weight.T).gather(1, picked)
    )
    assert torch.autograd.gradcheck(lambda h, w: gathered_product(h, w, picked), (hidden, weight))
    gathered_product(hidden, weight, picked).sum().backward()
    absent = torch.ones(7, dtype=torch.bool).index_fill(0, picked.flatten(), False)
    assert absent.any()
    assert not weight.grad[absent].any(), "a row that nobody asked for has no gradient"


def test_gathered_product_of_no_tokens_is_empty() -> None:
    hidden, weight = normal(0, 4).requires_grad_(), normal(7, 4).requires_grad_()
    z = gathered_product(hidden, weight, torch.zeros((0, 3), dtype=torch.long))
    assert z.shape == (0, 3)
    z.sum().backward()
    assert hidden.grad.shape == (0, 4)
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("dtype", "value", "gradient"),
    [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-6, 1.5e-2)],
)
@pytest.mark.parametrize("spread", ["distinct", "often", "one"])
def test_gathered_product_adds_up_in_float32(dtype, value, gradient, spread: str) -> None:
    """Values are not rounded to half precision; gradients are, once, however many they sum."""
    n, k, d, v = 500, 8, 48, 5000
    hidden, weight = normal(n, d, dtype=dtype), normal(v, d, seed=1, dtype=dtype)
    ids = torch.randint({"distinct": v, "often": 20, "one": 1}[spread], (n, k), generator=seeded(2))
    dz = normal(n, k, seed=3).abs().float()
    live = hidden.requires_grad_(), weight.requires_grad_()
    z = gathered_product(*live, ids)
    assert z.dtype == torch.float32
    found = torch.autograd.grad(z, live, dz)
    exact = [x.detach().double().requires_grad_() for x in live]
    dense = (exact[0] @ exact[1].T).gather(1, ids)
    assert largest((z.detach(),), (dense.detach(),)) < value
    assert [x.dtype for x in found] == [dtype, dtype]
    assert largest(found, torch.autograd.grad(dense, exact, dz.double())) < gradient
    again = torch.autograd.grad(gathered_product(*live, ids), live, dz)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not deterministic"


def test_triton_kernels_agree_with_torch() -> None:
    """In Triton's interpreter, which must be chosen before the first import; no GPU is needed."""
    line = [sys.executable, "-c", "from tests.opd.models.test_lm_head import compare; compare()"]
    done = subprocess.run(
        line,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def compare() -> None:
    """Triton's products against torch's: rare and frequent ids, segments whole and in pieces."""
    from opd.models import gathered_head, gathered_head_triton

    hidden, weight = normal(11, 300, dtype=torch.float32), normal(60, 300, dtype=torch.float32)
    dz = normal(11, 17, dtype=torch.float32)
    near = {"atol": 2e-5, "rtol": 1e-5}
    for top in (1, 4, 60):
        ids = torch.randint(top, (11, 17), generator=seeded())
        torch.testing.assert_close(
            gathered_head_triton.product(hidden, weight, ids),
            gathered_head.torch_product(hidden, weight, ids),
            **near,
        )
        torch.testing.assert_close(
            gathered_head_triton.hidden_gradient(dz, weight, ids),
            gathered_head.torch_hidden_gradient(dz, weight, ids),
            **near,
        )
        summed = gathered_head.torch_weight_gradient(dz, hidden, ids, 60)
        for piece in (1, 3, 256):
            assert gathered_head_triton.cut(ids.flatten(), 60, piece).begin.diff().max() <= piece
            ours = gathered_head_triton.weight_gradient(dz, hidden, ids, 60, piece)
            torch.testing.assert_close(ours, summed, **near)


# --- top-K --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 640, 1000, 1001, 1279])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("levels", [0, 3])
def test_two_stage_topk_is_exact(size: int, k: int, levels: int) -> None:
    """Against torch.topk; with few levels nearly all ids tie, with -inf most are equal."""
    logits = normal(40, size, dtype=torch.float32)
    if levels:
        logits = (logits * levels).round()
    logits[30:, 2:] = -torch.inf
    values, ids = two_stage_topk(logits, k, block=20)
    assert torch.equal(values, logits.topk(k, -1).values)
    assert torch.equal(logits.gather(-1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist()), "an id stands twice"
    if not levels:
        assert torch.equal(ids[:30], logits[:30].topk(k, -1).indices)


def test_more_ids_than_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="6 ids wanted of a vocabulary of 5"):
        two_stage_topk(normal(2, 5), 6)


# --- real models --------------------------------------------------------------------------------

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
MODELS = {
    "Llama": SMALL,
    "Qwen2": SMALL | {"tie_word_embeddings": True},
    "Qwen3": SMALL | {"head_dim": 8},
    "Gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Cohere": SMALL | {"logit_scale": 0.25},
    "Granite": SMALL | {"logits_scaling": 3.0},
    "Phi": SMALL,
    "GPT2": GPT | {"initializer_range": 0.4},
    "GPTJ": GPT | {"rotary_dim": 4, "initializer_range": 0.4},
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


def network(name: str, **changes: object):  # type: ignore[no-untyped-def]
    import transformers

    config = getattr(transformers, f"{name}Config")(**(MODELS[name] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config)
        output = made.get_output_embeddings()
        if getattr(output, "bias", None) is not None:
            torch.nn.init.normal_(output.bias)
    return made.eval()


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*falling back")
        yield


def gradients(net, loss: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def probe(net, one: CausalLM) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # type: ignore[no-untyped-def]
    """Own (B L, V) logits, hidden states, ids to pick and the input of a padded batch."""
    ids = torch.randint(60, (2, 7), generator=seeded(3))
    there = torch.ones_like(ids)
    given = (ids, there, torch.arange(7).expand(2, 7))
    own = net(input_ids=ids, attention_mask=there, position_ids=given[2]).logits.flatten(0, 1)
    picked = torch.randint(one.vocabulary, (14, 5), generator=seeded(4))
    return own[:, : one.vocabulary], one.hidden(*given).flatten(0, 1), picked, given


@pytest.mark.parametrize("name", MODELS)
def test_split_models_have_their_own_logits_and_gradients(name: str) -> None:
    """Values of all and of gathered logits, and the gradient of every parameter, tied ones too."""
    net = network(name)
    with no_warning():
        one = split(net, 57)
    own, hidden, picked, _ = probe(net, one)
    torch.testing.assert_close(full_logits(hidden, one.head), own, atol=1e-5, rtol=1e-4)
    some = gathered_logits(hidden, one.head, picked)
    torch.testing.assert_close(some, own.gather(1, picked), atol=1e-5, rtol=1e-4)

    def of_logits(z: Tensor, _: slice) -> Tensor:
        z = z[:, :57] * one.head.scale
        return cap(z, one.head.softcap).logsumexp(-1).square().sum()

    mine = some.log_softmax(-1)[:, 0].sum() + chunked_loss(hidden, one.head, of_logits, 200)
    theirs = own.gather(1, picked).log_softmax(-1)[:, 0].sum() + own.logsumexp(-1).square().sum()
    ours, dense_ones = gradients(net, mine), gradients(net, theirs)
    assert ours.keys() == dense_ones.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, dense_ones[key], atol=2e-4, rtol=1e-3, msg=key)


def cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def test_heads_are_read_from_the_configuration() -> None:
    heads = {name: split(network(name), 61).head for name in ("Gemma2", "Cohere", "Granite", "Phi")}
    assert heads["Gemma2"].softcap == 2
    assert heads["Cohere"].scale == 0.25
    assert heads["Granite"].scale == pytest.approx(1 / 3)
    assert heads["Phi"].bias is not None


def test_bfloat16_models_are_split_too() -> None:
    for name in ("Llama", "Gemma2", "Granite"):
        with no_warning():
            assert split(network(name).bfloat16(), 61).head.weight is not None


def test_a_model_that_explains_nothing_keeps_its_own_logits() -> None:
    """The configuration is silent about a factor of 1.1; the loss is right all the same."""
    net = network("Llama")
    net.register_forward_hook(lambda _, __, out: out | {"logits": out.logits * 1.1})
    with pytest.warns(UserWarning, match="LlamaForCausalLM has logits .* keeps 61 numbers"):
        one = split(net, 57)
    own, hidden, picked, _ = probe(net, one)
    assert one.head.weight is None
    mine = gathered_logits(hidden, one.head, picked).log_softmax(-1)[:, 0].sum()
    mine = mine + chunked_loss(hidden, one.head, lambda z, _: z[:, :57].logsumexp(-1).sum(), 200)
    theirs = own.gather(1, picked).log_softmax(-1)[:, 0].sum() + own.logsumexp(-1).sum()
    ours, dense_ones = gradients(net, mine), gradients(net, theirs)
    for key, value in ours.items():
        torch.testing.assert_close(value, dense_ones[key], atol=1e-4, rtol=1e-3, msg=key)


def test_adapters_act_in_the_decoder_and_are_refused_on_the_head() -> None:
    import peft

    def adapted(**where: object):  # type: ignore[no-untyped-def]
        net = peft.get_peft_model(network("Llama"), peft.LoraConfig(r=2, **where)).eval()
        for key, p in net.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p)
        return net

    net = adapted(target_modules=["q_proj", "down_proj"])
    with no_warning():
        one = split(net, 57)
    own, hidden, picked, given = probe(net, one)
    with net.disable_adapter():
        assert not torch.allclose(one.hidden(*given).flatten(0, 1), hidden)
    mine = gathered_logits(hidden, one.head, picked).square().sum()
    torch.testing.assert_close(mine, own.gather(1, picked).square().sum())
    ours, theirs = gradients(net, mine), gradients(net, own.gather(1, picked).square().sum())
    assert any("lora_A" in key for key in ours)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-4, rtol=1e-3, msg=key)
    for where in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        with pytest.raises(ValueError, match="adapter sits on the model's head"):
            split(adapted(**where), 57)
