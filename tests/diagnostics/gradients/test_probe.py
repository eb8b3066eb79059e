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
from torch.nn.functional import one_hot

from diagnostics.batch import ScoredRollouts, concatenate
from diagnostics.core.optional_fields import MissingField
from diagnostics.gradients.bias import (
    coherence,
    occupancy,
    recommend_estimator,
    response_cost,
    squared_bias,
)
from diagnostics.gradients.estimators import (
    FAMILY,
    available_estimators,
    estimator_index,
    estimator_weights,
)
from diagnostics.gradients.jackknife import (
    degrees_of_freedom,
    mean_estimate,
    positive_estimate,
    ratio_estimate,
    squared_length_estimate,
    student_t_quantile,
)
from diagnostics.gradients.proxies import (
    adam_noise,
    scalar_advantage_variance,
    token_advantage_variance,
)
from diagnostics.gradients.signal_noise import (
    pair_products,
    signal_and_noise,
    signal_noise_from_batches,
    signal_noise_from_norms,
)
from diagnostics.gradients.sketch import (
    identity_projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from opd.objectives.catalogue import OBJECTIVES
from synthetic.estimators import ESTIMATORS, Estimator
from synthetic.exact import moments
from synthetic.sampling.trajectories import Trajectories, sample
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair, token_chain, with_end_state

GAMMAS = (0.0, 0.5, 1.0)
N, REPETITIONS = 48, 200


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def world(horizon: int = 8) -> tuple[TabularMDP, Tensor, Tensor]:
    """Build a world of three states (the last token) and an end, so that lengths are random."""
    mdp = with_end_state(token_chain(3, horizon), torch.tensor(0.1))
    return mdp, *random_pair(mdp, seeded(8), distance=1.0, heterogeneity=0.5)


def sample_batch(mdp: TabularMDP, seed: int, count: int = N, group: int = 1) -> Trajectories:
    _, student, teacher = world()
    trajectories = sample(mdp, student, teacher, count, seeded(seed))
    return replace(
        trajectories, batch=replace(trajectories.batch, prompt=torch.arange(count) // group)
    )


def gradients(trajectories: Trajectories, names: tuple[str, ...]) -> tuple[Tensor, Tensor, object]:
    """Return (n, F, 1, S A) exact table gradients by the code of the probe, energies, weights."""
    _, student, teacher = world()
    batch, flat = trajectories.batch, trajectories.states[trajectories.batch.mask]
    tables = student.log_softmax(-1), teacher.log_softmax(-1)
    tokens = token_sketches(
        batch,
        one_hot(flat, 4).double(),
        lambda c: (tables[0][flat[c]], tables[1][flat[c]]),
        identity_projection(3, 4),
        chunk_tokens=100,
    )
    family = estimator_weights(batch, names, GAMMAS)
    x = sequence_sketches(tokens, batch.mask, family.values, family.local)
    return x, token_energies(tokens, batch.mask, family.values, family.local), family


def near(values: list[float], true: float, sigmas: float = 4) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std() / len(x) ** 0.5)
    assert abs(float(x.mean()) - true) < sigmas * error, (float(x.mean()), true, error)


def test_inner_products_are_means_over_pairs_and_their_replicates_leave_out_prompts() -> None:
    x = torch.randn(7, 2, 1, 4, generator=seeded(1), dtype=torch.float64)
    prompt = torch.tensor([5, 9, 5, 2, 2, 2, 0])
    products = pair_products(x, prompt)
    left_out = [None, 0, 2, 5, 9]
    assert len(products.different_prompts) == len(left_out)
    for r, out in enumerate(left_out):
        rows = [i for i in range(7) if out is None or prompt[i] != out]
        v = x[:, :, 0]
        different_prompts = [v[i] @ v[j].T for i in rows for j in rows if prompt[i] != prompt[j]]
        same_prompt = [
            (v[i] * v[j]).sum(1) for i in rows for j in rows if i != j and prompt[i] == prompt[j]
        ]
        self_products = torch.stack([v[i].square().sum(1) for i in rows]).mean(0)
        mean = v[rows].mean(0)
        torch.testing.assert_close(
            products.different_prompts[r], torch.stack(different_prompts).mean(0)
        )
        torch.testing.assert_close(products.same_prompt[r], torch.stack(same_prompt).mean(0))
        torch.testing.assert_close(products.self_products[r], self_products)
        torch.testing.assert_close(
            products.noise[r],
            len(rows) * (mean.square().sum(1) - torch.stack(different_prompts).mean(0).diagonal()),
        )


def test_copies_are_averaged_and_left_out_one_by_one() -> None:
    x = torch.randn(6, 2, 3, 4, generator=seeded(1), dtype=torch.float64)
    products = pair_products(x, torch.arange(6))
    parts = [pair_products(x[:, :, j : j + 1] * 3**0.5, torch.arange(6)) for j in range(3)]
    torch.testing.assert_close(products.self_products[:7], sum(p.self_products for p in parts) / 3)
    torch.testing.assert_close(
        products.different_prompts[8],
        (parts[0].different_prompts[0] + parts[2].different_prompts[0]) / 2,
    )
    signal = torch.stack([p.signal[0, 0] for p in parts])
    spread = products.mean_estimate(products.signal[:, 0])
    assert spread.sketch == pytest.approx(float(signal.std() / 3**0.5))


def test_norms_alone_give_the_same_signal_and_noise() -> None:
    x = torch.randn(9, 5, generator=seeded(3), dtype=torch.float64) + 0.4
    estimates = signal_and_noise(x, torch.arange(9))
    signal, noise = signal_noise_from_norms(float(x.sum(0).square().sum()), x.square().sum(1))
    assert signal == pytest.approx(estimates["signal"].value)
    assert noise == pytest.approx(estimates["variance"].value)
    assert estimates["snr"].value == pytest.approx(9 * signal / noise)
    # batches of 1 and 9: |G_1|^2 averaged over its nine batches
    mean_square = float(x.square().sum(1).mean())
    from_two_sizes = signal_noise_from_batches(float(x.mean(0).square().sum()), 9, mean_square, 1)
    assert from_two_sizes == pytest.approx((signal, noise))
    with pytest.raises(ValueError, match="large > small > 0 is required"):
        signal_noise_from_batches(1.0, 4, 1.0, 4)


@pytest.mark.parametrize(("degrees", "expected"), [(2, 4.30265), (5, 2.57058), (30, 2.04227)])
def test_the_quantile_is_students(degrees: int, expected: float) -> None:
    assert student_t_quantile(degrees) == pytest.approx(expected, rel=0.02 if degrees < 5 else 1e-3)


def test_intervals_by_hand() -> None:
    x = torch.tensor([10.0, 9.0, 11.0, 10.0, 8.0, 12.0], dtype=torch.float64)
    deviations = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0])  # 5 prompts, sum of squares 10
    plain, t = mean_estimate(x, 5), student_t_quantile(4)
    assert (plain.value, plain.sketch) == (10, 0)
    assert plain.error == pytest.approx((4 / 5 * 10) ** 0.5)
    spread = float((deviations.square() - 2).square().sum())
    assert degrees_of_freedom(deviations) == min(4, 2 * 100 / spread) == 4
    assert plain.high == pytest.approx(10 + t * 8**0.5)
    long = positive_estimate(x, 5)
    assert long.low * long.high == pytest.approx(100)
    assert long.high == pytest.approx(10 * math.exp(t * 8**0.5 / 10))
    reach = t * 8**0.5
    assert squared_length_estimate(plain).high == pytest.approx(10 + reach + reach**2 / 40)
    low = mean_estimate(x - 10, 5)
    assert squared_length_estimate(low).high == pytest.approx(reach + reach / 2)
    assert positive_estimate(x - 10, 5) == low
    # one prompt causes the entire error
    assert degrees_of_freedom(torch.tensor([9.0] + [0.0] * 99)) == pytest.approx(200 / 99)
    two = torch.cat([x, torch.tensor([9.0, 11.0])])  # two copies of a sketch
    assert mean_estimate(two, 5).sketch == pytest.approx((1 / 2 * 2) ** 0.5)
    # Fieller: at the ends (N - rho D)^2 = t^2 Var(N - rho D), with the jackknife variance
    denominator = torch.tensor([20.0, 20.5, 19.0, 20.0, 21.0, 19.5], dtype=torch.float64)
    estimate = ratio_estimate(x, denominator, 5)
    assert estimate.value == 0.5
    assert estimate.low < 0.5 < estimate.high
    t = student_t_quantile(
        degrees_of_freedom((x - 0.5 * denominator)[1:] - (x - 0.5 * denominator)[1:].mean())
    )
    for rho in (estimate.low, estimate.high):
        ends = mean_estimate(x - rho * denominator, 5)
        assert ends.value**2 == pytest.approx((t * ends.error) ** 2)
    assert math.isnan(ratio_estimate(x, denominator - 20, 5).low)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(MissingField, match="2 prompts"):
        signal_and_noise(torch.randn(8, 3), torch.arange(8) // 4)
    with pytest.raises(ValueError, match=r"expected \(4, F, J, m\)"):
        pair_products(torch.randn(4, 3), torch.arange(4))


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


def test_coherence_is_the_ratio_of_norms_and_constant_costs_have_one() -> None:
    trajectories = sample_batch(world()[0], 5, count=20)
    x, energies, family = gradients(trajectories, ("plain", "rb_all"))
    products = pair_products(x, trajectories.batch.prompt)
    i = estimator_index(family, "plain", 0.0)
    _, student, _ = world()
    p = student.log_softmax(-1).exp()[trajectories.states]
    delta = one_hot(trajectories.batch.tokens, 3).double() - p
    part = ((trajectories.batch.log_ratio * trajectories.batch.mask)[..., None] * delta)[
        ..., None, :
    ] * one_hot(trajectories.states, 4)[..., None]
    value = part.sum(1).square().sum() / part.square().sum()
    assert coherence(products, energies, trajectories.batch.prompt, i).value == pytest.approx(
        float(value)
    )
    # the gradient of the local KL, p (l - K), does not depend on the sampled token
    k = estimator_index(family, "rb_all", 0.0)
    _, student, teacher = world()
    ratio = student.log_softmax(-1) - teacher.log_softmax(-1)
    table = student.softmax(-1) * (ratio - (student.softmax(-1) * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(
        energies[:, k],
        (table.square().sum(-1)[trajectories.states] * trajectories.batch.mask).sum(1),
    )
    large_batch = sample_batch(world()[0], 6, count=3000)
    flat, log_p = large_batch.states[large_batch.batch.mask], student.log_softmax(-1)
    tokens = token_sketches(
        large_batch.batch,
        one_hot(flat, 4).double(),
        lambda c: (log_p[flat[c]], None),
        identity_projection(3, 4),
    )
    unit_weights, no_local = torch.ones(*large_batch.batch.mask.shape, 1), torch.tensor([False])
    x = sequence_sketches(tokens, large_batch.batch.mask, unit_weights, no_local)
    energy = token_energies(tokens, large_batch.batch.mask, unit_weights, no_local)
    together = coherence(
        pair_products(x, large_batch.batch.prompt), energy, large_batch.batch.prompt, 0
    )
    assert together.error < 0.02
    assert abs(together.value - 1) < 3 * together.error


def test_a_scalar_advantage_misses_the_noise_of_distillation() -> None:
    """At gamma = 0 verl's proxy gives a small part of the variance, the token version most."""
    mdp = random_chain(3, 3, 24, seeded(0), mixing=0.3)
    student, teacher = random_pair(mdp, seeded(2), distance=1.0, heterogeneity=0.5)
    _, true = moments.moments(mdp, student, teacher, "plain", 0.0)
    trajectories = sample(mdp, student, teacher, 20_000, seeded(3))
    batch: ScoredRollouts = trajectories.batch
    w = 1 - 2 * batch.student_logp.exp() + batch.prefix.collision
    scalar, token = (
        float(f(-batch.log_ratio, w, batch.mask) / true)
        for f in (scalar_advantage_variance, token_advantage_variance)
    )
    assert scalar < 0.3
    assert 0.7 < token < 1.4
    # by hand on one response
    a, s, m = torch.tensor([[1.0, -3.0, 9.0]]), torch.tensor([[0.5, 1.0, 7.0]]), [[1, 1, 0]]
    mask = torch.tensor(m, dtype=torch.bool)
    assert scalar_advantage_variance(a, s, mask) == pytest.approx(1.5)
    assert token_advantage_variance(a, s, mask) == pytest.approx(9.5)
    assert float(response_cost(batch).mean()) == pytest.approx(
        float(moments.sequence_kl(mdp, student, teacher).total), rel=0.05
    )


def test_adams_moments_mix_noise_with_drift() -> None:
    betas, steps, deviation = (0.9, 0.999), 6000, torch.tensor([1.0, 2.0, 0.5])
    noise = torch.randn(steps, 400, 3, generator=seeded(4), dtype=torch.float64) * deviation

    def proxy(mean: Tensor) -> float:
        m = v = torch.zeros(400, 3, dtype=torch.float64)
        for t in range(steps):
            g = mean[t] + noise[t]
            m, v = betas[0] * m + 0.1 * g, betas[1] * v + 0.001 * g.square()
        return float(adam_noise([(m[:200], v[:200]), (m[200:], v[200:])], steps, betas) / 400)

    still = torch.ones(steps, 1, 3, dtype=torch.float64)
    true = float(deviation.square().sum())
    assert proxy(still) == pytest.approx(2 * 0.9 / 1.9 * true, rel=0.02)
    drift = torch.linspace(6, 0, steps, dtype=torch.float64)[:, None, None] * still
    assert proxy(drift) > 1.5 * true
    g = torch.tensor(
        [3.0, -2.0]
    )  # after one update both corrected moments equal those of the gradient
    assert float(adam_noise([(0.1 * g, 0.001 * g.square())], 1, betas)) == pytest.approx(
        0, abs=1e-5
    )
    with pytest.raises(ValueError, match="step is 0"):
        adam_noise([], 0, betas)


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
