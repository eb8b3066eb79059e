"""Compare the effect of one step with enumerated paths, finite differences and actual steps."""

import numpy as np
import pandas as pd
import pytest
import torch

from synthetic.analysis.tradeoff import best_improvement
from synthetic.analysis.tradeoff import improvement as predicted
from synthetic.exact import curvature, moments
from synthetic.experiments import improvement
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import pair, seeded, worlds

GAMMAS = (0.0, 0.5, 1.0)
NAMES = ("plain", "rb_all")


def enumerated(
    mdp: TabularMDP, student: torch.Tensor, teacher: torch.Tensor, name: str, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N,) probabilities of the paths and (N, D) their estimates."""
    paths = by_hand.enumerate_paths(mdp)
    sample = by_hand.path_estimates(mdp, paths, student, teacher, name, gamma)
    return by_hand.probability(paths, student), sample.flatten(1)


def test_the_hessian_is_that_of_finite_differences_of_the_exact_gradient() -> None:
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    hessian, eps = curvature.hessian(mdp, student, teacher), 1e-5
    for i in range(student.numel()):
        offset = torch.zeros(student.numel(), dtype=torch.float64)
        offset[i] = eps
        ends = [
            moments.expected_gradient(mdp, student + sign * offset.view_as(student), teacher, 1.0)
            for sign in (1, -1)
        ]
        column = (ends[0] - ends[1]).flatten() / (2 * eps)
        torch.testing.assert_close(hessian[i], column, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("name", ["ending", "tokens"])
def test_slope_curvature_and_noise_equal_the_sum_over_all_paths(name: str) -> None:
    mdp = worlds()[name]
    student, teacher = pair(mdp)
    teacher = -2 * teacher  # far away, where J also curves down
    hessian = curvature.hessian(mdp, student, teacher)
    assert bool((torch.linalg.eigvalsh(hessian) < -1e-3).any())  # both signs occur
    downhill = moments.expected_gradient(mdp, student, teacher, 1.0).flatten()
    effect = curvature.step_effect(mdp, student, teacher, NAMES, GAMMAS)
    for i, estimator in enumerate(NAMES):
        for j, gamma in enumerate(GAMMAS):
            weight, sample = enumerated(mdp, student, teacher, estimator, gamma)
            mean = weight @ sample
            deviation = sample - mean
            noise = (weight * ((deviation @ hessian) * deviation).sum(1)).sum()
            actual = [x[i, j] for x in vars(effect).values()]
            expected = [mean @ downhill, mean @ hessian @ mean, noise]
            torch.testing.assert_close(
                torch.stack(actual), torch.stack(expected), rtol=1e-8, atol=1e-10
            )


def test_the_prediction_is_right_to_third_order_in_the_step_size() -> None:
    """Take a step for each trajectory: halving the step size divides the error by 8."""
    mdp = worlds()["ending"]
    student, teacher = pair(mdp)
    effect = curvature.step_effect(mdp, student, teacher, ["plain"], [0.5])
    parts = [float(x[0, 0]) for x in vars(effect).values()]
    weight, sample = enumerated(mdp, student, teacher, "plain", 0.5)
    start = moments.sequence_kl(mdp, student, teacher).total
    errors = []
    for rate in (4e-3, 2e-3):
        kl_after_step = [
            moments.sequence_kl(mdp, student - rate * g.view_as(student), teacher).total
            for g in sample
        ]
        gain = float(start - weight @ torch.stack(kl_after_step))
        errors.append(abs(gain - float(predicted(*parts, n=1, rate=rate))))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)


def test_the_best_step_size_is_best() -> None:
    parts = (np.array([2.0]), np.array([1.0]), np.array([12.0]))
    rate = 2.0 / (1 + 12 / 4)
    best = float(best_improvement(*parts, n=4)[0])
    assert best == pytest.approx(float(predicted(*parts, n=4, rate=rate)[0])) == 0.5
    assert all(float(predicted(*parts, n=4, rate=rate * x)[0]) < best for x in (0.9, 1.1))
    assert np.isinf(best_improvement(np.ones(1), -np.ones(1), np.zeros(1), n=1)[0])


def test_worlds_without_a_best_step_are_counted_and_left_out() -> None:
    rows = pd.DataFrame(
        {"seed": s, "distance": 0.7, "estimator": "plain", "gamma": g}
        | {"slope": 1.0, "curvature": c, "noise": v}
        for s, bends in ((0, (1.0, 2.0)), (1, (4.0, 2.0)), (2, (-1.0, 2.0)))
        for g, c, v in zip((0.0, 1.0), bends, (0.0, 2.0), strict=True)
    )
    table = improvement.summarize(rows).set_index("quantity")
    assert float(table.loc["unbounded", "value"]) == pytest.approx(1 / 3)
    assert float(table.loc["never", "value"]) == 0.5
    shares = table.loc["share"].query("n == 1").set_index("gamma")["value"]
    assert [float(shares[g]) for g in (0.0, 1.0)] == [np.median([2.0, 0.5]), 0.5]


def test_a_negligible_bias_leaves_gamma_0_ahead() -> None:
    """With independent next states, future costs do not depend on the token: no bias."""
    mdp = random_chain(3, 3, 8, seeded(1), mixing=1.0)
    independent = TabularMDP(mdp.start.expand(3, 3, 3), mdp.start, 8)
    effect = curvature.step_effect(
        independent, *random_pair(independent, seeded(2), 0.5, 0.5), ["plain"], GAMMAS
    )
    torch.testing.assert_close(effect.slope[0, 0], effect.slope[0, 2])
    assert float(effect.noise[0, 0]) < float(effect.noise[0, 2])
