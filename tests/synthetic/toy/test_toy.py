"""Compare the published toy with scipy, torch.distributions and autograd calls per trajectory."""

import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

from synthetic.experiments import toy
from synthetic.toy import control, distillation
from synthetic.toy.control import HORIZON, STARTS, TARGETS, DistillationConfig, Networks

CONFIG = DistillationConfig(hidden=5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def networks(count: int, seed: int, floor: float = 0.3) -> Networks:
    initial = control.init_networks(count, 3, 5, floor, seeded(seed))
    noise = [
        0.3 * torch.randn(w.shape, generator=seeded(seed + 1)).double() for w in initial.weights
    ]
    return initial.updated(noise)


def noise(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, HORIZON, generator=seeded(seed), dtype=torch.float64)


def policy(weights: list[Tensor], task: int, position: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, with the network written out for one input."""
    x = torch.stack(
        [torch.tensor((-1.0, 1.0)[task]).double(), position / 4, position * 0 + step / 20]
    )
    for i, w in enumerate(weights):
        x = x @ w[:-1] + w[-1]
        x = x.tanh() if i < 2 else x
    return x[0], 0.3 + x[1].exp()


def by_hand(students: Networks, teacher: Networks, run: int, task: int, gamma: float, eps: Tensor):
    """Return (n,) gradients of every trajectory's loss for each weight, one autograd call each."""
    teacher_weights, gradients = [w[0] for w in teacher.weights], []
    for row in eps:
        live = [w[run].clone().requires_grad_() for w in students.weights]
        position, logps, costs = torch.tensor(STARTS[task]).double(), [], []
        for t in range(HORIZON):
            mean, sigma = policy(live, task, position, t)
            action = (mean + sigma * row[t]).detach()
            logps.append(torch.distributions.Normal(mean, sigma).log_prob(action))
            q = torch.distributions.Normal(*policy(teacher_weights, task, position, t)).log_prob(
                action
            )
            costs.append((logps[-1] - q).detach())
            position = position + action
        loss = sum(
            gamma ** (u - t) * costs[u] * logps[t]
            for t in range(HORIZON)
            for u in range(t, HORIZON)
        )
        gradients.append(torch.autograd.grad(loss, live))
    return [torch.stack(parts) for parts in zip(*gradients, strict=True)]


def test_densities_and_divergences_are_the_known_ones() -> None:
    x, mean, sigma = (torch.tensor(v).double() for v in (0.3, -1.2, 0.7))
    assert control.log_density(x, mean, sigma).item() == pytest.approx(
        stats.norm.logpdf(0.3, -1.2, 0.7)
    )
    p, q = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.5, 2.0)
    expected = torch.distributions.kl_divergence(p, q).item()
    divergence = control.gaussian_kl(mean, sigma, torch.tensor(0.5), torch.tensor(2.0))
    assert divergence.item() == pytest.approx(expected)


@pytest.mark.parametrize("task", [0, 1])
def test_gradients_are_those_of_a_loop_over_trajectories(task: int) -> None:
    students, teacher, eps = networks(2, 4), networks(1, 6), noise(16)
    gammas = (0.5, 1.0)
    result = distillation.gradient(students, teacher, task, gammas, eps, CONFIG)
    for run, gamma in enumerate(gammas):
        expected = by_hand(students, teacher, run, task, gamma, eps)
        for layer, want in zip(result.weights, expected, strict=True):
            torch.testing.assert_close(layer[run], want.mean(0), atol=1e-9, rtol=1e-9)
        micro = expected[-1].view(8, 2, *expected[-1].shape[1:]).mean(1)
        metric = (micro - micro.mean(0)).square().sum((1, 2)).mean()
        assert result.micro[run].item() == pytest.approx(metric.item())
    student = students.repeat(0, 1)
    single = distillation.trajectory_gradients(student, teacher, task, gammas, eps, CONFIG)
    for gamma, layers in zip(gammas, single, strict=True):
        want = by_hand(student, teacher, 0, task, gamma, eps)
        for layer, reference in zip(layers, want, strict=True):
            torch.testing.assert_close(layer, reference, atol=1e-9, rtol=1e-9)


def test_variance_and_squared_mean_are_unbiased_forms() -> None:
    g = torch.randn(6, 2, 3, generator=seeded(7), dtype=torch.float64)
    pairs = [(g[i] * g[j]).sum() for i in range(6) for j in range(6) if i != j]
    assert distillation.squared_mean(g).item() == pytest.approx(float(sum(pairs)) / 30)
    gaps = [(g[i] - g[j]).square().sum() / 2 for i in range(6) for j in range(6) if i != j]
    assert distillation.total_variance(g).item() == pytest.approx(float(sum(gaps)) / 30)


def test_positions_add_up_actions_from_the_right_start() -> None:
    students = networks(2, 8)
    for task in (0, 1):
        positions, actions = control.rollouts(students, task, noise(4), CONFIG)
        assert positions[..., 0].unique().tolist() == [STARTS[task]]
        torch.testing.assert_close(positions[..., 1:], STARTS[task] + actions.cumsum(-1))
        mean, sigma = policy([w[1] for w in students.weights], task, positions[1, 2, 5], 5)
        assert actions[1, 2, 5].item() == pytest.approx((mean + sigma * noise(4)[2, 5]).item())


def test_odd_iterations_are_of_the_left_task_and_divergence_stops_a_run() -> None:
    students = networks(2, 9)
    teachers = networks(1, 10), networks(1, 12)
    far = [torch.zeros_like(w) for w in teachers[1].weights]
    far[-1][0, -1, 0] = 1e6
    teachers = teachers[0], teachers[1].updated(far)  # no student can follow the right teacher
    config = DistillationConfig(hidden=5, sigma_floor=0.3)
    run = distillation.distill(
        students, teachers, (0.0, 1.0), 4, (0, 1, 2, 4), 8, config, seeded(13)
    )
    assert run.diverged.tolist() == [1, 1]
    assert run.metric[0].isfinite().all()
    assert run.metric[1:].isinf().all()
    for snapshot, final in zip(run.snapshots[1].weights, run.students.weights, strict=True):
        assert snapshot.equal(final)
    assert not run.snapshots[0].weights[0].equal(run.snapshots[1].weights[0])


def test_clipping_bounds_the_step_of_plain_descent() -> None:
    students, teacher = networks(2, 14), networks(1, 16)
    config = DistillationConfig(hidden=5, optimizer="sgd", rate=0.5, clip=1e-3)
    run = distillation.distill(
        students, (teacher, teacher), (0.0, 1.0), 1, (), 8, config, seeded(17)
    )
    updates = [b - a for a, b in zip(students.weights, run.students.weights, strict=True)]
    sizes = torch.stack([x.square().sum((1, 2)) for x in updates]).sum(0).sqrt()
    assert sizes.tolist() == pytest.approx([0.5e-3, 0.5e-3])


def test_teachers_reach_their_targets() -> None:
    config = DistillationConfig(teacher_iterations=150, hidden=32)
    for task, teacher in enumerate(control.train_teachers(config, seeded(18))):
        positions, _ = control.rollouts(teacher, task, noise(200), config)
        assert abs(positions[0, :, -1].mean().item() - TARGETS[task]) < 0.5


def test_rows_hold_both_metrics_and_count_every_visit() -> None:
    setting = toy.SETTINGS["smoke"][0]
    rows = pd.DataFrame(toy.measure(setting, seeded(19)))
    visits = rows[rows["kind"] == "visits"]
    per = visits.groupby(["task", "gamma", "step"])["visits"].sum()
    assert per.max() == setting["count"]
    assert per[:, :, 0].eq(setting["count"]).all()
    equal = rows[(rows["kind"] == "equal") & (rows["gamma"] == 1)]
    assert equal["bias2"].eq(0).all()
    assert (equal["output_variance"] < equal["variance"]).all()
    metric = rows[rows["kind"] == "metric"]
    assert sorted(metric["iteration"].unique()) == [0, 2, 4]
    assert len(metric) == 6 * 5


def test_shares_of_divergence_have_exact_intervals() -> None:
    final = pd.DataFrame({"variant": "default", "gamma": 1.0, "diverged": [1.0, 0.0, 0.0, 0.0]})
    row = toy._diverged(final).iloc[0]
    assert row["value"] == 0.25
    assert [row["low"], row["high"]] == pytest.approx(
        [stats.beta.ppf(0.025, 1, 4), stats.beta.ppf(0.975, 2, 3)]
    )
