"""Compare the exact engine with enumeration and autograd, and the sampler with the exact engine."""

import pytest
import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.core.distribution_stats import compute_distribution_stats
from opd.objectives import factory
from synthetic.estimators import FAMILY
from synthetic.exact import moments
from synthetic.sampling.monte_carlo import monte_carlo, trajectory_gradients
from synthetic.sampling.trajectories import Trajectories, sample, with_support
from synthetic.worlds.mdp import (
    TabularMDP,
    random_chain,
    token_chain,
    with_end_state,
)
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import GAMMAS, pair, seeded, worlds


@pytest.mark.parametrize("name", worlds())
def test_the_gradient_is_that_of_the_enumerated_sequence_kl(name: str) -> None:
    mdp = worlds()[name]
    student, teacher = pair(mdp)
    paths = by_hand.enumerate_paths(mdp)
    live = student.clone().requires_grad_()
    total = by_hand.sequence_kl(paths, live, teacher)
    torch.testing.assert_close(moments.sequence_kl(mdp, student, teacher).total, total.detach())
    (true,) = torch.autograd.grad(total, live)
    (frozen,) = torch.autograd.grad(by_hand.frozen_kl(paths, live, teacher), live)
    at_ends = moments.expected_gradient(mdp, student, teacher, [0.0, 1.0])
    torch.testing.assert_close(at_ends[0], frozen, atol=1e-12, rtol=0)
    torch.testing.assert_close(at_ends[1], true, atol=1e-12, rtol=0)
    assert (true - frozen).norm() > 0.001
    assert moments.expected_gradient(mdp, student, student, 1.0).abs().max() < 1e-15


@pytest.mark.parametrize("name", worlds())
def test_sequence_kl_and_its_parts_are_the_enumerated_ones(name: str) -> None:
    mdp = worlds()[name]
    student, teacher = pair(mdp)
    paths = by_hand.enumerate_paths(mdp)
    live = student.clone().requires_grad_()
    target = teacher.clone().requires_grad_()
    parts = moments.sequence_kl(mdp, live, target)
    weight = by_hand.probability(paths, student)
    cost = by_hand.logp(paths, student) - by_hand.logp(paths, teacher)
    value = by_hand.mean_by_state(paths, weight, by_hand.costs_to_go(cost, 1.0), mdp.num_states)
    for t in range(mdp.horizon):
        for state in range(mdp.num_states):
            at_state = (paths.states[:, t] == state) & paths.mask[:, t]
            if mdp.active[state]:
                share = weight[at_state].sum().item()
                assert parts.occupancy[t, state].item() == pytest.approx(share, abs=1e-14)
            if bool(at_state.any()):
                assert parts.value[t, state].item() == pytest.approx(value[t, state].item())
    # check both gradients again, through the engine's own graph and by finite differences
    frozen = (parts.occupancy.detach() @ parts.local).sum()
    for loss, gamma in ((parts.total, 1.0), (frozen, 0.0)):
        (gradient_by_autograd,) = torch.autograd.grad(loss, live, retain_graph=True)
        family = moments.expected_gradient(mdp, student, teacher, gamma)
        torch.testing.assert_close(gradient_by_autograd, family, atol=1e-13, rtol=0)
    assert torch.autograd.grad(parts.total, target, allow_unused=True, retain_graph=True) == (None,)
    gradient = moments.expected_gradient(mdp, student, teacher, 1.0)
    for state in range(mdp.num_states):
        for token in range(mdp.num_actions):
            step = torch.zeros_like(student)
            step[state, token] = 1e-3
            near, far = (
                by_hand.sequence_kl(paths, student + x * step, teacher)
                - by_hand.sequence_kl(paths, student - x * step, teacher)
                for x in (1, 2)
            )
            difference = (8 * near - far).item() / 12e-3  # of fourth order
            assert difference == pytest.approx(gradient[state, token].item(), abs=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_moments_of_a_long_horizon_have_a_closed_form_in_one_state(gamma: float) -> None:
    """With one state, steps are independent and the variance is a sum over n later steps.

    Undiscounted, it grows as |s|^2 K^2 T^3 / 3 unless a baseline is subtracted.
    """
    horizon = 300
    mdp = TabularMDP(torch.ones(1, 3, 1), torch.ones(1), horizon)
    student, teacher = pair(mdp)
    p, r = student[0].softmax(-1), (student.log_softmax(-1) - teacher.log_softmax(-1))[0]
    score2 = 1 - 2 * p + p.square().sum()
    mean, local = p * (r - p @ r), p @ r
    spread, s2 = p @ (r - local).square(), p @ score2
    powers = gamma ** torch.arange(1, horizon, dtype=torch.float64)
    later = torch.cat([torch.zeros(1), powers.cumsum(0)])
    later2 = torch.cat([torch.zeros(1), powers.square().cumsum(0)])

    def closed(noise: Tensor, b: Tensor) -> Tensor:
        cost = r - b[:, None]
        own_term = (cost.square() + 2 * (later * local)[:, None] * cost) @ (p * score2)
        return (own_term + s2 * (later2 * noise + (later * local) ** 2) - mean.square().sum()).sum()

    zero = torch.zeros(horizon, dtype=torch.float64)
    value = (1 + later) * local
    want = {
        "plain": closed(spread, zero),
        "rb_future": closed(0 * spread, zero),
        "value": closed(spread, value),
        "position_value": closed(spread, value),
        "rb_all": s2 * (later * local).square().sum(),
        "rb_all_value": torch.zeros((), dtype=torch.float64),
    }
    for name, expected in want.items():
        estimator_mean, variance = moments.moments(mdp, student, teacher, name, gamma)
        torch.testing.assert_close(estimator_mean[0], horizon * mean, atol=0, rtol=1e-10)
        torch.testing.assert_close(variance, expected, atol=1e-8, rtol=1e-10)


@pytest.mark.parametrize("estimator", FAMILY)
def test_at_the_teacher_every_sampled_gradient_is_zero(estimator: str) -> None:
    mdp = worlds()["ending"]
    student, _ = pair(mdp)
    group = 2 if estimator == "leave_one_out" else None
    mean, variance = moments.moments(mdp, student, student + 3.0, estimator, GAMMAS, group=group)
    assert mean.abs().max() < 1e-14
    assert variance.max() < 1e-28


def all_paths(mdp: TabularMDP, student: Tensor, teacher: Tensor) -> tuple[Trajectories, Tensor]:
    """Return every trajectory as a batch, and its probability."""
    paths = by_hand.enumerate_paths(mdp)
    student_logp, teacher_logp = by_hand.logp(paths, student), by_hand.logp(paths, teacher)
    log_policies = [x.log_softmax(-1)[paths.states] for x in (student, teacher)]
    parts = compute_distribution_stats(*log_policies, paths.tokens)
    batch = ScoredRollouts(
        tokens=paths.tokens,
        mask=paths.mask,
        sampler_logp=student_logp,
        prompt=paths.states[:, 0],
        ended=torch.ones(len(student_logp), dtype=torch.bool),
        student_logp=student_logp,
        teacher_logp=teacher_logp,
        prefix=DistributionStats(**{k: x * paths.mask for k, x in parts.items()}),
    )
    return Trajectories(batch, paths.states), by_hand.probability(paths, student)


@pytest.mark.parametrize("name", worlds())
def test_the_trainers_objectives_have_the_exact_expected_gradients(name: str) -> None:
    mdp = worlds()[name]
    student, teacher = pair(mdp)
    trajectories, weight = all_paths(mdp, student, teacher)

    def expected(batch: Trajectories, objective: factory.Objective) -> Tensor:
        gradients = trajectory_gradients(batch, student, objective)
        return (weight[:, None, None] * gradients).sum(0)

    family = moments.expected_gradient(mdp, student, teacher, GAMMAS)
    for i, gamma in enumerate(GAMMAS):
        gradient = expected(trajectories, factory.make_objective("sampled_token", gamma=gamma))
        torch.testing.assert_close(gradient, family[i], atol=1e-12, rtol=0)
    full = expected(
        with_support(trajectories, student, teacher, "full"),
        factory.make_objective("full_reverse_kl"),
    )
    torch.testing.assert_close(full, family[0], atol=1e-12, rtol=0)
    whole_support = with_support(trajectories, student, teacher, "teacher", mdp.num_actions)
    torch.testing.assert_close(
        expected(whole_support, factory.make_objective("teacher_topk")),
        family[0],
        atol=1e-12,
        rtol=0,
    )
    # fewer tokens: p' (log p'/q' - KL(p' || q')) of both sides renormalised, at every visit
    partial_support = with_support(trajectories, student, teacher, "teacher", mdp.num_actions - 1)
    least_likely = teacher.argmin(-1, keepdim=True)
    student_logp, teacher_logp = (
        x.scatter(-1, least_likely, -torch.inf).log_softmax(-1) for x in (student, teacher)
    )
    ratio = (student_logp - teacher_logp).nan_to_num(0)
    local = student_logp.exp() * (ratio - (student_logp.exp() * ratio).sum(-1, keepdim=True))
    visits = moments.sequence_kl(mdp, student, teacher).occupancy.sum(0) * mdp.active
    gradient = expected(partial_support, factory.make_objective("teacher_topk"))
    torch.testing.assert_close(gradient, visits[:, None] * local, atol=1e-12, rtol=0)
    assert (gradient - family[0]).norm() > 0.01


def test_each_trajectorys_gradient_is_that_of_its_own_loss() -> None:
    mdp = with_end_state(token_chain(3, 5), torch.tensor(0.3))
    student, teacher = pair(mdp)
    trajectories = sample(mdp, student, teacher, 6, seeded(3))
    assert trajectories.batch.mask.sum(1).unique().numel() > 1
    full = with_support(trajectories, student, teacher, "full")
    top = with_support(trajectories, student, teacher, "teacher", 2)
    for objective, supported in (
        (factory.make_objective("sampled_token", gamma=0.7), trajectories),
        (factory.make_objective("full_reverse_kl"), full),
        (factory.make_objective("teacher_topk"), top),
    ):
        supported.batch.validate()
        together = trajectory_gradients(supported, student, objective)
        for i in range(6):
            live = student.clone().requires_grad_()
            row, loss = supported.batch.rows([i]), torch.zeros((), dtype=torch.float64)
            for t in range(int(row.mask.sum())):
                log_policy = live[supported.states[i, t]].log_softmax(-1)
                if objective.support == "none":
                    credit = by_hand.costs_to_go(row.log_ratio, 0.7)[0, t]
                    loss = loss + credit * log_policy[row.tokens[0, t]]
                else:
                    k = 3 if objective.support == "full" else 2
                    ids = teacher[supported.states[i, t]].argsort(descending=True)[:k]
                    student_logp = log_policy[ids].log_softmax(-1)
                    teacher_logp = teacher[supported.states[i, t]][ids].log_softmax(-1)
                    loss = loss + (student_logp.exp() * (student_logp - teacher_logp)).sum()
            (alone,) = torch.autograd.grad(loss, live)
            torch.testing.assert_close(together[i], alone, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", ["chain", "ending"])
def test_samples_visit_states_as_often_as_they_should(name: str) -> None:
    mdp = worlds()[name]
    student, teacher = pair(mdp)
    count = 40_000
    trajectories = sample(mdp, student, teacher, count, seeded(4))
    trajectories.batch.validate()
    occupancy = moments.sequence_kl(mdp, student, teacher).occupancy
    for t in range(mdp.horizon):
        share = torch.bincount(trajectories.states[:, t], minlength=mdp.num_states) / count
        error = (occupancy[t] * (1 - occupancy[t]) / count).sqrt().clamp(min=1 / count)
        assert ((share - occupancy[t]).abs() / error).max() < 4.5
    p = student.softmax(-1)
    for s in range(mdp.num_states):
        tokens = trajectories.batch.tokens[(trajectories.states == s) & trajectories.batch.mask]
        if len(tokens) > 100:
            share = torch.bincount(tokens, minlength=mdp.num_actions) / len(tokens)
            error = (p[s] * (1 - p[s]) / len(tokens)).sqrt()
            assert ((share - p[s]).abs() / error).max() < 4.5
    assert trajectories.batch.mask.equal(mdp.active[trajectories.states] > 0)
    assert bool(trajectories.batch.ended.any())
    assert trajectories.batch.log_ratio.sum(1).mean().item() == pytest.approx(
        moments.sequence_kl(mdp, student, teacher).total.item(), abs=0.05
    )


def test_monte_carlo_agrees_with_the_exact_moments() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    family = {str(g): factory.make_objective("sampled_token", gamma=g) for g in GAMMAS}
    estimate = monte_carlo(mdp, student, teacher, family, 20_000, seeded(5), chunk=3_000)
    mean, variance = moments.moments(mdp, student, teacher, "plain", GAMMAS)
    z = (estimate.mean - mean) / estimate.mean_se.clamp(min=1e-12)
    assert z[estimate.mean_se > 0].abs().max() < 4.5
    assert ((estimate.variance - variance) / estimate.variance_se).abs().max() < 4
    assert (estimate.variance_se / variance).max() < 0.2


def test_monte_carlo_covers_objectives_on_a_support() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    family = {
        "full": factory.make_objective("full_reverse_kl"),
        "top": factory.make_objective("teacher_topk"),
    }
    estimate = monte_carlo(mdp, student, teacher, family, 5_000, seeded(6), k=2)
    mean, variance = moments.moments(mdp, student, teacher, "rb_immediate", 0.0)
    error = estimate.mean_se[0].clamp(min=1e-12)
    assert ((estimate.mean[0] - mean).abs() / error).max() < 4.5
    assert abs(estimate.variance[0] - variance) / estimate.variance_se[0] < 4
    # all tokens in the support: the same numbers on the same samples; one token: all zero
    torch.testing.assert_close(estimate.mean[0], estimate.mean[1], atol=1e-14, rtol=0)
    torch.testing.assert_close(estimate.variance[0], estimate.variance[1], atol=0, rtol=1e-12)
    single = monte_carlo(mdp, student, teacher, family, 100, seeded(6), k=1)
    assert single.variance[1] < 1e-30 < single.variance[0]


@pytest.mark.parametrize("chunk", [60, 7])
def test_running_sums_are_those_of_the_whole_sample(chunk: int) -> None:
    mdp = worlds()["tokens"]
    student, teacher = pair(mdp)
    family = {
        "a": factory.make_objective("sampled_token", gamma=0.0),
        "b": factory.make_objective("sampled_token", gamma=0.9),
    }
    estimate = monte_carlo(mdp, student, teacher, family, 60, seeded(7), chunk=chunk)
    generator, sizes = seeded(7), [min(chunk, 60 - begin) for begin in range(0, 60, chunk)]
    batches = [sample(mdp, student, teacher, size, generator) for size in sizes]
    squares = []
    for i, objective in enumerate(family.values()):
        g = torch.cat(
            [trajectory_gradients(trajectories, student, objective) for trajectories in batches]
        )
        torch.testing.assert_close(estimate.mean[i], g.mean(0), atol=1e-13, rtol=0)
        torch.testing.assert_close(estimate.mean_se[i], g.std(0) / 60**0.5, atol=1e-13, rtol=0)
        torch.testing.assert_close(estimate.variance[i], g.var(0).sum(), atol=0, rtol=1e-12)
        squares.append((g - g.mean(0)).square().sum((1, 2)))
    if chunk == 60:
        covariance = torch.stack(squares).cov(correction=0) / 59
        torch.testing.assert_close(estimate.variance_covariance, covariance, atol=0, rtol=1e-10)


def test_standard_errors_of_variances_are_calibrated() -> None:
    """Check that z over independent replicates has unit spread, also for a paired difference."""
    mdp = worlds()["tokens"]
    student, teacher = pair(mdp)
    family = {str(g): factory.make_objective("sampled_token", gamma=g) for g in (0.0, 1.0)}
    _, truth = moments.moments(mdp, student, teacher, "plain", (0.0, 1.0))
    single, paired = [], []
    for seed in range(120):
        estimate = monte_carlo(mdp, student, teacher, family, 400, seeded(seed))
        cov = estimate.variance_covariance
        single.append((estimate.variance[0] - truth[0]) / cov[0, 0].sqrt())
        gap = estimate.variance[1] - estimate.variance[0] - (truth[1] - truth[0])
        paired.append(gap / (cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]).sqrt())
    for z in (torch.stack(single), torch.stack(paired)):
        assert 0.8 < z.std().item() < 1.3
        assert abs(z.mean().item()) < 0.5


def test_bad_worlds_and_arguments_are_refused_with_their_numbers() -> None:
    mdp = worlds()["chain"]
    student, teacher = pair(mdp)
    start, moves = mdp.start, mdp.transition
    for call, message in (
        (lambda: TabularMDP(moves, start, 0), "horizon is 0"),
        (lambda: TabularMDP(2 * moves, start, 3), "a row sums to 2"),
        (lambda: TabularMDP(-moves, start, 3), "transition contains -"),
        (lambda: TabularMDP(moves / 0, start, 3), "transition contains inf"),
        (lambda: TabularMDP(moves, start * torch.nan, 3), "start contains nan"),
        (lambda: TabularMDP(moves[:2], start, 3), r"\(2, 2, 3\), expected"),
        (lambda: TabularMDP(moves, start[:2], 3), r"start has shape \(2,\)"),
        (lambda: TabularMDP(moves, start, 3, 2), "end state 2 is not absorbing"),
        (lambda: TabularMDP(moves, start, 3, 7), "end is 7"),
        (lambda: with_end_state(mdp, torch.tensor(1.2)), "transition contains -"),
        (
            lambda: with_end_state(worlds()["ending"], torch.tensor(0.1)),
            "already has an end state, 3",
        ),
        (lambda: random_chain(3, 2, 4, seeded(0), mixing=1.5), r"mixing is 1\.5"),
        (lambda: random_chain(3, 2, 4, seeded(0), blocks=4), "blocks is 4"),
        (lambda: moments.expected_gradient(mdp, student, teacher, -0.1), r"-0\.1"),
        (lambda: moments.moments(mdp, student, teacher, "plain", [0.5, 1.1]), r"1\.1"),
        (lambda: moments.moments(mdp, student, teacher, "magic"), "unknown estimator 'magic'"),
        (lambda: moments.moments(mdp, student, teacher, "plain", []), "empty"),
        (lambda: moments.moments(mdp, student[:2], teacher, "plain"), r"student_logits has shape"),
        (lambda: moments.moments(mdp, student / 0, teacher, "plain"), "not finite"),
        (lambda: sample(mdp, student, teacher, 0, seeded(0)), "count is 0"),
        (lambda: sample(mdp, student, teacher * torch.nan, 2, seeded(0)), "teacher.*6 of 6 values"),
        (lambda: monte_carlo(mdp, student, teacher, {}, 1, seeded(0)), "count is 1"),
        (lambda: monte_carlo(mdp, student, teacher, {}, 2, seeded(0), chunk=0), "chunk is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    trajectories = sample(mdp, student, teacher, 2, seeded(0))
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 2"):
            with_support(trajectories, student, teacher, "teacher", k)
