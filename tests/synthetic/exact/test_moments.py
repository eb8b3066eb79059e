"""Compare every estimator's exact moments with the sum over all paths of small worlds."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd.objectives import factory
from opd.objectives.credit import RATIOS
from synthetic.estimators import ESTIMATORS, FAMILY
from synthetic.exact import moments
from synthetic.sampling.monte_carlo import monte_carlo, trajectory_gradients
from synthetic.sampling.trajectories import sample, with_baseline, with_support
from synthetic.worlds.mdp import TabularMDP, nucleus_probabilities
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import GAMMAS, pair, seeded, worlds

SUPPORTED = [name for name in ESTIMATORS if "topk" in name]
UNSUPPORTED = [name for name in ESTIMATORS if name not in SUPPORTED and name != "leave_one_out"]


def check(mdp: TabularMDP, name: str, gamma: float, k: int | None = None) -> None:
    student, teacher = pair(mdp)
    mean, variance = moments.moments(mdp, student, teacher, name, gamma, k=k)
    want = by_hand.mean_and_variance(mdp, student, teacher, name, gamma, k or 1)
    torch.testing.assert_close(mean, want[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(variance, want[1], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("estimator", UNSUPPORTED)
@pytest.mark.parametrize("name", worlds())
def test_moments_equal_the_sum_over_all_paths(name: str, estimator: str) -> None:
    for gamma in GAMMAS if ESTIMATORS[estimator].family else (0.0,):
        check(worlds()[name], estimator, gamma)


@pytest.mark.parametrize("estimator", SUPPORTED)
def test_supports_of_every_size_equal_the_sum_over_all_paths(estimator: str) -> None:
    for k in (1, 2, 3):
        if k == 3 and "and_sampled" in estimator:
            continue  # nothing is left to add to the support
        check(worlds()["tokens"], estimator, 0.0, k)
    check(worlds()["ending"], estimator, 0.0, 1)


@pytest.mark.parametrize("estimator", FAMILY)
def test_the_family_has_one_mean(estimator: str) -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    family = moments.expected_gradient(mdp, student, teacher, GAMMAS)
    group = 4 if estimator == "leave_one_out" else None
    mean, _ = moments.moments(mdp, student, teacher, estimator, GAMMAS, group=group)
    torch.testing.assert_close(mean, family, atol=1e-12, rtol=1e-10)


def test_what_the_differentiated_estimates_are_for() -> None:
    """The mean of k1 is zero; k2 has that of the reverse KL and k3 of the forward KL."""
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    visits = moments.sequence_kl(mdp, student, teacher).occupancy.sum(0) * mdp.active
    live = student.clone().requires_grad_()
    q, forward = teacher.softmax(-1), live.log_softmax(-1)
    forward_kl = (visits * (q * (q.log() - forward)).sum(-1)).sum()
    want = {
        "k1": torch.zeros_like(student),
        "k2": moments.expected_gradient(mdp, student, teacher, 0.0),
        "k3": torch.autograd.grad(forward_kl, live)[0],
        "kl_advantage": torch.zeros_like(student),
        "teacher_topk_sampled_tail": moments.expected_gradient(mdp, student, teacher, 0.0),
        "student_topk_sampled_tail": moments.expected_gradient(mdp, student, teacher, 0.0),
    }
    for name, gradient in want.items():
        k = 1 if "topk" in name else None
        mean, _ = moments.moments(mdp, student, teacher, name, k=k)
        torch.testing.assert_close(mean, gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("estimator", ["plain", "rb_all", "value", "teacher_topk_sampled_tail"])
@pytest.mark.parametrize("kind", ["temperature", "top_p"])
def test_another_sampler_with_and_without_correction(kind: str, estimator: str, ratio: str) -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    sampler = (
        nucleus_probabilities(student, 1.0, 0.6)
        if kind == "temperature"
        else nucleus_probabilities(student, 0.6)
    )
    assert (sampler == 0).any() == (kind == "top_p")
    gamma = 0.7 if ESTIMATORS[estimator].family else 0.0
    k = 1 if "topk" in estimator else None
    mean, variance = moments.moments(
        mdp, student, teacher, estimator, gamma, k=k, sampler=sampler, ratio=ratio
    )
    paths = by_hand.enumerate_paths(mdp)
    acting = by_hand.probability(paths, sampler.log().clamp(min=-1e9))
    student_logp = by_hand.logp(paths, student)
    sampleable = paths.mask & (sampler[paths.states, paths.tokens] > 0)
    log_ratio = torch.where(
        sampleable, student_logp - sampler.log()[paths.states, paths.tokens], torch.zeros(())
    )
    weight = {
        "none": 0 * log_ratio,
        "token": log_ratio,
        "sequence": log_ratio.sum(1, keepdim=True),
    }[ratio].exp()
    credit = torch.zeros_like(student_logp)
    if estimator != "teacher_topk_sampled_tail":
        r = student_logp - by_hand.logp(paths, teacher)
        p, q = student.log_softmax(-1), teacher.log_softmax(-1)
        local = (p.exp() * (p - q)).sum(-1)[paths.states] * paths.mask
        credit = (
            by_hand.costs_to_go(r, gamma)
            if estimator != "rb_all"
            else by_hand.costs_to_go(local, gamma)
        )
        credit = credit if estimator != "rb_all" else credit - local
        if estimator == "value":
            state_means = by_hand.mean_by_state(paths, acting, credit, mdp.num_states).nan_to_num(0)
            credit = credit - state_means[torch.arange(mdp.horizon), paths.states] * paths.mask
    result = torch.einsum("nt,ntsa->nsa", weight * credit, by_hand.scores(paths, student))
    if estimator in ("rb_all", "teacher_topk_sampled_tail"):
        local_name = "full_reverse_kl" if estimator == "rb_all" else estimator
        vectors = by_hand.local_vectors(local_name, student, teacher, 1)[paths.states, paths.tokens]
        visit = torch.nn.functional.one_hot(paths.states, mdp.num_states) * paths.mask[..., None]
        result += torch.einsum("nta,nts->nsa", weight[..., None] * vectors, visit.to(vectors.dtype))
    expected = by_hand.moments(acting, result)
    torch.testing.assert_close(mean, expected[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(variance, expected[1], atol=1e-12, rtol=1e-9)
    truth = moments.expected_gradient(mdp, student, teacher, gamma)
    repaired = ratio == "sequence" and kind == "temperature"
    if estimator in ("plain", "rb_all") and repaired:
        torch.testing.assert_close(mean, truth, atol=1e-12, rtol=0)
    elif estimator == "plain":
        assert (mean - truth).norm() > 0.01


@pytest.mark.parametrize("estimator", ["plain", "rb_all_value", "full_reverse_kl"])
def test_each_response_divided_by_its_own_length(estimator: str) -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    gamma = 0.5 if ESTIMATORS[estimator].family else 0.0
    result = moments.moments(mdp, student, teacher, estimator, gamma, length="sequence_mean")
    paths = by_hand.enumerate_paths(mdp)
    path_gradients = by_hand.path_estimates(mdp, paths, student, teacher, estimator, gamma)
    lengths = paths.mask.sum(1)
    expected = by_hand.moments(
        by_hand.probability(paths, student), path_gradients / lengths[:, None, None]
    )
    torch.testing.assert_close(result[0], expected[0], atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(result[1], expected[1], atol=1e-13, rtol=1e-9)
    assert lengths.unique().numel() == 4


@pytest.mark.parametrize("estimator", ["plain", "optimal", "rb_all_value", "teacher_topk_bucket"])
def test_shared_parameters_add_up_over_states(estimator: str) -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    gamma = 0.5 if ESTIMATORS[estimator].family else 0.0
    k = 1 if "topk" in estimator else None
    table = moments.moments(mdp, student, teacher, estimator, gamma, k=k)
    identity = torch.eye(student.numel(), dtype=torch.float64).view(*student.shape, -1)
    identity_result = moments.moments(
        mdp, student, teacher, estimator, gamma, k=k, jacobian=identity
    )
    torch.testing.assert_close(identity_result[0].view_as(student), table[0], atol=1e-13, rtol=0)
    torch.testing.assert_close(identity_result[1], table[1], atol=1e-13, rtol=1e-12)
    if estimator == "optimal":
        return  # its baseline depends on the parameters; see the next test
    jacobian = torch.randn(*student.shape, 3, generator=seeded(8), dtype=torch.float64)
    result = moments.moments(mdp, student, teacher, estimator, gamma, k=k, jacobian=jacobian)
    paths = by_hand.enumerate_paths(mdp)
    path_gradients = by_hand.path_estimates(mdp, paths, student, teacher, estimator, gamma, 1)
    shared_gradients = torch.einsum("nsa,sad->nd", path_gradients, jacobian)
    expected = by_hand.moments(by_hand.probability(paths, student), shared_gradients)
    torch.testing.assert_close(result[0], expected[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(result[1], expected[1], atol=1e-12, rtol=1e-9)


def test_no_baseline_has_less_variance_than_the_optimal_one() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    jacobian = torch.randn(*student.shape, 3, generator=seeded(8), dtype=torch.float64)
    paths = by_hand.enumerate_paths(mdp)
    weight, score = by_hand.probability(paths, student), by_hand.scores(paths, student)
    shared_scores = torch.einsum("ntsa,sad->ntd", score, jacobian)
    r = by_hand.costs_to_go(by_hand.logp(paths, student) - by_hand.logp(paths, teacher), 0.7)

    def variance(table: Tensor) -> float:
        credit = r - table[torch.arange(mdp.horizon), paths.states] * paths.mask
        return float(by_hand.moments(weight, torch.einsum("nt,ntd->nd", credit, shared_scores))[1])

    best = moments.baseline(mdp, student, teacher, "optimal", 0.7, jacobian)
    least = variance(best)
    optimal_variance = moments.moments(mdp, student, teacher, "optimal", 0.7, jacobian=jacobian)[1]
    assert float(optimal_variance) == pytest.approx(least, rel=1e-10)
    for seed in range(20):
        noise = torch.randn(best.shape, generator=seeded(seed), dtype=torch.float64)
        variance_up, variance_down = variance(best + 1e-3 * noise), variance(best - 1e-3 * noise)
        assert variance_up > least < variance_down
        assert variance_up == pytest.approx(variance_down, rel=1e-6), (
            "the minimum is flat in every direction"
        )
    assert least < variance(moments.baseline(mdp, student, teacher, "value", 0.7))


@pytest.mark.parametrize("name", [n for n, x in ESTIMATORS.items() if x.family and not x.grouped])
def test_a_baseline_without_later_costs_is_the_limit_of_small_discounts(name: str) -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    local, limit = (moments.baseline(mdp, student, teacher, name, g) for g in (0.0, 1e-9))
    torch.testing.assert_close(local, limit, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("size", [2, 3])
def test_a_leave_one_out_group_equals_the_sum_over_all_groups(size: int) -> None:
    mdp = replace(worlds()["ending"], horizon=2 if size == 3 else 3)
    student, teacher = pair(mdp)
    for gamma in GAMMAS:
        paths = by_hand.enumerate_paths(mdp)
        weight, score = by_hand.probability(paths, student), by_hand.scores(paths, student)
        credit = by_hand.costs_to_go(
            by_hand.logp(paths, student) - by_hand.logp(paths, teacher), gamma
        )
        group = torch.tensor(list(itertools.product(range(len(weight)), repeat=size)))
        mean = torch.zeros(len(group), *student.shape, dtype=torch.float64)
        for i in range(size):
            other_credits = [credit[group[:, j]] for j in range(size) if j != i]
            centred = (
                credit[group[:, i]] - sum(other_credits) / (size - 1) * paths.mask[group[:, i]]
            )
            mean += torch.einsum("nt,ntsa->nsa", centred, score[group[:, i]]) / size
        expected = by_hand.moments(weight[group].prod(1), mean)
        result = moments.moments(mdp, student, teacher, "leave_one_out", gamma, group=size)
        torch.testing.assert_close(result[0], expected[0], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(result[1], size * expected[1], atol=1e-12, rtol=1e-9)


def test_monte_carlo_agrees_for_other_samplers_and_given_baselines() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    sampler = nucleus_probabilities(student, 1.0, 0.7)
    family = {
        "rb_all": factory.make_objective("full_reverse_kl", gamma=0.9),
        "token": factory.make_objective("sampled_token", gamma=0.9, ratio="token"),
        "sequence": factory.make_objective("sampled_token", gamma=0.9, ratio="sequence"),
        "k3": factory.make_objective("k3"),
    }
    estimate = monte_carlo(mdp, student, teacher, family, 20_000, seeded(5), sampler=sampler)
    names = {"rb_all": "rb_all", "token": "plain", "sequence": "plain", "k3": "k3"}
    for i, (name, estimator) in enumerate(names.items()):
        ratio = name if name in RATIOS else "none"
        gamma = 0.0 if name == "k3" else 0.9
        mean, variance = moments.moments(
            mdp, student, teacher, estimator, gamma, sampler=sampler, ratio=ratio
        )
        error = estimate.mean_se[i].clamp(min=1e-12)
        assert ((estimate.mean[i] - mean).abs() / error)[estimate.mean_se[i] > 0].max() < 4.5
        assert abs(estimate.variance[i] - variance) / estimate.variance_se[i] < 4
        spread = 2 * (variance / 20_000) ** 0.5 * mean.norm() + variance / 20_000
        assert abs(estimate.norm2[i] - mean.square().sum()) < 4 * spread
    objectives = {
        name: ESTIMATORS[name].sampled_objective(0.9)
        for name in ("value", "optimal", "rb_all_value")
    }
    baselines = {name: moments.baseline(mdp, student, teacher, name, 0.9) for name in objectives}
    estimate = monte_carlo(
        mdp, student, teacher, objectives, 20_000, seeded(6), baselines=baselines
    )
    for i, name in enumerate(objectives):
        mean, variance = moments.moments(mdp, student, teacher, name, 0.9)
        assert abs(estimate.variance[i] - variance) / estimate.variance_se[i] < 4


def test_a_sampled_leave_one_out_group_has_the_exact_variance() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    size, groups = 4, 5_000
    trajectories = sample(mdp, student, teacher, size * groups, seeded(7))
    prompt = torch.arange(groups).repeat_interleave(size)
    trajectories = replace(trajectories, batch=replace(trajectories.batch, prompt=prompt))
    objective = factory.make_objective("sampled_token", gamma=1.0, baseline="leave_one_out")
    means = trajectory_gradients(trajectories, student, objective).view(groups, size, -1).mean(1)
    deviations = (means - means.mean(0)).square().sum(1) * size
    _, variance = moments.moments(mdp, student, teacher, "leave_one_out", 1.0, group=size)
    error = deviations.std() / groups**0.5
    assert abs(deviations.sum() / (groups - 1) - variance) / error < 4
    assert error / variance < 0.05


def test_a_grid_of_discounts_equals_one_at_a_time() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    for name, group in (("rb_all_value", None), ("optimal", None), ("leave_one_out", 3)):
        grid = moments.moments(mdp, student, teacher, name, GAMMAS, group=group)
        for i, gamma in enumerate(GAMMAS):
            single = moments.moments(mdp, student, teacher, name, gamma, group=group)
            torch.testing.assert_close(grid[0][i], single[0], atol=1e-14, rtol=0)
            torch.testing.assert_close(grid[1][i], single[1], atol=1e-14, rtol=1e-12)
    names = ("plain", "leave_one_out", "rb_all_value")
    combined = moments.moments(mdp, student, teacher, names, GAMMAS, group=3)
    for i, name in enumerate(names):
        group = 3 if name == "leave_one_out" else None
        single = moments.moments(mdp, student, teacher, name, GAMMAS, group=group)
        torch.testing.assert_close(combined[0][i], single[0], atol=1e-14, rtol=0)
        torch.testing.assert_close(combined[1][i], single[1], atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("world", ["chain", "ending"])
def test_students_together_have_the_gradients_of_each(world: str) -> None:
    mdp = worlds()[world]
    student, teacher = pair(mdp)
    students = torch.stack([student, teacher, 2 * student])
    gammas = (0.0, 0.7, 1.0)
    together = moments.expected_gradients_of_students(
        mdp, students, teacher, torch.tensor(gammas, dtype=torch.float64)
    )
    for gradient, logits, gamma in zip(together, students, gammas, strict=True):
        expected = moments.expected_gradient(mdp, logits, teacher, gamma)
        torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=1e-13)


def test_arguments_without_effect_or_sense_are_refused() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    sampler = nucleus_probabilities(student, 0.5)
    for message, options in (
        ("unknown estimator 'magic'", {"estimator": "magic"}),
        ("teacher_topk is local, gamma = 0.5", {"estimator": "teacher_topk", "gamma": 0.5, "k": 1}),
        ("k is None, expected 1 to 2", {"estimator": "teacher_topk"}),
        ("k is 3, expected 1 to 2", {"estimator": "student_topk", "k": 3}),
        ("needs the number of rollouts", {"estimator": "leave_one_out"}),
        ("group is 1", {"estimator": "leave_one_out", "group": 1}),
        ("group = 4 would have no effect on plain", {"group": 4}),
        (
            "not 'sequence_mean'",
            {"estimator": "leave_one_out", "group": 2, "length": "sequence_mean"},
        ),
        ("unknown ratio 'half'", {"ratio": "half"}),
        ("unknown length 'token_mean'", {"length": "token_mean"}),
        ("need the student as the sampler", {"estimator": "optimal", "sampler": sampler}),
        ("sampler has shape", {"sampler": sampler[:1]}),
        ("sampler: a row sums to 2", {"sampler": 2 * sampler}),
        ("jacobian has shape", {"jacobian": student}),
    ):
        with pytest.raises(ValueError, match=message):
            moments.moments(mdp, student, teacher, **options)
    trajectories = sample(mdp, student, teacher, 2, seeded(0))
    with pytest.raises(ValueError, match="unknown support 'best'"):
        with_support(trajectories, student, teacher, "best", 1)
    with pytest.raises(ValueError, match="baseline column"):
        factory.make_objective("sampled_token", baseline="given").credit(trajectories.batch)
    single = with_baseline(
        trajectories, torch.zeros(mdp.horizon, mdp.num_states, dtype=torch.float64)
    )
    single = replace(single.batch, prompt=torch.arange(2))
    with pytest.raises(ValueError, match="2 of 2 prompts have a single rollout"):
        factory.make_objective("sampled_token", baseline="leave_one_out").credit(single)
