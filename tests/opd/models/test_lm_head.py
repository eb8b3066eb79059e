"""LM heads: gathered products, top-K and the split of real models, against dense autograd."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd.models.gathered_head import gathered_product
from opd.models.lm_head import LmHead, LogitsHead, two_stage_topk
from opd.models.model import CausalLM, split_head
from opd.scoring.chunked_loss import chunked_loss
from tests.helpers.architectures import ARCHITECTURES, random_network
from tests.helpers.warm_process import run_process


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def largest(results: tuple[Tensor, ...], references: tuple[Tensor, ...]) -> float:
    """Return the largest error relative to the largest entry of each reference."""
    pairs = zip(results, references, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in pairs)


# --- the product with a few rows ----------------------------------------------------------------


@pytest.mark.parametrize("ids", [[[0, 3], [3, 3], [5, 0]], [[2], [2], [2]], [[6, 1, 1, 0]]])
def test_gathered_product_passes_gradcheck(ids: list[list[int]]) -> None:
    token_ids = torch.tensor(ids)
    hidden = normal(len(ids), 4).requires_grad_()
    weight = normal(7, 4, seed=1).requires_grad_()
    torch.testing.assert_close(
        gathered_product(hidden, weight, token_ids), (hidden @ weight.T).gather(1, token_ids)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: gathered_product(h, w, token_ids), (hidden, weight)
    )
    gathered_product(hidden, weight, token_ids).sum().backward()
    absent = torch.ones(7, dtype=torch.bool).index_fill(0, token_ids.flatten(), False)
    assert absent.any()
    assert not weight.grad[absent].any(), "a row that no token uses has no gradient"


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
@pytest.mark.parametrize("id_spread", ["distinct", "often", "one"])
def test_gathered_product_adds_up_in_float32(dtype, value, gradient, id_spread: str) -> None:
    """Values are not rounded to half precision; gradients are rounded once for all terms."""
    n, k, d, v = 500, 8, 48, 5000
    hidden, weight = normal(n, d, dtype=dtype), normal(v, d, seed=1, dtype=dtype)
    ids = torch.randint(
        {"distinct": v, "often": 20, "one": 1}[id_spread], (n, k), generator=seeded(2)
    )
    dz = normal(n, k, seed=3).abs().float()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    z = gathered_product(*leaves, ids)
    assert z.dtype == torch.float32
    gradients = torch.autograd.grad(z, leaves, dz)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    dense = (exact[0] @ exact[1].T).gather(1, ids)
    assert largest((z.detach(),), (dense.detach(),)) < value
    assert [x.dtype for x in gradients] == [dtype, dtype]
    assert largest(gradients, torch.autograd.grad(dense, exact, dz.double())) < gradient
    second_gradients = torch.autograd.grad(gathered_product(*leaves, ids), leaves, dz)
    assert all(torch.equal(a, b) for a, b in zip(gradients, second_gradients, strict=True)), (
        "not deterministic"
    )


def test_triton_kernels_agree_with_torch(tmp_path: Path) -> None:
    """Uses Triton's interpreter, which must be selected before the first import; needs no GPU."""
    process = run_process(tmp_path, compare)
    assert process.exit_code == 0, process.stderr


def compare() -> None:
    """Compare Triton's products with torch's for rare and frequent ids and several piece sizes.

    K and D are a little more than a block; the interpreter takes a millisecond for every block.
    """
    from opd.models import gathered_head, gathered_head_triton

    hidden, weight = normal(3, 300, dtype=torch.float32), normal(60, 300, dtype=torch.float32)
    dz = normal(3, 17, dtype=torch.float32)
    tolerance = {"atol": 2e-5, "rtol": 1e-5}
    for top in (1, 4, 60):
        ids = torch.randint(top, (3, 17), generator=seeded())
        torch.testing.assert_close(
            gathered_head_triton.product(hidden, weight, ids),
            gathered_head.torch_product(hidden, weight, ids),
            **tolerance,
        )
        torch.testing.assert_close(
            gathered_head_triton.hidden_gradient(dz, weight, ids),
            gathered_head.torch_hidden_gradient(dz, weight, ids),
            **tolerance,
        )
        torch_gradient = gathered_head.torch_weight_gradient(dz, hidden, ids, 60)
        for piece in (1, 3, 256):
            assert (
                gathered_head_triton.plan_tiles(ids.flatten(), 60, piece).begin.diff().max()
                <= piece
            )
            triton_gradient = gathered_head_triton.weight_gradient(dz, hidden, ids, 60, piece)
            torch.testing.assert_close(triton_gradient, torch_gradient, **tolerance)


# --- top-K --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 640, 1000, 1001, 1279])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("levels", [0, 3])
def test_two_stage_topk_is_exact(size: int, k: int, levels: int) -> None:
    """Compare with torch.topk; with few levels nearly all ids tie, with -inf most are equal."""
    logits = normal(40, size, dtype=torch.float32)
    if levels:
        logits = (logits * levels).round()
    logits[30:, 2:] = -torch.inf
    values, ids = two_stage_topk(logits, k, block=20)
    assert torch.equal(values, logits.topk(k, -1).values)
    assert torch.equal(logits.gather(-1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist()), "an id occurs twice"
    if not levels:
        assert torch.equal(ids[:30], logits[:30].topk(k, -1).indices)


def test_more_ids_than_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 6, but the vocabulary has 5 ids"):
        two_stage_topk(normal(2, 5), 6)


# --- real models --------------------------------------------------------------------------------


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*falling back")
        yield


def gradients(net, loss: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def probe(net, model: CausalLM) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:  # type: ignore[no-untyped-def]
    """Return the model's (B L, V) logits, hidden states, token ids and inputs of a padded batch."""
    ids = torch.randint(60, (2, 7), generator=seeded(3))
    attention_mask = torch.ones_like(ids)
    inputs = (ids, attention_mask, torch.arange(7).expand(2, 7))
    model_logits = net(
        input_ids=ids, attention_mask=attention_mask, position_ids=inputs[2]
    ).logits.flatten(0, 1)
    token_ids = torch.randint(model.vocabulary, (14, 5), generator=seeded(4))
    return (
        model_logits[:, : model.vocabulary],
        model.hidden(*inputs).flatten(0, 1),
        token_ids,
        inputs,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_split_models_have_their_own_logits_and_gradients(name: str) -> None:
    """Check values of all and of gathered logits, and gradients of all parameters, tied or not."""
    net = random_network(name)
    with no_warning():
        model = split_head(net, 57)
    model_logits, hidden, token_ids, _ = probe(net, model)
    torch.testing.assert_close(model.head.logits(hidden), model_logits, atol=1e-5, rtol=1e-4)
    gathered = model.head.gather(hidden, token_ids)
    torch.testing.assert_close(gathered, model_logits.gather(1, token_ids), atol=1e-5, rtol=1e-4)

    def logits_loss(z: Tensor, _: slice) -> Tensor:
        z = z[:, :57] * model.head.scale
        return cap(z, model.head.softcap).logsumexp(-1).square().sum()

    loss = gathered.log_softmax(-1)[:, 0].sum() + chunked_loss(
        hidden, model.head, lambda _: logits_loss, 200
    )
    dense_loss = (
        model_logits.gather(1, token_ids).log_softmax(-1)[:, 0].sum()
        + model_logits.logsumexp(-1).square().sum()
    )
    loss_gradients, dense_gradients = gradients(net, loss), gradients(net, dense_loss)
    assert loss_gradients.keys() == dense_gradients.keys()
    for key, value in loss_gradients.items():
        torch.testing.assert_close(value, dense_gradients[key], atol=2e-4, rtol=1e-3, msg=key)


def cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def test_heads_are_read_from_the_configuration() -> None:
    heads = {
        name: split_head(random_network(name), 61).head
        for name in ("Gemma2", "Cohere", "Granite", "Phi")
    }
    assert heads["Gemma2"].softcap == 2
    assert heads["Cohere"].scale == 0.25
    assert heads["Granite"].scale == pytest.approx(1 / 3)
    assert torch.equal(heads["Phi"].bias, random_network("Phi").get_output_embeddings().bias)


def test_bfloat16_models_are_split_too() -> None:
    for name in ("Llama", "Gemma2", "Granite"):
        with no_warning():
            model = random_network(name).bfloat16()
            head = split_head(model, 61).head
        assert isinstance(head, LmHead)
        assert head.weight.dtype == torch.bfloat16
        assert torch.equal(head.weight, model.get_output_embeddings().weight)


def test_a_model_that_explains_nothing_keeps_its_own_logits() -> None:
    """A factor of 1.1 is missing from the configuration; the loss must still be right."""
    net = random_network("Llama")
    net.register_forward_hook(lambda _, __, out: out | {"logits": out.logits * 1.1})
    with pytest.warns(UserWarning, match="LlamaForCausalLM do not reproduce .* keeps 61 numbers"):
        model = split_head(net, 57)
    model_logits, hidden, token_ids, _ = probe(net, model)
    assert isinstance(model.head, LogitsHead)
    loss = model.head.gather(hidden, token_ids).log_softmax(-1)[:, 0].sum()
    loss = loss + chunked_loss(
        hidden, model.head, lambda _: lambda z, _: z[:, :57].logsumexp(-1).sum(), 200
    )
    dense_loss = (
        model_logits.gather(1, token_ids).log_softmax(-1)[:, 0].sum()
        + model_logits.logsumexp(-1).sum()
    )
    loss_gradients, dense_gradients = gradients(net, loss), gradients(net, dense_loss)
    for key, value in loss_gradients.items():
        torch.testing.assert_close(value, dense_gradients[key], atol=1e-4, rtol=1e-3, msg=key)


def test_adapters_act_in_the_decoder_and_are_refused_on_the_head() -> None:
    import peft

    def adapted_model(**adapter_options: object):  # type: ignore[no-untyped-def]
        net = peft.get_peft_model(
            random_network("Llama"), peft.LoraConfig(r=2, **adapter_options)
        ).eval()
        for key, p in net.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p)
        return net

    net = adapted_model(target_modules=["q_proj", "down_proj"])
    with no_warning():
        model = split_head(net, 57)
    model_logits, hidden, token_ids, inputs = probe(net, model)
    with net.disable_adapter():
        assert not torch.allclose(model.hidden(*inputs).flatten(0, 1), hidden)
    loss = model.head.gather(hidden, token_ids).square().sum()
    torch.testing.assert_close(loss, model_logits.gather(1, token_ids).square().sum())
    loss_gradients, dense_gradients = (
        gradients(net, loss),
        gradients(net, model_logits.gather(1, token_ids).square().sum()),
    )
    assert any("lora_A" in key for key in loss_gradients)
    for key, value in loss_gradients.items():
        torch.testing.assert_close(value, dense_gradients[key], atol=1e-4, rtol=1e-3, msg=key)
    for adapter_options in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        with pytest.raises(ValueError, match="adapter is attached to the model's head"):
            split_head(adapted_model(**adapter_options), 57)
