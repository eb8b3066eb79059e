"""Compare the horizon experiment with closed forms, and its summary with constructed rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from synthetic.experiments import horizon
from synthetic.worlds import worst_case
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair
from tests.helpers.worlds import seeded

STUDENT = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64).log()


def test_the_fit_finds_the_polynomial_of_one_state() -> None:
    """Independent steps: Var = sum_k E[|s|^2 (r + R_k)^2] - T |E[s r]|^2, R_k a sum of k costs.

    With sum k^2 = T^3/3 - T^2/2 + ..., sum k = T^2/2 - ..., the coefficient of T^2 is
    s2 Var(r)/2, which is predicted, and kappa (E[|s|^2 r] - kappa s2/2), which is not.
    """
    p, r = STUDENT[0].exp(), (STUDENT - TEACHER)[0]
    norm2 = (torch.eye(3) - p).square().sum(-1)
    kappa, score2 = float(p @ r), float(p @ norm2)
    spread = float(p @ (r - kappa) ** 2)
    left_out = kappa * (float(p @ (norm2 * r)) - kappa * score2 / 2)
    assert abs(left_out) > 0.1 * score2 * spread / 2, "the world must distinguish the two terms"
    mdp = TabularMDP(torch.ones(1, 3, 1), torch.ones(1), 512)
    coefficients = horizon.coefficients(mdp, STUDENT, TEACHER)
    assert coefficients["cost"] == pytest.approx(kappa, rel=1e-12)
    assert coefficients["cubic_ratio"] == pytest.approx(1, rel=1e-9)
    assert coefficients["square_ratio"] == pytest.approx(
        1 + left_out / (score2 * spread / 2), rel=1e-6
    )
    assert coefficients["crossover_times_cost"] == pytest.approx(1.5 * spread / kappa, rel=1e-12)


def cost_moments(mdp: TabularMDP, student: Tensor, teacher: Tensor, steps: int) -> np.ndarray:
    """Return mean and variance (2,) of the cost of `steps` tokens, by forward recursion."""
    p, r = student.softmax(-1), student.log_softmax(-1) - teacher.log_softmax(-1)
    occupancy, first, second = mdp.start, torch.zeros_like(mdp.start), torch.zeros_like(mdp.start)
    for _ in range(steps):
        moments = [occupancy[:, None], first[:, None] + occupancy[:, None] * r]
        moments.append(second[:, None] + 2 * first[:, None] * r + occupancy[:, None] * r**2)
        occupancy, first, second = (
            torch.einsum("ca,cad->d", p * x, mdp.transition) for x in moments
        )
    mean = float(first.sum())
    return np.array([mean, float(second.sum()) - mean**2])


def test_cost_and_error_are_the_growth_of_the_sum_of_costs() -> None:
    """kappa is the growth of E[sum r] per step, and E[delta^2] that of Var(sum r)."""
    for seed in range(3):
        mdp = random_chain(4, 3, 256, seeded(seed))
        student, teacher = random_pair(mdp, seeded(10 + seed), 1.0, 0.5)
        growth = cost_moments(mdp, student, teacher, 201) - cost_moments(mdp, student, teacher, 200)
        coefficients = horizon.coefficients(mdp, student, teacher)
        assert coefficients["cost"] == pytest.approx(growth[0], rel=1e-9)
        assert coefficients["crossover_times_cost"] == pytest.approx(
            1.5 * growth[1] / growth[0], rel=1e-7
        )
        assert coefficients["cubic_ratio"] == pytest.approx(1, rel=1e-4)


def test_the_square_is_as_predicted_near_the_teacher() -> None:
    """The neglected term has an additional factor of kappa compared with E[delta^2]."""
    mdp = random_chain(4, 3, 512, seeded(0))
    student, offset = random_pair(mdp, seeded(1), 1.0)
    errors = []
    for distance in (0.2, 0.1):
        teacher = student + distance * (offset - student)
        errors.append(abs(horizon.coefficients(mdp, student, teacher)["square_ratio"] - 1))
    assert errors[1] < 0.6 * errors[0] < 0.06


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
def test_the_tight_bound_counts_every_age_of_a_score(gamma: float) -> None:
    mdp, student, teacher = worst_case.constant_cost(6, cost=0.7, rare_probability=1e-3)
    p, r = student.exp()[0], (student - teacher)[0]
    unit = float(r.abs().max() ** 2 * (torch.eye(3) - p).square().sum(-1).max())
    tight, published = worst_case.bounds(mdp, student, teacher, gamma)
    age_factor = sum(gamma ** (2 * j) for u in range(1, 7) for j in range(u)) / 6
    limit = 3.5 if gamma == 1 else min(3.5, 1 / (1 - gamma**2))
    assert tight == pytest.approx(unit * 36 * limit)
    assert age_factor <= limit + 1e-12
    assert published == pytest.approx(unit * 6**4)


def made_by_hand(seed: int) -> list[dict[str, object]]:
    """Build a world with variance (seed + 1) T^3 at gamma = 1 and (seed + 1) T at gamma = 0."""
    labels = {"seed": seed, "world": "mixing", "distance": 1.0}
    rows: list[dict[str, object]] = []
    for t in (4, 8, 16):
        for gamma, power in ((0.0, 1), (1.0, 3)):
            variance = float((seed + 1) * t**power)
            rows.append({**labels, "estimator": "plain", "gamma": gamma, "horizon": t})
            rows[-1]["variance"] = variance
        bound = {"tight": 10.0 * t**3, "published": 10.0 * t**4, "attained": 1 / 3 + 1 / t}
        rows.append({**labels, "horizon": t, **bound})
    names = ("cubic_ratio", "square_ratio", "crossover_times_cost", "cost")
    for distance in (1.0, 0.3):
        values = {name: distance * (seed + i) for i, name in enumerate(names)}
        rows.append({**labels, "distance": distance, **values})
    return rows


def test_the_summary_is_what_rows_made_by_hand_say() -> None:
    rows = pd.DataFrame([row for seed in (0, 1, 2) for row in made_by_hand(seed)])
    table = horizon.summarize(rows)

    def value(quantity: str, **selection: object) -> float:
        selected = table[table["quantity"] == quantity]
        for column, x in selection.items():
            selected = selected[selected[column] == x]
        assert len(selected) == 1
        assert selected["worlds"].iloc[0] == 3
        return float(selected["value"].iloc[0])

    assert value("variance", gamma=1.0, horizon=8) == 2 * 8**3
    assert value("variance", gamma=0.0, horizon=16) == 2 * 16
    assert value("slope", gamma=1.0, horizon=8) == pytest.approx(3)
    assert value("last_slope", gamma=0.0) == pytest.approx(1)
    assert value("last_slope", gamma=1.0) == pytest.approx(3)
    assert value("tight", horizon=4) == 640
    assert value("published", horizon=4) == 2560
    assert value("attained") == pytest.approx(1 / 3 + 1 / 16)
    assert value("cubic_ratio", distance=1.0) == 1
    assert value("square_ratio", distance=0.3) == pytest.approx(0.6)
    assert value("crossover_times_cost", distance=1.0) == 3
