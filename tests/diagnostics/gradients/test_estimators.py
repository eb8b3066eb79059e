"""Estimator weights against loops, sketches against full gradients, and a tiny language model."""

from functools import cache

import pytest
import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.gradients.estimators import (
    FAMILY,
    GAMMAS,
    GradientEstimator,
    estimator_index,
    estimator_weights,
)
from diagnostics.gradients.probe import (
    GradientSketches,
    concatenate_sketches,
    gradient_row,
    sketch_gradients,
)
from diagnostics.gradients.signal_noise import pair_products
from diagnostics.gradients.sketch import (
    TokenSketches,
    identity_projection,
    random_projection,
    sequence_sketches,
    token_sketches,
)
from tests.helpers.sketches import matrix_sketch

B, T, V, D = 6, 7, 11, 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@cache
def make_batch() -> tuple[ScoredRollouts, Tensor, Tensor, Tensor]:
    """Return a batch with gaps in its mask, states (B, T, D), and both models' (B, T, V) logps."""
    hidden, head = normal(B, T, D, seed=1), normal(V, D, seed=2)
    p = (hidden @ head.T).log_softmax(-1)
    q = (p + normal(B, T, V, seed=3)).log_softmax(-1)
    tokens = torch.multinomial(p.exp().flatten(0, 1), 1, generator=seeded(4)).view(B, T)
    mask = torch.rand(B, T, generator=seeded(5)) > 0.25
    mask[1, 4:], mask[:, 0] = False, True

    def sampled_logp(x: Tensor) -> Tensor:
        return x.gather(-1, tokens[..., None])[..., 0] * mask

    batch = ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=sampled_logp(p),
        student_logp=sampled_logp(p),
        teacher_logp=sampled_logp(q),
        prompt=torch.tensor([4, 7, 4, 7, 9, 9]),
        ended=torch.ones(B, dtype=torch.bool),
        prefix=DistributionStats(
            **{k: x * mask for k, x in compute_distribution_stats(p, q, tokens).items()}
        ),
    ).validate()
    return batch, hidden, p, q


def by_hand(batch: ScoredRollouts, member: GradientEstimator, gamma: float) -> Tensor:
    """Compute the (B, T) weights by loops over the definition."""
    r, k, mask = batch.log_ratio, batch.prefix.reverse_kl, batch.mask
    later = k if member.mean_later else r
    credit = torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        for t in range(T):
            if mask[i, t]:
                later_positions = [u for u in range(t + 1, T) if mask[i, u]]
                credit[i, t] = sum(
                    gamma ** (j + 1) * later[i, u] for j, u in enumerate(later_positions)
                )
                credit[i, t] += 0 if member.mean_own else r[i, t]
    weight = credit.clone()
    for i in range(B):
        for t in range(T):
            mates = [j for j in range(B) if batch.prompt[j] == batch.prompt[i] and j != i]
            other_rows = [j for j in range(B) if batch.prompt[j] != batch.prompt[i] and mask[j, t]]
            if member.baseline == "local_kl":
                weight[i, t] -= k[i, t]
            elif member.baseline == "leave_one_out":
                weight[i, t] -= credit[mates, t].mean()
            elif member.baseline == "position_mean" and other_rows:
                weight[i, t] -= credit[other_rows, t].mean()
    return weight * mask


@pytest.mark.parametrize("name", FAMILY)
def test_weights_are_those_of_the_definition(name: str) -> None:
    batch = make_batch()[0]
    family = estimator_weights(batch, ["plain", name], GAMMAS)
    for gamma in GAMMAS:
        weight = family.values[..., estimator_index(family, name, gamma)]
        torch.testing.assert_close(weight, by_hand(batch, FAMILY[name], gamma), atol=1e-13, rtol=0)
        assert bool(family.local[estimator_index(family, name, gamma)]) == FAMILY[name].mean_own


def sketches(
    batch: ScoredRollouts, hidden: Tensor, p: Tensor, q: Tensor, projection
) -> TokenSketches:
    flat = p[batch.mask], q[batch.mask]
    return token_sketches(
        batch, hidden[batch.mask], lambda c: (flat[0][c], flat[1][c]), projection, chunk_tokens=4
    )


def test_the_eligibility_trace_is_the_same_sum() -> None:
    """Z <- gamma Z + s_t, G <- G + r_t Z, token by token, on full outer products."""
    batch, hidden, p, q = make_batch()
    family = estimator_weights(batch, ["plain"], GAMMAS)
    tokens = sketches(batch, hidden, p, q, identity_projection(V, D))
    gradients = sequence_sketches(tokens, batch.mask, family.values, family.local)
    for f, gamma in enumerate(GAMMAS):
        for i in range(B):
            trace, total = torch.zeros(V, D).double(), torch.zeros(V, D).double()
            for t in batch.mask[i].nonzero()[:, 0]:
                delta = -p[i, t].exp()
                delta[batch.tokens[i, t]] += 1
                trace = gamma * trace + torch.outer(delta, hidden[i, t])
                total = total + batch.log_ratio[i, t] * trace
            torch.testing.assert_close(gradients[i, f, 0], total.flatten(), atol=1e-12, rtol=0)


def test_a_random_sketch_is_the_projection_of_the_whole_gradient() -> None:
    batch, hidden, p, q = make_batch()
    family = estimator_weights(batch, ["plain", "rb_all"], (0.0, 0.9))
    projection = random_projection(V, D, seed=3, rows=2, copies=5)
    full, small = (
        sequence_sketches(sketches(batch, hidden, p, q, x), batch.mask, family.values, family.local)
        for x in (identity_projection(V, D), projection)
    )
    r1, r2 = (x.double() for x in (projection.vocabulary, projection.hidden))
    expected = torch.einsum("vja,bfvd,djc->bfjac", r1, full.view(B, 4, V, D), r2)
    torch.testing.assert_close(small, expected.flatten(3) / 2 / 5**0.5)
    same_seed = random_projection(V, D, seed=3, rows=2, copies=5)
    assert torch.equal(same_seed.vocabulary, projection.vocabulary)
    assert not torch.equal(random_projection(V, D, 4, 2, 5).hidden, projection.hidden)


def test_inner_products_of_sketches_are_unbiased_with_the_stated_error() -> None:
    x, y = torch.outer(normal(40, seed=1), normal(30, seed=2)), normal(40, 30, seed=3)
    y = y / y.norm() * x.norm() / 2 + x

    def squares(rows: int, copies: int) -> tuple[Tensor, Tensor]:
        values = []
        for seed in range(400):
            a = random_projection(40, 30, seed, rows, copies)
            r1, r2 = (m.double().permute(1, 2, 0) for m in (a.vocabulary, a.hidden))
            sx, sy = (a.scale * (r1 @ m @ r2.mT).flatten() for m in (x, y))
            values.append(torch.stack([sx @ sx / x.square().sum(), sx @ sy / (x * y).sum()]))
        stacked = torch.stack(values)
        return stacked.mean(0), stacked.std(0)

    for rows, copies in ((4, 2), (4, 8), (16, 2)):
        mean, spread = squares(rows, copies)
        assert bool(((mean - 1).abs() < 4 * spread / 20).all())
        # one outer product: ((1 + 2/m)^2 - 1)/J for normal entries, slightly less for signs
        predicted = (((1 + 2 / rows) ** 2 - 1) / copies) ** 0.5
        assert 0.75 * predicted < float(spread[0]) < 1.1 * predicted
    # at fixed copies, sixteen times the numbers in rows only halve the error
    assert squares(4, 2)[1][0] / squares(16, 2)[1][0] < 2.7


def test_the_copies_tell_the_sketch_error() -> None:
    """Over 100 seeds, the error is the standard deviation and the mean is the exact signal."""
    batch, hidden, p, q = make_batch()
    family = estimator_weights(batch, ["plain"], (0.0, 1.0))
    full = sequence_sketches(
        sketches(batch, hidden, p, q, identity_projection(V, D)),
        batch.mask,
        family.values,
        family.local,
    )
    exact = pair_products(full, batch.prompt)
    assert exact.mean_estimate(exact.signal[:, 1]).sketch == 0
    values, stated = [], []
    for seed in range(100):
        a = random_projection(V, D, seed, rows=3, copies=6)
        products = pair_products(
            sequence_sketches(
                sketches(batch, hidden, p, q, a), batch.mask, family.values, family.local
            ),
            batch.prompt,
        )
        estimate = products.mean_estimate(products.noise[:, 1])
        values.append(estimate.value)
        stated.append(estimate.sketch**2)
    x = torch.tensor(values)
    assert abs(float(x.mean() - exact.noise[0, 1])) < 4 * float(x.std()) / 10
    assert float(torch.tensor(stated).mean() ** 0.5 / x.std()) == pytest.approx(1, abs=0.25)


def test_masked_positions_chunks_and_padding_change_nothing() -> None:
    batch, hidden, p, q = make_batch()
    family = estimator_weights(batch, ["rb_all"], GAMMAS)
    tokens = sketches(batch, hidden, p, q, identity_projection(V, D))
    flat = p[batch.mask], q[batch.mask]
    at_once = token_sketches(
        batch, hidden[batch.mask], lambda c: (flat[0][c], flat[1][c]), identity_projection(V, D)
    )
    torch.testing.assert_close(tokens.local, at_once.local)
    wide = batch._map(lambda x: torch.cat([x, torch.zeros_like(x)], 1) if x.dim() > 1 else x)
    padded = estimator_weights(wide, ["rb_all"], GAMMAS)
    torch.testing.assert_close(
        sequence_sketches(tokens, wide.mask, padded.values, padded.local),
        sequence_sketches(tokens, batch.mask, family.values, family.local),
    )
    with pytest.raises(ValueError, match="the mask has"):
        token_sketches(batch, hidden[0], lambda c: (flat[0][c], None), identity_projection(V, D))
    with pytest.raises(ValueError, match="the projection is for 11 and 4"):
        sketches(batch, hidden, p, q, identity_projection(V, 4))


def test_measurements_join_by_prompt() -> None:
    batch, hidden, p, q = make_batch()
    halves = []
    for rows in ([0, 2], [1, 3, 4, 5]):
        part = batch.rows(rows)
        flat = p[rows][part.mask], q[rows][part.mask]
        halves.append(
            sketch_gradients(part, hidden[rows][part.mask], lambda c, f=flat: (f[0][c], f[1][c]),
                     identity_projection(V, D))
        )  # fmt: skip
    flat = p[batch.mask], q[batch.mask]
    full: GradientSketches = sketch_gradients(
        batch, hidden[batch.mask], lambda c: (flat[0][c], flat[1][c]), identity_projection(V, D)
    )
    concatenated, together = gradient_row(concatenate_sketches(halves)), gradient_row(full)
    assert concatenated.keys() == together.keys()
    for name, value in together.items():
        # a position mean averages over the prompts of its part only
        if not any(word in name for word in ("position_mean", "bias", "alpha", "occ", "cos", "ch")):
            assert concatenated[name] == pytest.approx(value, nan_ok=True), name


def test_gram_matrices_agree() -> None:
    """|g|^2 = W' K W with K_tu = <delta_t, delta_u><h_t, h_u>, and the sketch of a full matrix."""
    batch, hidden, p, q = make_batch()
    family = estimator_weights(batch, ["leave_one_out"], GAMMAS)
    tokens = sketches(batch, hidden, p, q, identity_projection(V, D))
    gradients = sequence_sketches(tokens, batch.mask, family.values, family.local)
    delta = torch.nn.functional.one_hot(batch.tokens, V) - p.exp()
    for i, j in ((0, 0), (2, 5)):
        gram = (delta[i] @ delta[j].T) * (hidden[i] @ hidden[j].T)
        product = (family.values[i].T @ gram @ family.values[j]).diagonal()
        torch.testing.assert_close((gradients[i] * gradients[j]).flatten(1).sum(1), product)
    a = random_projection(V, D, seed=2, rows=2, copies=3)
    small = sequence_sketches(
        sketches(batch, hidden, p, q, a), batch.mask, family.values, family.local
    )
    torch.testing.assert_close(small[3, 2], matrix_sketch(gradients[3, 2].view(V, D), a))
