"""Signal, noise and bias of gradients from one batch, against the exact engine on tabular worlds.

A tabular policy is a head on one-hot states, so that the whole probe runs on it. Seeds are fixed;
means of repetitions must lie within 4 of their standard errors of the truth.
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
    cost_of_response,
    occupancy,
    recommend,
    squared_bias,
)
from diagnostics.gradients.estimators import FAMILY, available, member_index, weights
from diagnostics.gradients.jackknife import degrees, estimate, positive, quantile, ratio, squared
from diagnostics.gradients.proxies import (
    adam_noise,
    scalar_advantage_variance,
    token_advantage_variance,
)
from diagnostics.gradients.signal_noise import from_batches, from_norms, pairs, signal_and_noise
from diagnostics.gradients.sketch import (
    no_projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from opd.objectives.factory import full_reverse_kl
from synthetic.estimators import ESTIMATORS, Estimator
from synthetic.exact import moments
from synthetic.sampling.trajectories import Trajectories, sample
from synthetic.worlds.mdp import TabularMDP, ending, random_chain, random_pair, token_chain

GAMMAS = (0.0, 0.5, 1.0)
N, REPETITIONS = 48, 200


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def world(horizon: int = 8) -> tuple[TabularMDP, Tensor, Tensor]:
    """Three states, which are the last token, and an end: lengths are random."""
    mdp = ending(token_chain(3, horizon), torch.tensor(0.1))
    return mdp, *random_pair(mdp, seeded(8), distance=1.0, heterogeneity=0.5)


def drawn(mdp: TabularMDP, seed: int, count: int = N, group: int = 1) -> Trajectories:
    _, student, teacher = world()
    at = sample(mdp, student, teacher, count, seeded(seed))
    return replace(at, batch=replace(at.batch, prompt=torch.arange(count) // group))


def gradients(at: Trajectories, names: tuple[str, ...]) -> tuple[Tensor, Tensor, object]:
    """(n, F, 1, S A) exact gradients of the tables by the probe's own path, energies, weights."""
    _, student, teacher = world()
    batch, flat = at.batch, at.states[at.batch.mask]
    tables = student.log_softmax(-1), teacher.log_softmax(-1)
    tokens = token_sketches(
        batch,
        one_hot(flat, 4).double(),
        lambda c: (tables[0][flat[c]], tables[1][flat[c]]),
        no_projection(3, 4),
        chunk_tokens=100,
    )
    family = weights(batch, names, GAMMAS)
    x = sequence_sketches(tokens, batch.mask, family.values, family.local)
    return x, token_energies(tokens, batch.mask, family.values, family.local), family


def near(values: list[float], true: float, sigmas: float = 4) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std() / len(x) ** 0.5)
    assert abs(float(x.mean()) - true) < sigmas * error, (float(x.mean()), true, error)


# --- the formulas ---------------------------------------------------------------------------------


def test_inner_products_are_means_over_pairs_and_their_replicates_leave_out_prompts() -> None:
    x = torch.randn(7, 2, 1, 4, generator=seeded(1), dtype=torch.float64)
    prompt = torch.tensor([5, 9, 5, 2, 2, 2, 0])
    found = pairs(x, prompt)
    left_out = [None, 0, 2, 5, 9]
    assert len(found.apart) == len(left_out)
    for r, out in enumerate(left_out):
        rows = [i for i in range(7) if out is None or prompt[i] != out]
        v = x[:, :, 0]
        apart = [v[i] @ v[j].T for i in rows for j in rows if prompt[i] != prompt[j]]
        same = [
            (v[i] * v[j]).sum(1) for i in rows for j in rows if i != j and prompt[i] == prompt[j]
        ]
        own = torch.stack([v[i].square().sum(1) for i in rows]).mean(0)
        mean = v[rows].mean(0)
        torch.testing.assert_close(found.apart[r], torch.stack(apart).mean(0))
        torch.testing.assert_close(found.same[r], torch.stack(same).mean(0))
        torch.testing.assert_close(found.own[r], own)
        torch.testing.assert_close(
            found.noise[r],
            len(rows) * (mean.square().sum(1) - torch.stack(apart).mean(0).diagonal()),
        )


def test_copies_are_averaged_and_left_out_one_by_one() -> None:
    x = torch.randn(6, 2, 3, 4, generator=seeded(1), dtype=torch.float64)
    found = pairs(x, torch.arange(6))
    parts = [pairs(x[:, :, j : j + 1] * 3**0.5, torch.arange(6)) for j in range(3)]
    torch.testing.assert_close(found.own[:7], sum(p.own for p in parts) / 3)
    torch.testing.assert_close(found.apart[8], (parts[0].apart[0] + parts[2].apart[0]) / 2)
    signal = torch.stack([p.signal[0, 0] for p in parts])
    spread = found.estimate(found.signal[:, 0])
    assert spread.sketch == pytest.approx(float(signal.std() / 3**0.5))


def test_norms_alone_give_the_same_signal_and_noise() -> None:
    x = torch.randn(9, 5, generator=seeded(3), dtype=torch.float64) + 0.4
    found = signal_and_noise(x, torch.arange(9))
    signal, noise = from_norms(float(x.sum(0).square().sum()), x.square().sum(1))
    assert signal == pytest.approx(found["signal"].value)
    assert noise == pytest.approx(found["variance"].value)
    assert found["snr"].value == pytest.approx(9 * signal / noise)
    # batches of 1 and 9: |G_1|^2 averaged over its nine batches
    one = float(x.square().sum(1).mean())
    both = from_batches(float(x.mean(0).square().sum()), 9, one, 1)
    assert both == pytest.approx((signal, noise))
    with pytest.raises(ValueError, match="need large > small"):
        from_batches(1.0, 4, 1.0, 4)


@pytest.mark.parametrize(("degrees", "known"), [(2, 4.30265), (5, 2.57058), (30, 2.04227)])
def test_the_quantile_is_students(degrees: int, known: float) -> None:
    assert quantile(degrees) == pytest.approx(known, rel=0.02 if degrees < 5 else 1e-3)


def test_intervals_by_hand() -> None:
    x = torch.tensor([10.0, 9.0, 11.0, 10.0, 8.0, 12.0], dtype=torch.float64)
    away = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0])  # leaves 5 prompts, sum of squares 10
    plain, t = estimate(x, 5), quantile(4)
    assert (plain.value, plain.sketch) == (10, 0)
    assert plain.error == pytest.approx((4 / 5 * 10) ** 0.5)
    spread = float((away.square() - 2).square().sum())
    assert degrees(away) == min(4, 2 * 100 / spread) == 4
    assert plain.high == pytest.approx(10 + t * 8**0.5)
    long = positive(x, 5)
    assert long.low * long.high == pytest.approx(100)
    assert long.high == pytest.approx(10 * math.exp(t * 8**0.5 / 10))
    reach = t * 8**0.5
    assert squared(plain).high == pytest.approx(10 + reach + reach**2 / 40)
    low = estimate(x - 10, 5)
    assert squared(low).high == pytest.approx(reach + reach / 2)
    assert positive(x - 10, 5) == low
    # one prompt makes all of the error
    assert degrees(torch.tensor([9.0] + [0.0] * 99)) == pytest.approx(200 / 99)
    two = torch.cat([x, torch.tensor([9.0, 11.0])])  # and two copies of a sketch
    assert estimate(two, 5).sketch == pytest.approx((1 / 2 * 2) ** 0.5)
    # Fieller: the ends are where (N - rho D)^2 = t^2 Var(N - rho D), by the jackknife of that
    below = torch.tensor([20.0, 20.5, 19.0, 20.0, 21.0, 19.5], dtype=torch.float64)
    found = ratio(x, below, 5)
    assert found.value == 0.5
    assert found.low < 0.5 < found.high
    t = quantile(degrees((x - 0.5 * below)[1:] - (x - 0.5 * below)[1:].mean()))
    for rho in (found.low, found.high):
        ends = estimate(x - rho * below, 5)
        assert ends.value**2 == pytest.approx((t * ends.error) ** 2)
    assert math.isnan(ratio(x, below - 20, 5).low)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(MissingField, match="2 prompts"):
        signal_and_noise(torch.randn(8, 3), torch.arange(8) // 4)
    with pytest.raises(ValueError, match=r"expected \(4, F, J, m\)"):
        pairs(torch.randn(4, 3), torch.arange(4))


# --- against the exact engine ---------------------------------------------------------------------

NAMES = tuple(name for name in FAMILY if name != "leave_one_out")


@cache
def repeated() -> list[dict[str, object]]:
    """The whole family on 200 independent batches of 48 trajectories."""
    found = []
    for seed in range(REPETITIONS):
        at = drawn(world()[0], 1000 + seed)
        x, energies, family = gradients(at, NAMES)
        p = pairs(x, at.batch.prompt)
        found.append({"pairs": p, "family": family, "energies": energies, "at": at, "x": x})
    return found


@cache
def truth() -> tuple[dict[str, Tensor], Tensor]:
    """name -> (G,) exact noise of a trajectory, and (G, S, A) means.

    The position mean of many prompts is the exact mean at the position, `position_value`.
    """
    mdp, student, teacher = world()
    exact_names = {name: name.replace("position_mean", "position_value") for name in NAMES}
    ESTIMATORS["rb_all_position_value"] = Estimator(
        objective=full_reverse_kl, baseline="position_value"
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
        i = member_index(repeated()[0]["family"], name, gamma)
        near([float(r["pairs"].signal[0, i]) for r in repeated()], float(signal[g]))
        near([float(r["pairs"].noise[0, i]) for r in repeated()], float(noise[name][g]))


def covered(estimates: list, true: float) -> float:
    return sum(e.low <= true <= e.high for e in estimates) / len(estimates)


def test_intervals_cover_what_they_say() -> None:
    """95 % nominal, 200 repetitions: 90 to 99 % (the binomial's 99.9 % range is about that)."""
    noise, mean = truth()
    signal = mean.square().sum((1, 2))
    for name, gamma in (("plain", 0.0), ("rb_all", 0.0), ("rb_all_position_mean", 1.0)):
        g = GAMMAS.index(gamma)
        i = member_index(repeated()[0]["family"], name, gamma)
        found = [r["pairs"] for r in repeated()]
        shares = {
            "signal": covered(
                [squared(p.estimate(p.signal[:, i])) for p in found], float(signal[g])
            ),
            "noise": covered([p.positive(p.noise[:, i]) for p in found], float(noise[name][g])),
            "snr": covered(
                [p.ratio(p.signal[:, i] * N, p.noise[:, i]) for p in found],
                float(N * signal[g] / noise[name][g]),
            ),
        }
        assert all(0.9 <= share <= 0.99 for share in shares.values()), (name, gamma, shares)


def test_bias_is_unbiased_and_a_plug_in_is_far_off() -> None:
    _, mean = truth()
    true = (mean - mean[-1]).square().sum((1, 2))
    for g in range(len(GAMMAS)):
        values = [float(squared_bias(r["pairs"], r["family"])[0, g]) for r in repeated()]
        if GAMMAS[g] < 1:
            near(values, float(true[g]))
        else:
            assert set(values) == {0.0}
    family = repeated()[0]["family"]
    whole, local = (member_index(family, "plain", gamma) for gamma in (1.0, 0.0))
    plug_in = [
        float((r["x"][:, whole] - r["x"][:, local]).mean(0).square().sum()) for r in repeated()
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
    found = [occupancy(r["pairs"], r["family"]) for r in repeated()]
    for name, value in true.items():
        known = [f[name] for f in found if not math.isnan(f[name].value)]
        assert len(known) > 0.9 * REPETITIONS
        assert 0.9 <= covered(known, value) <= 0.995, (name, value)


def test_rollouts_of_a_prompt_are_told_from_prompts() -> None:
    """Prompts are the random start states: within and between by the exact engine from each."""
    mdp, student, teacher = world()
    worlds = [replace(mdp, start=torch.eye(4, dtype=torch.float64)[s]) for s in range(3)]
    each = [moments.moments(world, student, teacher, "plain", 1.0) for world in worlds]
    means = torch.stack([m for m, _ in each])
    away = (means - means.mean(0)).square().sum((1, 2)).mean()
    within = torch.stack([v for _, v in each]).mean()
    found = []
    for seed in range(REPETITIONS):
        drawn_from = torch.bincount(torch.randint(3, (16,), generator=seeded(seed)), minlength=3)
        parts = [
            sample(world, student, teacher, 3 * int(count), seeded(c + 3 * seed))
            for c, (world, count) in enumerate(zip(worlds, drawn_from, strict=True))
            if count
        ]
        batch = concatenate([p.batch for p in parts])
        at = Trajectories(
            replace(batch, prompt=torch.arange(48) // 3), torch.cat([p.states for p in parts])
        )
        x, _, family = gradients(at, ("plain",))
        found.append(pairs(x, at.batch.prompt))
    i = member_index(family, "plain", 1.0)
    near([float(p.within[0, i]) for p in found], float(within))
    near([float(p.between[0, i]) for p in found], float(away))
    near([float(p.noise[0, i]) for p in found], float(3 * away + within))
    assert float(away) > 0.05


def test_a_leave_one_out_group_has_its_exact_noise() -> None:
    mdp, student, teacher = world()
    _, true = moments.moments(mdp, student, teacher, "leave_one_out", GAMMAS, group=4)
    found = []
    for seed in range(REPETITIONS):
        at = drawn(mdp, seed, group=4)
        x, _, _ = gradients(at, ("leave_one_out",))
        found.append(pairs(x, at.batch.prompt))
    for g in range(len(GAMMAS)):
        near([float(p.noise[0, g]) for p in found], float(true[g]))


def test_a_ratio_to_no_signal_is_refused() -> None:
    refused = unresolved = 0
    for seed in range(200):
        x = torch.randn(30, 8, generator=seeded(seed), dtype=torch.float64)
        found = signal_and_noise(x, torch.arange(30))
        refused += math.isnan(found["noise_scale"].value)
        unresolved += found["snr"].low < 0
    assert refused >= 190
    assert unresolved == refused
    clear = signal_and_noise(x + 3, torch.arange(30))
    assert clear["noise_scale"].value == pytest.approx(8 / 72, rel=0.3)
    assert clear["noise_scale"].low < 8 / 72 < clear["noise_scale"].high


def test_the_recommendation_is_the_exact_one_where_that_is_clear() -> None:
    noise, mean = truth()
    bias = (mean - mean[-1]).square().sum((1, 2))
    at = drawn(world()[0], 7, count=3000)
    names = ("plain", "position_mean", "rb_all_position_mean")
    x, _, family = gradients(at, names)
    found = pairs(x, at.batch.prompt)
    for sequences in (1, 10**5):
        error = torch.stack([bias + noise[n] / sequences for n in names])
        choice = recommend(found, family, sequences, seeded(0))
        best = int(error.argmin())
        assert (choice.name, choice.gamma) == (names[best // 3], GAMMAS[best % 3])
        torch.testing.assert_close(choice.error, error.flatten(), rtol=0.2, atol=1e-3)
        assert choice.share.sum() == pytest.approx(1)
        assert choice.share[best] > 0.8
    assert recommend(found, family, 1, seeded(0)).gamma < 1
    assert recommend(found, family, 10**5, seeded(0)).gamma == 1
    # equal members do not split the vote
    x, _, family = gradients(at, ("rb_immediate", "rb_all"))
    choice = recommend(pairs(x, at.batch.prompt), family, 1, seeded(0))
    assert (choice.name, choice.share[0]) == ("rb_immediate", 1)
    few = drawn(world()[0], 8, count=12)
    x, _, family = gradients(few, names)
    assert recommend(pairs(x, few.batch.prompt), family, 30, seeded(0)).share.max() < 1


def test_coherence_is_the_ratio_of_norms_and_constant_costs_have_one() -> None:
    at = drawn(world()[0], 5, count=20)
    x, energies, family = gradients(at, ("plain", "rb_all"))
    found = pairs(x, at.batch.prompt)
    i = member_index(family, "plain", 0.0)
    _, student, _ = world()
    p = student.log_softmax(-1).exp()[at.states]
    delta = one_hot(at.batch.tokens, 3).double() - p
    part = ((at.batch.log_ratio * at.batch.mask)[..., None] * delta)[..., None, :] * one_hot(
        at.states, 4
    )[..., None]
    value = part.sum(1).square().sum() / part.square().sum()
    assert coherence(found, energies, at.batch.prompt, i).value == pytest.approx(float(value))
    # the local KL's own gradient: p (l - K), no sampled token in it
    k = member_index(family, "rb_all", 0.0)
    _, student, teacher = world()
    ratio = student.log_softmax(-1) - teacher.log_softmax(-1)
    table = student.softmax(-1) * (ratio - (student.softmax(-1) * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(
        energies[:, k], (table.square().sum(-1)[at.states] * at.batch.mask).sum(1)
    )
    many = drawn(world()[0], 6, count=3000)
    flat, log_p = many.states[many.batch.mask], student.log_softmax(-1)
    tokens = token_sketches(
        many.batch, one_hot(flat, 4).double(), lambda c: (log_p[flat[c]], None), no_projection(3, 4)
    )
    ones, none = torch.ones(*many.batch.mask.shape, 1), torch.tensor([False])
    x = sequence_sketches(tokens, many.batch.mask, ones, none)
    energy = token_energies(tokens, many.batch.mask, ones, none)
    together = coherence(pairs(x, many.batch.prompt), energy, many.batch.prompt, 0)
    assert together.error < 0.02
    assert abs(together.value - 1) < 3 * together.error


# --- what others report ---------------------------------------------------------------------------


def test_a_scalar_advantage_misses_the_noise_of_distillation() -> None:
    """At gamma = 0 verl's proxy reads a small part of the variance, the token version most."""
    mdp = random_chain(3, 3, 24, seeded(0), mixing=0.3)
    student, teacher = random_pair(mdp, seeded(2), distance=1.0, heterogeneity=0.5)
    _, true = moments.moments(mdp, student, teacher, "plain", 0.0)
    at = sample(mdp, student, teacher, 20_000, seeded(3))
    batch: ScoredRollouts = at.batch
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
    assert float(cost_of_response(batch).mean()) == pytest.approx(
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
    g = torch.tensor([3.0, -2.0])  # after one update both corrected moments are the gradient's own
    assert float(adam_noise([(0.1 * g, 0.001 * g.square())], 1, betas)) == pytest.approx(
        0, abs=1e-5
    )
    with pytest.raises(ValueError, match="step is 0"):
        adam_noise([], 0, betas)


def test_only_what_the_batch_allows_is_measured() -> None:
    at = drawn(world()[0], 1, count=12)
    assert "leave_one_out" not in available(at.batch, True)
    bare = replace(at.batch, prefix=None, prompt=torch.arange(12) // 2)
    assert available(bare, False) == ["plain", "position_mean", "leave_one_out"]
    assert available(bare, True) == ["plain", "position_mean", "leave_one_out", "rb_immediate"]
    with pytest.raises(MissingField, match="prefix functionals"):
        weights(bare, ["rb_future"], GAMMAS)
    with pytest.raises(MissingField, match="single rollout"):
        weights(at.batch, ["leave_one_out"], GAMMAS)
    with pytest.raises(ValueError, match=r"unknown members \['no'\]"):
        weights(bare, ["no"], GAMMAS)
    x, _, _ = gradients(at, ("plain",))
    other = weights(at.batch, ["plain"], (0.0, 0.5))
    with pytest.raises(MissingField, match="discounts 0 and 1"):
        squared_bias(pairs(x[:, :2], at.batch.prompt), other)
