"""The study of prefix sources: moments against enumerated responses, the path against descent."""

import pandas as pd
import pytest
import torch
from torch import Tensor

from synthetic.exact.moments import sequence_kl
from synthetic.experiments.prefix_sources import (
    MIXED,
    all_moments,
    moved_student,
    prefix_exponents,
    source_rows,
    stated_gradients,
)
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import pair, seeded, worlds

MDP = worlds()["chain"]
START, TEACHER = pair(MDP)
STUDENT = moved_student(START, TEACHER, 0.4)
DATASET = START + torch.randn(START.shape, generator=seeded(8), dtype=torch.float64)
WRITERS = {"teacher": TEACHER, "dataset": DATASET, "replay": START}
PATHS = by_hand.enumerate_paths(MDP)


def path_gradients(loss: str, gamma: float, ratio: str) -> Tensor:
    """Return (N, S, A) the gradient of one loss on every path, from its definition."""
    score = by_hand.scores(PATHS, STUDENT)
    if loss == "sft":
        return -score.sum(1)
    p, q = STUDENT.softmax(-1), TEACHER.softmax(-1)
    if loss in ("reverse_kl", "forward_kl"):
        cost = (p / q).log()
        local = {
            "reverse_kl": p * (cost - (p * cost).sum(-1, keepdim=True)),
            "forward_kl": p - q,
        }[loss]
        visit = torch.nn.functional.one_hot(PATHS.states, MDP.num_states).to(p.dtype)
        return visit.sum(1)[..., None] * local
    own = by_hand.logp(PATHS, STUDENT)
    credit = by_hand.costs_to_go(own - by_hand.logp(PATHS, TEACHER), gamma)
    moved = (own - by_hand.logp(PATHS, START)).exp()
    weight = {
        "none": torch.ones_like(moved),
        "token": moved,
        "sequence": moved.prod(1, keepdim=True).expand_as(moved),
    }[ratio]
    return torch.einsum("nt,ntsa->nsa", weight * credit, score)


@pytest.fixture(scope="module")
def computed() -> dict:
    return all_moments(MDP, STUDENT, TEACHER, WRITERS)


def test_every_source_has_the_moments_of_enumerated_responses(computed: dict) -> None:
    sources = {"student": STUDENT, **WRITERS}
    num_compared = 0
    for (source, loss, gamma, ratio), moments in computed.items():
        if source == "mixed":
            continue
        weight = by_hand.probability(PATHS, sources[source])
        mean, variance = by_hand.moments(weight, path_gradients(loss, gamma, ratio))
        torch.testing.assert_close(moments[0], mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(moments[1], variance, atol=1e-10, rtol=1e-10)
        num_compared += 1
    assert num_compared == len(computed) - 2 == 16


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
def test_a_source_drawn_per_response_mixes_biases_and_adds_variance(
    computed: dict, loss: str
) -> None:
    samples = path_gradients(loss, 0.0, "none").repeat(2, 1, 1)
    weight = torch.cat(
        [
            (1 - MIXED) * by_hand.probability(PATHS, STUDENT),
            MIXED * by_hand.probability(PATHS, TEACHER),
        ]
    )
    mean, variance = by_hand.moments(weight, samples)
    actual = computed["mixed", loss, 0.0, "none"]
    torch.testing.assert_close(actual[0], mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(actual[1], variance, atol=1e-11, rtol=0)


def test_the_stated_gradients_are_those_of_enumerated_divergences() -> None:
    live = STUDENT.clone().requires_grad_()
    own, target = by_hand.logp(PATHS, live).sum(1), by_hand.logp(PATHS, TEACHER).sum(1)
    on_teacher = by_hand.probability(PATHS, TEACHER)
    p, q = live.log_softmax(-1), TEACHER.log_softmax(-1)
    forward = (q.exp() * (q - p)).sum(-1)[PATHS.states].sum(1)
    losses = {
        ("sampled_token", 1.0): by_hand.sequence_kl(PATHS, live, TEACHER),
        ("sampled_token", 0.0): by_hand.frozen_kl(PATHS, live, TEACHER),
        ("reverse_kl", 0.0): by_hand.frozen_kl(PATHS, live, TEACHER),
        ("forward_kl", 0.0): (by_hand.probability(PATHS, STUDENT) * forward).sum(),
        ("sft", 0.0): (on_teacher * (target - own)).sum(),
    }
    stated = stated_gradients(MDP, STUDENT, TEACHER)
    assert stated.keys() == losses.keys()
    for key, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, live, retain_graph=True)
        torch.testing.assert_close(stated[key], gradient, atol=1e-12, rtol=0)


def test_what_is_unbiased_and_what_is_not() -> None:
    rows = {
        (r["source"], r["loss"], r["gamma"], r["ratio"]): r
        for r in source_rows(MDP, STUDENT, TEACHER, WRITERS)
    }
    unbiased = {key for key, row in rows.items() if row["bias"] < 1e-12}
    assert unbiased == {
        ("student", "sampled_token", 1.0, "none"),
        ("replay", "sampled_token", 1.0, "sequence"),
    }
    as_stated = {key for key, row in rows.items() if row["bias_stated"] < 1e-12}
    assert as_stated == {
        *unbiased,
        *(key for key in rows if key[0] == "student"),
        ("replay", "sampled_token", 0.0, "sequence"),
        ("teacher", "sft", 0.0, "none"),
    }
    for loss in ("reverse_kl", "forward_kl"):
        halved = rows["mixed", loss, 0.0, "none"]["bias_stated"]
        assert halved == pytest.approx(MIXED * rows["teacher", loss, 0.0, "none"]["bias_stated"])
    # the token ratio corrects the token: what remains are the prefixes of the writer
    token = rows["replay", "sampled_token", 0.0, "token"]
    weight = by_hand.probability(PATHS, START)
    on_replay = (weight[:, None, None] * path_gradients("reverse_kl", 0.0, "none")).sum(0)
    target = stated_gradients(MDP, STUDENT, TEACHER)["reverse_kl", 0.0]
    expected = float((on_replay - target).norm() / target.norm())
    assert token["bias_stated"] == pytest.approx(expected, abs=1e-12)
    assert expected > 1e-3


def test_distances_ratios_and_the_batch_size_of_equal_errors() -> None:
    rows = {
        (r["source"], r["loss"], r["gamma"], r["ratio"]): r
        for r in source_rows(MDP, STUDENT, TEACHER, WRITERS)
    }
    by_response = rows["replay", "sampled_token", 1.0, "sequence"]
    by_token = rows["replay", "sampled_token", 1.0, "token"]
    on_policy = rows["student", "sampled_token", 1.0, "none"]
    expected = float(by_hand.sequence_kl(PATHS, STUDENT, START))
    assert by_response["kl_source"] == pytest.approx(expected)
    assert on_policy["kl_teacher"] == pytest.approx(float(sequence_kl(MDP, STUDENT, TEACHER).total))
    assert by_response["variance_ratio"] == pytest.approx(
        by_response["variance"] / on_policy["variance"]
    )
    n = by_response["ratio_batch"]
    errors = [row["bias"] ** 2 + row["variance"] / n for row in (by_response, by_token)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)


@pytest.mark.parametrize("writer", WRITERS)
def test_the_bias_of_prefixes_is_bounded_by_the_root_of_the_kl(writer: str) -> None:
    """Pinsker: |E_b G - E_p G| <= 2 TV max |G| <= sqrt(2 KL(p || b)) max |G| of a response."""
    gradients = path_gradients("reverse_kl", 0.0, "none")
    largest = gradients.flatten(1).norm(dim=1).max()
    means = [
        (by_hand.probability(PATHS, x)[:, None, None] * gradients).sum(0)
        for x in (STUDENT, WRITERS[writer])
    ]
    distance = by_hand.sequence_kl(PATHS, STUDENT, WRITERS[writer])
    assert 0 < (means[0] - means[1]).norm() <= largest * (2 * distance).sqrt()


def test_the_exponent_is_that_of_neighbouring_points() -> None:
    table = {"seed": 0, "horizon": 4, "loss": "reverse_kl", "gamma": 0.0, "ratio": "none"}
    rows = pd.DataFrame(
        [
            table | {"source": source, "moved": x, "kl_source": kl, "bias_stated": 3 * kl**power}
            for source, power in (("teacher", 0.5), ("dataset", 0.7))
            for x, kl in ((0.0, 4.0), (0.5, 1.0), (0.9, 0.1))
        ]
    )
    exponents = prefix_exponents(rows)
    assert exponents["moved"].tolist() == [0.5, 0.9]
    assert exponents["exponent"].tolist() == pytest.approx([0.5, 0.5])
    assert set(exponents["source"]) == {"teacher"}


def test_the_path_is_that_of_natural_gradient_descent_on_the_local_kl() -> None:
    """Integrate d log p/dt = -(log p/q - KL), the inverse Fisher matrix times the gradient."""
    q, logp, steps = TEACHER.log_softmax(-1), START.log_softmax(-1), 4000
    p = logp[0].exp()
    cost = logp[0] - q[0]
    gradient = p * (cost - p @ cost)
    fisher = torch.diag(p) - torch.outer(p, p)
    natural = torch.linalg.pinv(fisher) @ gradient
    torch.testing.assert_close(natural, cost - cost.mean(), atol=1e-10, rtol=0)
    time = 0.9
    for _ in range(steps):
        logp = (logp - time / steps * (logp - q)).log_softmax(-1)
    moved = 1 - torch.exp(torch.tensor(-time, dtype=torch.float64))
    torch.testing.assert_close(moved_student(START, TEACHER, float(moved)), logp, atol=1e-3, rtol=0)
    assert torch.equal(moved_student(START, TEACHER, 0.0), START.log_softmax(-1).log_softmax(-1))
