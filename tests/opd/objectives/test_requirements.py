"""Requirements are true of the functions, and wrapping a function changes no answer.

Shapes: B responses, T positions, V vocabulary, K support ids.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.errors import InvalidInput
from opd.objectives.catalogue import OBJECTIVES
from opd.objectives.factory import make_objective
from opd.objectives.objective import Objective, batch_losses
from opd.objectives.requirements import Requirements
from opd.objectives.support import JOINT_SUPPORTS

B, T, V, K = 6, 4, 7, 3
OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"gamma": 0.7},
    {"baseline": "position_mean"},
    {"baseline": "leave_one_out", "gamma": 0.7},
    {"baseline": "local_kl"},
    {"baseline": "given"},
    {"ratio": "token"},
    {"ratio": "sequence"},
    {"ratio_clip": 0.5},
    {"ratio_clip": 0.5, "gamma": 0.7},
    {"reward_weight": 0.5},
    {"reward_weight": 0.5, "reward_baseline": "group_normal", "gamma": 0.7},
    {"beta": 0.0},
    {"beta": 0.3},
    {"clip": (0.1, 0.1, 2.0)},
    {"mask_scope": "loss", "gamma": 0.7},
)


def built(name: str) -> list[tuple[dict[str, object], Objective]]:
    """Return the objective with every option that it accepts."""
    objectives = []
    for options in OPTIONS:
        try:
            objectives.append((options, make_objective(name, allow_collapse=True, **options)))  # type: ignore[arg-type]
        except InvalidInput:
            continue
    return objectives


def scored(source: str) -> ScoredRollouts:
    """Return three prompts with two rollouts each, scored on a support."""
    g = torch.Generator().manual_seed(0)
    student, teacher, sampler = (
        torch.randn(3, B, T, V, generator=g, dtype=torch.float64).log_softmax(-1).unbind(0)
    )
    tokens = torch.randint(V, (B, T), generator=g)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3] = mask[2, 1] = False
    teacher_ids, student_ids = (x.topk(K, -1).indices for x in (teacher, student))
    ids, present = (
        {"student": student_ids, "full": torch.arange(V).expand(B, T, V)}.get(source, teacher_ids),
        None,
    )
    if source in JOINT_SUPPORTS:
        ids, present = JOINT_SUPPORTS[source](teacher_ids, student_ids)

    def sampled(logp: Tensor) -> Tensor:
        return logp.gather(-1, tokens[..., None])[..., 0]

    support = Support(
        ids=ids,
        student_logp=student.gather(-1, ids),
        teacher_logp=teacher.gather(-1, ids),
        source=source,
        present=present,
    )
    return ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=sampled(sampler),
        student_logp=sampled(student),
        teacher_logp=sampled(teacher),
        prompt=torch.arange(B) // 2,
        ended=torch.ones(B, dtype=torch.bool),
        reward=torch.rand(B, generator=g, dtype=torch.float64),
        baseline=torch.randn(B, T, generator=g, dtype=torch.float64),
        support=None if source == "none" else support,
        prefix=DistributionStats(**compute_distribution_stats(student, teacher, tokens)),
    )


def loss_and_gradients(
    objective: Objective, batch: ScoredRollouts, *, offset: float = 0.0, pass_logp: bool = True
) -> list[Tensor]:
    """Return the token losses, and gradients by log p(y) and by log p on the support.

    `offset` is added to all log-probabilities of the student at the second position.
    """
    shift = offset * (torch.arange(T) == 1)
    logp = (batch.student_logp * 0.9 + shift).requires_grad_()  # the student has moved
    leaves = [logp]
    if batch.support is not None:
        leaves.append((batch.support.student_logp * 0.9 + shift[:, None]).requires_grad_())
    support_logp = leaves[1] if leaves[1:] else None
    losses = batch_losses(objective, batch, logp if pass_logp else None, support_logp)
    gradients = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True, allow_unused=True)
    return [losses.detach(), *gradients]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-12) for a, b in zip(first, second, strict=True))


def differs(expected: list[Tensor], compute: Callable[[], list[Tensor]]) -> bool:
    """Whether the result is another one, or what it needs is missing."""
    try:
        return not same(expected, compute())
    except (InvalidInput, ValueError):
        return True


def measured(objective: Objective) -> Requirements:
    """Find out by removing and changing inputs what the loss reads."""
    batch = scored(objective.support)
    base = loss_and_gradients(objective, batch)
    assert base[0].abs().sum() > 0
    no_teacher = replace(batch, teacher_logp=torch.full_like(batch.teacher_logp, torch.nan))
    # a valid change as well: a clip might turn nan into a number
    change = 0.2 * torch.rand(B, T, generator=torch.Generator().manual_seed(1))
    other_teacher = replace(batch, teacher_logp=batch.teacher_logp - change)
    teacher_changes = [
        differs(base, partial(loss_and_gradients, objective, x))
        for x in (no_teacher, other_teacher)
    ]
    assert teacher_changes[0] == teacher_changes[1]
    credit, rows = objective.credit(batch), [[i] for i in range(B)]
    return replace(
        objective.requirements,
        support=objective.support if batch.support is not None else "none",
        sampled_logp=bool(base[1].any()),
        teacher_sampled_logp=teacher_changes[0],
        normalised=differs(base, partial(loss_and_gradients, objective, batch, offset=0.3)),
        distributions=differs(
            base, partial(loss_and_gradients, objective, replace(batch, prefix=None))
        ),
        whole_groups=any(
            differs([credit[i]], lambda i=i: [objective.credit(batch.rows(i))]) for i in rows
        ),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_requirements_are_what_the_loss_reads(name: str) -> None:
    """`on_policy` is measured in tests/opd/training/test_repeated_updates.py."""
    for options, objective in built(name):
        needs, batch = objective.requirements, scored(objective.support)
        assert needs == measured(objective), options
        without_logp = partial(loss_and_gradients, objective, batch, pass_logp=False)
        assert differs(loss_and_gradients(objective, batch), without_logp) == needs.sampled_logp
        if needs.support == "none":
            with_support = replace(batch, support=scored("teacher").support)
            expected = loss_and_gradients(objective, batch)
            assert same(expected, loss_and_gradients(objective, with_support)[:2])
        else:
            assert batch.support is not None
            other_support = replace(batch.support, teacher_logp=batch.support.teacher_logp.flip(-1))
            changed = partial(loss_and_gradients, objective, replace(batch, support=other_support))
            assert differs(loss_and_gradients(objective, batch), changed)
            with pytest.raises(InvalidInput, match="support"):
                loss_and_gradients(objective, replace(batch, support=None))


def test_both_answers_of_every_requirement_occur() -> None:
    all_needs = [objective.requirements for name in OBJECTIVES for _, objective in built(name)]
    for field in (
        "sampled_logp",
        "teacher_sampled_logp",
        "normalised",
        "distributions",
        "whole_groups",
        "on_policy",
    ):
        assert {vars(needs)[field] for needs in all_needs} == {True, False}, field
    assert {needs.support for needs in all_needs} == {
        "none",
        "teacher",
        "student",
        "union",
        "intersection",
        "full",
    }
    assert make_objective("teacher_topk", support_k=5).requirements.support_k == 5


def wrapped(objective: Objective) -> Objective:
    """Wrap every function of an objective."""
    reward_cost = objective.reward_cost
    return replace(
        objective,
        local=replace(objective.local, surrogate=partial(objective.local.surrogate)),
        score=replace(objective.score, function=partial(objective.score.function)),
        own_cost=replace(objective.own_cost, function=partial(objective.own_cost.function)),
        later_cost=replace(objective.later_cost, function=partial(objective.later_cost.function)),
        baseline=replace(objective.baseline, function=partial(objective.baseline.function)),
        reward_cost=None if reward_cost is None else partial(reward_cost),
        ratio=partial(objective.ratio),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_wrapping_functions_changes_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = built(name)
    monkeypatch.setitem(OBJECTIVES, name, wrapped(OBJECTIVES[name]))
    from_wrapped = built(name)
    assert [options for options, _ in plain] == [options for options, _ in from_wrapped]
    for (_, objective), (_, other) in zip(plain, from_wrapped, strict=True):
        for variant in (other, wrapped(objective)):
            batch = scored(objective.support)
            assert variant.requirements == objective.requirements
            assert same(loss_and_gradients(objective, batch), loss_and_gradients(variant, batch))
