"""Objectives against the exact gradient of a tree in which every trajectory is enumerated."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from opd.objectives import credit
from opd.objectives import factory as o
from opd.objectives.catalogue import SUPPORTS
from opd.objectives.objective import batch_losses
from opd.objectives.reduction import DENOMINATORS
from opd.objectives.support import JOINT_SUPPORTS
from synthetic.estimators import terms, token_batch
from synthetic.worlds.mdp import random_pair, token_chain

V, T = 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))
NODES = 1 + V + V * V


def states() -> Tensor:
    """Return the (B, T) tree node of each prefix of each of the V**T sequences."""
    a, b = SEQUENCES[:, 0], SEQUENCES[:, 1]
    return torch.stack([torch.zeros_like(a), 1 + a, 1 + V + V * a + b], 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tables() -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, NODES, V, generator=seeded(0), dtype=torch.float64))


def sequence_kl(student: Tensor, teacher: Tensor, frozen: bool) -> Tensor:
    """Return J by enumeration; with `frozen`, prefixes are weighted by a detached probability."""
    p, q = student.log_softmax(-1)[states()], teacher.log_softmax(-1)[states()]
    student_logp = p.gather(-1, SEQUENCES[..., None])[..., 0]
    if not frozen:
        teacher_logp = q.gather(-1, SEQUENCES[..., None])[..., 0]
        return (student_logp.sum(1).exp() * (student_logp - teacher_logp).sum(1)).sum()
    weight = student_logp.sum(1).exp().detach()
    return (weight[:, None] * (p.exp() * (p - q)).sum(-1)).sum()


def expected_gradient(name: str, gamma: float = 0.0, k: int = V, **choices: object) -> Tensor:
    """Return the expected gradient of an objective with respect to the student."""
    return expected_gradients(name, gamma, k, **choices)[0]


def expected_gradients(
    name: str, gamma: float, k: int, **choices: object
) -> tuple[Tensor, Tensor | None]:
    """Return gradients with respect to student and teacher; no input is detached."""
    student, teacher = (table.requires_grad_() for table in tables())
    objective = o.make_objective(name, gamma=gamma, allow_collapse=True, **choices)
    batch = every_sequence(student, teacher, objective.support, k)
    logp = batch.student_logp
    support_logp = None if batch.support is None else batch.support.student_logp
    loss = batch_losses(objective, batch, logp, support_logp).sum(1)
    total = (logp.sum(1).exp().detach() * loss).sum()
    return torch.autograd.grad(total, (student, teacher), allow_unused=True)


def every_sequence(student: Tensor, teacher: Tensor, source: str, k: int) -> ScoredRollouts:
    """Return all V**T sequences, each once, with a support and distribution statistics."""
    p, q = student.log_softmax(-1)[states()], teacher.log_softmax(-1)[states()]
    logp = p.gather(-1, SEQUENCES[..., None])[..., 0]
    teacher_ids, student_ids, present = q.topk(k, -1).indices, p.topk(k, -1).indices, None
    ids = {"student": student_ids, "full": torch.arange(V).expand_as(p)}.get(source, teacher_ids)
    if source in JOINT_SUPPORTS:
        ids, present = JOINT_SUPPORTS[source](teacher_ids, student_ids)
    support = Support(
        ids=ids,
        student_logp=p.gather(-1, ids),
        teacher_logp=q.gather(-1, ids),
        source=source,
        present=present,
    )
    return ScoredRollouts(
        tokens=SEQUENCES,
        mask=torch.ones_like(SEQUENCES, dtype=torch.bool),
        sampler_logp=logp,
        prompt=torch.arange(len(SEQUENCES)),
        ended=torch.ones(len(SEQUENCES), dtype=torch.bool),
        student_logp=logp,
        teacher_logp=q.gather(-1, SEQUENCES[..., None])[..., 0],
        support=None if source == "none" else support,
        prefix=DistributionStats(**compute_distribution_stats(p, q, SEQUENCES)),
    )


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


FAMILY = (
    "sampled_token",
    "sampled_token_weighted",
    "sampled_token_clipped",
    "mean_future",
    "full_reverse_kl",
    "full_sampled_future",
)


def scores(student: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) probability of each sequence and (B, T, NODES, V) score of each of its tokens."""
    p = student.softmax(-1)
    is_node = torch.nn.functional.one_hot(states(), NODES)[..., None]
    score = torch.nn.functional.one_hot(SEQUENCES, V) - p[states()]
    sampled_logp = p[states()].gather(-1, SEQUENCES[..., None])[..., 0]
    return sampled_logp.prod(1), is_node * score[..., None, :]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", FAMILY)
def test_the_gamma_family_has_the_mean_of_its_definition(name: str, gamma: float) -> None:
    """Compare with sum_t score_t sum_{u >= t} gamma^(u-t) r_u over all sequences."""
    student, teacher = tables()
    weight, score = scores(student)
    ratio = (student.log_softmax(-1) - teacher.log_softmax(-1))[states()]
    r = ratio.gather(-1, SEQUENCES[..., None])[..., 0]
    want = torch.zeros(NODES, V, dtype=torch.float64)
    for t, u in itertools.combinations_with_replacement(range(T), 2):
        want += gamma ** (u - t) * torch.einsum("b,bsv->sv", weight * r[:, u], score[:, t])
    torch.testing.assert_close(expected_gradient(name, gamma), want)
    if gamma in (0, 1):
        torch.testing.assert_close(want, exact(frozen=gamma == 0))


def test_the_exact_engine_finds_ratios_of_one_in_the_first_step() -> None:
    """In the first step weighted and clipped equal the plain estimator and have its moments."""
    mdp = token_chain(3, 4)
    student, teacher = random_pair(mdp, seeded(4), distance=1.0, heterogeneity=0.5)
    grid = torch.tensor([0.0, 0.5], dtype=torch.float64)
    tokens = token_batch(mdp, student, teacher)
    plain = terms(tokens, o.make_objective("sampled_token", gamma=1.0), grid)
    for objective in (
        o.make_objective("sampled_token_weighted", gamma=1.0),
        o.make_objective("sampled_token_clipped", gamma=1.0),
    ):
        objective_terms = terms(tokens, objective, grid)
        for name in ("own", "later", "step", "score"):
            torch.testing.assert_close(getattr(objective_terms, name), getattr(plain, name))


def frozen(divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the gradient of a divergence (p, q) -> () summed over frozen visited prefixes."""
    student, teacher = tables()
    visits = torch.zeros(NODES, dtype=torch.float64)
    for node in range(NODES):
        visits[node] = (scores(student)[0][:, None] * (states() == node)).sum()
    student.requires_grad_()
    p, q = student.softmax(-1), teacher.softmax(-1)
    local_divergence = torch.stack([divergence(p[i], q[i]) for i in range(NODES)])
    return torch.autograd.grad((visits * local_divergence).sum(), student)[0]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def test_other_divergences_are_exact_on_frozen_prefixes() -> None:
    forward = frozen(lambda p, q: kl(q, p))
    torch.testing.assert_close(expected_gradient("full_forward_kl"), forward)
    torch.testing.assert_close(expected_gradient("k3"), forward)
    torch.testing.assert_close(expected_gradient("k2"), exact(frozen=True))
    torch.testing.assert_close(expected_gradient("full_jsd", beta=0.0), forward)
    torch.testing.assert_close(expected_gradient("full_jsd", beta=1.0), exact(frozen=True))
    mixed = frozen(lambda p, q: 0.3 * kl(q, 0.3 * q + 0.7 * p) + 0.7 * kl(p, 0.3 * q + 0.7 * p))
    torch.testing.assert_close(expected_gradient("full_jsd", beta=0.3), mixed)
    half = frozen(lambda p, q: 0.5 * kl(q, (p + q) / 2) + 0.5 * kl(p, (p + q) / 2))
    torch.testing.assert_close(expected_gradient("full_jsd"), half)


@pytest.mark.parametrize("source", SUPPORTS)
def test_the_sampled_tail_is_unbiased_on_every_support(source: str) -> None:
    for k in (1, 2):
        name = f"{source}_topk_sampled_tail"
        torch.testing.assert_close(expected_gradient(name, k=k), exact(frozen=True))


def test_a_weighted_token_has_the_mean_of_the_student_that_moved() -> None:
    """The rollouts are those of an old student; the new student is differentiated."""
    old, teacher = tables()
    new = old + 0.5 * torch.randn(NODES, V, generator=seeded(1), dtype=torch.float64)
    batch = every_sequence(old, teacher, "none", V)
    live = new.clone().requires_grad_()
    logp = live.log_softmax(-1)[states()].gather(-1, SEQUENCES[..., None])[..., 0]
    objective = o.make_objective("sampled_token_weighted")
    weight = scores(old)[0]
    total = (weight * batch_losses(objective, batch, logp).sum(1)).sum()
    (gradient,) = torch.autograd.grad(total, live, retain_graph=True)
    reference_leaf = new.clone().requires_grad_()
    cost = old.log_softmax(-1) - teacher.log_softmax(-1)
    mean = (reference_leaf.softmax(-1) * cost).sum(-1)[states()]
    (want,) = torch.autograd.grad((weight[:, None] * mean).sum(), reference_leaf)
    torch.testing.assert_close(gradient, want)
    plain = (weight * batch_losses(o.make_objective("sampled_token"), batch, logp).sum(1)).sum()
    assert (torch.autograd.grad(plain, live)[0] - want).norm() > 0.01


def test_a_clipped_token_counts_where_it_has_not_moved_far_enough() -> None:
    """With rollouts of an old student, the weighted loss except for the clipped tokens."""
    old, teacher = tables()
    new = old + 0.5 * torch.randn(NODES, V, generator=seeded(1), dtype=torch.float64)
    batch = every_sequence(old, teacher, "none", V)
    logp = new.log_softmax(-1)[states()].gather(-1, SEQUENCES[..., None])[..., 0].requires_grad_()
    clip = (0.1, 0.4, 1.5)
    objective = o.make_objective("sampled_token_clipped", gamma=0.5, clip=clip)
    (gradient,) = torch.autograd.grad(batch_losses(objective, batch, logp).sum(), logp)
    free = batch_losses(o.make_objective("sampled_token_weighted", gamma=0.5), batch, logp)
    (slope,) = torch.autograd.grad(free.sum(), logp)
    rho, advantage = (logp - batch.student_logp).exp(), -objective.credit(batch)
    is_clipped = torch.where(advantage > 0, rho > 1.4, (rho < 0.9) | (rho > 1.5))
    torch.testing.assert_close(gradient, torch.where(is_clipped, 0, slope))
    for case in ((rho > 1.4) & (advantage > 0), (rho < 0.9) & (advantage < 0), rho > 1.5):
        assert case.any()


def test_credit_is_a_constant() -> None:
    student, teacher = (table.requires_grad_() for table in tables())
    batch = every_sequence(student, teacher, "none", V)
    assert batch.student_logp.requires_grad
    for name in FAMILY:
        assert not o.make_objective(name, gamma=0.5).credit(batch).requires_grad


def test_clipped_costs_have_the_mean_of_the_clipped_ratio() -> None:
    student, teacher = tables()
    ratio = student.log_softmax(-1) - teacher.log_softmax(-1)
    limit = float(ratio.abs().median())
    weight, score = scores(student)
    r = ratio[states()].gather(-1, SEQUENCES[..., None])[..., 0]
    for name, clipped_ratio in (("sampled_token", r.clamp(-limit, limit)), ("mean_future", None)):
        want = torch.zeros(NODES, V, dtype=torch.float64)
        mean = (student.softmax(-1) * ratio).sum(-1)[states()]
        for t, u in itertools.combinations_with_replacement(range(T), 2):
            cost = r.clamp(-limit, limit) if clipped_ratio is not None or t == u else mean
            want += 0.7 ** (u - t) * torch.einsum("b,bsv->sv", weight * cost[:, u], score[:, t])
        torch.testing.assert_close(expected_gradient(name, 0.7, ratio_clip=limit), want)
        assert (expected_gradient(name, 0.7) - want).norm() > 0.01
        wide = expected_gradient(name, 0.7, ratio_clip=100.0)
        torch.testing.assert_close(wide, expected_gradient(name, 0.7))


# --- supports, masks, denominators --------------------------------------------------------------


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
    batch = ScoredRollouts(
        tokens=zeros.long(),
        mask=mask,
        sampler_logp=zeros,
        prompt=torch.tensor([7, 3, 7, 7, 3]),
        ended=mask.any(1),
        student_logp=zeros,
        teacher_logp=zeros,
    )
    credit_values = torch.tensor([[1.0, 2.0], [10.0, 20.0], [4.0, 0.0], [7.0, 5.0], [30.0, 50.0]])
    other_means = torch.tensor([[5.5, 2.5], [30.0, 50.0], [4.0, 3.5], [2.5, 1.0], [10.0, 20.0]])
    torch.testing.assert_close(credit.leave_one_out(batch, credit_values), other_means)
    # of prompt 7 the two responses of prompt 3, and the other way round those that are alive
    means = {7: [20.0, 35.0], 3: [4.0, 3.5]}
    alive = torch.tensor([means[number] for number in batch.prompt.tolist()])
    torch.testing.assert_close(credit.position_mean(batch, credit_values), alive)
    wide = torch.stack([credit_values, -credit_values], -1)
    torch.testing.assert_close(credit.position_mean(batch, wide)[..., 1], -alive)
    torch.testing.assert_close(credit.leave_one_out(batch, wide)[..., 1], -other_means)
    with pytest.raises(ValueError, match="position_mean averages over other prompts"):
        credit.position_mean(replace(batch, prompt=torch.zeros(5).long()), credit_values)


@pytest.mark.parametrize("name", sorted(DENOMINATORS))
def test_micro_batches_do_not_change_the_loss(name: str) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    zeros = torch.zeros(3, 3)
    batch = ScoredRollouts(
        tokens=zeros.long(),
        mask=mask,
        sampler_logp=zeros,
        prompt=torch.tensor([4, 1, 4]),
        ended=mask.any(1),
        student_logp=zeros,
        teacher_logp=zeros,
    )
    losses = torch.arange(9.0).reshape(3, 3).masked_fill(~mask, torch.nan)  # nan must not count
    objective = o.make_objective("sampled_token")  # the loss of credit 1 is the log-probability
    credit_values, denominator = torch.ones(3, 3), DENOMINATORS[name](batch)
    full_loss = batch_losses(
        objective, batch, losses, denominator=denominator, credit=credit_values
    ).sum()
    parts = [
        batch_losses(
            objective,
            batch.rows([i]),
            losses[i : i + 1],
            denominator=denominator[i : i + 1],
            credit=credit_values[i : i + 1],
        ).sum()
        for i in range(3)
    ]
    torch.testing.assert_close(full_loss, torch.stack(parts).sum())
    by_hand = {
        "token_mean": 25 / 6,
        "sequence_sum": 25 / 3,
        "sequence_mean": (0.5 + 3 + 7) / 3,
        "group_mean": ((1 + 6 + 7 + 8) / 5 + 3) / 2,
    }
    assert full_loss.item() == pytest.approx(by_hand[name])
    with pytest.raises(ValueError, match="0 supervised"):
        DENOMINATORS[name](ScoredRollouts(**{**vars(batch), "mask": torch.zeros_like(mask)}))
