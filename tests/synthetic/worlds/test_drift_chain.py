"""Compare the drift chain with finite differences, hand calculation and the sampled metrics."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diagnostics.monitor import Monitor
from opd.objectives import factory
from synthetic.exact import moments
from synthetic.exact.token_weights import masked_moments, token_weights, weighted_quantiles
from synthetic.experiments import drift as experiment
from synthetic.sampling.monte_carlo import trajectory_gradients
from synthetic.sampling.trajectories import Trajectories, sample
from synthetic.worlds.drift_chain import DriftChain, DriftChainConfig, drift_chain
from tests.helpers import mdp_enumeration as by_hand

COUNT = 4000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**overrides: float) -> DriftChain:
    return drift_chain(
        replace(DriftChainConfig(horizon=4, informed=1, ordinary=2), **overrides), seeded(0)
    )


UNTAGGED = {"teacher_special": DriftChainConfig().special}
"""The teacher gives the tag the student's probability, which isolates the loop."""


@pytest.fixture(scope="module")
def panel_sample() -> tuple[DriftChain, Trajectories, dict[str, float]]:
    """Return a long chain, its trajectories, and one row of metrics; a trajectory is a cluster."""
    chain = drift_chain(DriftChainConfig(horizon=64), seeded(1))
    trajectories = sample(chain.mdp, chain.student, chain.teacher, COUNT, seeded(2))
    batch = replace(trajectories.batch, prompt=torch.arange(COUNT))
    return chain, trajectories, Monitor()(0, [batch])


# --- the world ----------------------------------------------------------------------------------


@pytest.mark.parametrize("uninformed", ["flat", "copies"])
def test_the_uninformed_teacher_is_flat_or_copies(uninformed: str) -> None:
    """Calculate the local KL by hand: log-ratios of the loop token, the tag and ordinary tokens."""
    config = DriftChainConfig(uninformed=uninformed, **UNTAGGED)
    chain = drift_chain(config, seeded(7))
    divergence = moments.sequence_kl(chain.mdp, chain.student, chain.teacher)
    p = chain.student.softmax(-1)[chain.uninformed, : config.ordinary]
    ordinary_mass = 1 - config.enter - config.special
    teacher_ordinary_mass = 1 - config.teacher_enter - config.special
    entry = config.enter * math.log(config.enter / config.teacher_enter)
    flat = math.log(config.ordinary) + (p / ordinary_mass * (p / ordinary_mass).log()).sum(-1)
    want = entry + ordinary_mass * (
        math.log(ordinary_mass / teacher_ordinary_mass)
        + (torch.zeros_like(flat) if uninformed == "copies" else flat)
    )
    torch.testing.assert_close(divergence.local[chain.uninformed], want, atol=1e-12, rtol=0)


def test_an_excursion_to_the_uninformed_block_ends_only_through_the_loop() -> None:
    config = DriftChainConfig(drift=0.1, enter=0.05, stay=0.6)
    chain = drift_chain(config, seeded(8))
    divergence = moments.sequence_kl(chain.mdp, chain.student, chain.teacher)
    informed, uninformed, looping = 1.0, 0.0, 0.0
    for occupancy in divergence.occupancy:
        assert occupancy[chain.uninformed].sum().item() == pytest.approx(uninformed, abs=1e-12)
        assert occupancy[chain.loop].item() == pytest.approx(looping, abs=1e-12)
        onward = informed * (1 - config.enter)
        informed, uninformed, looping = (
            onward * (1 - config.drift) + looping * (1 - config.stay),
            onward * config.drift + uninformed * (1 - config.enter),
            (informed + uninformed) * config.enter + looping * config.stay,
        )


# --- entering the loop --------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_the_slope_of_entering_is_that_of_the_enumerated_cost(frozen: bool) -> None:
    """Use central differences in the loop token's logits of all informed states at once."""
    chain, step = small(), 1e-5
    paths = by_hand.enumerate_paths(chain.mdp)
    weight = by_hand.probability(paths, chain.student)

    def cost(shift: float) -> float:
        student = chain.student.clone()
        student[chain.informed, chain.loop_token] += shift
        if not frozen:
            return float(by_hand.sequence_kl(paths, student, chain.teacher))
        p, q = student.log_softmax(-1), chain.teacher.log_softmax(-1)
        return float(weight @ ((p.exp() * (p - q)).sum(-1)[paths.states] * paths.mask).sum(1))

    want = (cost(step) - cost(-step)) / (2 * step)
    gradient = moments.expected_gradient(
        chain.mdp, chain.student, chain.teacher, 0.0 if frozen else 1.0
    )
    actual = gradient[chain.informed, chain.loop_token].sum().item()
    assert actual == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_entering_is_worth_what_the_loop_saves(gamma: float) -> None:
    """One informed state and no drift: costs to go of two states follow a recursion.

    The slope is sum_t d_t p (A - mean of A), A = own cost + gamma times the cost to go after it.
    """
    chain = small(drift=0.0, horizon=6, **UNTAGGED)
    p, q = (x.log_softmax(-1) for x in (chain.student, chain.teacher))
    local = (p.exp() * (p - q)).sum(-1)
    enter, stay = (p[s, chain.loop_token].exp().item() for s in (0, chain.loop))
    entry = (p - q)[0, chain.loop_token].item()
    outside, inside = local[0].item(), local[chain.loop].item()
    informed_mass = [1.0]  # probability of the informed state by step
    for _ in range(5):
        informed_mass.append(informed_mass[-1] * (1 - enter) + (1 - informed_mass[-1]) * (1 - stay))
    to_go, slope = (0.0, 0.0), 0.0
    for share in reversed(informed_mass):
        outside_to_go, loop_to_go = to_go
        mean = outside + gamma * ((1 - enter) * outside_to_go + enter * loop_to_go)
        slope += share * enter * (entry + gamma * loop_to_go - mean)
        to_go = (mean, inside + gamma * (stay * loop_to_go + (1 - stay) * outside_to_go))
    gradient = moments.expected_gradient(chain.mdp, chain.student, chain.teacher, gamma)
    assert gradient[0, chain.loop_token].item() == pytest.approx(slope, abs=1e-12)


def test_sequence_level_buys_the_loop_that_token_level_refuses() -> None:
    """Entering costs more than an ordinary token, and later tokens in the loop cost nothing."""
    chain = drift_chain(DriftChainConfig(**UNTAGGED), seeded(3))
    divergence = moments.sequence_kl(chain.mdp, chain.student, chain.teacher)
    assert divergence.local[chain.loop].item() == pytest.approx(0, abs=1e-12)
    slopes = moments.expected_gradient(chain.mdp, chain.student, chain.teacher, [0.0, 1.0])
    token, sequence = slopes[:, chain.informed, chain.loop_token].sum(-1).tolist()
    assert sequence < 0 < token


def test_a_forbidden_tag_drives_even_token_level_into_the_loop() -> None:
    """Outside the loop the tag raises the mean cost, which makes entering the loop cheaper."""
    slopes = []
    for config in (DriftChainConfig(**UNTAGGED), DriftChainConfig()):
        chain = drift_chain(config, seeded(3))
        gradient = moments.expected_gradient(chain.mdp, chain.student, chain.teacher, 0.0)
        slopes.append(gradient[chain.informed, chain.loop_token].sum().item())
    visits = moments.sequence_kl(chain.mdp, chain.student, chain.teacher).occupancy
    tag = DriftChainConfig().special * (math.log(DriftChainConfig().special) + 20)
    # all ordinary tokens gain the small share of the tag's teacher mass that is freed
    freed = -math.log((1 - 0.015 - math.exp(-20)) / (1 - 0.015 - 0.02)) * (1 - 0.04)
    want = -visits[:, chain.informed].sum().item() * DriftChainConfig().enter * (tag + freed)
    assert slopes[1] - slopes[0] == pytest.approx(want, rel=1e-9)


# --- the special tag ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_a_masked_tag_is_a_masked_position_of_the_batch(gamma: float) -> None:
    """The exact study and the training loss mask alike: no cost, no loss, discount advanced."""
    chain = drift_chain(DriftChainConfig(horizon=12, special=0.05), seeded(4))
    trajectories = sample(chain.mdp, chain.student, chain.teacher, 20_000, seeded(5))
    trajectories = replace(
        trajectories,
        batch=trajectories.batch.restrict_mask(trajectories.batch.tokens != chain.special_token),
    )
    objective = factory.make_objective("sampled_token", gamma=gamma)
    gradients = trajectory_gradients(trajectories, chain.student, objective)
    mean, variance = masked_moments(chain, "plain", gamma, chain.special_token)
    error = gradients.std(0) / len(gradients) ** 0.5
    reached = error > 0
    z = (gradients.mean(0) - mean)[reached] / error[reached]
    assert z.abs().max() < 4.5  # the largest of about a hundred entries
    squared_deviation = (gradients - mean).square().sum((1, 2))
    assert (
        abs(squared_deviation.mean() - variance)
        < 4 * squared_deviation.std() / len(squared_deviation) ** 0.5
    )


def test_the_teachers_top_tokens_do_not_move_with_the_tag() -> None:
    """The tag ranks last for the teacher, so that only K = A includes it."""
    chain = drift_chain(DriftChainConfig(), seeded(6))
    shifted = replace(chain, teacher=chain.teacher.clone())
    shifted.teacher[:, chain.special_token] -= 5  # still rarer
    for k, is_equal in ((2, True), (6, True), (7, True), (8, False)):
        gradients = [
            moments.moments(x.mdp, x.student, x.teacher, "teacher_topk", k=k)[0]
            for x in (chain, shifted)
        ]
        assert torch.allclose(*gradients, atol=1e-12) == is_equal


# --- sampled metrics ----------------------------------------------------------------------------

PanelSample = tuple[DriftChain, Trajectories, dict[str, float]]


def per_token(weight: Tensor, x: Tensor) -> float:
    return float((weight * x).sum() / weight.sum())


def test_the_panel_measures_the_exact_shares_and_costs(panel_sample: PanelSample) -> None:
    chain, _, row = panel_sample
    weight, cost = token_weights(chain)
    q = chain.teacher.log_softmax(-1)
    entropy = -(q.exp() * q).sum(-1, keepdim=True)
    for name, x in (
        ("signal/negative_share", (cost > 0).double()),
        ("signal/negative_share_null", (cost > 0).double()),
        ("signal/positive_mass", (-cost).clamp(min=0)),
        ("divergence/k1", cost),
        ("divergence/reverse_kl", cost),
        ("divergence/teacher_entropy", entropy.expand_as(cost)),
        ("divergence/teacher_prob", q.exp()),
    ):
        assert row[f"{name}_se"] > 0
        assert abs(row[name] - per_token(weight, x)) < 4 * row[f"{name}_se"], name
    for first, last in ((0, 1), (8, 15), (32, 63)):
        part = weight[first : last + 1]
        for name, x in (("k1", cost), ("teacher_entropy", entropy.expand_as(cost))):
            mean, error = (row[f"divergence/{name}@{first}-{last}{end}"] for end in ("", "_se"))
            assert abs(mean - per_token(part, x)) < 4 * error, (name, first)
    assert abs(row["signal/negative_share_excess"]) < (4 * row["signal/negative_share_excess_se"])


def test_repeated_tokens_are_the_loops_and_cost_next_to_nothing(panel_sample: PanelSample) -> None:
    chain, trajectories, row = panel_sample
    looping = (trajectories.batch.tokens == chain.loop_token).unfold(1, 9, 1).all(-1)
    # nine loop tokens in a row contain two equal 8-grams; ordinary tokens rarely repeat eight
    least = looping.double().sum() / trajectories.batch.mask.sum()
    assert least <= row["repetition/repeated_share"] < least + 0.01
    assert row["signal/repeated_cost"] < 0.1 * row["signal/regular_cost"]
    assert row["divergence/teacher_rank_1"] < 1


def test_position_quantiles_are_those_of_the_samples(panel_sample: PanelSample) -> None:
    """The fraction below the exact quantile is the level, up to ties and four standard errors."""
    chain, trajectories, _ = panel_sample
    weight, cost = token_weights(chain)
    signal = -trajectories.batch.log_ratio
    for t in (0, 20, 63):
        for level in (0.05, 0.5, 0.95):
            (quantile,) = weighted_quantiles(weight[t], -cost, (level,))
            error = 4 * (level * (1 - level) / COUNT) ** 0.5
            share_below = (signal[:, t] < quantile - 1e-9).double().mean().item()
            share_up_to = (signal[:, t] <= quantile + 1e-9).double().mean().item()
            assert share_below - error < level < share_up_to + error


# --- random lengths and a sure teacher ----------------------------------------------------------


def test_responses_end_geometrically_but_not_in_the_loop() -> None:
    """Two lumped states, outside and in the loop.

    Outside, a fraction enters the loop and the remainder ends with probability `stop`; inside, a
    fraction 1 - stay leaves the loop and of those the same fraction ends.
    """
    config = DriftChainConfig(horizon=24, stop=0.1, enter=0.05, stay=0.9)
    weight, cost = token_weights(drift_chain(config, seeded(2)))
    outside, loop = 1.0, 0.0
    for token_weight in weight:
        assert token_weight[:-2].sum().item() == pytest.approx(outside, abs=1e-12)
        assert token_weight[-2].sum().item() == pytest.approx(loop, abs=1e-12)
        assert token_weight[-1].sum().item() == 0  # nothing is emitted at the end
        moving = outside * (1 - config.enter) + loop * (1 - config.stay)
        outside, loop = moving * (1 - config.stop), outside * config.enter + loop * config.stay
    assert cost.isfinite().all()


def test_the_late_tokens_of_random_lengths_are_loops() -> None:
    """Estimate the fraction of unfinished responses in the loop from samples."""
    chain = drift_chain(DriftChainConfig(horizon=48, stop=0.05), seeded(2))
    batch = sample(chain.mdp, chain.student, chain.teacher, 8000, seeded(3)).batch
    want = float(experiment.signal_metrics(chain)["late_loop"])
    running = batch.mask[:, -1]
    # a preceding loop token means that the last token was sampled in the loop
    looping = batch.tokens[running, -2] == chain.loop_token
    share = looping.double().mean().item()
    assert abs(share - want) < 4 * (want * (1 - want) / int(running.sum())) ** 0.5
    assert want > 2 * float(experiment.position_metrics(chain)[5]["loop_mass"])


def test_a_sure_teacher_widens_the_signal_and_a_flat_one_narrows_it() -> None:
    growth = {
        kind: experiment.signal_metrics(drift_chain(DriftChainConfig(uninformed=kind), seeded(4)))[
            "band_growth"
        ]
        for kind in ("flat", "sure")
    }
    assert growth["sure"] > 1.2 > growth["flat"]


def test_positive_and_total_signal_concentrate_differently() -> None:
    chain = drift_chain(DriftChainConfig(), seeded(5))
    weight, cost = token_weights(chain)
    probability, size = weight.sum(0).flatten(), (-cost).flatten()
    rows = sorted(zip(size.tolist(), probability.tolist(), strict=True), reverse=True)
    rows = [row for row in rows if row[0] > 0]
    remaining = 0.01 * sum(mass for _, mass in rows)
    top, total = 0.0, sum(value * mass for value, mass in rows)
    for value, mass in rows:
        top += value * min(mass, remaining)
        remaining -= min(mass, remaining)
    metrics = experiment.signal_metrics(chain)
    assert metrics["positive_top1_share"] == pytest.approx(top / total, rel=1e-9)
    assert metrics["top1_share"] > 2 * top / total  # the tag is among the negative ones
