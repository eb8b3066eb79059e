"""Objectives without a teacher: the likelihood of given tokens, and the reward alone.

Shapes: B responses, T positions, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diagnostics.batch import DATASET, ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.missing import Missing
from opd.objectives.catalogue import CONTROLS
from opd.objectives.factory import make_objective
from opd.objectives.objective import Objective, batch_losses

B, T, V = 6, 3, 5


def batch_of(logp: Tensor, tokens: Tensor) -> ScoredRollouts:
    """Three prompts with two responses each, without a teacher; one token is not supervised."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[4, 2] = False
    student_logp = logp.detach().gather(-1, tokens[..., None])[..., 0] * mask
    return ScoredRollouts(
        tokens=tokens * mask,
        mask=mask,
        sampler_logp=student_logp,
        prompt=torch.arange(B) // 2,
        ended=torch.ones(B, dtype=torch.bool),
        reward=torch.tensor([1.0, 0, 0.5, 2, -1, 3], dtype=torch.float64),
        student_logp=student_logp,
        teacher_logp=Missing("a run without a teacher has"),  # type: ignore[arg-type]
    )


def gradient(objective: Objective, logits: Tensor, batch: ScoredRollouts) -> Tensor:
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0]
    losses = batch_losses(objective, batch, logp)
    return torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def batch(logits: Tensor) -> ScoredRollouts:
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    return batch_of(logits.log_softmax(-1), tokens)


def test_the_likelihood_is_the_cross_entropy_of_torch(
    logits: Tensor, batch: ScoredRollouts
) -> None:
    leaf = logits.clone().requires_grad_()
    labels = torch.where(batch.mask, batch.tokens, -100)
    loss = torch.nn.functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    objective = make_objective("negative_log_likelihood")
    torch.testing.assert_close(gradient(objective, logits, batch), expected)
    values = batch_losses(objective, batch, batch.student_logp)
    assert float(values.sum()) == pytest.approx(float(loss.detach()))
    moved = replace_scores(batch, batch.student_logp - 0.3)
    torch.testing.assert_close(gradient(objective, logits, moved), expected)


def replace_scores(batch: ScoredRollouts, student_logp: Tensor) -> ScoredRollouts:
    return batch.with_fields(student_logp=student_logp * batch.mask)


def test_its_mean_over_a_writer_is_the_gradient_of_the_kl_from_the_writer() -> None:
    """Over every token of a vocabulary, by its probability under the writer."""
    generator = torch.Generator().manual_seed(2)
    student, writer = torch.randn(2, V, generator=generator, dtype=torch.float64)
    q = writer.softmax(-1)
    leaf = student.clone().requires_grad_()
    kl = (q * (q.log() - leaf.log_softmax(-1))).sum()
    (expected,) = torch.autograd.grad(kl, leaf)

    def mean_gradient(probabilities: Tensor) -> Tensor:
        live = student.clone().requires_grad_()
        tokens = torch.arange(V)[:, None]
        logp = live.log_softmax(-1)[tokens]
        every_token = ScoredRollouts(
            tokens=tokens,
            mask=torch.ones(V, 1, dtype=torch.bool),
            sampler_logp=probabilities.log()[:, None],
            prompt=torch.zeros(V, dtype=torch.long),
            ended=torch.ones(V, dtype=torch.bool),
            student_logp=logp.detach(),
            teacher_logp=Missing("a run without a teacher has"),  # type: ignore[arg-type]
        )
        losses = batch_losses(make_objective("negative_log_likelihood"), every_token, logp)
        return torch.autograd.grad((probabilities[:, None] * losses).sum(), live)[0]

    torch.testing.assert_close(mean_gradient(q), expected)
    assert mean_gradient(student.softmax(-1)).abs().max() < 1e-12, "its own samples teach nothing"


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_reward_alone_is_its_policy_gradient(
    logits: Tensor, batch: ScoredRollouts, weight: float
) -> None:
    """By hand: each token's score times minus the advantage over the prompt's other response."""
    p = logits.softmax(-1)
    expected = torch.zeros_like(logits)
    for i in range(B):
        advantage = float(batch.reward[i] - batch.reward[i ^ 1])
        for t in range(T):
            if not batch.mask[i, t]:
                continue
            score = -p[i, t]
            score[batch.tokens[i, t]] += 1
            expected[i, t] = -weight * advantage * score
    objective = make_objective("reward_only", reward_weight=weight)
    torch.testing.assert_close(gradient(objective, logits, batch), expected)


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "group_normal"])
def test_it_is_what_distillation_adds_for_the_reward(
    logits: Tensor, batch: ScoredRollouts, baseline: str
) -> None:
    """With the student as its own teacher the costs are zero, and the reward is left."""
    options = {"reward_weight": 0.7, "reward_baseline": baseline}
    itself = batch.with_fields(teacher_logp=batch.student_logp)
    torch.testing.assert_close(
        gradient(make_objective("reward_only", **options), logits, batch),  # type: ignore[arg-type]
        gradient(make_objective("sampled_token", **options), logits, itself),  # type: ignore[arg-type]
    )


def test_what_they_require() -> None:
    likelihood = make_objective("negative_log_likelihood").requirements
    assert (likelihood.teacher, likelihood.own_samples, likelihood.on_policy) == (False,) * 3
    assert (likelihood.sampled_logp, likelihood.normalised, likelihood.support) == (
        True,
        True,
        "none",
    )
    reward = make_objective("reward_only", reward_weight=1.0).requirements
    assert (reward.teacher, reward.own_samples, reward.on_policy) == (False, True, True)
    assert reward.whole_groups
    for name in CONTROLS:
        with pytest.raises(InvalidInput, match="gamma"):
            make_objective(name, gamma=0.5, reward_weight=1.0)
        with pytest.raises(InvalidInput, match="no credit from which to subtract"):
            make_objective(name, baseline="local_kl", reward_weight=1.0)
    with pytest.raises(InvalidInput, match="reward_weight is 0; set it"):
        make_objective("reward_only")


def test_what_needs_a_teacher_says_so_without_one(batch: ScoredRollouts) -> None:
    with pytest.raises(InvalidInput, match="scored without a teacher; set a teacher"):
        batch_losses(make_objective("k2"), batch, batch.student_logp)


def test_a_ratio_needs_a_sampler(batch: ScoredRollouts) -> None:
    objective = make_objective("reward_only", reward_weight=1.0, ratio="sequence")
    assert torch.equal(objective.ratio(batch), torch.ones(B, T, dtype=torch.float64))
    origin = torch.zeros(B, dtype=torch.long)
    origin[3] = DATASET
    for given in (
        batch.with_fields(origin=origin),
        batch.with_fields(sampler_logp=Missing("responses from a dataset have")),
    ):
        for ratio in ("token", "sequence"):
            with pytest.raises(InvalidInput, match="not known of responses from a dataset"):
                replace(objective, ratio=make_objective("k2", ratio=ratio).ratio).ratio(given)
