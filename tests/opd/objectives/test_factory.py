"""Options of `make_objective`, what it refuses, and the selection of tokens."""

import math
from dataclasses import replace

import pytest
import torch

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.core.distribution_stats import compute_distribution_stats
from opd.objectives import credit
from opd.objectives import factory as o
from opd.objectives.objective import batch_losses
from opd.objectives.reduction import DENOMINATORS
from opd.objectives.token_selection import highest_entropy_tokens
from tests.opd.objectives.test_oracle import (
    SEQUENCES,
    T,
    every_sequence,
    expected_gradient,
    seeded,
    states,
    tables,
)

# --- the outcome reward -------------------------------------------------------------------------

MIXED = (
    "sampled_token",
    "sampled_token_clipped",
    "full_reverse_kl",
    "teacher_topk",
    "k3",
    "full_jsd",
)
SHARES = {"leave_one_out": 1.0, "group_mean": 0.5}


@pytest.mark.parametrize("advantage", SHARES)
@pytest.mark.parametrize("name", MIXED)
def test_an_outcome_adds_the_gradient_of_the_mean_reward(name: str, advantage: str) -> None:
    """Every pair of sequences is a group of two rollouts."""
    reward = torch.rand(len(SEQUENCES), generator=seeded(2), dtype=torch.float64)
    student, teacher = (table.requires_grad_() for table in tables())
    objective = o.make_objective(name, reward_weight=0.6, reward_baseline=advantage)
    sequences = every_sequence(student, teacher, objective.support, 2)
    first, second = torch.cartesian_prod(*[torch.arange(len(SEQUENCES))] * 2).T
    pairs = torch.stack([first, second], 1)
    batch = sequences.rows(pairs.flatten())
    prompt = torch.arange(len(pairs)).repeat_interleave(2)
    batch = replace(batch, prompt=prompt, reward=reward[pairs.flatten()])
    logp = batch.student_logp
    support_logp = None if batch.support is None else batch.support.student_logp
    weight = sequences.student_logp.sum(1).exp().detach()[pairs].prod(1)
    pair_losses = batch_losses(objective, batch, logp, support_logp).sum(1).view(-1, 2).mean(1)
    (gradient,) = torch.autograd.grad((weight * pair_losses).sum(), student)
    live = tables()[0].requires_grad_()
    sampled_logp = live.log_softmax(-1)[states()].gather(-1, SEQUENCES[..., None])[..., 0]
    (reward_gradient,) = torch.autograd.grad((sampled_logp.sum(1).exp() * reward).sum(), live)
    want = expected_gradient(name, k=2) - 0.6 * SHARES[advantage] * reward_gradient
    torch.testing.assert_close(gradient, want)


def graded(reward: list[float], prompt: list[int]) -> ScoredRollouts:
    zeros = torch.zeros(len(reward), 2, dtype=torch.float64)
    mask = torch.ones(len(reward), 2, dtype=torch.bool)
    mask[-1, 1] = False
    return ScoredRollouts(
        tokens=zeros.long(),
        mask=mask,
        sampler_logp=zeros,
        prompt=torch.tensor(prompt),
        ended=mask.any(1),
        student_logp=zeros,
        teacher_logp=zeros,
        reward=torch.tensor(reward),
    )


def test_advantages_by_hand() -> None:
    batch = graded([1.0, 0.0, 1.0, 0.0, 2.0, 2.0], [5, 5, 9, 5, 9, 9])
    want = {
        "leave_one_out": [1.0, -0.5, -1.0, -0.5, 0.5, 0.5],
        "group_mean": [2 / 3, -1 / 3, -2 / 3, -1 / 3, 1 / 3, 1 / 3],
        "group_normal": [x / (1 / 3) ** 0.5 for x in (2 / 3, -1 / 3, -2 / 3, -1 / 3, 1 / 3, 1 / 3)],
    }
    for name, values in want.items():
        objective = o.make_objective(
            "sampled_token", gamma=0.3, reward_weight=2.0, reward_baseline=name
        )
        expected = -2 * torch.tensor(values, dtype=torch.float64)[:, None] * batch.mask
        torch.testing.assert_close(objective.credit(batch), expected)
    equal_rewards = graded([1.0, 1.0], [0, 0])
    assert (
        o.make_objective("teacher_topk", reward_weight=1.0, reward_baseline="group_normal")
        .credit(equal_rewards)
        .eq(0)
        .all()
    )
    with pytest.raises(ValueError, match="1 of 2 responses have no reward"):
        o.make_objective("sampled_token", reward_weight=1.0).credit(
            graded([1.0, torch.nan], [0, 0])
        )
    with pytest.raises(ValueError, match="2 of 2 prompts have a single rollout"):
        o.make_objective("sampled_token", reward_weight=1.0).credit(graded([1.0, 0.0], [0, 1]))


# --- selection ----------------------------------------------------------------------------------


def test_the_most_uncertain_tokens_of_the_step_are_kept() -> None:
    """Loss and denominator cover the selected tokens, the credit covers all of them."""
    student, teacher = tables()
    batch = every_sequence(student, teacher, "teacher", 2)
    hole = torch.rand(batch.mask.shape, generator=seeded(3)) > 0.2
    batch = batch.restrict_mask(hole).validate()
    entropies = batch.prefix.student_entropy
    positions = [(i, t) for i in range(len(batch)) for t in range(T) if batch.mask[i, t]]
    for fraction in (0.01, 0.25, 0.7, 1.0):
        keep = highest_entropy_tokens(batch, fraction)
        count = max(1, round(fraction * len(positions)))
        ranked = sorted(positions, key=lambda position: -float(entropies[position]))
        want = torch.zeros_like(keep)
        for position in ranked[:count]:
            want[position] = True
        torch.testing.assert_close(keep, want)
        objective = o.make_objective("sampled_token", gamma=0.5)
        credit_of = objective.credit(batch)
        selected = batch.restrict_mask(keep).validate()
        assert torch.equal(selected.mask, keep)
        assert torch.equal(selected.teacher_logp, batch.teacher_logp), (
            "unselected tokens keep their values"
        )
        assert torch.equal(selected.sampled, batch.sampled)
        loss = batch_losses(objective, selected, batch.student_logp, credit=credit_of)
        for name, number in (("token_mean", count), ("sequence_sum", len(batch))):
            reduced = (loss / DENOMINATORS[name](selected)[:, None]).sum()
            total = sum(
                float(credit_of[position] * batch.student_logp[position])
                for position in ranked[:count]
            )
            assert reduced.item() == pytest.approx(total / number)
    assert highest_entropy_tokens(batch, 1.0).equal(batch.mask)
    for fraction in (0.0, 1.5, -0.2, math.nan):
        with pytest.raises(ValueError, match=f"fraction is {fraction}"):
            highest_entropy_tokens(batch, fraction)
    with pytest.raises(ValueError, match="distribution statistics"):
        highest_entropy_tokens(replace(batch, prefix=None), 0.5)


@pytest.mark.parametrize("split", [1, 2])
def test_rounding_does_not_choose_among_equal_entropies(split: int) -> None:
    """Three of five equal ones are kept, the earlier prompts first, despite rounding noise."""
    entropy = torch.tensor([[1.0, 2.0], [1.0, 0.5], [1.0, 1.0], [1.0, 3.0]])
    zeros = torch.zeros(4, 2)
    batch = ScoredRollouts(
        tokens=zeros.long(),
        mask=torch.ones(4, 2, dtype=torch.bool),
        sampler_logp=zeros,
        prompt=torch.tensor([2, 0, 1, 0]),
        ended=torch.ones(4, dtype=torch.bool),
        student_logp=zeros,
        teacher_logp=zeros,
    )
    noise = 1e-6 * torch.randn(4, 2, generator=seeded(split))
    logp = torch.zeros(4, 2, 2).log_softmax(-1)
    prefix = compute_distribution_stats(*[logp.flatten(0, 1)] * 2, zeros.long().flatten())
    spread = {name: x.view(4, 2) for name, x in prefix.items()}
    spread["student_entropy"] = entropy + noise
    keep = highest_entropy_tokens(replace(batch, prefix=DistributionStats(**spread)), 5 / 8)
    # of the five at 1.0: prompt 0 has row 1 position 0 and row 3 position 0, then prompt 1
    want = torch.tensor([[False, True], [True, False], [True, False], [True, True]])
    assert torch.equal(keep, want)


# --- refusals -----------------------------------------------------------------------------------

REFUSED = [
    ("1.5", "sampled_token", {"gamma": 1.5}),
    ("gamma is nan", "sampled_token", {"gamma": math.nan}),
    ("no effect", "teacher_topk", {"gamma": 0.5}),
    ("no effect", "full_forward_kl", {"gamma": 0.5}),
    ("unknown objective 'kl'", "kl", {}),
    ("gradient of mean zero", "k1", {}),
    ("gradient of mean zero", "kl_advantage", {"gamma": 0.5}),
    ("no credit from which to subtract", "teacher_topk", {"baseline": "position_mean"}),
    ("no credit from which to subtract", "full_reverse_kl", {"baseline": "leave_one_out"}),
    ("only add noise", "full_reverse_kl", {"gamma": 0.5, "baseline": "local_kl"}),
    ("unknown baseline 'mean'", "sampled_token", {"baseline": "mean"}),
    ("unknown ratio 'both'", "sampled_token", {"ratio": "both"}),
    ("only add noise", "teacher_topk", {"ratio": "token"}),
    ("beta = 0.5 would have no effect", "full_reverse_kl", {"beta": 0.5}),
    ("beta is 1.5", "full_jsd", {"beta": 1.5}),
    ("clip = .* would have no effect", "sampled_token", {"clip": (0.2, 0.2, 3.0)}),
    ("clip is", "sampled_token_clipped", {"clip": (1.2, 0.2, 3.0)}),
    ("clip is", "sampled_token_clipped", {"clip": (0.2, 0.2, 1.1)}),
    ("ratio_clip is -1", "sampled_token", {"ratio_clip": -1.0}),
    ("ratio_clip is nan", "sampled_token", {"ratio_clip": math.nan}),
    ("no sampled cost", "teacher_topk_bucket", {"ratio_clip": 5.0}),
    ("no sampled cost", "full_jsd", {"ratio_clip": 5.0}),
    ("no sampled cost", "full_forward_kl", {"ratio_clip": 5.0}),
    ("reward_weight is -1", "sampled_token", {"reward_weight": -1.0}),
    ("reward_weight is nan", "sampled_token", {"reward_weight": math.nan}),
    ("without a reward_weight", "sampled_token", {"reward_baseline": "group_mean"}),
    (
        "unknown reward_baseline 'best'",
        "sampled_token",
        {"reward_weight": 1.0, "reward_baseline": "best"},
    ),
    ("support_k is 0", "teacher_topk", {"support_k": 0}),
    ("q.S./e, pushing", "teacher_topk_unnormalised", {}),
    ("q.S./e, pushing", "union_topk_unnormalised", {}),
    ("grad p.S.", "student_topk_published_tail", {}),
]


@pytest.mark.parametrize(("words", "name", "options"), REFUSED)
def test_refusals_name_the_value(words: str, name: str, options: dict) -> None:
    with pytest.raises(ValueError, match=words):
        o.make_objective(name, **options)


def test_what_is_not_refused_is_built_as_asked() -> None:
    objective = o.make_objective(
        "sampled_token_clipped",
        gamma=0.5,
        baseline="leave_one_out",
        ratio="token",
        clip=(0.1, 0.3, 2.0),
    )
    assert objective.gamma == 0.5
    assert objective.baseline == credit.BASELINES["leave_one_out"]
    assert objective.ratio is credit.token_ratio
    clipped = o.make_objective("full_sampled_future", gamma=0.5, ratio_clip=5.0)
    assert clipped.later_cost != o.OBJECTIVES["full_sampled_future"].later_cost
    assert o.make_objective("teacher_topk", ratio="token", reward_weight=1.0).has_credit
    for name in o.OBJECTIVES:
        o.make_objective(name, reward_weight=0.5, allow_collapse=True)
    batch = every_sequence(*tables(), "union", 2)
    with pytest.raises(ValueError, match="needs a 'teacher' support, but the batch has 'union'"):
        batch_losses(o.make_objective("teacher_topk"), batch, None, batch.support.student_logp)
