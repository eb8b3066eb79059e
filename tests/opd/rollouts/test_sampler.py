"""The sampler draws ids from the nucleus, by hand and with a large vocabulary."""

import pytest
import torch

from opd.rollouts.sampler import BLOCK, DIRECT_IDS, Sampler, draw, nucleus
from tests.opd.rollouts.reference_sampling import nucleus_ids, seeded


def test_draws_by_hand() -> None:
    mass = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    noise = torch.tensor([0.0, 0.2499999, 0.25, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(mass.expand(5, -1), noise).tolist() == [1, 1, 3, 3, 3]
    short = torch.tensor([[0.3, 0.3, 0.3, 0.0]])  # rounding may leave a sum below 1
    assert draw(short, noise[-1:]).tolist() == [2]


@pytest.mark.parametrize("vocabulary", [2, 32 * BLOCK, DIRECT_IDS + BLOCK, DIRECT_IDS + 7])
def test_rare_ids_beside_a_certain_one(vocabulary: int) -> None:
    """In float32 the cumulative sum would never reach the last id."""
    rare = torch.zeros(2, vocabulary)
    rare[:, -2], rare[:, -1] = 1.0, 2e-9
    noise = torch.tensor([1 - 1e-9, 1 - 3e-9], dtype=torch.float64)
    assert draw(rare, noise).tolist() == [vocabulary - 1, vocabulary - 2]


@pytest.mark.parametrize("vocabulary", [DIRECT_IDS, DIRECT_IDS + 1, 3 * DIRECT_IDS + 50])
def test_ids_of_a_large_vocabulary_are_those_of_one_cumulative_sum(vocabulary: int) -> None:
    """Every id is sampled by the noise of its own interval, its two ends included."""
    generator = seeded(1)
    mass = torch.rand(1, vocabulary, generator=generator) ** 8
    mass[:, torch.randint(vocabulary, (vocabulary // 3,), generator=generator)] = 0.0
    mass[:, 3 * BLOCK : 5 * BLOCK] = 0.0
    mass[:, -1] = 0.2
    ends = mass.double().cumsum(1)[0] / mass.double().sum()
    likely = (mass[0] > 0.1).nonzero()[:, 0]
    width = mass[0, likely].double() / mass.double().sum()
    rows = mass.expand(len(likely), -1)
    for share in (0.01, 0.5, 0.99):  # float32 sums of blocks move an interval by less
        assert torch.equal(draw(rows, ends[likely] - (1 - share) * width), likely)
    extremes = draw(mass.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert extremes.tolist() == [int(mass[0].nonzero()[0]), vocabulary - 1]


def test_every_token_has_noise_of_its_own() -> None:
    generator = seeded(0)
    scores = torch.randn(50, 7, generator=generator)
    noise = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    sampler = Sampler(7, 1.0, 1.0, noise)
    sampled = [sampler(torch.zeros(50, 1), scores).argmax(1) for _ in range(3)]
    for t, tokens in enumerate(sampled):
        mass_below_noise = scores.softmax(1).double().cumsum(1) <= noise[:, t, None]
        assert torch.equal(tokens, mass_below_noise.sum(1))


def nucleus_table(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """(B, V) probabilities inside the nucleus, renormalised."""
    ids, mass = nucleus(p, top_p)
    assert bool((ids.diff() > 0).all())
    return torch.zeros_like(p).scatter(1, ids, mass / mass.sum(1, keepdim=True))


def test_nucleus_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    p = torch.tensor([[0.3, 0.5, 0.15, 0.05]])
    torch.testing.assert_close(nucleus_table(p, 0.6), torch.tensor([[0.375, 0.625, 0.0, 0.0]]))
    torch.testing.assert_close(nucleus_table(p, 0.1), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_ties_and_extremes_of_the_nucleus() -> None:
    equal = torch.full((1, 4), 0.25)
    assert sorted(nucleus_table(equal, 0.5)[0].tolist()) == [0, 0, 0.5, 0.5]
    assert sorted(nucleus_table(equal, 1e-30)[0].tolist()) == [0, 0, 0, 1]
    torch.testing.assert_close(nucleus_table(equal, 1.0), equal)


@pytest.mark.parametrize("scales", [(3.0, 6.0), (3.0, 0.1)])
def test_the_nucleus_of_a_large_vocabulary(scales: tuple[float, ...]) -> None:
    """Peaked rows only, and a batch with a flat row whose nucleus exceeds TOP_CANDIDATES ids."""
    logits = torch.randn(2, 5000, generator=seeded(0)) * torch.tensor(scales)[:, None]
    restricted = nucleus_table(logits.softmax(-1), 0.9)
    for row, logp in zip(restricted, logits.double().log_softmax(-1), strict=True):
        kept_ids = sorted(nucleus_ids(logp, 0.9))
        assert row.nonzero()[:, 0].tolist() == kept_ids
        torch.testing.assert_close(row[kept_ids].log(), logp[kept_ids].log_softmax(-1).float())


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_both_log_probabilities_of_a_large_vocabulary(top_p: float) -> None:
    logits = 4 * torch.randn(40, DIRECT_IDS + 200, generator=seeded(3))
    noise = torch.rand(40, 1, generator=seeded(4), dtype=torch.float64)
    sampler = Sampler(DIRECT_IDS + 150, 0.8, top_p, noise)
    tokens = sampler.sample(logits)
    logp = (logits[:, : DIRECT_IDS + 150].double() / 0.8).log_softmax(-1)
    expected = logp.gather(1, tokens[:, None])
    torch.testing.assert_close(sampler.softmax_logp, expected.float())
    for row, token in enumerate(tokens.tolist()):
        kept = sorted(nucleus_ids(logp[row], top_p)) if top_p < 1 else range(DIRECT_IDS + 150)
        p = logp[row, list(kept)].softmax(0)
        below = sum(i < token for i in kept)
        assert p[:below].sum() - 1e-6 <= noise[row, 0] <= p[: below + 1].sum() + 1e-6
        assert float(sampler.sampler_logp[row, 0]) == pytest.approx(float(p[below].log()), abs=1e-5)
