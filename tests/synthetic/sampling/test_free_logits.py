"""Expected gradients of local objectives against one response for every token."""

import pytest
import torch

from opd.objectives import factory
from synthetic.sampling.free_logits import expected_gradients, sampled_gradients
from tests.helpers.worlds import seeded


@pytest.mark.parametrize("name", list(factory.OBJECTIVES))
def test_tokens_weighted_by_their_probabilities_are_the_mean_over_samples(name: str) -> None:
    student, teacher = torch.randn(2, 6, 7, generator=seeded(0), dtype=torch.float64)
    objective = factory.OBJECTIVES[name]
    k = 3 if objective.support not in ("none", "full") else None
    expected = sampled_gradients(student, teacher, objective, k)
    gradient = expected_gradients(student, teacher, objective, k)
    torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=1e-13)
