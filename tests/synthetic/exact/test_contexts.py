"""Best students of a teacher with a hidden context: against enumeration, entropies and descent."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from synthetic.exact import contexts
from synthetic.exact.moments import sequence_kl
from synthetic.experiments.hidden_context import FORWARD, REVERSE, descended_student
from synthetic.worlds.contexts import ContextWorld, random_contexts
from synthetic.worlds.mdp import to_dense
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import seeded, token_tree

ACTIONS, HORIZON = 3, 3


@pytest.fixture(scope="module")
def world() -> ContextWorld:
    uniform = random_contexts(3, ACTIONS, HORIZON, seeded(5), strength=1.5)
    return replace(uniform, prior=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


@pytest.fixture(scope="module")
def student(world: ContextWorld) -> Tensor:
    noise = torch.randn(world.teacher_logp.shape[1:], generator=seeded(6), dtype=torch.float64)
    return noise.log_softmax(-1)


def all_prefixes(length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(ACTIONS), repeat=length))


ROW = {x: i for i, x in enumerate(p for t in range(HORIZON) for p in all_prefixes(t))}
"""Row of each prefix: shorter ones first, those of one length in the order of their tokens."""
RESPONSES = all_prefixes(HORIZON)


def probability(logp: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Return the probability of some first tokens under a policy (S, A), token by token."""
    product = torch.ones((), dtype=torch.float64)
    for t, token in enumerate(tokens):
        product = product * logp[ROW[tokens[:t]], token].exp()
    return product


def response_table(world: ContextWorld) -> Tensor:
    """Return (C, N) the probability of every response under the teacher of every context."""
    rows = [[probability(x, y) for y in RESPONSES] for x in world.teacher_logp]
    return torch.stack([torch.stack(row) for row in rows])


def entropy(x: Tensor) -> Tensor:
    return -(x * x.clamp(min=1e-300).log()).sum()


def information(joint: Tensor) -> Tensor:
    """Return I of a joint table by entropies, H(row) + H(column) - H(both)."""
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)


def test_prefixes_are_numbered_by_length_and_then_by_tokens(
    world: ContextWorld, student: Tensor
) -> None:
    expected = torch.stack([probability(student, x) for x in ROW])
    actual = contexts.prefix_probabilities(world, student)
    torch.testing.assert_close(actual, expected, atol=1e-15, rtol=0)
    responses = contexts.response_probabilities(world, world.teacher_logp)
    torch.testing.assert_close(responses, response_table(world), atol=1e-15, rtol=0)
    tree = token_tree(ACTIONS, HORIZON)
    inner = world.levels[-2].stop
    assert torch.equal(to_dense(world.mdp).transition[:inner], tree.transition[:inner])
    occupancy = sequence_kl(world.mdp, student, student).occupancy.sum(0)
    torch.testing.assert_close(occupancy, expected, atol=1e-15, rtol=0)


def test_on_the_teachers_prefixes_the_mutual_information_of_the_response_remains(
    world: ContextWorld,
) -> None:
    joint = contexts.joint_on_teacher_prefixes(world)
    best = contexts.arithmetic_student(world, contexts.context_weights(joint))
    table = world.prior[:, None] * response_table(world)
    marginal = torch.stack([probability(best, y) for y in RESPONSES])
    torch.testing.assert_close(marginal, table.sum(0), atol=1e-14, rtol=0)
    expected = float(information(table))
    remaining = (joint * contexts.forward_kl(world, best)).sum()
    assert float(remaining) == pytest.approx(expected, abs=1e-12)
    assert float(contexts.conditional_information(world, joint)) == pytest.approx(
        expected, abs=1e-12
    )
    assert float(contexts.response_information(world, best)) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < float(contexts.entropy(world.prior))


def test_on_the_students_prefixes_the_information_of_each_token_remains(
    world: ContextWorld, student: Tensor
) -> None:
    joint = contexts.joint_on_student_prefixes(world, student)
    best = contexts.arithmetic_student(world, contexts.prior_weights(world))
    expected = torch.zeros((), dtype=torch.float64)
    for prefix, row in ROW.items():
        table = world.prior[:, None] * world.teacher_logp[:, row].exp()
        expected = expected + probability(student, prefix) * information(table)
    assert float(contexts.conditional_information(world, joint)) == pytest.approx(
        float(expected), abs=1e-12
    )
    remaining = (joint * contexts.forward_kl(world, best)).sum()
    assert float(remaining) == pytest.approx(float(expected), abs=1e-12)


def test_the_prefix_tells_the_context_on_the_teachers_prefixes_only(
    world: ContextWorld, student: Tensor
) -> None:
    weights = contexts.context_weights(contexts.joint_on_teacher_prefixes(world))
    for prefix, row in ROW.items():
        likelihood = torch.stack([probability(x, prefix) for x in world.teacher_logp])
        posterior = world.prior * likelihood / (world.prior @ likelihood)
        torch.testing.assert_close(weights[:, row], posterior, atol=1e-14, rtol=0)
    assert (weights[:, -1] - world.prior).abs().max() > 0.1
    independent = contexts.context_weights(contexts.joint_on_student_prefixes(world, student))
    torch.testing.assert_close(independent, contexts.prior_weights(world))


def test_the_sequence_optimum_is_the_geometric_mixture_of_responses(world: ContextWorld) -> None:
    best, value = contexts.geometric_student(world, 1.0)
    product = (world.prior @ response_table(world).log()).exp()
    responses = torch.stack([probability(best, y) for y in RESPONSES])
    torch.testing.assert_close(responses, product / product.sum(), atol=1e-14, rtol=0)
    remaining = -math.log(float(product.sum()))
    assert float(value[0]) == pytest.approx(remaining, abs=1e-12)
    assert float(contexts.mean_sequence_kl(world, best)) == pytest.approx(remaining, abs=1e-12)
    mixture = contexts.geometric_student(world, 0.0)[0]
    assert float(contexts.mean_sequence_kl(world, mixture)) > remaining + 1e-4


def test_the_mean_sequence_kl_of_the_marginal_is_the_lautum_information(
    world: ContextWorld,
) -> None:
    """Palomar and Verdu (2008): KL of the product of the marginals from the joint distribution."""
    weights = contexts.context_weights(contexts.joint_on_teacher_prefixes(world))
    marginal = contexts.arithmetic_student(world, weights)
    table = world.prior[:, None] * response_table(world)
    product = table.sum(1, keepdim=True) * table.sum(0)
    lautum = (product * (product / table).log()).sum()
    actual = contexts.mean_sequence_kl(world, marginal)
    assert float(actual) == pytest.approx(float(lautum), abs=1e-12)


def minimize(loss: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, float]:
    """Minimise by L-BFGS on autograd's gradient; return log-probabilities and the least loss."""
    live = start.clone().requires_grad_()
    options = {"max_iter": 60, "max_eval": 100, "tolerance_grad": 1e-10, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS([live], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(live.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return live.detach().log_softmax(-1), float(loss(live.detach().log_softmax(-1)))


def test_descent_on_enumerated_responses_ends_at_the_closed_forms(
    world: ContextWorld, student: Tensor
) -> None:
    table = response_table(world)
    rows = torch.tensor([[ROW[y[:t]] for t in range(HORIZON)] for y in RESPONSES])
    tokens = torch.tensor(RESPONSES)

    def reverse(logp: Tensor) -> Tensor:
        own = logp[rows, tokens].sum(1)
        return (own.exp() * (own - world.prior @ table.log())).sum()

    def forward(logp: Tensor) -> Tensor:
        joint = world.prior[:, None] * table
        return (joint * (table.log() - logp[rows, tokens].sum(1))).sum()

    sequence, costs = contexts.geometric_student(world, 1.0)
    joint = contexts.joint_on_teacher_prefixes(world)
    marginal = contexts.arithmetic_student(world, contexts.context_weights(joint))
    information = contexts.conditional_information(world, joint)
    for loss, best, remaining in (
        (reverse, sequence, costs[0]),
        (forward, marginal, information),
    ):
        logp, least = minimize(loss, student)
        assert least == pytest.approx(float(remaining), abs=1e-12)
        torch.testing.assert_close(logp, best, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["full_reverse_kl", *REVERSE, *FORWARD])
def test_descent_on_the_trainers_objectives_ends_at_the_mixtures(
    world: ContextWorld, student: Tensor, name: str
) -> None:
    mixture = (world.prior[:, None, None] * world.teacher_logp.exp()).sum(0).log()
    product = torch.einsum("c,csa->sa", world.prior, world.teacher_logp).log_softmax(-1)
    best, other = (mixture, product) if name in FORWARD else (product, mixture)
    assert (best - other).abs().max() > 0.1
    torch.testing.assert_close(descended_student(world, best, name, 1), best, atol=1e-12, rtol=0)
    if name.startswith("full"):
        rest = descended_student(world, student, name, 100)
        torch.testing.assert_close(rest, best, atol=1e-3, rtol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_descent_on_the_gamma_family_ends_at_its_own_mixture(
    world: ContextWorld, student: Tensor, gamma: float
) -> None:
    best, value = contexts.geometric_student(world, gamma)
    assert contexts.sequence_gradient(world, best, gamma).abs().max() < 1e-14
    assert contexts.sequence_gradient(world, best, 0.7).abs().max() > 1e-4
    current = student
    for _ in range(50):  # the natural gradient: divided by visits and by probabilities
        visits = contexts.prefix_probabilities(world, current)[:, None]
        gradient = contexts.sequence_gradient(world, current, gamma)
        current = (current - 0.5 * gradient / visits / current.exp()).log_softmax(-1)
    torch.testing.assert_close(current, best, atol=1e-6, rtol=0)
    # the value is the discounted cost to go of that student, summed over its responses
    to_go = torch.zeros((), dtype=torch.float64)
    for y in RESPONSES:
        cost = [
            best[ROW[y[:t]], y[t]] - world.prior @ world.teacher_logp[:, ROW[y[:t]], y[t]]
            for t in range(HORIZON)
        ]
        to_go = to_go + probability(best, y) * sum(gamma**t * x for t, x in enumerate(cost))
    assert float(value[0]) == pytest.approx(float(to_go), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "gamma"),
    [
        *(("plain", 0.0), ("plain", 0.5), ("rb_all", 1.0), ("full_forward_kl", 0.0)),
        *(("k3", 0.0), ("teacher_topk", 0.0), ("student_topk_bucket", 0.0)),
    ],
)
def test_moments_are_those_of_enumerated_contexts_and_responses(
    world: ContextWorld, student: Tensor, name: str, gamma: float
) -> None:
    k = 2 if "topk" in name else 1
    mdp = token_tree(ACTIONS, HORIZON)
    paths = by_hand.enumerate_paths(mdp)
    samples = torch.stack(
        [
            by_hand.path_estimates(mdp, paths, student, teacher, name, gamma, k)
            for teacher in world.teacher_logp
        ]
    )
    weight = world.prior[:, None] * by_hand.probability(paths, student)
    mean, variance = by_hand.moments(weight.flatten(), samples.flatten(0, 1))
    own_means = (by_hand.probability(paths, student)[:, None, None] * samples).sum(1)
    between = world.prior @ (own_means - mean).square().sum((1, 2))
    actual = contexts.context_moments(world, student, name, gamma, k if "topk" in name else None)
    torch.testing.assert_close(actual[0], mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(actual[2], between, atol=1e-12, rtol=0)
    torch.testing.assert_close(actual[1] + actual[2], variance, atol=1e-11, rtol=0)
    assert float(between) > 1e-3


def test_a_context_that_is_known_or_without_effect_leaves_nothing(world: ContextWorld) -> None:
    known = replace(world, prior=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    blind = random_contexts(3, ACTIONS, HORIZON, seeded(5), strength=0.0)
    for special, teacher in ((known, known.teacher_logp[1]), (blind, blind.teacher_logp[0])):
        for joint in (
            contexts.joint_on_teacher_prefixes(special),
            contexts.joint_on_student_prefixes(special, teacher),
        ):
            assert float(contexts.conditional_information(special, joint)) == pytest.approx(
                0, abs=1e-14
            )
        for gamma in (0.0, 1.0):
            best, value = contexts.geometric_student(special, gamma)
            torch.testing.assert_close(best, teacher, atol=1e-14, rtol=0)
            assert value.abs().max() < 1e-14
        within, between = contexts.context_moments(special, teacher, "plain", 1.0)[1:]
        assert max(float(within), float(between)) < 1e-25


def test_wrong_worlds_name_the_value() -> None:
    world = random_contexts(2, 2, 2, seeded(0))
    for change, message in (
        ({"horizon": 3}, "has 3 prefixes, expected 7"),
        ({"prior": torch.ones(3).double() / 3}, r"expected \(2,\)"),
        ({"prior": torch.ones(2).double()}, r"with sum 2\.0"),
        ({"prior": torch.tensor([1.5, -0.5]).double()}, "expected a distribution"),
    ):
        with pytest.raises(InvalidInput, match=message):
            replace(world, **change)
    for arguments, message in (
        ((1, 2, 2), "num_contexts is 1"),
        ((2, 1, 2), "num_actions is 1"),
        ((2, 2, 0), "horizon is 0"),
    ):
        with pytest.raises(InvalidInput, match=message):
            random_contexts(*arguments, seeded(0))
    with pytest.raises(InvalidInput, match="strength is nan"):
        random_contexts(2, 2, 2, seeded(0), strength=math.nan)
    with pytest.raises(InvalidInput, match="gamma is 2"):
        contexts.sequence_gradient(world, world.teacher_logp[0], 2.0)
