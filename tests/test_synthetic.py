"""The exact engine against autograd through the sequence KL."""

import pytest
import torch

from synthetic.exact import expected_gradient, sequence_kl
from synthetic.mdp import TabularMDP


def world(end: int | None) -> tuple[TabularMDP, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    transition = torch.rand(4, 3, 4, generator=g, dtype=torch.float64)
    if end is not None:
        transition[end] = 0
        transition[end, :, end] = 1
    transition /= transition.sum(-1, keepdim=True)
    student, teacher = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    start = torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64)
    return TabularMDP(transition, start, 6, end), student, teacher


@pytest.mark.parametrize("end", [None, 3])
def test_gamma_one_is_the_gradient_of_the_sequence_kl(end: int | None) -> None:
    mdp, student, teacher = world(end)
    live = student.clone().requires_grad_()
    (true,) = torch.autograd.grad(sequence_kl(mdp, live, teacher).total, live)
    torch.testing.assert_close(
        expected_gradient(mdp, student, teacher, 1.0), true, atol=1e-12, rtol=0
    )
    assert (expected_gradient(mdp, student, teacher, 0.0) - true).norm() > 0.01
    assert expected_gradient(mdp, student, student, 1.0).abs().max() == 0


def test_bad_worlds_are_refused_with_their_numbers() -> None:
    mdp, student, teacher = world(None)
    with pytest.raises(ValueError, match="horizon is 0"):
        TabularMDP(mdp.transition, mdp.start, 0)
    with pytest.raises(ValueError, match="a row sums to 2"):
        TabularMDP(2 * mdp.transition, mdp.start, 3)
    with pytest.raises(ValueError, match="end state 2 is not absorbing"):
        TabularMDP(mdp.transition, mdp.start, 3, 2)
    with pytest.raises(ValueError, match=r"-0\.1"):
        expected_gradient(mdp, student, teacher, -0.1)
