"""Compare sparse worlds with dense ones, with enumeration and with samples; returns with loops."""

import pytest
import torch
from torch import Tensor

from opd.objectives import factory
from synthetic.estimators import ADDITIONAL, FAMILY, LOCAL
from synthetic.exact import moments, returns
from synthetic.sampling.monte_carlo import monte_carlo
from synthetic.worlds.mdp import TabularMDP, random_chain, to_dense, with_end_state
from synthetic.worlds.transitions import SparseTransitions
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import GAMMAS, pair, seeded


def sparse_chain(states: int, actions: int, horizon: int, ends: bool = False) -> TabularMDP:
    mdp = random_chain(states, actions, horizon, seeded(0), mixing=0.3, successors=3)
    if not ends:
        return mdp
    stop = 0.4 * torch.rand(states, actions, generator=seeded(1), dtype=torch.float64)
    return with_end_state(mdp, stop)


def assert_equal_to_rounding(value: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(value, expected, atol=1e-12 * scale, rtol=1e-12)


@pytest.mark.parametrize(("states", "ends"), [(8, True), (64, False)])
def test_a_sparse_world_has_the_moments_of_the_dense_one(states: int, ends: bool) -> None:
    sparse = sparse_chain(states, 3, 6, ends)
    dense = to_dense(sparse)
    assert isinstance(sparse.transition, SparseTransitions)
    assert isinstance(dense.transition, Tensor)
    student, teacher = pair(sparse)
    for names, gammas in (
        ((*FAMILY, "kl_advantage"), GAMMAS),
        ((*LOCAL, *ADDITIONAL), (0.0,)),
    ):
        results = [
            moments.moments(
                mdp, student, teacher, names, gammas, k=2, group=3 if "plain" in names else None
            )
            for mdp in (sparse, dense)
        ]
        (mean, variance), (dense_mean, dense_variance) = results
        for i in range(len(names)):
            assert_equal_to_rounding(variance[i], dense_variance[i])
            # some means are zero, so that rounding is relative to the noise
            noise = dense_variance[i].max().sqrt().item()
            torch.testing.assert_close(mean[i], dense_mean[i], atol=1e-12 * noise, rtol=1e-12)
    for gamma in GAMMAS:
        gradients = [moments.expected_gradient(x, student, teacher, gamma) for x in (sparse, dense)]
        assert_equal_to_rounding(*gradients)
    live = student.clone().requires_grad_()
    totals = [moments.sequence_kl(mdp, live, teacher).total for mdp in (sparse, dense)]
    assert_equal_to_rounding(*(x.detach() for x in totals))
    assert_equal_to_rounding(*(torch.autograd.grad(x, live)[0] for x in totals))
    jacobian = torch.randn(*student.shape, 5, generator=seeded(4), dtype=torch.float64)
    options = {"estimator": ["plain", "optimal", "leave_one_out"], "gamma": 0.9, "group": 2}
    results = [
        moments.moments(mdp, student, teacher, jacobian=jacobian, **options)
        for mdp in (sparse, dense)
    ]
    for value, expected in zip(*results, strict=True):
        assert_equal_to_rounding(value, expected)


def test_a_sparse_world_has_the_moments_of_its_enumeration() -> None:
    mdp = sparse_chain(4, 2, 4, ends=True)
    student, teacher = pair(mdp)
    for name in ("plain", "value", "optimal", "rb_all"):
        for gamma in GAMMAS:
            mean, variance = moments.moments(mdp, student, teacher, name, gamma)
            want = by_hand.mean_and_variance(to_dense(mdp), student, teacher, name, gamma)
            torch.testing.assert_close(mean, want[0], atol=1e-12, rtol=1e-10)
            torch.testing.assert_close(variance, want[1], atol=1e-12, rtol=1e-9)


def test_samples_of_a_large_sparse_world_have_the_exact_moments() -> None:
    mdp = random_chain(1024, 2, 12, seeded(0), mixing=0.1, successors=2)
    student, teacher = pair(mdp)
    gammas = (0.0, 1.0)
    objectives = {str(g): factory.make_objective("sampled_token", gamma=g) for g in gammas}
    estimate = monte_carlo(mdp, student, teacher, objectives, 1_500, seeded(5), chunk=500)
    mean, variance = moments.moments(mdp, student, teacher, "plain", gammas)
    z = (estimate.variance - variance) / estimate.variance_se
    assert z.abs().max() < 4
    assert (estimate.variance_se / variance).max() < 0.1
    # single entries are noise; the squared distance of all has the exact variance as its mean
    truth = moments.expected_gradient(mdp, student, teacher, gammas)
    torch.testing.assert_close(mean, truth, atol=1e-12, rtol=1e-9)
    deviation = (estimate.mean - mean).square().sum((-1, -2))
    assert ((deviation / (variance / 1_500) - 1).abs() < 0.2).all()


def test_return_measures_are_those_of_matrix_powers() -> None:
    mdp = sparse_chain(6, 2, 5, ends=True)
    (s, a), dense = mdp.transitions.shape, to_dense(mdp).transitions
    measure = torch.rand(s, a, generator=seeded(6), dtype=torch.float64) * mdp.active[:, None]
    costs = torch.randn(2, s, a, generator=seeded(7), dtype=torch.float64)
    cost_of, discounts = torch.tensor([0, 0, 1]), torch.tensor([0.5, 1.0, 0.5]).double()
    joint = measure[..., None] * dense.probabilities
    move = joint.sum(1)
    for transitions in (mdp.transitions, dense):
        result = returns.return_measures(
            transitions, mdp.horizon, measure, costs, cost_of, discounts, slice(1, 4)
        )
        for lag in range(1, mdp.horizon):
            reach = joint @ torch.linalg.matrix_power(move, lag - 1)
            own = torch.stack([reach[c, :, c] for c in range(1, 4)])
            torch.testing.assert_close(result[lag - 1, 0], own)
            for x in range(3):
                paid_move = torch.einsum("cad,ca->cd", joint, costs[cost_of[x]])
                # a cost is paid at one of the steps between the token and the return
                total = sum(
                    discounts[x] ** step
                    * torch.linalg.matrix_power(move, step - 1)
                    @ paid_move
                    @ torch.linalg.matrix_power(move, lag - 1 - step)
                    for step in range(1, lag)
                )
                paid = joint @ total if lag > 1 else torch.zeros(s, a, s).double()
                own = torch.stack([paid[c, :, c] for c in range(1, 4)])
                torch.testing.assert_close(result[lag - 1, 1 + x], own)


def test_convolutions_are_causal_sums() -> None:
    left, right = (torch.rand(shape, generator=seeded(8)) for shape in ((3, 5), (3, 5, 2)))
    result = returns.convolve(left, right)
    for t in range(5):
        want = sum(left[:, t - i, None] * right[:, i] for i in range(t + 1))
        torch.testing.assert_close(result[:, t], want)


def test_a_tree_ends_before_its_horizon() -> None:
    """Where nothing can be returned to, products with earlier steps are zero."""
    states = torch.tensor([[[1], [2]], [[3], [3]], [[3], [3]], [[3], [3]]])
    tree = SparseTransitions(states, torch.ones(4, 2, 1))
    start = torch.tensor([1.0, 0.0, 0.0, 0.0])
    measure = torch.full((4, 2), 0.5, dtype=torch.float64)
    measure[3] = 0
    none = torch.zeros(0, dtype=torch.long)
    result = returns.return_measures(
        tree, 40, measure, measure[None], none, measure[0, :0], slice(0, 4)
    )
    assert not bool(result.any())
    assert TabularMDP(tree, start, 40, end=3).num_states == 4


def test_sparse_chains_have_their_successors() -> None:
    mdp = random_chain(12, 3, 4, seeded(0), mixing=0.0, blocks=3, successors=2)
    assert isinstance(mdp.transition, SparseTransitions)
    block = torch.arange(12) // 4
    reached = mdp.transition.probabilities > 0
    assert (block[mdp.transition.successors] == block[:, None, None])[reached].all()
    assert bool((mdp.transition.successors.sort(-1).values.diff(dim=-1) > 0).all())
    mixed = random_chain(12, 3, 4, seeded(0), mixing=1.0, blocks=3, successors=2)
    assert bool((mixed.transitions.probabilities > 0).all())
    torch.testing.assert_close(
        to_dense(with_end_state(mixed, torch.tensor(0.2))).transition,
        with_end_state(to_dense(mixed), torch.tensor(0.2)).transition,
        atol=1e-15,
        rtol=0,
    )


def test_worlds_too_large_or_not_sparse_are_refused_with_their_numbers() -> None:
    two = torch.zeros(2, 1, 1, dtype=torch.long)
    for message, make in (
        (
            r"4096 states and 64 actions needs 8.0 GiB .* successors=4",
            lambda: random_chain(4096, 64, 4, seeded(0)),
        ),
        (
            "successors is 9, expected 1 to 8",
            lambda: random_chain(8, 2, 4, seeded(0), successors=9),
        ),
        ("contain state 2, expected 0 to 1", lambda: SparseTransitions(two + 2, two + 1.0)),
        (
            r"\(2, 1, 1\) and probabilities \(2, 1\)",
            lambda: SparseTransitions(two, two[..., 0] + 1.0),
        ),
        (
            "a row sums to 0.5",
            lambda: TabularMDP(SparseTransitions(two, two + 0.5), torch.ones(2) / 2, 3),
        ),
        (
            "contains -1.0",
            lambda: TabularMDP(SparseTransitions(two, two - 1.0), torch.ones(2) / 2, 3),
        ),
        (
            "end state 1 is not absorbing",
            lambda: TabularMDP(SparseTransitions(two, two + 1.0), torch.tensor([1.0, 0.0]), 3, 1),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
