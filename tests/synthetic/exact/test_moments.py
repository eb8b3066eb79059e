"""Every estimator's exact moments against the sum over all paths of small worlds."""

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
from synthetic.worlds.mdp import TabularMDP, nucleus
from tests.helpers import mdp_enumeration as by_hand
from tests.synthetic.exact.test_against_enumeration import GAMMAS, pair, seeded, worlds

SUPPORTED = [name for name in ESTIMATORS if "topk" in name]
REST = [name for name in ESTIMATORS if name not in SUPPORTED and name != "leave_one_out"]


def check(mdp: TabularMDP, name: str, gamma: float, k: int | None = None) -> None:
    student, teacher = pair(mdp)
    mean, variance = moments.moments(mdp, student, teacher, name, gamma, k=k)
    want = by_hand.mean_and_variance(mdp, student, teacher, name, gamma, k or 1)
    torch.testing.assert_close(mean, want[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(variance, want[1], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("estimator", REST)
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
    """k1 for nothing, k2 for the reverse KL, k3 for the forward KL, all with frozen prefixes."""
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
    sampler = nucleus(student, 1.0, 0.6) if kind == "temperature" else nucleus(student, 0.6)
    assert (sampler == 0).any() == (kind == "top_p")
    gamma = 0.7 if ESTIMATORS[estimator].family else 0.0
    k = 1 if "topk" in estimator else None
    mean, variance = moments.moments(
        mdp, student, teacher, estimator, gamma, k=k, sampler=sampler, ratio=ratio
    )
    at = by_hand.paths(mdp)
    acting = by_hand.probability(at, sampler.log().clamp(min=-1e9))
    ours = by_hand.logp(at, student)
    drawn = at.mask & (sampler[at.states, at.tokens] > 0)
    away = torch.where(drawn, ours - sampler.log()[at.states, at.tokens], torch.zeros(()))
    weight = {"none": 0 * away, "token": away, "sequence": away.sum(1, keepdim=True)}[ratio].exp()
    credit = torch.zeros_like(ours)
    if estimator != "teacher_topk_sampled_tail":
        r = ours - by_hand.logp(at, teacher)
        p, q = student.log_softmax(-1), teacher.log_softmax(-1)
        local = (p.exp() * (p - q)).sum(-1)[at.states] * at.mask
        credit = by_hand.to_go(r, gamma) if estimator != "rb_all" else by_hand.to_go(local, gamma)
        credit = credit if estimator != "rb_all" else credit - local
        if estimator == "value":
            every = by_hand.mean_by_state(at, acting, credit, mdp.num_states).nan_to_num(0)
            credit = credit - every[torch.arange(mdp.horizon), at.states] * at.mask
    result = torch.einsum("nt,ntsa->nsa", weight * credit, by_hand.scores(at, student))
    if estimator in ("rb_all", "teacher_topk_sampled_tail"):
        local_name = "full_reverse_kl" if estimator == "rb_all" else estimator
        vectors = by_hand.local_vectors(local_name, student, teacher, 1)[at.states, at.tokens]
        visit = torch.nn.functional.one_hot(at.states, mdp.num_states) * at.mask[..., None]
        result += torch.einsum("nta,nts->nsa", weight[..., None] * vectors, visit.to(vectors.dtype))
    want = by_hand.moments(acting, result)
    torch.testing.assert_close(mean, want[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(variance, want[1], atol=1e-12, rtol=1e-9)
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
    found = moments.moments(mdp, student, teacher, estimator, gamma, length="sequence_mean")
    at = by_hand.paths(mdp)
    whole = by_hand.estimates(mdp, at, student, teacher, estimator, gamma)
    lengths = at.mask.sum(1)
    want = by_hand.moments(by_hand.probability(at, student), whole / lengths[:, None, None])
    torch.testing.assert_close(found[0], want[0], atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(found[1], want[1], atol=1e-13, rtol=1e-9)
    assert lengths.unique().numel() == 4


@pytest.mark.parametrize("estimator", ["plain", "optimal", "rb_all_value", "teacher_topk_bucket"])
def test_shared_parameters_add_up_over_states(estimator: str) -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    gamma = 0.5 if ESTIMATORS[estimator].family else 0.0
    k = 1 if "topk" in estimator else None
    table = moments.moments(mdp, student, teacher, estimator, gamma, k=k)
    identity = torch.eye(student.numel(), dtype=torch.float64).view(*student.shape, -1)
    same = moments.moments(mdp, student, teacher, estimator, gamma, k=k, jacobian=identity)
    torch.testing.assert_close(same[0].view_as(student), table[0], atol=1e-13, rtol=0)
    torch.testing.assert_close(same[1], table[1], atol=1e-13, rtol=1e-12)
    if estimator == "optimal":
        return  # its baseline depends on the parameters; see the next test
    jacobian = torch.randn(*student.shape, 3, generator=seeded(8), dtype=torch.float64)
    found = moments.moments(mdp, student, teacher, estimator, gamma, k=k, jacobian=jacobian)
    at = by_hand.paths(mdp)
    whole = by_hand.estimates(mdp, at, student, teacher, estimator, gamma, 1)
    shared = torch.einsum("nsa,sad->nd", whole, jacobian)
    want = by_hand.moments(by_hand.probability(at, student), shared)
    torch.testing.assert_close(found[0], want[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found[1], want[1], atol=1e-12, rtol=1e-9)


def test_no_baseline_has_less_variance_than_the_optimal_one() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    jacobian = torch.randn(*student.shape, 3, generator=seeded(8), dtype=torch.float64)
    at = by_hand.paths(mdp)
    weight, score = by_hand.probability(at, student), by_hand.scores(at, student)
    shared = torch.einsum("ntsa,sad->ntd", score, jacobian)
    r = by_hand.to_go(by_hand.logp(at, student) - by_hand.logp(at, teacher), 0.7)

    def variance(table: Tensor) -> float:
        credit = r - table[torch.arange(mdp.horizon), at.states] * at.mask
        return float(by_hand.moments(weight, torch.einsum("nt,ntd->nd", credit, shared))[1])

    best = moments.baseline(mdp, student, teacher, "optimal", 0.7, jacobian)
    least = variance(best)
    found = moments.moments(mdp, student, teacher, "optimal", 0.7, jacobian=jacobian)[1]
    assert float(found) == pytest.approx(least, rel=1e-10)
    for seed in range(20):
        noise = torch.randn(best.shape, generator=seeded(seed), dtype=torch.float64)
        up, down = variance(best + 1e-3 * noise), variance(best - 1e-3 * noise)
        assert up > least < down
        assert up == pytest.approx(down, rel=1e-6), "the minimum is flat in every direction"
    assert least < variance(moments.baseline(mdp, student, teacher, "value", 0.7))


@pytest.mark.parametrize("size", [2, 3])
def test_a_leave_one_out_group_equals_the_sum_over_all_groups(size: int) -> None:
    mdp = replace(worlds()["ending"], horizon=2 if size == 3 else 3)
    student, teacher = pair(mdp)
    for gamma in GAMMAS:
        at = by_hand.paths(mdp)
        weight, score = by_hand.probability(at, student), by_hand.scores(at, student)
        credit = by_hand.to_go(by_hand.logp(at, student) - by_hand.logp(at, teacher), gamma)
        group = torch.tensor(list(itertools.product(range(len(weight)), repeat=size)))
        mean = torch.zeros(len(group), *student.shape, dtype=torch.float64)
        for i in range(size):
            others = [credit[group[:, j]] for j in range(size) if j != i]
            centred = credit[group[:, i]] - sum(others) / (size - 1) * at.mask[group[:, i]]
            mean += torch.einsum("nt,ntsa->nsa", centred, score[group[:, i]]) / size
        want = by_hand.moments(weight[group].prod(1), mean)
        found = moments.moments(mdp, student, teacher, "leave_one_out", gamma, group=size)
        torch.testing.assert_close(found[0], want[0], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(found[1], size * want[1], atol=1e-12, rtol=1e-9)


def test_monte_carlo_agrees_for_other_samplers_and_given_baselines() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    sampler = nucleus(student, 1.0, 0.7)
    family = {
        "rb_all": factory.make("full_reverse_kl", 0.9),
        "token": factory.make("sampled_token", 0.9, ratio="token"),
        "sequence": factory.make("sampled_token", 0.9, ratio="sequence"),
        "k3": factory.make("k3"),
    }
    drawn = monte_carlo(mdp, student, teacher, family, 20_000, seeded(5), sampler=sampler)
    names = {"rb_all": "rb_all", "token": "plain", "sequence": "plain", "k3": "k3"}
    for i, (name, estimator) in enumerate(names.items()):
        ratio = name if name in RATIOS else "none"
        gamma = 0.0 if name == "k3" else 0.9
        mean, variance = moments.moments(
            mdp, student, teacher, estimator, gamma, sampler=sampler, ratio=ratio
        )
        error = drawn.mean_se[i].clamp(min=1e-12)
        assert ((drawn.mean[i] - mean).abs() / error)[drawn.mean_se[i] > 0].max() < 4.5
        assert abs(drawn.variance[i] - variance) / drawn.variance_se[i] < 4
        spread = 2 * (variance / 20_000) ** 0.5 * mean.norm() + variance / 20_000
        assert abs(drawn.norm2[i] - mean.square().sum()) < 4 * spread
    chosen = {name: ESTIMATORS[name].sampled(0.9) for name in ("value", "optimal", "rb_all_value")}
    given = {name: moments.baseline(mdp, student, teacher, name, 0.9) for name in chosen}
    drawn = monte_carlo(mdp, student, teacher, chosen, 20_000, seeded(6), baselines=given)
    for i, name in enumerate(chosen):
        mean, variance = moments.moments(mdp, student, teacher, name, 0.9)
        assert abs(drawn.variance[i] - variance) / drawn.variance_se[i] < 4


def test_a_sampled_leave_one_out_group_has_the_exact_variance() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    size, groups = 4, 5_000
    at = sample(mdp, student, teacher, size * groups, seeded(7))
    prompt = torch.arange(groups).repeat_interleave(size)
    at = replace(at, batch=replace(at.batch, prompt=prompt))
    objective = factory.make("sampled_token", 1.0, baseline="leave_one_out")
    means = trajectory_gradients(at, student, objective).view(groups, size, -1).mean(1)
    away = (means - means.mean(0)).square().sum(1) * size
    _, variance = moments.moments(mdp, student, teacher, "leave_one_out", 1.0, group=size)
    error = away.std() / groups**0.5
    assert abs(away.sum() / (groups - 1) - variance) / error < 4
    assert error / variance < 0.05


def test_a_grid_of_discounts_equals_one_at_a_time() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    for name, group in (("rb_all_value", None), ("optimal", None), ("leave_one_out", 3)):
        grid = moments.moments(mdp, student, teacher, name, GAMMAS, group=group)
        for i, gamma in enumerate(GAMMAS):
            alone = moments.moments(mdp, student, teacher, name, gamma, group=group)
            torch.testing.assert_close(grid[0][i], alone[0], atol=1e-14, rtol=0)
            torch.testing.assert_close(grid[1][i], alone[1], atol=1e-14, rtol=1e-12)
    names = ("plain", "leave_one_out", "rb_all_value")
    both = moments.moments(mdp, student, teacher, names, GAMMAS, group=3)
    for i, name in enumerate(names):
        group = 3 if name == "leave_one_out" else None
        alone = moments.moments(mdp, student, teacher, name, GAMMAS, group=group)
        torch.testing.assert_close(both[0][i], alone[0], atol=1e-14, rtol=0)
        torch.testing.assert_close(both[1][i], alone[1], atol=1e-14, rtol=1e-12)


def test_arguments_without_effect_or_sense_are_refused() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    sampler = nucleus(student, 0.5)
    for words, given in (
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
        with pytest.raises(ValueError, match=words):
            moments.moments(mdp, student, teacher, **given)
    at = sample(mdp, student, teacher, 2, seeded(0))
    with pytest.raises(ValueError, match="unknown support 'best'"):
        with_support(at, student, teacher, "best", 1)
    with pytest.raises(ValueError, match="baseline column"):
        factory.make("sampled_token", baseline="given").credit(at.batch)
    single = with_baseline(at, torch.zeros(mdp.horizon, mdp.num_states, dtype=torch.float64))
    single = replace(single.batch, prompt=torch.arange(2))
    with pytest.raises(ValueError, match="2 of 2 prompts have a single rollout"):
        factory.make("sampled_token", baseline="leave_one_out").credit(single)
