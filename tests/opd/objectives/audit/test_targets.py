"""Targets, variances and places of rest against independent calculations.

Shapes: N prefixes, R responses, V vocabulary; the MDP has a state more, its end.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor

from opd.objectives.audit.audit import audit
from opd.objectives.audit.matching import Mean, mixture_weights, pairs_that_span
from opd.objectives.audit.noise import relative_variance, variance_of_two_rows
from opd.objectives.audit.ours import objective_loss
from opd.objectives.audit.rest import mean_gradients
from opd.objectives.audit.structure import Structure
from opd.objectives.audit.targets import (
    BASIC,
    REWARD,
    SEQUENCE,
    TOKEN_FORWARD,
    TOKEN_REVERSE,
    Target,
    discounted_target,
    jsd_target,
    support_targets,
)
from opd.objectives.audit.units import enumerate_units, mean_gradient, total_variance
from opd.objectives.audit.worlds import World, make_world
from opd.objectives.factory import make_objective
from opd.objectives.user_loss import as_user_loss
from synthetic.exact.moments import expected_gradient, moments, sequence_kl
from synthetic.worlds.mdp import TabularMDP
from tests.opd.objectives.audit.bank import right, right_sampled
from tests.opd.objectives.audit.bank.faulty import elsewhere

ROWS = Structure("row", "tokens")


def world(random_lengths: bool = True) -> World:
    return make_world("w", vocabulary=4, length=3, random_lengths=random_lengths, seed=5)


def as_mdp(world: World) -> TabularMDP:
    """Write the tree of a world as an MDP whose last state is the end."""
    n, v = world.student.shape
    transition = torch.zeros(n + 1, v, n + 1).double()
    transition[:, :, n] = 1
    for row in range(len(world.tokens)):
        for t in range(int(world.lengths[row]) - 1):
            node, token = int(world.nodes[row, t]), int(world.tokens[row, t])
            transition[node, token] = 0
            transition[node, token, int(world.nodes[row, t + 1])] = 1
    start = torch.zeros(n + 1).double()
    start[world.nodes[:, 0].unique()] = 1 / world.num_prompts
    return TabularMDP(transition, start, horizon=world.tokens.shape[1], end=n)


def with_end(table: Tensor) -> Tensor:
    return torch.cat([table, torch.zeros_like(table[:1])])


@pytest.mark.parametrize("random_lengths", [True, False])
@pytest.mark.parametrize(
    ("target", "gamma"),
    [(TOKEN_REVERSE, 0.0), (SEQUENCE, 1.0), (discounted_target(0.6), 0.6)],
    ids=["token", "sequence", "discounted"],
)
def test_gamma_family_equals_the_recursion(
    target: Target, gamma: float, random_lengths: bool
) -> None:
    w = world(random_lengths)
    ours = target.gradient(w, w.student, None)
    exact = expected_gradient(as_mdp(w), with_end(w.student), with_end(w.teacher), gamma)
    torch.testing.assert_close(ours, exact[:-1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("target", "estimator", "k"),
    [
        (TOKEN_FORWARD, "full_forward_kl", None),
        (support_targets(4)[0], "teacher_topk", 2),
        (support_targets(4)[2], "student_topk", 2),
    ],
    ids=["forward", "teacher", "student"],
)
def test_local_targets_equal_the_recursion(target: Target, estimator: str, k: int | None) -> None:
    w = world()
    student, teacher = with_end(w.student), with_end(w.teacher)
    exact, _ = moments(as_mdp(w), student, teacher, estimator, k=k)
    ours = target.gradient(w, w.student, None)
    torch.testing.assert_close(ours, exact[:-1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("loss", "estimator", "gamma"),
    [
        (right_sampled.score_of_the_log_ratio, "plain", 0.0),
        (right_sampled.cost_to_go, "plain", 1.0),
        (right_sampled.discounted_cost_to_go, "plain", 0.5),
        (right_sampled.k2, "k2", 0.0),
        (right.k3_direct, "k3", 0.0),
        (right.reverse_kl_token_mean, "full_reverse_kl", 0.0),
        (elsewhere.teacher_topk_unnormalised, "teacher_topk_unnormalised", 0.0),
        (elsewhere.head_and_tail_of_two_kinds, "teacher_topk_published_tail", 0.0),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_mean_and_variance_of_somebody_elses_loss_equal_the_recursion(
    loss: Callable[..., Tensor], estimator: str, gamma: float
) -> None:
    w = world()
    structure = ROWS if loss is not right_sampled.cost_to_go else Structure("row", "rows")
    units = enumerate_units(as_user_loss(loss, "loss"), w, structure)
    mean, variance = moments(
        as_mdp(w),
        with_end(w.student),
        with_end(w.teacher),
        estimator,
        gamma,
        k=w.k if "topk" in estimator else None,
    )
    nodes = len(w.student)
    torch.testing.assert_close(mean_gradient(units, nodes), mean[:-1], rtol=1e-9, atol=1e-13)
    assert total_variance(units, nodes) == pytest.approx(float(variance), rel=1e-9)


def test_sequence_target_is_the_derivative_of_the_recursion() -> None:
    w = world()
    table = with_end(w.student).requires_grad_()
    total = sequence_kl(as_mdp(w), table, with_end(w.teacher)).total
    (gradient,) = torch.autograd.grad(total, table)
    ours = SEQUENCE.gradient(w, w.student, None)
    torch.testing.assert_close(ours, gradient[:-1], rtol=1e-10, atol=1e-13)


# --- finite differences of enumerated objectives ------------------------------------------------


def _token_objective(divergence: Callable[[Tensor, Tensor], Tensor], w: World, x: Tensor) -> float:
    """Return the sum over prefixes of fixed visits times a divergence, in plain probabilities."""
    visits = torch.zeros(len(x)).double()
    for row, probability in enumerate(w.probabilities(w.student).tolist()):
        for t in range(int(w.lengths[row])):
            visits[int(w.nodes[row, t])] += probability
    return float((visits * divergence(x.softmax(-1), w.teacher.softmax(-1))).sum())


def _response_objective(value: Callable[[World, Tensor], Tensor], w: World, x: Tensor) -> float:
    """Return the mean over responses of a value, by products of probabilities."""
    probability = torch.ones(len(w.tokens)).double() / w.num_prompts
    for row in range(len(w.tokens)):
        for t in range(int(w.lengths[row])):
            node = int(w.nodes[row, t])
            probability[row] *= x[node].softmax(-1)[int(w.tokens[row, t])]
    return float((probability * value(w, probability * w.num_prompts)).sum())


def _log_ratio(w: World, probability: Tensor) -> Tensor:
    return probability.log() - (w.probabilities(w.teacher) * w.num_prompts).log()


def _jsd(beta: float, p: Tensor, q: Tensor) -> Tensor:
    m = beta * q + (1 - beta) * p
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)


def _on_support(source: str, k: int, bucket: bool, p: Tensor, q: Tensor) -> Tensor:
    ids = (q if source == "teacher" else p).sort(-1, descending=True).indices[:, :k]
    head, goal = p.gather(1, ids), q.gather(1, ids)
    rest, goal_rest = 1 - head.sum(1), 1 - goal.sum(1)
    if bucket:
        return (head * (head / goal).log()).sum(1) + rest * (rest / goal_rest).log()
    head, goal = head / head.sum(1, keepdim=True), goal / goal.sum(1, keepdim=True)
    return (head * (head / goal).log()).sum(1)


OBJECTIVES: dict[str, tuple[Target, Callable[[World, Tensor], float]]] = {
    "token_reverse": (
        TOKEN_REVERSE,
        partial(_token_objective, lambda p, q: (p * (p / q).log()).sum(-1)),
    ),
    "token_forward": (
        TOKEN_FORWARD,
        partial(_token_objective, lambda p, q: (q * (q / p).log()).sum(-1)),
    ),
    "jsd": (jsd_target(0.3), partial(_token_objective, partial(_jsd, 0.3))),
    "sequence": (SEQUENCE, partial(_response_objective, _log_ratio)),
    "reward": (REWARD, partial(_response_objective, lambda w, _: -w.reward)),
    **{
        target.name + str(k): (
            target,
            partial(_token_objective, partial(_on_support, source, k, bucket)),
        )
        for target, (source, k, bucket) in zip(
            support_targets(4),
            [("teacher", 2, False), ("teacher", 3, False), ("student", 2, False)]
            + [("student", 3, False)]
            + [(source, k, True) for source in ("teacher", "student") for k in (1, 2, 3)],
            strict=True,
        )
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_the_slope_of_the_enumerated_objective(name: str) -> None:
    target, objective = OBJECTIVES[name]
    w = make_world("w", vocabulary=4, length=2, random_lengths=True, seed=6)
    gradient = target.gradient(w, w.student, None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        direction = torch.randn(w.student.shape, generator=generator).double()
        step = 1e-5 * direction
        slope = (objective(w, w.student + step) - objective(w, w.student - step)) / 2e-5
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-9)


def test_targets_differ() -> None:
    w = world()
    directions = [target.gradient(w, w.student, None).flatten() for target in BASIC]
    unit = torch.stack([x / x.norm() for x in directions])
    assert float((unit @ unit.T - torch.eye(len(unit))).abs().max()) < 0.99


# --- places of rest -----------------------------------------------------------------------------


def test_descent_finds_the_fixed_point_of_the_unnormalised_topk() -> None:
    rest = audit(elsewhere.teacher_topk_unnormalised).rest
    assert rest is not None
    assert rest.log_mass_ratio == pytest.approx(-1.0, abs=1e-3)  # p(S) = q(S)/e
    assert rest.student_mass == pytest.approx(rest.teacher_mass / math.e, abs=1e-3)


def test_descent_finds_the_fixed_point_of_the_published_tail() -> None:
    w = make_world("s", vocabulary=4, length=2, random_lengths=True, seed=7, num_prompts=1)
    rest = audit(elsewhere.head_and_tail_of_two_kinds).rest
    assert rest is not None
    mass = w.teacher.softmax(-1).topk(w.k, -1).values.sum(-1)
    expected = mass / (mass + math.e - math.e * mass)
    assert rest.student_mass == pytest.approx(float(expected.mean()), abs=1e-3)


@pytest.mark.parametrize("loss", [right.jsd_of_logs, right_sampled.k2, right.soft_cross_entropy])
def test_right_divergences_rest_at_the_teacher(loss) -> None:
    rest = audit(loss).rest
    assert rest is not None
    assert rest.at_teacher
    assert rest.mean_at_teacher < 1e-6


@pytest.mark.parametrize("name", ["sampled_token", "full_reverse_kl"])
def test_variance_of_two_rows_of_a_prompt_is_that_of_all_pairs(name: str) -> None:
    w = make_world("pairs", vocabulary=4, length=2, random_lengths=True, seed=5, num_prompts=3)
    loss = objective_loss(name, make_objective(name))
    row = relative_variance(loss, w, Structure("row", "tokens"), "one")
    pairs = relative_variance(loss, w, Structure("group", "tokens"), "one")
    assert variance_of_two_rows(row, 3) == pytest.approx(pairs, rel=1e-9)


@pytest.mark.parametrize("unit", ["row", "group"])
def test_each_student_of_a_descent_is_that_of_a_world_of_its_own(unit: str) -> None:
    w = make_world("s", vocabulary=4, length=2, random_lengths=True, seed=7)

    def importance_sampled(student_logp, sampler_logp, teacher_logp, mask):
        ratio = (student_logp - sampler_logp).exp()
        return (ratio * (sampler_logp - teacher_logp) * mask).sum() / mask.sum()

    loss = as_user_loss(importance_sampled, "loss")
    structure = Structure(unit, "tokens")
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(3, *w.student.shape, generator=generator, dtype=torch.float64)
    means, _ = mean_gradients(loss, w, structure, "one", tables)
    for table, mean in zip(tables, means, strict=True):
        own = replace(w, student=table)
        expected = mean_gradient(enumerate_units(loss, own, structure), len(table))
        torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)


def test_only_pairs_that_no_mixture_fits_are_left_out() -> None:
    w = world()
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(5, *w.student.shape, generator=generator, dtype=torch.float64)
    parts[3] = 2 * parts[0] + 1e-5 * parts[3]  # nearly parallel to the first
    noise = torch.randn(w.student.shape, generator=generator, dtype=torch.float64)
    for i, j in combinations(range(5), 2):
        goal = 0.3 * parts[i] + 0.7 * parts[j]
        mean = Mean(w, goal + 5e-4 * goal.norm() * noise / noise.norm(), 1.0)
        near = pairs_that_span([*parts], mean)
        for a, b in combinations(range(5), 2):
            fits = mixture_weights([mean], ([parts[a]], [parts[b]])) is not None
            assert near[a, b] or not fits
        if (i, j) != (0, 3):  # of which each alone is enough
            assert mixture_weights([mean], ([parts[i]], [parts[j]])) is not None
            assert near.triu(1).sum() <= 3
