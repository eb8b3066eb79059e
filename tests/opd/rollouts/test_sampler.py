"""The sampler draws ids from the nucleus, by hand and with a large vocabulary."""

import pytest
import torch

from opd.rollouts.sampler import Sampler, draw, nucleus
from tests.opd.rollouts.reference_sampling import nucleus_ids, seeded


def test_draws_by_hand() -> None:
    logp = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log()
    noise = torch.tensor([0.0, 0.2499999, 0.25, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(logp.expand(5, -1), noise).tolist() == [1, 1, 3, 3, 3]
    short = torch.tensor([[0.3, 0.3, 0.3, 0.0]]).log()  # rounding may leave a sum below 1
    assert draw(short, noise[-1:]).tolist() == [2]
    rare = torch.tensor([[0.0, -20.0]])  # in float32 the sum would never reach the second id
    assert draw(rare, torch.tensor([1 - 1e-9], dtype=torch.float64)).tolist() == [1]
    assert draw(rare, torch.tensor([1 - 3e-9], dtype=torch.float64)).tolist() == [0]


def test_every_token_has_noise_of_its_own() -> None:
    generator = seeded(0)
    scores = torch.randn(50, 7, generator=generator)
    noise = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    sampler = Sampler(7, 1.0, 1.0, noise)
    sampled = [sampler(torch.zeros(50, 1), scores).argmax(1) for _ in range(3)]
    for t, tokens in enumerate(sampled):
        mass_below_noise = scores.softmax(1).double().cumsum(1) <= noise[:, t, None]
        assert torch.equal(tokens, mass_below_noise.sum(1))


def test_ties_and_extremes_of_the_nucleus() -> None:
    equal = torch.zeros(1, 4)
    assert sorted(nucleus(equal, 0.5).exp()[0].tolist()) == [0, 0, 0.5, 0.5]
    assert sorted(nucleus(equal, 1e-30).exp()[0].tolist()) == [0, 0, 0, 1]
    torch.testing.assert_close(nucleus(equal, 1.0).exp(), torch.full((1, 4), 0.25))


@pytest.mark.parametrize("scales", [(3.0, 6.0), (3.0, 0.1)])
def test_the_nucleus_of_a_large_vocabulary(scales: tuple[float, ...]) -> None:
    """Peaked rows only, and a batch with a flat row whose nucleus exceeds TOP_CANDIDATES ids."""
    logits = torch.randn(2, 5000, generator=seeded(0)) * torch.tensor(scales)[:, None]
    restricted_logp = nucleus(logits, 0.9)
    for row, logp in zip(restricted_logp, logits.double().log_softmax(-1), strict=True):
        kept_ids = sorted(nucleus_ids(logp, 0.9))
        assert row.isfinite().nonzero()[:, 0].tolist() == kept_ids
        torch.testing.assert_close(row[kept_ids], logp[kept_ids].log_softmax(-1).float())
