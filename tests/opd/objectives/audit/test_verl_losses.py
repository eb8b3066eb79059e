"""The losses of verl as the audit calls them: their targets, values by hand, settings."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.errors import InvalidInput, MissingPackage
from opd.objectives.audit.faults import factors_of, sample_batch, world_mean
from opd.objectives.audit.gradients import loss_gradients
from opd.objectives.audit.matching import find_target
from opd.objectives.audit.named import load_loss
from opd.objectives.audit.structure import find_structure
from opd.objectives.audit.world_set import make_worlds
from opd.objectives.audit.worlds import make_batch
from opd.objectives.user_loss import UserLoss
from tests.helpers.warm_process import run_process

LN2 = math.log(2)
NO_REWARD = "vanilla,adv_estimator=none,use_kl_loss=true,kl_loss_coef=1,kl_loss_type"
PG = "use_policy_gradient=true"
TOKENS = torch.tensor([[0, 1, 0], [2, 0, 1], [1, 0, 0]])
"""Three responses of one, two and two tokens of a vocabulary of three."""
MASK = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0]]).bool()


def target_of(mode: str) -> str:
    """Return the name of the target of a loss, from its means in two worlds."""
    loss = load_loss(f"verl:{mode}")
    worlds = make_worlds(4, full=False, length=2)
    structure = find_structure(loss, worlds.random, 1)
    assert structure.unit != "batch"
    for factor in factors_of(structure):
        means = [world_mean(loss, x, structure, factor) for x in (worlds.random, worlds.equal)]
        if all(mean.is_zero for mean in means):
            return "zero"
        match, _ = find_target([mean for mean in means if not mean.is_zero])
        if match is not None:
            assert match.relative_bias < 1e-4
            return match.target.name
    return "none"


@pytest.mark.verl
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("k2", "token_reverse_kl"),
        ("mse", "token_reverse_kl"),
        (f"k1,{PG}", "token_reverse_kl"),
        ("kl", "zero"),
        ("abs", "none"),
        ("forward_kl_topk", "none"),
        ("forward_kl_topk,topk=4", "token_forward_kl"),  # all of the vocabulary
        ("vanilla", "token_reverse_kl"),
        ("gspo", "token_reverse_kl"),
        ("cispo", "token_reverse_kl"),
        ("bypass_mode,loss_type=reinforce,rollout_is=token", "token_reverse_kl"),
        ("vanilla,loss_agg_mode=seq-mean-token-sum", "token_reverse_kl"),
        ("geo_mean", "none"),
        ("vanilla,adv_estimator=rloo", "expected_reward"),
        ("vanilla,adv_estimator=grpo,norm_adv_by_std_in_grpo=false", "expected_reward"),
        ("vanilla,adv_estimator=remax", "expected_reward"),
        (f"{NO_REWARD}=k1", "zero"),
        (f"{NO_REWARD}=k1+", "token_reverse_kl"),
        (f"{NO_REWARD}=k3+", "token_reverse_kl"),
        ("opdlab_teacher_topk", "topk_reverse_kl(renormalised, teacher)"),
        ("opdlab_teacher_topk_bucket", "topk_reverse_kl(bucket, teacher)"),
        ("opdlab_sampled_token", "token_reverse_kl"),
        (
            f"k1,{PG},use_task_rewards=true,adv_estimator=rloo",
            "mixture(0.5 token_reverse_kl, 0.5 expected_reward)",
        ),
    ],
)
def test_the_target_of_each_mode(mode: str, name: str) -> None:
    assert target_of(mode) == name


# --- values by hand -----------------------------------------------------------------------------


def value(loss: UserLoss, **values: Any) -> Tensor:
    """Return a loss of those values that it asks for."""
    result: Tensor = loss.function(**{name: values[name] for name in loss.asks})
    return result


def one_token(mode: str, p: list[float], q: list[float], token: int) -> tuple[float, Tensor]:
    """Return a loss of one token and its gradient by the student's logits."""
    logits = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    tokens = torch.tensor([[token]])
    result = value(
        load_loss(f"verl:{mode}"),
        student_logits=logits[None, None],
        teacher_logits=torch.tensor(q, dtype=torch.float64).log()[None, None],
        tokens=tokens,
        mask=torch.ones(1, 1, dtype=torch.bool),
        sampler_logp=logits.detach()[tokens],
        reward=torch.ones(1, dtype=torch.float64),
        prompt=torch.zeros(1, dtype=torch.long),
    )
    return float(result.detach()), torch.autograd.grad(result, logits)[0]


def mean_over_tokens(mode: str, p: list[float], q: list[float]) -> Tensor:
    """Return the mean gradient by the logits of one prefix over its token, sampled from p."""
    parts = [x * one_token(mode, p, q, token)[1] for token, x in enumerate(p)]
    return torch.stack(parts).sum(0)


P, Q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
REVERSE_KL = LN2 * torch.tensor([0.375, -0.3125, -0.0625]).double()
"""Gradient of KL(P || Q) by P's logits: p (log p - log q - KL), with KL = ln(2) / 4."""
FORWARD_KL = torch.tensor([0.25, -0.25, 0.0]).double()
"""Gradient of KL(Q || P) by P's logits: p - q."""
TOTAL_VARIATION = torch.tensor([0.375, -0.3125, -0.0625]).double()
"""Gradient of sum |p - q|: p (s - sum p s), s = sign(p - q) = (1, -1, 0)."""


@pytest.mark.verl
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (f"k1,{PG}", REVERSE_KL),
        (f"k3,{PG}", REVERSE_KL - FORWARD_KL),
        ("k2", REVERSE_KL),
        ("vanilla", REVERSE_KL),
        ("k3", FORWARD_KL),
        ("kl", 0 * FORWARD_KL),
        (f"{NO_REWARD}=low_var_kl", FORWARD_KL),
        (f"{NO_REWARD}=k3+", REVERSE_KL),
        ("abs", TOTAL_VARIATION),
        ("forward_kl_topk,topk=3", FORWARD_KL),
    ],
)
def test_the_mean_over_one_token_by_hand(mode: str, expected: Tensor) -> None:
    assert torch.allclose(mean_over_tokens(mode, P, Q), expected, atol=1e-6)


@pytest.mark.verl
def test_the_forward_kl_on_a_topk_pulls_a_student_off_an_equal_teacher() -> None:
    loss, gradient = one_token("forward_kl_topk", [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], 0)
    assert loss == pytest.approx(0.0, abs=1e-6)
    expected = torch.tensor([0.75 * 0.5 - 0.5, 0.75 * 0.25 - 0.25, 0.75 * 0.25])
    assert torch.allclose(gradient, expected.double(), atol=1e-6)


@pytest.mark.verl
def test_the_forward_kl_on_a_topk_is_silent_where_it_would_be_negative() -> None:
    loss, gradient = one_token("forward_kl_topk", [0.5, 0.4, 0.1], [0.4, 0.3, 0.3], 0)
    unclamped = 0.4 * math.log(0.4 / 0.5) + 0.3 * math.log(0.3 / 0.4)
    assert unclamped == pytest.approx(-0.1756, abs=1e-4)
    assert loss == 0.0
    assert gradient.tolist() == [0.0, 0.0, 0.0]


def batch_gradient(
    mode: str, *, prompt: list[int] | None = None, reward: list[float] | None = None
) -> Tensor:
    """Return (B, T, V) the gradient of a loss on TOKENS, the models' logits drawn from a seed."""
    student, teacher = models()
    logp = student.detach().log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0]
    result = value(
        load_loss(f"verl:{mode}"),
        student_logits=student,
        teacher_logits=teacher,
        tokens=TOKENS,
        mask=MASK,
        sampler_logp=logp,
        reward=torch.tensor(reward or [0.0, 0.0, 0.0], dtype=torch.float64),
        prompt=torch.tensor(prompt or [0, 0, 0]),
    )
    return torch.autograd.grad(result, student)[0]


def models() -> tuple[Tensor, Tensor]:
    """Return (B, T, V) logits of student and teacher on TOKENS."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def score_gradient(weights: list[list[float]]) -> Tensor:
    """Return (B, T, V) minus the sum of weight times the score of each token of TOKENS."""
    student, _ = models()
    one_hot = torch.nn.functional.one_hot(TOKENS, 3)
    scores = one_hot - student.detach().softmax(-1)
    return -torch.tensor(weights, dtype=torch.float64)[..., None] * scores


def token_advantages() -> list[list[float]]:
    """Return log q - log p of each token of TOKENS, 0 outside the mask."""
    student, teacher = models()
    logp, teacher_logp = (
        x.detach().log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0] for x in (student, teacher)
    )
    advantages: list[list[float]] = torch.where(MASK, teacher_logp - logp, 0.0).tolist()
    return advantages


@pytest.mark.verl
@pytest.mark.parametrize(
    ("mode", "divisors"),
    [
        ("token-mean", [5.0, 5.0, 5.0]),
        ("token-sum", [1.0, 1.0, 1.0]),
        ("seq-mean-token-sum", [3.0, 3.0, 3.0]),
        ("seq-mean-token-mean", [3.0, 6.0, 6.0]),
        ("seq-mean-token-sum-norm", [6.0, 6.0, 6.0]),
        ("seq-mean-token-sum-norm,loss_scale_factor=4", [12.0, 12.0, 12.0]),
    ],
)
def test_what_each_aggregation_divides_by(mode: str, divisors: list[float]) -> None:
    weights = [[a / n for a in row] for row, n in zip(token_advantages(), divisors, strict=True)]
    found = batch_gradient(f"vanilla,loss_agg_mode={mode}")
    assert torch.allclose(found, score_gradient(weights), atol=1e-8)


@pytest.mark.verl
def test_geo_mean_spreads_the_mean_advantage_over_a_response() -> None:
    weights = []
    for row, length in zip(token_advantages(), (1, 2, 2), strict=True):
        mean = sum(row) / length
        weights.append([mean / length / 3] * length + [0.0] * (3 - length))
    assert torch.allclose(batch_gradient("geo_mean"), score_gradient(weights), atol=1e-7)


@pytest.mark.verl
@pytest.mark.parametrize("name", ["rloo", "rloo_vectorized"])
def test_rloo_compares_with_the_others_of_a_group(name: str) -> None:
    advantages = [1.0 - 4.0, 3.0 - 3.0, 5.0 - 2.0]
    weights = [[a / 5] * n + [0.0] * (3 - n) for a, n in zip(advantages, (1, 2, 2), strict=True)]
    found = batch_gradient(f"vanilla,adv_estimator={name}", reward=[1.0, 3.0, 5.0])
    assert torch.allclose(found, score_gradient(weights), atol=1e-8)


@pytest.mark.verl
def test_a_group_of_one_has_its_reward_as_advantage_and_in_rloo_vectorized_none() -> None:
    rewards = [1.0, 3.0, 5.0]
    found = batch_gradient("vanilla,adv_estimator=rloo", prompt=[0, 1, 2], reward=rewards)
    weights = [[1 / 5, 0.0, 0.0], [3 / 5, 3 / 5, 0.0], [1.0, 1.0, 0.0]]
    assert torch.allclose(found, score_gradient(weights), atol=1e-8)
    found = batch_gradient(
        "vanilla,adv_estimator=rloo_vectorized", prompt=[0, 1, 2], reward=rewards
    )
    assert not bool(found.any())


@pytest.mark.verl
def test_opo_has_its_own_reward_in_a_baseline_weighted_by_lengths() -> None:
    advantages = [1.0 - 11 / 3, 5.0 - 11 / 3, 0.0]  # baseline (1 * 1 + 2 * 5) / 3; alone below
    weights = [[a / 5] * n + [0.0] * (3 - n) for a, n in zip(advantages, (1, 2, 2), strict=True)]
    found = batch_gradient("vanilla,adv_estimator=opo", prompt=[0, 0, 1], reward=[1.0, 5.0, 0.0])
    assert torch.allclose(found, score_gradient(weights), atol=1e-6)


@pytest.mark.verl
def test_opo_divides_by_the_tokens_of_a_group_that_has_none() -> None:
    world, loss = (
        make_worlds(4, full=False, length=2).random,
        load_loss("verl:vanilla,adv_estimator=opo"),
    )
    assert bool(loss_gradients(loss, sample_batch(world)).student.isfinite().all())
    empty = loss_gradients(loss, sample_batch(world, empty_rows=2)).student
    assert bool(empty[-2:].isnan().any())


@pytest.mark.verl
def test_the_kl_in_the_reward_is_a_cost_of_each_token() -> None:
    settings = "vanilla,adv_estimator=remax,use_kl_in_reward=true,kl_coef=0.5"
    advantages = [[0.5 * a for a in row] for row in token_advantages()]
    weights = [[sum(row[t:]) / 5 for t in range(3)] for row in advantages]
    weights = [
        [w * m for w, m in zip(*x, strict=True)] for x in zip(weights, MASK.tolist(), strict=True)
    ]
    assert torch.allclose(batch_gradient(settings), score_gradient(weights), atol=1e-8)


@pytest.mark.verl
@pytest.mark.parametrize(("mode", "factor"), [("vanilla", 1.0), ("geo_mean", 0.75), ("sapo", 0.75)])
def test_a_row_without_tokens_counts_in_means_over_rows(mode: str, factor: float) -> None:
    world, loss = make_worlds(4, full=False, length=2).random, load_loss(f"verl:{mode}")
    without = loss_gradients(loss, sample_batch(world)).student
    with_rows = loss_gradients(loss, sample_batch(world, empty_rows=2)).student
    assert float(without.abs().max()) > 1e-3
    assert torch.allclose(with_rows[: len(without)], factor * without, rtol=1e-5, atol=1e-9)
    assert not bool(with_rows[len(without) :].any())


@pytest.mark.verl
def test_micro_batches_add_up_but_for_means_over_their_own_rows() -> None:
    world = make_worlds(4, full=False, length=2).random
    batch = sample_batch(world)
    for mode, factor in (("vanilla", 1.0), ("forward_kl_topk", 1.0), ("geo_mean", 3.0)):
        whole = loss_gradients(load_loss(f"verl:{mode}"), batch).student
        parts = loss_gradients(load_loss(f"verl:{mode},micro_batches=3"), batch).student
        assert torch.allclose(parts, factor * whole, rtol=1e-5, atol=1e-9)


@pytest.mark.verl
def test_a_topk_loss_as_an_advantage_teaches_nothing() -> None:
    loss = load_loss(f"verl:forward_kl_topk,{PG}")
    mean = mean_over_tokens(f"forward_kl_topk,{PG}", P, Q)
    assert float(mean.abs().max()) < 1e-7
    world = make_worlds(4, full=False, length=2).random
    assert float(loss_gradients(loss, sample_batch(world)).student.abs().max()) > 1e-3


@pytest.mark.verl
def test_masked_tokens_before_the_response_are_a_tools_text() -> None:
    world, loss = make_worlds(4, full=False, length=2).random, load_loss("verl:vanilla")
    shifted = sample_batch(world, left=1)
    assert torch.allclose(
        loss_gradients(loss, shifted).student[shifted.mask],
        loss_gradients(loss, sample_batch(world)).student[sample_batch(world).mask],
        atol=1e-9,
    )


@pytest.mark.verl
def test_rejected_rows_have_no_gradient_and_stay_in_the_divisor() -> None:
    settings = "vanilla,rollout_rs=seq_mean_k1,rollout_rs_threshold=0.5_2.0"
    world = make_worlds(4, full=False, length=2).random
    rows = (world.prompt == 0).nonzero()[:6, 0]
    sampler = world.student + torch.linspace(-1, 1, world.student.shape[1])
    batch = make_batch(world, rows, sampler=sampler)
    logp = make_batch(world, rows).arguments["sampler_logp"]
    log_ratios = torch.where(batch.mask, logp - batch.arguments["sampler_logp"], 0.0)
    kept = (log_ratios.sum(1) / batch.mask.sum(1)).abs() < math.log(2)
    assert 0 < int(kept.sum()) < 6
    found = loss_gradients(load_loss(f"verl:{settings}"), batch).student
    whole = loss_gradients(load_loss("verl:vanilla,old_log_probs=student"), batch).student
    assert torch.allclose(found, kept[:, None, None] * whole, atol=1e-9)


@pytest.mark.verl
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_of_the_correction_multiply_the_policy_loss(level: str) -> None:
    loss = load_loss(f"verl:vanilla,rollout_is={level},rollout_is_threshold=1.5")
    world = make_worlds(4, full=False, length=2).random
    rows = (world.prompt == 0).nonzero()[:6, 0]
    sampler = world.student + torch.linspace(-1, 1, world.student.shape[1])
    base, other = make_batch(world, rows), make_batch(world, rows, sampler=sampler)
    log_ratios = base.arguments["sampler_logp"] - other.arguments["sampler_logp"]
    log_ratios = torch.where(base.mask, log_ratios, 0.0)
    if level == "sequence":
        log_ratios = log_ratios.sum(1, keepdim=True)
    ratios = log_ratios.exp().clamp(max=1.5)[..., None]
    assert float(ratios.max()) == 1.5 > float(ratios.min())
    expected = ratios * loss_gradients(load_loss("verl:vanilla"), base).student
    assert torch.allclose(loss_gradients(loss, other).student, expected, atol=1e-7)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.verl
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("k1", "verl refuses it: Directly backpropagating k1 loss is incorrect"),
        (
            "k4",
            "unknown mode 'k4'; distillation losses: forward_kl_topk, kl, k1.*policy losses: va",
        ),
        ("vanilla,topk=2", "topk cannot be set: this loss does not read it"),
        ("k2,dro_beta=1", "dro_beta cannot be set: this loss does not read it"),
        ("forward_kl_topk,strategy=megatron", "strategy cannot be set: the audit calls the loss"),
        ("vanilla,adv_estimator=gae", "gae cannot be audited: it needs the values of a critic"),
        (
            "vanilla,adv_estimator=rlo",
            "unknown adv_estimator 'rlo'; known: distillation, none, grpo",
        ),
        ("vanilla,loss_agg_mode=mean", "verl refuses it: Invalid loss_agg_mode: mean"),
        ("vanilla,clip_ratio=high", "clip_ratio is 'high', expected float"),
        ("vanilla,use_kl_loss=2", "use_kl_loss is '2', expected bool"),
        ("vanilla,micro_batches=0", "micro_batches is '0'; expected 1 or more"),
        ("vanilla,old_log_probs=teacher", "old_log_probs is 'teacher'; expected student or"),
        ("opdlab_full_jsd", "no full next-token distributions"),
    ],
)
def test_wrong_settings_are_refused(target: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"verl:{target.partition(',')[0]}.*{message}"):
        load_loss(f"verl:{target}")


def load_without_verl() -> None:
    """Print why a loss of verl cannot be loaded, in a process that has not imported verl."""
    sys.modules["verl"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        load_loss("verl:k2")
    except MissingPackage as error:
        print(error)


def test_a_missing_verl_says_how_to_install_it(tmp_path: Path) -> None:
    ended = run_process(tmp_path, load_without_verl)
    assert ended.exit_code == 0, ended.stderr
    assert "pip install 'verl==0.9.1' in an environment of your own" in ended.stdout
