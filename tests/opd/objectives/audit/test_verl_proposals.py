"""Reverse KLs on a top-K that were proposed for verl: where they rest, and what a cut at 0 does."""

import math

import pytest
import torch
from torch import Tensor

from diagnostics.io.user_functions import load_function
from opd.objectives.audit.audit import audit
from opd.objectives.audit.verl.batches import Rows, package
from tests.helpers.paths import ROOT

PROPOSALS = f"{ROOT}/examples/verl/reverse_topk.py"
TEACHER = [0.4, 0.3, 0.2, 0.1]
"""A teacher whose two most probable ids hold 0.7."""


def loss_and_gradient(name: str, p: list[float], q: list[float], k: int) -> tuple[float, Tensor]:
    """Return a loss of one position and its gradient by the student's logits."""
    logits = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor(q, dtype=torch.float64).log()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = load_function(f"{PROPOSALS}:{name}", "loss")(
        logits[None, None], teacher[None, None], mask, k=k
    )
    return float(loss.detach()), torch.autograd.grad(loss, logits)[0]


def descend(name: str, p: list[float], steps: int) -> Tensor:
    """Return the student's probabilities after plain descent with K = 2."""
    logits = torch.tensor(p, dtype=torch.float64).log()
    for _ in range(steps):
        probabilities = logits.softmax(-1).tolist()
        logits = logits - loss_and_gradient(name, probabilities, TEACHER, 2)[1]
    return logits.softmax(-1)


def test_the_cut_silences_a_position_by_hand() -> None:
    p, q = [0.6, 0.4], [0.9, 0.1]
    loss, gradient = loss_and_gradient("student_support", p, q, 1)
    assert loss == pytest.approx(0.6 * math.log(0.6 / 0.9))
    slope = 0.24 * (1 + math.log(0.6 / 0.9))
    assert gradient.tolist() == pytest.approx([slope, -slope])
    loss, gradient = loss_and_gradient("student_support_cut", p, q, 1)
    assert loss == 0.0
    assert gradient.tolist() == [0.0, 0.0]


def test_the_teacher_is_pushed_out_of_the_support() -> None:
    expected = [0.4 * 0.3, 0.3 * 0.3, -0.2 * 0.7, -0.1 * 0.7]  # p (1[v in S] - p(S))
    for name in ("student_support", "union"):
        assert loss_and_gradient(name, TEACHER, TEACHER, 2)[1].tolist() == pytest.approx(expected)


def test_without_the_cut_descent_goes_on_to_a_flat_support() -> None:
    mass = descend("student_support", TEACHER, 400).sort(descending=True).values[:2].sum()
    assert float(mass) < 0.55  # the support follows the student: at least half of four ids


def test_the_cut_ends_the_descent_beside_the_teacher() -> None:
    after_one, after_all = (descend("student_support_cut", TEACHER, x) for x in (1, 400))
    assert torch.equal(after_one, after_all)
    assert 0.45 < float(after_all[:2].sum()) < 0.7


def test_the_cut_does_not_pull_back_a_student_that_left() -> None:
    p = [0.3, 0.29, 0.21, 0.2]
    assert loss_and_gradient("student_support_cut", p, TEACHER, 2)[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["student_support_cut", "union_cut"])
def test_the_audit_finds_both_faults(name: str) -> None:
    card = audit(load_function(f"{PROPOSALS}:{name}", "loss"))
    assert {"biased", "off_teacher_fixed_point"} <= {*card.faults}


@pytest.mark.verl
def test_the_cut_is_that_of_verls_function_for_a_topk() -> None:
    from verl.trainer.distillation.losses import compute_forward_kl_topk

    generator = torch.Generator().manual_seed(1)
    student, noise = torch.randn(2, 1, 6, 5, generator=generator, dtype=torch.float64)
    teacher = 1.5 * student + 0.5 * noise
    student.requires_grad_()
    sums = load_function(f"{PROPOSALS}:on_student_support", "loss")(student, teacher, 2)[0]
    assert 0 < int((sums < 0).sum()) < 6
    mask = torch.ones(1, 6, dtype=torch.bool)
    rows = Rows({"tokens": torch.zeros(1, 6, dtype=torch.long), "mask": mask})
    per_token = rows.sequences(sums[None])
    output = {
        "distillation_losses": per_token,
        "student_mass": per_token.detach(),
        "teacher_mass": per_token.detach(),
    }
    losses, _ = compute_forward_kl_topk(
        config=None,
        distillation_config=None,
        model_output=output,
        data=package("tensordict").TensorDict(rows.token_fields(), batch_size=1),
    )
    ours = load_function(f"{PROPOSALS}:student_support_cut", "loss")(student, teacher, mask)
    assert float(losses.detach().mean()) == pytest.approx(float(ours.detach()))
    found = torch.autograd.grad(losses.mean(), student, retain_graph=True)[0]
    assert torch.allclose(found, torch.autograd.grad(ours, student)[0])
