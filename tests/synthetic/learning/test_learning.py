"""Compare the training of capacity-limited students with exact moments and hand calculation."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Tensor

from opd.objectives import factory
from synthetic.exact import moments
from synthetic.experiments import learning
from synthetic.learning import descent, students
from synthetic.seeds import derive
from tests.helpers.worlds import seeded

BATCH, RUNS = 4, 4000


def small(seed: int = 0, hidden: int = 0) -> students.LearningProblem:
    return students.capacity_limited_problem((4, 3, 4), 2, hidden, 0.5, seeded(seed))


def rates(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- sampled gradients of many runs -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gamma", "baseline", "estimator", "k"),
    [
        ("sampled_token", 0.6, "none", "plain", None),
        ("sampled_token", 1.0, "leave_one_out", "leave_one_out", None),
        ("full_reverse_kl", 0.0, "none", "full_reverse_kl", None),
        ("teacher_topk", 0.0, "none", "teacher_topk", 2),
        ("teacher_topk_unnormalised", 0.0, "none", "teacher_topk_unnormalised", 2),
        ("teacher_topk_sampled_tail", 0.0, "none", "teacher_topk_sampled_tail", 2),
    ],
)
def test_a_runs_gradient_has_the_exact_mean_and_variance(
    name: str, gamma: float, baseline: str, estimator: str, k: int | None
) -> None:
    """Many runs of one student: their variance is that of a batch of its trajectories."""
    problem = small(hidden=2)
    parameters = problem.student.start(RUNS, seeded(1))
    objective = factory.make_objective(name, gamma=gamma, baseline=baseline, allow_collapse=True)
    gradients = descent.sampled_gradient(problem, parameters, objective, BATCH, seeded(2), k)
    mean, variance = moments.moments(
        problem.mdp,
        problem.student.logits(parameters[:1])[0],
        problem.teacher,
        estimator,
        gamma,
        k=k,
        group=BATCH if baseline == "leave_one_out" else None,
        jacobian=problem.student.jacobian(parameters[0]),
    )
    z = (gradients.mean(0) - mean) / (gradients.std(0) / RUNS**0.5)
    assert z.abs().max() < 4  # the largest of ten
    if baseline == "none":
        squared_deviation = (gradients - mean).square().sum(1) * BATCH
        assert abs(squared_deviation.mean() - variance) < 4 * squared_deviation.std() / RUNS**0.5


def test_a_run_does_not_notice_its_neighbours() -> None:
    """Other rates and starts do not change three steps of Adam with clipping."""
    problem, objective = (
        small(),
        factory.make_objective("sampled_token", gamma=1.0, baseline="leave_one_out"),
    )
    starts = torch.randn(3, problem.student.size, generator=seeded(3), dtype=torch.float64)

    def ends(begin: Tensor, step_sizes: Tensor) -> Tensor:
        step = descent.adam(step_sizes, problem.student.size)
        return descent.train(problem, begin, objective, step, 3, 5, 0.2, [3], seeded(4))[3]

    first = ends(starts, rates(0.1, 0.2, 0.3))
    second = ends(starts * rates(-1.0, 1.0, 2.0)[:, None], rates(0.7, 0.2, 0.01))
    torch.testing.assert_close(first[1], second[1], atol=1e-12, rtol=0)
    assert (first[[0, 2]] - second[[0, 2]]).norm(dim=1).min() > 0.1


def test_updates_of_adam_are_those_of_torch() -> None:
    step_sizes, generator = rates(0.1, 0.003), seeded(4)
    weights = [torch.zeros(5, dtype=torch.float64, requires_grad=True) for _ in step_sizes]
    optimizers = [
        torch.optim.Adam([w], lr=float(r)) for w, r in zip(weights, step_sizes, strict=True)
    ]
    step, total = descent.adam(step_sizes, 5), torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(4):
        gradient = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        total += step(gradient)
        for weight, optimizer, row in zip(weights, optimizers, gradient, strict=True):
            weight.grad = row.clone()
            optimizer.step()
    expected = torch.stack([weight.detach() for weight in weights])
    torch.testing.assert_close(total, expected, atol=1e-15, rtol=1e-14)


def test_a_marked_path_is_one_of_single_steps() -> None:
    problem, objective = (
        small(),
        factory.make_objective("full_reverse_kl", gamma=1.0, baseline="leave_one_out"),
    )
    begin, rate, clip = problem.student.start(2, seeded(5)), rates(0.5, 2.0), 0.3
    path = descent.train(
        problem, begin, objective, descent.sgd(rate), 3, 4, clip, [0, 2, 3], seeded(6), None
    )
    now, generator, steps = begin, seeded(6), [begin]
    for _ in range(3):
        gradient = descent.sampled_gradient(problem, now, objective, 4, generator)
        size = gradient.norm(dim=1, keepdim=True)
        now = now - rate[:, None] * torch.where(size > clip, gradient / size * clip, gradient)
        steps.append(now)
    assert sorted(path) == [0, 2, 3]
    for mark, parameters in path.items():
        torch.testing.assert_close(parameters, steps[mark], atol=1e-12, rtol=0)


# --- where training goes ------------------------------------------------------------------------


def at_its_teacher(problem: students.LearningProblem) -> tuple[students.LearningProblem, Tensor]:
    """Return the same problem with the starting student as its teacher."""
    begin = problem.student.start(2, seeded(7))
    return replace(problem, teacher=problem.student.logits(begin)[0]), begin


@pytest.mark.parametrize("name", learning.OBJECTIVES)
def test_only_the_unnormalised_support_leaves_its_teacher(name: str) -> None:
    problem, begin = at_its_teacher(small())
    kind, gamma, baseline = learning.OBJECTIVES[name]
    objective = factory.make_objective(kind, gamma=gamma, baseline=baseline, allow_collapse=True)
    k = 2 if "topk" in kind else None
    step = descent.sgd(rates(0.3, 1.0))
    end = descent.train(problem, begin, objective, step, 20, 8, math.inf, [20], seeded(8), k)[20]
    final_kl = students.evaluate_students(problem, end).sequence_kl
    if kind != "teacher_topk_unnormalised":
        torch.testing.assert_close(end, begin, atol=1e-12, rtol=0)
        assert final_kl.max() < 1e-12
        return
    assert final_kl.min() > 0.1
    ids = problem.teacher.topk(2, -1).indices
    mass = problem.student.logits(end).softmax(-1).gather(-1, ids.expand(2, -1, -1)).sum(-1)
    initial_mass = problem.teacher.softmax(-1).gather(-1, ids).sum(-1)
    assert (mass.mean(1) < initial_mass.mean() - 0.05).all()


@pytest.mark.parametrize(("gamma", "other_gamma"), [(0.0, 1.0), (1.0, 0.0)])
def test_exact_descent_of_each_level_ends_at_its_own_optimum(
    gamma: float, other_gamma: float
) -> None:
    """Use plain descent along the exact mean gradient, in place of L-BFGS."""
    problem = students.capacity_limited_problem((6, 4, 6), 2, 0, 0.1, seeded(9))
    start = problem.student.start(1, seeded(10))[0]
    token = students.token_optimum(problem, start)
    optima = {0.0: token, 1.0: students.sequence_optimum(problem, token[None])}
    parameters = token.clone()
    for _ in range(3000):
        logits = problem.student.logits(parameters[None])[0]
        field = moments.expected_gradient(problem.mdp, logits, problem.teacher, gamma)
        parameters = (
            parameters - 0.1 * torch.einsum("sa,sf->fa", field, problem.student.features).flatten()
        )
    assert students.evaluate_students(
        problem, parameters[None]
    ).sequence_kl.item() == pytest.approx(
        students.evaluate_students(problem, optima[gamma][None]).sequence_kl.item(), rel=1e-5
    )
    assert students.evaluate_students(problem, optima[0.0][None]).sequence_kl > (
        students.evaluate_students(problem, optima[1.0][None]).sequence_kl + 1e-3
    )


def test_a_run_whose_gradient_is_not_finite_stops_and_counts_as_diverged() -> None:
    problem, objective = small(), factory.make_objective("sampled_token", gamma=0.0)
    begin = problem.student.start(2, seeded(11))
    broken = begin.clone()
    broken[0] = 1e308
    step = descent.sgd(rates(0.1, 0.1))
    ends = [
        descent.train(problem, x, objective, step, 3, 4, math.inf, [3], seeded(12))[3]
        for x in (begin, broken)
    ]
    torch.testing.assert_close(ends[1][0], broken[0], atol=0, rtol=0)
    torch.testing.assert_close(ends[1][1], ends[0][1], atol=1e-12, rtol=0)
    now, first = (students.evaluate_students(problem, x).sequence_kl for x in (ends[1], begin))
    assert learning.diverged_share(now, first[:1]) == 0.5


def test_a_student_that_can_be_its_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="4 features and 0 hidden units distinguish all 4 states"):
        students.capacity_limited_problem((4, 3, 4), 4, 0, 0.5, seeded(0))
    with pytest.raises(ValueError, match="fewer than 4"):
        students.capacity_limited_problem((4, 3, 4), 2, 4, 0.5, seeded(0))


# --- the experiment -----------------------------------------------------------------------------


def test_tuning_takes_the_least_mean_and_never_a_run_that_broke() -> None:
    ends = rates(3.0, 5.0, 1.0, 4.0, 0.0, math.nan, 0.0, math.inf).view(4, 2)
    assert learning.best_rate((0.1, 0.2, 0.3, 0.4), ends) == 0.2  # means 4, 2.5, broken, broken


def test_diverged_counts_runs_above_twice_the_start() -> None:
    ends = rates(1.0, 5.9, 6.0, 6.1, math.inf, math.nan, 2.0, 3.0)
    assert learning.diverged_share(ends, rates(3.0)) == 3 / 8


def test_objectives_meet_in_one_world_and_none_beats_its_optimum() -> None:
    base = learning.SETTINGS["smoke"][0] | {"iterations": 30, "seeds": 3, "world": 5}
    assert (base["objective"], base["optimizer"], base["clip"]) == ("token", "sgd", "none")
    second_setting = base | {"objective": "sequence, mean costs", "optimizer": "adam"}
    rows = [learning.measure(x, derive("learning", x)) for x in (base, second_setting)]
    for metric in learning.METRICS:
        assert rows[0][0][metric] == rows[1][0][metric]
    assert rows[0][0]["student_kl"] == pytest.approx(rows[0][0]["sequence_kl"] / 4)
    optima = rows[0][-1]
    assert min(optima["optimum_ratio"], optima["basin_ratio"]) >= 1 - 1e-9
    for setting_rows in rows:
        curve = [row["sequence_kl"] for row in setting_rows if "sequence_kl" in row]
        assert len(curve) == 11
        assert optima["least_kl"] <= min(curve)
        assert curve[-1] - optima["least_kl"] < 0.5 * (curve[0] - optima["least_kl"])


def test_the_summary_compares_each_world_with_its_own_optimum() -> None:
    """Two constructed worlds: J 6 and 3 over optima 2 and 2; the median of two is their mean."""
    key = {"objective": "token", "optimizer": "sgd", "clip": "none"}
    rows = []
    for world, (end, worst, teacher, reward) in enumerate([(6, 8, 0.5, 0.1), (3, 3, 0.9, 0.4)]):
        for iteration, total in ((0, 10.0), (5, end)):
            row = {"sequence_kl": total, "student_kl": total / 4, "teacher_kl": teacher}
            row |= {"reward": reward, "worst_kl": worst, "diverged": 0.5 * world}
            row |= {"rate": 0.1, "at_edge": float(world), "iteration": iteration}
            rows.append({"seed": world, **key, **row})
        optima = {"least_kl": 2.0, "least_teacher_kl": 0.5, "best_reward": 1.0 + world}
        ratios = {"optimum_ratio": 1.5, "optimum_kl_ratio": 0.5, "basin_ratio": 1.0 + world}
        rows.append({"seed": world, **key, **optima, **ratios})
    table = learning.summarize(pd.DataFrame(rows))
    last = table[table["iteration"].isna() | (table["iteration"] == 5)].set_index("quantity")
    for quantity, value in (
        ("excess", (2 + 0.5) / 2),
        ("final", (2 + 0.5) / 2),
        ("worst", (3 + 0.5) / 2),
        ("teacher_excess", (0 + 0.8) / 2),
        ("reward_short", (0.9 + 1.6) / 2),
        ("diverged", 0.25),
        ("at_edge", 0.5),
        ("optimum_ratio", 1.5),
        ("optimum_kl_ratio", 0.5),
        ("basin_ratio", 1.5),
    ):
        assert last.loc[quantity, "value"] == pytest.approx(value), quantity
    assert (last.loc["excess", "low"], last.loc["excess", "high"]) == (0.5, 2.0)
