"""The losses of TRL's trainers as the audit calls them: their targets, values by hand, settings."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.errors import InvalidInput, MissingPackage
from opd.objectives.audit.faults import (
    factors_of,
    non_finite,
    sample_batch,
    teacher_gradient,
    world_mean,
)
from opd.objectives.audit.gradients import loss_gradients
from opd.objectives.audit.matching import Fit, find_target
from opd.objectives.audit.named import load_loss
from opd.objectives.audit.structure import find_structure
from opd.objectives.audit.world_set import make_worlds
from opd.objectives.audit.worlds import make_batch
from opd.objectives.user_loss import UserLoss
from tests.helpers.warm_process import run_process

LN2, LN3 = float(torch.tensor(2.0).log()), float(torch.tensor(3.0).log())
TWO_TOKENS = torch.tensor([[0, 1, 0], [2, 0, 1], [1, 0, 0]])
"""Three responses of one, two and two tokens of a vocabulary of three."""
TWO_MASK = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0]]).bool()


def fit_of(target: str, *, length: int = 2) -> Fit:
    """Return the comparison of a loss's means in two worlds with the target that it estimates."""
    loss = load_loss(f"trl:{target}")
    worlds = make_worlds(4, full=False, length=length)
    structure = find_structure(loss, worlds.random, 1)
    for factor in factors_of(structure):
        means = [world_mean(loss, x, structure, factor) for x in (worlds.random, worlds.equal)]
        match, _ = find_target([mean for mean in means if not mean.is_zero])
        if match is not None:
            return match
    raise AssertionError(f"{target} has no target")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("GKD,beta=0", "token_forward_kl"),
        ("GKD", "token_jsd(0.5)"),
        ("gkd,beta=1", "token_reverse_kl"),
        ("GOLD,beta=0.1", "token_jsd(0.1)"),
        ("Distillation", "token_reverse_kl"),
        ("Distillation,beta=0,temperature=2", "token_forward_kl"),
        ("AsyncDistillation,teacher_top_k=4", "token_forward_kl"),
        ("IW-OPD,iw_opd_gamma=0", "token_reverse_kl"),
        ("iwopd,distillation_objective=jsd,loss_top_k=2", "topk_reverse_kl(bucket, student)"),
        ("SDPO", "token_reverse_kl"),
        ("SDFT,distillation_mode=full_logits", "token_jsd(0.5)"),
        (
            "SDFT,distillation_topk=2,distillation_alpha=1",
            "topk_reverse_kl(renormalised, student)",
        ),
        ("GRPO,scale_rewards=none", "expected_reward"),
        ("GRPO,scale_rewards=none,loss_type=cispo,epsilon_high=5", "expected_reward"),
        ("GRPO,reward_weights=0,beta=1", "token_reverse_kl"),
        ("GRPO,reward_weights=0,beta=1,use_bias_correction_kl=false", "token_forward_kl"),
        ("GMPO,scale_rewards=none", "expected_reward"),
        ("RLOO,beta=0", "expected_reward"),
        ("RLOO,reward_weights=0,beta=1", "sequence_reverse_kl"),
    ],
)
def test_the_target_of_each_trainer(target: str, name: str) -> None:
    fit = fit_of(target)
    assert fit.target.name == name
    assert fit.relative_bias < 1e-5


@pytest.mark.parametrize("target", ["GKD", "GOLD", "Distillation", "IW-OPD", "SDPO", "RLOO"])
def test_the_teacher_has_no_gradient(target: str) -> None:
    world = make_worlds(4, full=False, length=2).random
    assert teacher_gradient(load_loss(f"trl:{target}"), world, 1) is None


@pytest.mark.parametrize("target", ["Distillation,beta=0", "Distillation", "GKD,beta=0"])
def test_gradients_are_finite_where_the_target_is(target: str) -> None:
    world = make_worlds(4, full=False, length=2).random
    assert [*non_finite(load_loss(f"trl:{target}"), world, fit_of(target).target)] == []


# --- values by hand -----------------------------------------------------------------------------


def value(loss: UserLoss, **values: Any) -> Tensor:
    """Return a loss of those values that it asks for."""
    result: Tensor = loss.function(**{name: values[name] for name in loss.asks})
    return result


def mean_over_tokens(loss: UserLoss, p: list[float], q: list[float]) -> Tensor:
    """Return the mean gradient by the logits of one prefix over its token, sampled from p."""
    logits = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    total = torch.zeros_like(logits)
    for token, probability in enumerate(p):
        tokens = torch.tensor([[token]])
        result = value(
            loss,
            student_logits=logits[None, None],
            teacher_logits=torch.tensor(q, dtype=torch.float64).log()[None, None],
            tokens=tokens,
            mask=torch.ones(1, 1, dtype=torch.bool),
            sampler_logp=logits.detach()[tokens],
            reward=torch.ones(1, dtype=torch.float64),
            prompt=torch.zeros(1, dtype=torch.long),
        )
        total += probability * torch.autograd.grad(result, logits)[0]
    return total


P, Q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
REVERSE_KL = LN2 * torch.tensor([0.375, -0.3125, -0.0625]).double()
"""Gradient of KL(P || Q) by P's logits: p (log p - log q - KL), with KL = ln(2) / 4."""
SAMPLED_PAIR = LN3 * torch.tensor([0.15625, -0.109375, -0.046875]).double()
"""Mean over y of the gradient of the KL between {y, the rest}: p_y^2 f'(p_y) (1_y - p)."""


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("GKD,beta=1", REVERSE_KL),
        ("IW-OPD,iw_opd_gamma=0", REVERSE_KL),
        ("SDPO", REVERSE_KL),
        ("ServerDistillation,beta=1", SAMPLED_PAIR),
        ("IW-OPD,distillation_objective=jsd", SAMPLED_PAIR),
        ("AsyncDistillation,beta=1,teacher_top_k=1", SAMPLED_PAIR),
        (
            "GRPO,reward_weights=0,beta=1,use_bias_correction_kl=false",
            torch.tensor([0.25, -0.25, 0.0]).double(),  # p - q: the forward KL's
        ),
    ],
)
def test_the_mean_over_one_token_by_hand(target: str, expected: Tensor) -> None:
    mean = mean_over_tokens(load_loss(f"trl:{target}"), P, Q)
    assert torch.allclose(mean, expected, atol=1e-6)


def test_the_sampled_pair_is_no_multiple_of_the_kl() -> None:
    ratios = SAMPLED_PAIR / REVERSE_KL
    assert ratios.tolist() == pytest.approx([0.660, 0.555, 1.189], abs=1e-3)


def student_and_teacher() -> tuple[Tensor, Tensor]:
    """Return (B, T, V) logits of TWO_TOKENS."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def gradient(target: str, *, prompt: list[int], reward: list[float] | None = None) -> Tensor:
    """Return (B, T, V) the gradient of a loss on TWO_TOKENS."""
    student, teacher = student_and_teacher()
    logp = student.detach().log_softmax(-1).gather(-1, TWO_TOKENS[..., None])[..., 0]
    result = value(
        load_loss(f"trl:{target}"),
        student_logits=student,
        teacher_logits=teacher,
        tokens=TWO_TOKENS,
        mask=TWO_MASK,
        sampler_logp=logp,
        reward=torch.tensor(reward or [0.0, 0.0, 0.0], dtype=torch.float64),
        prompt=torch.tensor(prompt),
    )
    return torch.autograd.grad(result, student)[0]


def score_gradient(weights: list[list[float]]) -> Tensor:
    """Return (B, T, V) minus the sum of weight times the score of each token of TWO_TOKENS."""
    student, _ = student_and_teacher()
    one_hot = torch.nn.functional.one_hot(TWO_TOKENS, 3)
    return -torch.tensor(weights, dtype=torch.float64)[..., None] * (one_hot - student.softmax(-1))


def test_iw_opd_weighs_by_the_share_of_earlier_tokens() -> None:
    student, teacher = student_and_teacher()
    logp, teacher_logp = (
        x.detach().log_softmax(-1).gather(-1, TWO_TOKENS[..., None])[..., 0]
        for x in (student, teacher)
    )
    weights = []
    for row, length in enumerate((1, 2, 2)):
        advantages = [float(teacher_logp[row, t] - logp[row, t]) for t in range(length)]
        total = sum(abs(a) for a in advantages)
        earlier = [sum(abs(a) for a in advantages[:t]) for t in range(length)]
        shares = [1 + 0.5 * (1 - e / total) for e in earlier]
        row_weights = [w * a / 5 for w, a in zip(shares, advantages, strict=True)]
        weights.append(row_weights + [0.0] * (3 - length))
    assert torch.allclose(gradient("IW-OPD", prompt=[0, 0, 0]), score_gradient(weights), atol=1e-8)


def test_rloo_compares_with_the_others_of_a_group() -> None:
    advantages = [1.0 - 0.5 * (3.0 + 5.0), 3.0 - 0.5 * (1.0 + 5.0), 5.0 - 0.5 * (1.0 + 3.0)]
    weights = [[a / 3] * n + [0.0] * (3 - n) for a, n in zip(advantages, (1, 2, 2), strict=True)]
    found = gradient("RLOO,beta=0", prompt=[0, 0, 0], reward=[1.0, 3.0, 5.0])
    assert torch.allclose(found, score_gradient(weights), atol=1e-8)


def test_grpo_standardises_groups_of_any_size_and_order() -> None:
    found = gradient("GRPO", prompt=[4, 2, 4], reward=[1.0, 7.0, 4.0])
    deviation = 1.5 * 2**0.5 + 1e-4  # of 1 and 4
    weights = [
        [-1.5 / deviation / 5, 0.0, 0.0],
        [0.0, 0.0, 0.0],  # alone in its group
        [1.5 / deviation / 5] * 2 + [0.0],
    ]
    assert torch.allclose(found, score_gradient(weights), atol=1e-6)


@pytest.mark.parametrize("mode", ["sequence_truncate", "token_truncate"])
def test_grpo_corrects_for_the_engine(mode: str) -> None:
    settings = f"GRPO,scale_rewards=none,use_vllm=true,vllm_importance_sampling_mode={mode}"
    loss = load_loss(f"trl:{settings},vllm_importance_sampling_clip_max=1.5")
    world = make_worlds(4, full=False, length=2).random
    rows = (world.prompt == 0).nonzero()[:6, 0]
    sampler = world.student + torch.linspace(-1, 1, world.student.shape[1])
    base, other = make_batch(world, rows), make_batch(world, rows, sampler=sampler)
    differences = base.arguments["sampler_logp"] - other.arguments["sampler_logp"]
    log_ratios = torch.where(base.mask, differences, 0.0)
    if mode == "sequence_truncate":
        log_ratios = log_ratios.sum(1, keepdim=True)
    ratios = log_ratios.exp().clamp(max=1.5)[..., None]
    assert float(ratios.max()) == 1.5 > float(ratios.min())
    expected = ratios * loss_gradients(loss, base).student
    assert torch.allclose(loss_gradients(loss, other).student, expected, atol=1e-7)


@pytest.mark.parametrize("epsilon_high", [0.2, 5.0])
def test_cispo_cuts_ratios_at_its_upper_bound(epsilon_high: float) -> None:
    settings = f"GRPO,scale_rewards=none,loss_type=cispo,epsilon_high={epsilon_high}"
    cut = gradient(settings, prompt=[0, 0, 0], reward=[1.0, 3.0, 5.0])
    whole = gradient("GRPO,scale_rewards=none", prompt=[0, 0, 0], reward=[1.0, 3.0, 5.0])
    assert torch.allclose(cut, min(1.0, epsilon_high) * whole, atol=1e-8)


@pytest.mark.parametrize(
    ("target", "factor"), [("SDPO", 0.75), ("RLOO", 0.75), ("GRPO", 1.0), ("GKD", 1.0)]
)
def test_a_row_without_tokens_counts_in_means_over_rows(target: str, factor: float) -> None:
    world, loss = make_worlds(4, full=False, length=2).random, load_loss(f"trl:{target}")
    base, longer = sample_batch(world), sample_batch(world, empty_rows=2)
    without, with_rows = (loss_gradients(loss, batch).student for batch in (base, longer))
    assert float(without.abs().max()) > 1e-3
    assert torch.allclose(with_rows[: len(without)], factor * without, rtol=1e-5, atol=1e-9)
    assert not bool(with_rows[len(without) :].any())


def gold_gradient(settings: str, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """Return the value and the (T, V) gradient of GOLD's loss for two vocabularies."""
    logits = student.log()[None].requires_grad_()
    result = value(
        load_loss(f"trl:GOLD,use_uld_loss=true{settings}"),
        student_logits=logits,
        teacher_logits=teacher.log()[None],
        tokens=torch.zeros(1, len(student), dtype=torch.long),
        mask=torch.ones(1, len(student), dtype=torch.bool),
    )
    return float(result.detach()), torch.autograd.grad(result, logits)[0][0]


def test_uld_compares_sorted_probabilities() -> None:
    student = torch.tensor([[0.7, 0.2, 0.1]] * 3).double()
    assert gold_gradient("", student, student.flip(1))[0] == pytest.approx(0.0, abs=1e-7)
    assert gold_gradient("", student, student.new_full((3, 3), 1 / 3))[0] > 0.1


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ("", [False, True, True]),
        (",uld_token_merge_strategy=bayesian", [True, True, False]),
        (
            ",uld_token_merge_strategy=bayesian,uld_skip_student_eos=false"
            ",uld_skip_teacher_eos=false",
            [True, True, True],
        ),
    ],
)
def test_the_tokens_that_uld_trains(settings: str, positions: list[bool]) -> None:
    student = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2]]).double()
    _, gradient = gold_gradient(settings, student, student.new_full((3, 3), 1 / 3))
    assert gradient.any(-1).tolist() == positions


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("GKD,temperatur_=1", "unknown setting 'temperatur_'; known: beta"),
        ("GKD,temperature=1", "temperature cannot be set: the loss of GKDTrainer does not read it"),
        ("GKD,lmbda=1", "lmbda cannot be set: the audit's responses are always sampled"),
        ("GRPO,use_liger_kernel=true", "use_liger_kernel cannot be set: the kernels run on a GPU"),
        ("GKD,beta=7", r"TRL refuses it: beta must be in the range \[0.0, 1.0\]"),
        ("GKD,beta=high", "beta is 'high', expected"),
        ("GOLD,use_uld_loss=2", "use_uld_loss is '2', expected"),
        ("ServerDistillation,beta=1,loss_top_k=3", "TRL refuses it: loss_top_k must be 1"),
        ("SDFT", "distillation_topk is 100, .* set distillation_topk=2"),
        ("MiniLLM", "TRL 1.16 has no such trainer"),
        ("AsyncGRPO", "a worker process beside vLLM"),
        ("GDK", "unknown trainer 'GDK'; known: GKD, GOLD, Distillation"),
    ],
)
def test_wrong_settings_are_refused(target: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"trl:{target.partition(',')[0]}.*{message}"):
        load_loss(f"trl:{target}")


def load_without_trl() -> None:
    """Print why a loss of TRL cannot be loaded, in a process that has not imported TRL."""
    sys.modules["trl"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        load_loss("trl:GRPO")
    except MissingPackage as error:
        print(error)


def test_a_missing_trl_names_the_extra(tmp_path: Path) -> None:
    ended = run_process(tmp_path, load_without_trl)
    assert ended.exit_code == 0, ended.stderr
    message = "auditing a loss of TRL needs trl: pip install 'opdlab[trl]'"
    assert ended.stdout.strip() == message
