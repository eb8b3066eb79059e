"""Cheaper measures of noise, against the exact noise that they stand for."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diagnostics.batch import ScoredRollouts
from diagnostics.gradients.bias import (
    coherence,
    response_cost,
)
from diagnostics.gradients.estimators import (
    estimator_index,
)
from diagnostics.gradients.proxies import (
    adam_noise,
    scalar_advantage_variance,
    token_advantage_variance,
)
from diagnostics.gradients.signal_noise import (
    pair_products,
)
from diagnostics.gradients.sketch import (
    identity_projection,
    sequence_sketches,
    token_energies,
    token_sketches,
)
from synthetic.exact import moments
from synthetic.sampling.trajectories import sample
from synthetic.worlds.mdp import random_chain, random_pair
from tests.diagnostics.gradients.tabular_gradients import gradients, sample_batch, seeded, world


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
