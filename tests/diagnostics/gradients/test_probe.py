"""Signal, noise and bias of gradients from one batch, against the exact engine on tabular worlds.

A tabular policy is a head on one-hot states, so the full probe can run on it. Seeds are fixed; the
means of repetitions must be within 4 standard errors of the exact value.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from diagnostics.concatenation import concatenate
from diagnostics.core.optional_fields import MissingField
from diagnostics.gradients.bias import (
    occupancy,
    recommend_estimator,
    squared_bias,
)
from diagnostics.gradients.estimators import (
    FAMILY,
    available_estimators,
    estimator_index,
    estimator_weights,
)
from diagnostics.gradients.jackknife import (
    squared_length_estimate,
)
from diagnostics.gradients.signal_noise import (
    pair_products,
    signal_and_noise,
)
from opd.objectives.catalogue import OBJECTIVES
from synthetic.estimators import ESTIMATORS, Estimator
from synthetic.exact import moments
from synthetic.sampling.trajectories import Trajectories, sample
from tests.diagnostics.gradients.tabular_gradients import (
    GAMMAS,
    REPETITIONS,
    N,
    gradients,
    near,
    sample_batch,
    seeded,
    world,
)

NAMES = tuple(name for name in FAMILY if name != "leave_one_out")


@cache
def repeated_probes() -> list[dict[str, object]]:
    """Measure all estimators on 200 independent batches of 48 trajectories."""
    results = []
    for seed in range(REPETITIONS):
        trajectories = sample_batch(world()[0], 1000 + seed)
        x, energies, family = gradients(trajectories, NAMES)
        p = pair_products(x, trajectories.batch.prompt)
        results.append(
            {"pairs": p, "family": family, "energies": energies, "at": trajectories, "x": x}
        )
    return results


@cache
def truth() -> tuple[dict[str, Tensor], Tensor]:
    """Return name -> (G,) exact noise of a trajectory, and (G, S, A) means.

    The position mean of many prompts is the exact mean at the position, `position_value`.
    """
    mdp, student, teacher = world()
    exact_names = {name: name.replace("position_mean", "position_value") for name in NAMES}
    ESTIMATORS["rb_all_position_value"] = Estimator(
        objective=OBJECTIVES["full_reverse_kl"], baseline="position_value"
    )
    try:
        parts = {
            name: moments.moments(mdp, student, teacher, exact_name, GAMMAS)
            for name, exact_name in exact_names.items()
        }
    finally:
        del ESTIMATORS["rb_all_position_value"]
    return {n: v for n, (_, v) in parts.items()}, parts["plain"][0]


@pytest.mark.parametrize("name", NAMES)
def test_signal_and_noise_of_every_member_are_the_exact_ones(name: str) -> None:
    noise, mean = truth()
    signal = mean.square().sum((1, 2))
    for g, gamma in enumerate(GAMMAS):
        i = estimator_index(repeated_probes()[0]["family"], name, gamma)
        near([float(r["pairs"].signal[0, i]) for r in repeated_probes()], float(signal[g]))
        near([float(r["pairs"].noise[0, i]) for r in repeated_probes()], float(noise[name][g]))


def covered(estimates: list, true: float) -> float:
    return sum(e.low <= true <= e.high for e in estimates) / len(estimates)


def test_intervals_cover_what_they_say() -> None:
    """Nominal 95 %, 200 repetitions: 90 to 99 %, about the 99.9 % range of the binomial."""
    noise, mean = truth()
    signal = mean.square().sum((1, 2))
    for name, gamma in (("plain", 0.0), ("rb_all", 0.0), ("rb_all_position_mean", 1.0)):
        g = GAMMAS.index(gamma)
        i = estimator_index(repeated_probes()[0]["family"], name, gamma)
        products = [r["pairs"] for r in repeated_probes()]
        shares = {
            "signal": covered(
                [squared_length_estimate(p.mean_estimate(p.signal[:, i])) for p in products],
                float(signal[g]),
            ),
            "noise": covered(
                [p.positive_estimate(p.noise[:, i]) for p in products], float(noise[name][g])
            ),
            "snr": covered(
                [p.ratio_estimate(p.signal[:, i] * N, p.noise[:, i]) for p in products],
                float(N * signal[g] / noise[name][g]),
            ),
        }
        assert all(0.9 <= share <= 0.99 for share in shares.values()), (name, gamma, shares)


def test_bias_is_unbiased_and_a_plug_in_is_far_off() -> None:
    _, mean = truth()
    true = (mean - mean[-1]).square().sum((1, 2))
    for g in range(len(GAMMAS)):
        values = [float(squared_bias(r["pairs"], r["family"])[0, g]) for r in repeated_probes()]
        if GAMMAS[g] < 1:
            near(values, float(true[g]))
        else:
            assert set(values) == {0.0}
    family = repeated_probes()[0]["family"]
    full, local = (estimator_index(family, "plain", gamma) for gamma in (1.0, 0.0))
    plug_in = [
        float((r["x"][:, full] - r["x"][:, local]).mean(0).square().sum())
        for r in repeated_probes()
    ]
    assert sum(plug_in) / len(plug_in) > 2 * float(true[0])


def test_alpha_and_the_cosine_are_the_exact_ones() -> None:
    _, mean = truth()
    g, h = mean[0].flatten(), (mean[-1] - mean[0]).flatten()
    true = {
        "alpha": float(g @ h / g.square().sum()),
        "bias_share": float(h.norm() / (g + h).norm()),
        "cosine": float(g @ (g + h) / g.norm() / (g + h).norm()),
        "occupancy_square": float(h.square().sum()),
    }
    estimates = [occupancy(r["pairs"], r["family"]) for r in repeated_probes()]
    for name, value in true.items():
        defined = [f[name] for f in estimates if not math.isnan(f[name].value)]
        assert len(defined) > 0.9 * REPETITIONS
        assert 0.9 <= covered(defined, value) <= 0.995, (name, value)


def test_rollouts_of_a_prompt_are_told_from_prompts() -> None:
    """Prompts are the random start states; exact within and between from each start state."""
    mdp, student, teacher = world()
    worlds = [replace(mdp, start=torch.eye(4, dtype=torch.float64)[s]) for s in range(3)]
    world_moments = [moments.moments(world, student, teacher, "plain", 1.0) for world in worlds]
    means = torch.stack([m for m, _ in world_moments])
    between = (means - means.mean(0)).square().sum((1, 2)).mean()
    within = torch.stack([v for _, v in world_moments]).mean()
    results = []
    for seed in range(REPETITIONS):
        drawn_from = torch.bincount(torch.randint(3, (16,), generator=seeded(seed)), minlength=3)
        parts = [
            sample(world, student, teacher, 3 * int(count), seeded(c + 3 * seed))
            for c, (world, count) in enumerate(zip(worlds, drawn_from, strict=True))
            if count
        ]
        batch = concatenate([p.batch for p in parts])
        trajectories = Trajectories(
            replace(batch, prompt=torch.arange(48) // 3), torch.cat([p.states for p in parts])
        )
        x, _, family = gradients(trajectories, ("plain",))
        results.append(pair_products(x, trajectories.batch.prompt))
    i = estimator_index(family, "plain", 1.0)
    near([float(p.within[0, i]) for p in results], float(within))
    near([float(p.between[0, i]) for p in results], float(between))
    near([float(p.noise[0, i]) for p in results], float(3 * between + within))
    assert float(between) > 0.05


def test_a_leave_one_out_group_has_its_exact_noise() -> None:
    mdp, student, teacher = world()
    _, true = moments.moments(mdp, student, teacher, "leave_one_out", GAMMAS, group=4)
    results = []
    for seed in range(REPETITIONS):
        trajectories = sample_batch(mdp, seed, group=4)
        x, _, _ = gradients(trajectories, ("leave_one_out",))
        results.append(pair_products(x, trajectories.batch.prompt))
    for g in range(len(GAMMAS)):
        near([float(p.noise[0, g]) for p in results], float(true[g]))


def test_a_ratio_to_no_signal_is_refused() -> None:
    refused = unresolved = 0
    for seed in range(200):
        x = torch.randn(30, 8, generator=seeded(seed), dtype=torch.float64)
        estimates = signal_and_noise(x, torch.arange(30))
        refused += math.isnan(estimates["noise_scale"].value)
        unresolved += estimates["snr"].low < 0
    assert refused >= 190
    assert unresolved == refused
    clear = signal_and_noise(x + 3, torch.arange(30))
    assert clear["noise_scale"].value == pytest.approx(8 / 72, rel=0.3)
    assert clear["noise_scale"].low < 8 / 72 < clear["noise_scale"].high


def test_the_recommendation_is_the_exact_one_where_that_is_clear() -> None:
    noise, mean = truth()
    bias = (mean - mean[-1]).square().sum((1, 2))
    trajectories = sample_batch(world()[0], 7, count=3000)
    names = ("plain", "position_mean", "rb_all_position_mean")
    x, _, family = gradients(trajectories, names)
    products = pair_products(x, trajectories.batch.prompt)
    for sequences in (1, 10**5):
        error = torch.stack([bias + noise[n] / sequences for n in names])
        choice = recommend_estimator(products, family, sequences, seeded(0))
        best = int(error.argmin())
        assert (choice.name, choice.gamma) == (names[best // 3], GAMMAS[best % 3])
        torch.testing.assert_close(choice.error, error.flatten(), rtol=0.2, atol=1e-3)
        assert choice.share.sum() == pytest.approx(1)
        assert choice.share[best] > 0.8
    assert recommend_estimator(products, family, 1, seeded(0)).gamma < 1
    assert recommend_estimator(products, family, 10**5, seeded(0)).gamma == 1
    # equal estimators do not split the share
    x, _, family = gradients(trajectories, ("rb_immediate", "rb_all"))
    choice = recommend_estimator(pair_products(x, trajectories.batch.prompt), family, 1, seeded(0))
    assert (choice.name, choice.share[0]) == ("rb_immediate", 1)
    small_batch = sample_batch(world()[0], 8, count=12)
    x, _, family = gradients(small_batch, names)
    assert (
        recommend_estimator(
            pair_products(x, small_batch.batch.prompt), family, 30, seeded(0)
        ).share.max()
        < 1
    )


def test_only_what_the_batch_allows_is_measured() -> None:
    trajectories = sample_batch(world()[0], 1, count=12)
    assert "leave_one_out" not in available_estimators(trajectories.batch, True)
    bare = replace(trajectories.batch, prefix=None, prompt=torch.arange(12) // 2)
    assert available_estimators(bare, False) == ["plain", "position_mean", "leave_one_out"]
    assert available_estimators(bare, True) == [
        "plain",
        "position_mean",
        "leave_one_out",
        "rb_immediate",
    ]
    with pytest.raises(MissingField, match="distribution statistics"):
        estimator_weights(bare, ["rb_future"], GAMMAS)
    with pytest.raises(MissingField, match="single rollout"):
        estimator_weights(trajectories.batch, ["leave_one_out"], GAMMAS)
    with pytest.raises(ValueError, match=r"unknown estimators \['no'\]"):
        estimator_weights(bare, ["no"], GAMMAS)
    x, _, _ = gradients(trajectories, ("plain",))
    other_weights = estimator_weights(trajectories.batch, ["plain"], (0.0, 0.5))
    with pytest.raises(MissingField, match="discounts 0 and 1"):
        squared_bias(pair_products(x[:, :2], trajectories.batch.prompt), other_weights)
