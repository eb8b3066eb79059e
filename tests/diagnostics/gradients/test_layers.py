"""Gradients of blocks below the LM head, by sequence, against one autograd call a sequence."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.gradients.bias import prompt_jackknife_means
from diagnostics.gradients.estimators import estimator_weights
from diagnostics.gradients.layers import (
    linear_sketch,
    linear_squares,
    make_block,
    sequence_gradients,
)
from diagnostics.gradients.probe import GradientSketches
from diagnostics.gradients.signal_noise import signal_and_noise
from diagnostics.gradients.sketch import identity_projection, random_projection
from diagnostics.ragged import scatter_to_mask
from opd.config.problems import check_settings
from opd.config.settings import Config, with_settings
from opd.data.prompts import Prompts
from opd.models.contexts import activation_checkpointing
from opd.models.forward import log_probabilities, response_hidden_states
from opd.models.lm_head import LogitsHead
from opd.models.model import split_head
from opd.objectives.factory import make_objective
from opd.scoring.score import ScoredBatch
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import LocalTeacher
from opd.training.probe.block_gradients import block_gradient_sketches, hidden_state_gradients
from opd.training.probe.gradient_probe import probe_gradients, supervised_hidden_states
from opd.training.update import PreparedLoss
from tests.diagnostics.gradients.test_probe import seeded
from tests.helpers.sketches import matrix_sketch

V, B, T = 11, 6, 7
PATTERNS = ("*norm", "model.layers.1.mlp.down_proj", "*.0.self_attn.[qk]_proj")


def network(seed: int) -> nn.Module:
    """Build two layers with biased query and key, grouped heads and a final norm, in float64."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
            tie_word_embeddings=False,
        )
        model = Qwen2ForCausalLM(config).double().eval()
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model


@cache
def pair() -> ModelPair:
    student, teacher = network(0), network(1)
    teacher.requires_grad_(False)
    return ModelPair(split_head(student, V), LocalTeacher("", split_head(teacher, V)), None, [0])


@cache
def case() -> tuple[Prompts, ScoredRollouts]:
    """Build three prompts of two rollouts: left padding, different lengths, a gap in a mask."""
    g = seeded(3)
    widths, ends = torch.tensor([4, 4, 1, 1, 3, 3]), torch.tensor([7, 3, 5, 7, 1, 6])
    real = torch.arange(4) >= 4 - widths[:, None]
    prompts = Prompts(
        tokens=torch.randint(V, (3, 4), generator=g).repeat_interleave(2, 0) * real,
        mask=real,
        index=torch.arange(B) // 2,
        answers=[""] * B,
    )
    mask = torch.arange(T) < ends[:, None]
    mask[0, 2] = False
    tokens = torch.randint(V, (B, T), generator=g) * (torch.arange(T) < ends[:, None])
    zero = torch.zeros(B, T, dtype=torch.float64)
    bare = ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=zero,
        student_logp=zero,
        teacher_logp=zero,
        prompt=prompts.index,
        ended=ends < T,
    )
    with torch.no_grad():
        logp = [
            log_probabilities(m, response_hidden_states(m, prompts, bare), 1.0).double()
            for m in (pair().student, pair().teacher.model)
        ]
    y = tokens[mask]
    student_logp, teacher_logp = (
        scatter_to_mask(x.gather(1, y[:, None])[:, 0], mask) for x in logp
    )
    prefix = {
        name: scatter_to_mask(x, mask) for name, x in compute_distribution_stats(*logp, y).items()
    }
    scored = replace(
        bare, sampler_logp=student_logp, student_logp=student_logp, teacher_logp=teacher_logp
    )
    return prompts, replace(scored, prefix=DistributionStats(**prefix))


def by_autograd(member: tuple[Tensor, bool], names: list[str]) -> dict[str, Tensor]:
    """Return name -> (B, ...) gradients of sum_t [w_t log p(y_t) + K_t], from `.logits`, by row."""
    prompts, scored = case()
    w, local = member
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(B):
        p, t = prompts.tokens[i][prompts.mask[i]], int(scored.mask[i].nonzero()[-1]) + 1
        ids = torch.cat([p, scored.tokens[i, :t]])[None]
        student, teacher = (
            m.network(ids).logits[0, len(p) - 1 : -1].log_softmax(-1)
            for m in (pair().student, pair().teacher.model)
        )
        kl = (student.exp() * (student - teacher)).sum(-1)
        picked = student.gather(1, scored.tokens[i, :t, None])[:, 0]
        loss = ((w[i, :t] * picked + local * kl) * scored.mask[i, :t]).sum()
        parameters = dict(pair().student.network.named_parameters())
        grads = torch.autograd.grad(loss, [parameters[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            gradients[name].append(grad)
    return {name: torch.stack(parts) for name, parts in gradients.items()}


def gradients_below_head(
    patterns: tuple[str, ...], max_tokens_per_microbatch: int
) -> dict[str, GradientSketches]:
    prompts, scored = case()
    with torch.no_grad():
        output_gradients = [
            supervised_hidden_states(m, prompts, scored, 1000)
            for m in (pair().student, pair().teacher.model)
        ]
        slopes = hidden_state_gradients(pair(), scored, *output_gradients, chunk_tokens=5)
    blocks = [make_block(pair().student.network, pattern) for pattern in patterns]
    return block_gradient_sketches(
        pair().student, prompts, scored, slopes, blocks, 0.5, max_tokens_per_microbatch
    )


@pytest.mark.parametrize("max_tokens_per_microbatch", [1000, 20])
def test_gradients_by_sequence_are_autograds(max_tokens_per_microbatch: int) -> None:
    """For every estimator, with left padding, masks and reordered micro-batches."""
    gradients = gradients_below_head(PATTERNS, max_tokens_per_microbatch)
    block_gradients = gradients[PATTERNS[0]]
    assert (block_gradients.names, block_gradients.gammas) == (
        ("plain", "rb_all_position_mean"),
        (0.0, 0.5, 1.0),
    )
    family = estimator_weights(case()[1], block_gradients.names, block_gradients.gammas)
    for f in range(6):
        member = (family.values[..., f], bool(family.local[f]))
        for pattern in PATTERNS:
            block = make_block(pair().student.network, pattern)
            names = [f"{layer}.{p}" for layer, m in block.layers.items() for p in m._parameters]
            names = [name for name in names if name in dict(owned())]
            grads = by_autograd(member, names)
            squares = sum(x.flatten(1).square().sum(1) for x in grads.values())
            block_gradients = gradients[pattern]
            torch.testing.assert_close(block_gradients.squares[:, f], squares, rtol=1e-4, atol=1e-9)
            if not block.projections:
                assert list(block.layers)[-1] == "model.norm"
                full = torch.cat([grads[f"{layer}.weight"] for layer in block.layers], 1)
                torch.testing.assert_close(
                    block_gradients.sketches[:, f, 0].double(), full, rtol=1e-3, atol=1e-5
                )
                continue
            total = 0
            for layer, projection in block.projections.items():
                parts = [grads[f"{layer}.weight"]]
                if f"{layer}.bias" in grads:
                    parts.append(grads[f"{layer}.bias"][..., None])
                matrix = torch.cat(parts, 2)
                total = total + torch.stack([matrix_sketch(x, projection) for x in matrix])
            torch.testing.assert_close(
                block_gradients.sketches[:, f],
                total.to(block_gradients.sketches),
                rtol=1e-3,
                atol=1e-5,
            )


def owned() -> list[tuple[str, Tensor]]:
    return list(pair().student.network.named_parameters())


def test_nothing_is_left_behind() -> None:
    initial = [p.clone() for _, p in owned()]
    gradients_below_head(PATTERNS, 1000)
    assert all(p.grad is None for _, p in owned())
    assert all(torch.equal(p, x) for (_, p), x in zip(owned(), initial, strict=True))
    modules = pair().student.network.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_recomputed_activations_give_the_same() -> None:
    prompts, scored = case()
    blocks = [make_block(pair().student.network, "*down_proj")]

    def forward() -> Tensor:
        return response_hidden_states(pair().student, prompts, scored)

    g = torch.randn(int(scored.mask.sum()), 16, generator=seeded(0), dtype=torch.float64)
    plain = sequence_gradients(blocks, forward, [g, 2 * g])["*down_proj"]
    with activation_checkpointing(pair().student.network, enabled=True):
        recomputed = sequence_gradients(blocks, forward, [g, 2 * g])["*down_proj"]
    torch.testing.assert_close(recomputed, plain)
    torch.testing.assert_close(plain[1][:, 1], 4 * plain[1][:, 0])


@pytest.mark.parametrize("length", [2, 40])
def test_squared_lengths_are_exact_either_way(length: int) -> None:
    a = torch.randn(3, length, 5, generator=seeded(1), dtype=torch.float64)
    b = torch.randn(3, length, 7, generator=seeded(2), dtype=torch.float64)
    matrix = torch.einsum("nto,nti->noi", b, a)
    torch.testing.assert_close(linear_squares(a, b), matrix.square().sum((1, 2)))
    full = linear_sketch(a, b, identity_projection(7, 5))
    torch.testing.assert_close(full[:, 0], matrix.flatten(1))
    # independent signs: unbiased inner products with the documented error
    signs = [random_projection(7, 5, seed, rows=4, copies=2) for seed in range(400)]
    inner = torch.stack(
        [torch.einsum("njm,kjm->nk", s, s) for s in (linear_sketch(a, b, p) for p in signs)]
    )
    error = inner.std(0) / 20
    assert bool(((inner.mean(0) - matrix.flatten(1) @ matrix.flatten(1).T).abs() < 4 * error).all())


def test_layers_of_other_norms_and_adapters() -> None:
    """LayerNorm with a bias, a norm that multiplies by 1 + weight, and low-rank factors."""

    class Shifted(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.shifted = nn.LayerNorm(6), Shifted(6)
            self.base, self.lora_A = nn.Linear(6, 6), nn.Linear(6, 2, bias=False)
            self.lora_B = nn.Linear(2, 6, bias=False)
            self.base.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            x = torch.tanh(self.base(x) + self.lora_B(self.lora_A(x)))
            return self.shifted(x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net().double()
        for p in net.parameters():
            nn.init.normal_(p)
    x = torch.randn(4, 5, 6, generator=seeded(1), dtype=torch.float64)
    g = torch.randn(4, 5, 6, generator=seeded(2), dtype=torch.float64)
    gradients = sequence_gradients(
        [make_block(net, n) for n in ("shifted", "lora_[AB]", "norm")],
        lambda: net(x),
        [g],
    )
    for pattern, names in (
        ("norm", ["norm.weight", "norm.bias"]),
        ("shifted", ["shifted.weight"]),
        ("lora_[AB]", ["lora_A.weight", "lora_B.weight"]),
    ):
        parameters = [dict(net.named_parameters())[name] for name in names]
        rows = [
            torch.cat(
                [
                    y.flatten()
                    for y in torch.autograd.grad((net(x[i : i + 1]) * g[i]).sum(), parameters)
                ]
            )
            for i in range(4)
        ]
        expected = torch.stack(rows)
        sketch, square = gradients[pattern]
        torch.testing.assert_close(square[:, 0], expected.square().sum(1))
        if "lora" not in pattern:
            torch.testing.assert_close(sketch[:, 0, 0], expected)


def test_wrong_blocks_are_refused() -> None:
    net = pair().student.network
    with pytest.raises(ValueError, match=r"matches .head.; trained layers: model\.embed"):
        make_block(net, "head")
    with pytest.raises(ValueError, match=r"matches linear layers .* and others"):
        make_block(net, "model.layers.0.*")
    with pytest.raises(ValueError, match="Embedding with a matrix"):
        make_block(net, "*embed_tokens")
    layer = nn.Linear(3, 3)
    twice = make_block(nn.Sequential(layer), "0")
    x = torch.ones(2, 4, 3)
    with pytest.raises(
        ValueError, match=r"exactly once in a forward pass; number of calls: \{'0': 2\}"
    ):
        sequence_gradients([twice], lambda: layer(layer(x)), [x])
    with pytest.raises(ValueError, match=r"0 ran on \(4, 3\), expected"):
        sequence_gradients([twice], lambda: layer(x[0]), [x[0]])
    assert not layer._forward_hooks


def config(*blocks: str, interval: int) -> Config:
    settings = {"probe_blocks": blocks, "probe_every": interval}
    return check_settings(with_settings(Config(student="s", teacher="t", out="o"), **settings))


def test_blocks_without_a_probe_are_refused() -> None:
    with pytest.raises(ValueError, match=r"probe_blocks is \('\*norm',\); it must be \(\) if"):
        config("*norm", interval=0)
    assert config("*norm", interval=5).record.probe_blocks == ("*norm",)


def trained(name: str, gamma: float = 0.0, baseline: str = "none") -> PreparedLoss:
    """Build a loss that averages over responses."""
    prompts, scored = case()
    objective = make_objective(name, gamma=gamma, baseline=baseline)
    weight = 1 + torch.arange(B, dtype=torch.float64)[:, None].expand(B, T)
    teacher = pair().teacher.model
    teacher_hidden = supervised_hidden_states(teacher, prompts, scored, 1000).detach()
    return PreparedLoss(
        objective=objective,
        batch=ScoredBatch(prompts, scored, teacher_hidden),
        credit=objective.credit(scored),
        weight=weight if baseline != "none" else torch.ones_like(weight),
        denominator=torch.ones(B, dtype=torch.float64),
        rows=[list(range(B))],
        micro_batches=[],
    )


@pytest.mark.parametrize(
    ("name", "gamma", "baseline"),
    [("sampled_token", 0.7, "leave_one_out"), ("sampled_token_clipped", 1.0, "position_mean")],
)
def test_the_headline_of_a_block_is_the_trained_losses(
    name: str, gamma: float, baseline: str
) -> None:
    prompts, scored = case()
    loss = trained(name, gamma, baseline)
    row = probe_gradients(
        pair(), ScoredBatch(prompts, scored), loss, gamma=gamma, max_tokens_per_microbatch=30,
        max_logits_per_chunk=100, blocks=PATTERNS[:1],
    )  # fmt: skip
    norms = [name for name, _ in owned() if "norm" in name]
    member = (loss.credit * loss.weight, False)
    full = torch.cat(list(by_autograd(member, norms).values()), 1)
    for measure, want in signal_and_noise(full, scored.prompt).items():
        actual = row[f"gradient/blocks/*norm/{measure}"]
        assert actual == pytest.approx(want.value, rel=1e-3, abs=1e-5, nan_ok=True), measure


def test_a_student_whose_logits_are_no_matrix_product_is_refused() -> None:
    prompts, scored = case()
    student = replace(pair().student, get_head=lambda: LogitsHead(V))
    with pytest.raises(ValueError, match="set probe_every to 0"):
        probe_gradients(
            replace(pair(), student=student), ScoredBatch(prompts, scored),
            trained("sampled_token"),
            gamma=0.0, max_tokens_per_microbatch=30, max_logits_per_chunk=100,
        )  # fmt: skip


def test_the_row_of_a_run_says_what_the_gradients_are() -> None:
    prompts, scored = case()
    loss = trained("sampled_token")
    row = probe_gradients(
        pair(), ScoredBatch(prompts, scored), loss, gamma=0.0, max_tokens_per_microbatch=30,
        max_logits_per_chunk=100, blocks=PATTERNS,
    )  # fmt: skip
    family = estimator_weights(scored, ["plain"], (0.0,))
    member = (family.values[..., 0], False)
    norms = [name for name, _ in owned() if "norm" in name]
    full = torch.cat(list(by_autograd(member, norms).values()), 1)
    for name, want in signal_and_noise(full, scored.prompt).items():
        for end, value in want.columns(name).items():
            actual = row[f"gradient/blocks/*norm/{end}"]
            assert actual == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), end
    down_proj = by_autograd(member, ["model.layers.1.mlp.down_proj.weight"])
    true = float(next(iter(down_proj.values())).flatten(1).square().sum(1).mean())
    excess = row[f"gradient/blocks/{PATTERNS[1]}/sketch_excess"]
    assert abs(excess) < 0.3
    assert row["gradient/blocks/*norm/sketch_excess"] == pytest.approx(0, abs=1e-6)
    block_gradients = gradients_below_head(PATTERNS[1:2], 1000)[PATTERNS[1]]
    assert (block_gradients.sketches[:, 0].double().square().sum() / B / true - 1) == pytest.approx(
        excess, abs=1e-4
    )
    bare = probe_gradients(
        pair(),
        ScoredBatch(prompts, scored),
        loss,
        gamma=0.0,
        max_tokens_per_microbatch=30,
        max_logits_per_chunk=100,
    )
    assert all(row[name] == pytest.approx(x, nan_ok=True) for name, x in bare.items())
    assert not any("blocks" in name for name in bare)


def test_means_without_each_prompt() -> None:
    x, prompt = torch.tensor([1.0, 5.0, 3.0, 11.0]), torch.tensor([7, 2, 7, 9])
    assert prompt_jackknife_means(x, prompt).tolist() == [5, 5, 8, 3]
