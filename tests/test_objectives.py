"""The objectives against the exact gradient of a tree whose every trajectory is enumerated."""

import itertools

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Scored, Support
from opd import credit
from opd import objectives as o

V, T = 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))
NODES = 1 + V + V * V


def states() -> Tensor:
    """(B, T) tree node of each prefix of each of the V**T sequences."""
    a, b = SEQUENCES[:, 0], SEQUENCES[:, 1]
    return torch.stack([torch.zeros_like(a), 1 + a, 1 + V + V * a + b], 1)


def tables() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, NODES, V, generator=generator, dtype=torch.float64))


def sequence_kl(student: Tensor, teacher: Tensor, frozen: bool) -> Tensor:
    """J by enumeration; with `frozen`, prefixes are weighted by a detached probability."""
    p, q = student.log_softmax(-1)[states()], teacher.log_softmax(-1)[states()]
    chosen = p.gather(-1, SEQUENCES[..., None])[..., 0]
    if not frozen:
        theirs = q.gather(-1, SEQUENCES[..., None])[..., 0]
        return (chosen.sum(1).exp() * (chosen - theirs).sum(1)).sum()
    weight = chosen.sum(1).exp().detach()
    return (weight[:, None] * (p.exp() * (p - q)).sum(-1)).sum()


def expected_gradient(name: str, gamma: float = 0.0, k: int = V) -> Tensor:
    """Expected gradient of an objective with respect to the student."""
    return expected_gradients(name, gamma, k)[0]


def expected_gradients(name: str, gamma: float, k: int) -> tuple[Tensor, Tensor | None]:
    """With respect to student and teacher; every tensor given is live, none is detached."""
    student, teacher = (table.requires_grad_() for table in tables())
    p, q = student.log_softmax(-1)[states()], teacher.log_softmax(-1)[states()]
    logp = p.gather(-1, SEQUENCES[..., None])[..., 0]
    ids = (p if name.startswith("student") else q).topk(k, -1).indices
    source = o.make(name, gamma).support
    ours = p.gather(-1, ids)
    batch = Scored(
        tokens=SEQUENCES,
        mask=torch.ones_like(SEQUENCES, dtype=torch.bool),
        sampler_logp=logp,
        prompt=torch.arange(len(SEQUENCES)),
        ended=torch.ones(len(SEQUENCES), dtype=torch.bool),
        student_logp=logp,
        teacher_logp=q.gather(-1, SEQUENCES[..., None])[..., 0],
        support=Support(ids=ids, student_logp=ours, teacher_logp=q.gather(-1, ids), source=source),
    )
    loss = o.make(name, gamma).loss(logp, ours, batch).sum(1)
    total = (logp.sum(1).exp().detach() * loss).sum()
    return torch.autograd.grad(total, (student, teacher), allow_unused=True)


def exact(frozen: bool) -> Tensor:
    student, teacher = tables()
    student.requires_grad_()
    return torch.autograd.grad(sequence_kl(student, teacher, frozen), student)[0]


def test_to_go_credit_is_unbiased_for_the_sequence_kl() -> None:
    torch.testing.assert_close(expected_gradient("sampled_token", 1.0), exact(frozen=False))


def test_immediate_credit_is_unbiased_for_the_frozen_kl_only() -> None:
    torch.testing.assert_close(expected_gradient("sampled_token"), exact(frozen=True))
    assert (exact(frozen=True) - exact(frozen=False)).norm() > 0.01


def test_full_kl_and_whole_support_have_the_token_level_mean() -> None:
    torch.testing.assert_close(expected_gradient("full_reverse_kl"), exact(frozen=True))
    torch.testing.assert_close(expected_gradient("teacher_topk"), exact(frozen=True))


def test_local_support_matching_is_biased_and_blind_outside_its_support() -> None:
    gradient = expected_gradient("teacher_topk", k=2)
    assert (gradient - exact(frozen=True)).norm() > 0.01
    outside = tables()[1].argmin(-1, keepdim=True)
    assert gradient.gather(-1, outside).abs().max() < 1e-12
    assert expected_gradient("teacher_topk", k=1).abs().max() < 1e-12


@pytest.mark.parametrize("name", sorted(o.OBJECTIVES))
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = expected_gradients(name, gamma=0.0, k=2 if "topk" in name else V)
    assert student.norm() > 0.01
    assert teacher is None


def test_discount_lies_between_and_skips_masked_positions() -> None:
    cost = torch.tensor([[1.0, 0.0, 2.0, 4.0]])
    mask = torch.tensor([[True, False, True, True]])
    torch.testing.assert_close(
        credit.discounted(cost, mask, 0.5), torch.tensor([[3.0, 0.0, 4.0, 4.0]])
    )
    torch.testing.assert_close(credit.to_go(cost, mask), torch.tensor([[7.0, 0.0, 6.0, 4.0]]))
    torch.testing.assert_close(credit.discounted(cost, mask, 1.0), credit.to_go(cost, mask))
    torch.testing.assert_close(credit.discounted(cost, mask, 0.0), credit.immediate(cost, mask))


def test_baselines_average_the_responses_they_say() -> None:
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True], [True, True]])
    zeros = torch.zeros(5, 2)
    batch = Scored(
        tokens=zeros.long(),
        mask=mask,
        sampler_logp=zeros,
        prompt=torch.tensor([7, 3, 7, 7, 3]),
        ended=mask.any(1),
        student_logp=zeros,
        teacher_logp=zeros,
    )
    given = torch.tensor([[1.0, 2.0], [10.0, 20.0], [4.0, 0.0], [7.0, 5.0], [30.0, 50.0]])
    others = torch.tensor([[5.5, 2.5], [30.0, 50.0], [4.0, 3.5], [2.5, 1.0], [10.0, 20.0]])
    torch.testing.assert_close(credit.leave_one_out(batch, given), others)
    alive = torch.tensor([52 / 5, 77 / 4]).expand(5, 2)
    torch.testing.assert_close(credit.position_mean(batch, given), alive)


@pytest.mark.parametrize("name", sorted(o.DENOMINATORS))
def test_micro_batches_do_not_change_the_loss(name: str) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    zeros = torch.zeros(3, 3)
    batch = Scored(
        tokens=zeros.long(),
        mask=mask,
        sampler_logp=zeros,
        prompt=torch.arange(3),
        ended=mask.any(1),
        student_logp=zeros,
        teacher_logp=zeros,
    )
    loss = torch.arange(9.0).reshape(3, 3)
    denominator = o.DENOMINATORS[name](batch)
    whole = o.reduce(loss, mask, denominator)
    parts = sum(
        o.reduce(loss[i : i + 1], mask[i : i + 1], denominator[i : i + 1]) for i in range(3)
    )
    torch.testing.assert_close(whole, torch.as_tensor(parts))
    by_hand = {"token_mean": 25 / 6, "sequence_sum": 25 / 3, "sequence_mean": (0.5 + 3 + 7) / 3}
    assert whole.item() == pytest.approx(by_hand[name])
    with pytest.raises(ValueError, match="0 supervised"):
        o.DENOMINATORS[name](Scored(**{**vars(batch), "mask": torch.zeros_like(mask)}))


def test_refusals_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        o.make("sampled_token", 1.5)
    with pytest.raises(ValueError, match="no effect"):
        o.make("teacher_topk", 0.5)
    with pytest.raises(ValueError, match="unknown objective 'kl'"):
        o.make("kl")
    with pytest.raises(ValueError, match="gradient of mean zero"):
        o.make("k1")
    with pytest.raises(ValueError, match="gradient of mean zero"):
        o.make("kl_advantage", 0.5)
    with pytest.raises(ValueError, match="no credit from which to subtract"):
        o.make("teacher_topk", baseline="position_mean")
    with pytest.raises(ValueError, match="unknown baseline 'mean'"):
        o.make("sampled_token", baseline="mean")
    with pytest.raises(ValueError, match="unknown ratio 'both'"):
        o.make("sampled_token", ratio="both")
