"""Run every experiment on its smoke preset, and compare shared functions with hand calculation."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from opd.objectives import factory
from synthetic.analysis.summary import interval, slopes
from synthetic.analysis.tradeoff import crossover_batch_size, mse, optimal_gamma
from synthetic.exact import moments
from synthetic.exact.token_weights import (
    masked_moments,
    token_weights,
    top_share,
    weighted_quantiles,
)
from synthetic.experiments import batch_size, collapse, estimators, horizon, support
from synthetic.learning import descent, students
from synthetic.runner import run as study
from synthetic.sampling.free_logits import expected_gradients
from synthetic.sampling.trajectories import sample
from synthetic.worlds import drift_chain, worst_case
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import pair, seeded, worlds


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    out = tmp_path_factory.mktemp("study")
    names = [name for name in study.list_experiments() if name != "bias_variance"]
    return {name: study.run(name, "smoke", out=out) for name in names}


def value(table: pd.DataFrame, quantity: str, **selection: object) -> float:
    rows = table[table["quantity"] == quantity]
    for column, x in selection.items():
        rows = rows[rows[column] == x]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_every_smoke_preset_fills_its_headlines(summaries: dict[str, pd.DataFrame]) -> None:
    for name, table in summaries.items():
        lines = study.format_headlines(name, table)
        assert len(lines) == len(study.load_experiment(name).HEADLINES)
        assert not any("nan" in line for line in lines), name
        with_interval = table.dropna(subset=["low"])
        assert (with_interval["low"] <= with_interval["value"] + 1e-12).all(), name
        assert (with_interval["value"] <= with_interval["high"] + 1e-12).all(), name


def test_every_experiment_has_a_recorded_table_and_a_figure() -> None:
    for name in study.list_experiments():
        table, preset = study.load_recorded_table(name)
        assert preset in study.load_experiment(name).SETTINGS
        assert preset != "smoke"
        assert len(study.format_headlines(name, table)) == len(
            study.load_experiment(name).HEADLINES
        )
        assert list((Path(study.ROOT) / "figures").glob(f"*/{name}.py"))


def test_an_interval_is_of_whole_repetitions() -> None:
    rows = pd.DataFrame(
        {"seed": [0, 0, 1, 1], "k": [1, 2, 1, 2], "x": [1.0, 10.0, 3.0, 30.0], "n": [5, 5, 5, 5]}
    )
    table = interval(rows, "x", ["k", "absent"], np.mean)
    assert table["value"].tolist() == [2, 20]
    assert table["low"].tolist() == [1, 10]
    assert table["high"].tolist() == [3, 30]
    assert table["worlds"].tolist() == [2, 2]
    assert table["absent"].isna().all()
    with pytest.raises(ValueError, match="1 of 4 cells"):
        interval(rows.head(3), "x", ["k"])
    with pytest.raises(ValueError, match="duplicate"):
        interval(pd.concat([rows, rows]), "x", ["k"])


def test_slopes_are_local_exponents() -> None:
    rows = pd.DataFrame({"t": [1, 2, 4, 1, 2, 4], "g": [0, 0, 0, 1, 1, 1]})
    rows["y"] = [3.0, 6.0, 12.0, 1.0, 4.0, 32.0]
    assert slopes(rows, "y", "t", ["g"])["slope"].tolist() == pytest.approx([1, 1, 2, 3])


def test_errors_are_bias_plus_a_share_of_the_variance() -> None:
    gammas, bias2, variance = np.array([0.0, 0.5, 1.0]), np.array([4.0, 1.0, 0.0]), [1.0, 8.0, 64.0]
    assert mse(bias2, variance, 4).tolist() == [4.25, 3, 16]
    assert [optimal_gamma(gammas, bias2, variance, n) for n in (1, 2, 1000)] == [0, 0, 1]
    assert optimal_gamma(gammas, bias2, variance, 10) == 0.5
    assert crossover_batch_size(np.array(4.0), 1.0, 65.0) == 16
    assert crossover_batch_size(np.zeros(2), [1.0, 1.0], [2.0, 0.5]).tolist() == [math.inf, 0]


# --- worst case ---------------------------------------------------------------------------------


def test_constant_costs_attain_the_cubic_order() -> None:
    for t in (1, 2, 7, 64):
        _, variance = moments.moments(*worst_case.constant_cost(t, 0.7), "plain", 1.0)
        assert variance.item() == pytest.approx(worst_case.constant_cost_variance(t, 0.7), rel=1e-6)
        tight = 0.7**2 * 0.5 * t**2 * (t + 1) / 2
        assert 2 / 3 - 1e-6 <= variance.item() / tight <= 1 + 1e-6
    with pytest.raises(ValueError, match="cost is 0"):
        worst_case.constant_cost(3, 0.0)


@pytest.mark.parametrize("name", worlds())
def test_no_world_exceeds_the_bounds(name: str) -> None:
    mdp = worlds()[name]
    student, teacher = pair(mdp)
    for gamma in (0.0, 0.5, 0.9, 1.0):
        mean, variance = moments.moments(mdp, student, teacher, "plain", gamma)
        tight, published = worst_case.bounds(mdp, student, teacher, gamma)
        assert variance + mean.square().sum() <= tight <= published


def test_the_predicted_coefficients_are_those_of_one_state() -> None:
    """With one state: cubic term kappa^2 s2 / 3, square term as predicted up to E[r s]."""
    mdp, student, teacher = worst_case.constant_cost(512)
    coefficients = horizon.coefficients(mdp, student, teacher)
    assert coefficients["cubic_ratio"] == pytest.approx(1, rel=1e-6)
    assert coefficients["cost"] == pytest.approx(1, rel=1e-6)


# --- supports -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in factory.OBJECTIVES if "topk" in n])
def test_a_prefix_has_the_gradient_worked_out_by_hand(name: str) -> None:
    student, teacher = torch.randn(2, 5, 7, generator=seeded(1), dtype=torch.float64)
    for k in (1, 3):
        vectors = by_hand.local_vectors(name, student, teacher, k)
        expected = (student.softmax(-1)[..., None] * vectors).sum(1)
        gradient = expected_gradients(student, teacher, factory.OBJECTIVES[name], k)
        torch.testing.assert_close(gradient, expected, atol=1e-13, rtol=0)


def test_un_normalised_support_rests_at_a_share_of_one_over_e() -> None:
    """The gradient vanishes where p = q / e on S, for any p outside S."""
    teacher = torch.randn(4, 9, generator=seeded(2), dtype=torch.float64)
    ids = teacher.topk(3, -1).indices
    q, p = teacher.softmax(-1), torch.rand(4, 9, generator=seeded(3), dtype=torch.float64)
    inside = torch.zeros_like(q).scatter(-1, ids, 1.0)
    head = q * inside / math.e
    p = p * (1 - inside)
    p = head + p / p.sum(-1, keepdim=True) * (1 - head.sum(-1, keepdim=True))
    objective = factory.make_objective("teacher_topk_unnormalised", allow_collapse=True)
    assert expected_gradients(p.log(), teacher, objective, 3).abs().max() < 1e-15
    assert expected_gradients(teacher, teacher, objective, 3).norm() > 0.1
    for row, mass in zip(collapse.support_metrics(p.log(), teacher, 3), head.sum(-1), strict=True):
        assert row["mass"] == pytest.approx(mass.item())
        assert row["mass_over_fixed_point"] == pytest.approx(1)


def test_support_rows_are_means_over_prefixes() -> None:
    setting = support.SETTINGS["smoke"][0]
    rows = pd.DataFrame(support.measure(setting, seeded(4)))
    generator = seeded(4)
    shape = (setting["prefixes"], setting["actions"])
    student = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher = student + 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    vectors = by_hand.local_vectors("teacher_topk", student, teacher, 4)[:, 0]
    full = by_hand.local_vectors("full_reverse_kl", student, teacher)[:, 0]
    cosine = torch.nn.functional.cosine_similarity(vectors, full, dim=-1)
    inside = by_hand.support_mask(student, teacher, "teacher", 4)
    step = 1e-6
    masses = [((student - x * vectors).softmax(-1) * inside).sum(-1) for x in (step, -step)]
    drift_by_hand = (masses[0] - masses[1]) / (2 * step) / full.norm(dim=-1)
    unbinned = rows[(rows["bin"] < 0) & (rows["form"] == "renormalised") & (rows["k"] == 4)]
    teacher_row = unbinned[unbinned["source"] == "teacher"].iloc[0]
    assert teacher_row["cosine"] == pytest.approx(cosine.mean().item())
    assert teacher_row["drift"] == pytest.approx(drift_by_hand.mean().item(), abs=1e-8)
    binned = rows[(rows["bin"] >= 0) & (rows["form"] == "renormalised") & (rows["k"] == 4)]
    binned = binned[binned["source"] == "teacher"]
    assert binned["count"].sum() == setting["prefixes"]
    assert binned["cosine"].sum() == pytest.approx(cosine.sum().item())


def test_compared_knows_a_scaled_and_a_turned_gradient() -> None:
    truth = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    scaled = estimators.compare_to_gradient(2 * truth, torch.tensor(50.0), truth)
    assert scaled == pytest.approx({"bias": 1, "cosine": 1, "length_ratio": 2, "variance": 2})
    turned = estimators.compare_to_gradient(
        torch.tensor([[-4.0, 3.0]]).double(), torch.tensor(0.0), truth
    )
    assert turned["cosine"] == pytest.approx(0)
    assert turned["bias"] == pytest.approx(2**0.5)
    assert estimators.compare_to_gradient(0 * truth, torch.tensor(1.0), truth)["cosine"] == 0


def test_batch_sizes_of_two_worlds_made_by_hand() -> None:
    rows = pd.DataFrame(
        {"seed": s, "distance": 1.0, "estimator": "plain", "gamma": g, "bias2": b, "variance": v}
        for s in (0, 1)
        for g, b, v in ((0.0, 1.0, 1.0), (1.0, 0.0, 33.0))
    )
    table = batch_size.summarize(rows)
    assert value(table, "overtaking_batch") == 32
    assert [value(table, "best_gamma", n=n) for n in (1, 16, 64)] == [0, 0, 1]
    assert value(table, "gain", n=64) == pytest.approx((33 / 64) / (1 + 1 / 64))


# --- drift --------------------------------------------------------------------------------------


def chain(**overrides: float) -> drift_chain.DriftChain:
    return drift_chain.drift_chain(
        replace(drift_chain.DriftChainConfig(horizon=8, informed=2, ordinary=3), **overrides),
        seeded(5),
    )


def test_the_loop_fills_geometrically() -> None:
    """Check m' = (1 - m) enter + m stay, which holds for any ordinary tokens."""
    drifting = chain()
    mass, config = 0.0, drift_chain.DriftChainConfig()
    for occupancy in moments.sequence_kl(
        drifting.mdp, drifting.student, drifting.teacher
    ).occupancy[:, drifting.loop]:
        assert occupancy.item() == pytest.approx(mass, abs=1e-12)
        mass = (1 - mass) * config.enter + mass * config.stay
    p = drifting.student.softmax(-1)
    assert p[drifting.informed, drifting.special_token].tolist() == pytest.approx(
        [config.special] * 2
    )
    ratio = drifting.student.log_softmax(-1) - drifting.teacher.log_softmax(-1)
    assert ratio[drifting.loop, drifting.loop_token].item() == pytest.approx(0, abs=1e-12)
    assert ratio[0, drifting.special_token].item() == pytest.approx(20 + math.log(0.02))
    assert (
        chain(uninformed="copies")
        .teacher.softmax(-1)[drifting.uninformed, :3]
        .sub(p[drifting.uninformed, :3])
        .abs()
        .max()
        < 0.02
    )


def test_a_masked_token_is_as_if_its_terms_were_never_added() -> None:
    drifting = chain(horizon=3)
    paths = by_hand.enumerate_paths(drifting.mdp)
    weight = by_hand.probability(paths, drifting.student)
    unmasked = paths.tokens != drifting.special_token
    r = (by_hand.logp(paths, drifting.student) - by_hand.logp(paths, drifting.teacher)) * unmasked
    score = by_hand.scores(paths, drifting.student)
    for gamma in (0.0, 0.7):
        credit = by_hand.costs_to_go(r, gamma) * unmasked
        expected = by_hand.moments(weight, torch.einsum("nt,ntsa->nsa", credit, score))
        result = masked_moments(drifting, "plain", gamma, drifting.special_token)
        torch.testing.assert_close(result[0], expected[0], atol=1e-13, rtol=0)
        torch.testing.assert_close(result[1], expected[1], atol=1e-12, rtol=1e-9)


def test_weighted_quantiles_and_shares() -> None:
    weight, x = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([5.0, 1.0, 3.0])
    assert weighted_quantiles(weight, x, (0.1, 0.5, 0.76)) == [1, 3, 5]
    assert top_share(weight, x, 0.25) == pytest.approx(5 / 12)
    assert top_share(weight, x, 0.5) == pytest.approx(8 / 12)
    assert top_share(weight, x, 1.0) == pytest.approx(1)


def test_the_panel_sees_the_lopsided_signal(summaries: dict[str, pd.DataFrame]) -> None:
    drifting = chain(horizon=16)
    batch = sample(drifting.mdp, drifting.student, drifting.teacher, 4000, seeded(6)).batch
    weight, cost = token_weights(drifting)
    share = float((weight.sum(0) * (cost > 0)).sum() / weight.sum())
    positive_share = (batch.log_ratio > 0).double().mean(1)
    assert abs(positive_share.mean() - share) < 4 * positive_share.std() / 4000**0.5
    table = summaries["drift"]
    flat = {"uninformed": "flat", "enter": 0.02, "distance": 0.7, "stop": 0.0}
    assert value(table, "variance_factor", gamma=0.0, **flat) > 2
    assert value(table, "topk_tag_cosine", k=4, **flat) > 0.9


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 3])
def test_shared_parameters_have_the_gradient_of_the_enumerated_kl(hidden: int) -> None:
    problem = students.capacity_limited_problem((4, 3, 4), 2, hidden, 0.5, seeded(7))
    live = problem.student.start(1, seeded(8)).requires_grad_()
    logits = problem.student.logits(live)[0]
    total = by_hand.sequence_kl(by_hand.enumerate_paths(problem.mdp), logits, problem.teacher)
    (gradient,) = torch.autograd.grad(total, live)
    jacobian = problem.student.jacobian(live[0])
    mean, _ = moments.moments(
        problem.mdp, logits.detach(), problem.teacher, "rb_all_value", 1.0, jacobian=jacobian
    )
    torch.testing.assert_close(mean, gradient[0], atol=1e-12, rtol=0)
    metrics = students.evaluate_students(problem, live.detach())
    assert metrics.sequence_kl.item() == pytest.approx(total.item())
    visits = moments.sequence_kl(problem.mdp, logits.detach(), problem.teacher).occupancy.sum(0)
    assert metrics.reward.item() == pytest.approx((visits @ problem.reward).item() / 4)
    swapped = moments.sequence_kl(problem.mdp, problem.teacher, logits.detach()).occupancy.sum(0)
    local = moments.sequence_kl(problem.mdp, logits.detach(), problem.teacher).local
    assert metrics.teacher_kl.item() == pytest.approx((swapped @ local).item() / 4)


def test_both_optima_are_where_their_gradients_vanish() -> None:
    problem = students.capacity_limited_problem((6, 4, 6), 2, 0, 0.1, seeded(9))
    start = problem.student.start(2, seeded(10))
    token = students.token_optimum(problem, start[0])
    least = students.sequence_optimum(problem, torch.stack([start[0], token]))
    for parameters, gamma in ((token, 0.0), (least, 1.0)):
        logits = problem.student.logits(parameters[None])[0]
        field = moments.expected_gradient(problem.mdp, logits, problem.teacher, gamma)
        jacobian = problem.student.jacobian(parameters)
        assert torch.einsum("sa,sad->d", field, jacobian).norm() < 1e-4
    ends = students.evaluate_students(problem, torch.stack([least, token])).sequence_kl
    assert ends[0] < ends[1] - 1e-4


def test_runs_side_by_side_do_not_interact() -> None:
    problem = students.capacity_limited_problem((4, 3, 5), 2, 0, 0.5, seeded(11))
    parameters = torch.randn(3, problem.student.size, generator=seeded(12), dtype=torch.float64)
    objective = factory.make_objective("full_reverse_kl", gamma=1.0, baseline="leave_one_out")
    together = descent.sampled_gradient(problem, parameters, objective, 8, seeded(13))
    table = problem.student.logits(parameters).detach()
    trajectories = descent.sample_for_students(problem, table, 8, seeded(13))
    assert trajectories.batch.prompt.tolist() == [i for i in range(3) for _ in range(8)]
    local = trajectories.states - 4 * trajectories.batch.prompt[:, None]
    for run in range(3):
        live = parameters[run : run + 1].clone().requires_grad_()
        student_logp = problem.student.logits(live)[0].log_softmax(-1)
        teacher_logp = problem.teacher.log_softmax(-1)
        states, tokens = (
            local[8 * run : 8 * run + 8],
            trajectories.batch.tokens[8 * run : 8 * run + 8],
        )
        kl = (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)[states]
        later = by_hand.costs_to_go(kl.detach(), 1.0) - kl.detach()
        other_mean = (later.sum(0) - later) / 7
        logp = student_logp[states, tokens]
        loss = (kl + (later - other_mean) * logp).sum() / 8
        (want,) = torch.autograd.grad(loss, live)
        torch.testing.assert_close(together[run], want[0], atol=1e-12, rtol=0)


def test_adam_is_torchs_and_clipping_keeps_the_direction() -> None:
    live = torch.randn(2, 5, generator=seeded(14), dtype=torch.float64).requires_grad_()
    parameters, update = (
        live.detach().clone(),
        descent.adam(torch.full((2,), 0.1, dtype=torch.float64), 5),
    )
    torch_adam = torch.optim.Adam([live], lr=0.1)
    for step in range(4):
        live.grad = torch.randn(2, 5, generator=seeded(20 + step), dtype=torch.float64)
        parameters = parameters + update(live.grad.clone())
        torch_adam.step()
    torch.testing.assert_close(parameters, live.detach(), atol=1e-12, rtol=0)
    long = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(
        descent.clip_gradient(long, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]])
    )
    torch.testing.assert_close(
        descent.sgd(torch.tensor([2.0, 1.0]))(long)[0], torch.tensor([-6.0, -8.0])
    )
