"""Divergences where a probability is 0: nothing for a weight of 0, infinite for the other."""

import math

import pytest
import torch
from torch import Tensor

from opd.objectives.divergences import forward_kl, reverse_kl


def plain_kl(weight: Tensor, other: Tensor) -> list[float]:
    """KL(weight || other) of each row, number by number."""
    rows = []
    for row, other_row in zip(weight.tolist(), other.tolist(), strict=True):
        total = 0.0
        for p, q in zip(row, other_row, strict=True):
            if p > 0:
                total += p * (math.log(p / q) if q > 0 else math.inf)
        rows.append(total)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_probabilities(dtype: torch.dtype) -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [1 - 1e-12, 1e-12, 0.0], [1, 0, 0]])
    q = torch.tensor([[0.3, 0.3, 0.4], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25]])
    p, q = p.to(dtype), q.to(dtype)
    assert reverse_kl(p.log(), q.log()).tolist() == pytest.approx(plain_kl(p, q))
    assert forward_kl(q.log(), p.log()).tolist() == pytest.approx(plain_kl(p, q))
    assert reverse_kl(p.log(), q.log()).tolist()[1:3] == [math.inf, math.inf]
    clipped = reverse_kl(p.log(), q.log(), limit=3.0)
    assert float(clipped[1]) == pytest.approx(0.2 * math.log(0.2) + 0.8 * 3)


def test_an_infinite_divergence_has_no_finite_gradient() -> None:
    """So that the optimizer skips the step instead of following one token."""
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    (gradient,) = torch.autograd.grad(reverse_kl(logits.log_softmax(-1), teacher).sum(), logits)
    assert not gradient.isfinite().all()
    masked = logits.masked_fill(torch.tensor([False, False, True]), -math.inf)
    (gradient,) = torch.autograd.grad(forward_kl(masked.log_softmax(-1), teacher).sum(), logits)
    assert gradient.isfinite().all(), "both exclude the last id"
