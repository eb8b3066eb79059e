"""Several updates on one set of rollouts: the mean gradient of the second one, over every token.

A vocabulary of V tokens after one prefix. The rollouts come from the student `old` (or from another
sampler), and the student has since been updated to `moved`; a loss that is valid on them has the
same mean gradient as on tokens sampled from the updated student.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from opd.config.problems import raise_problems
from opd.config.settings import Config, with_settings
from opd.objectives import factory
from opd.objectives.credit import RATIOS
from opd.objectives.objective import Objective, batch_losses
from opd.training.validation import validate
from tests.helpers.batches import support_of_every_token

V, K = 8, 3
EXACT = 1e-9


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, generator=generator, dtype=torch.float64)


OLD, TEACHER, SAMPLER = (logits(seed).log_softmax(0) for seed in (0, 1, 2))
MOVED_LOGITS = logits(0) + 0.5 * logits(3)


def every_token(source: str, sampler: Tensor) -> ScoredRollouts:
    tokens = torch.arange(V)[:, None]
    return ScoredRollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=sampler[:, None],
        prompt=torch.zeros(V, dtype=torch.long),
        ended=torch.ones(V, dtype=torch.bool),
        student_logp=OLD[:, None],
        teacher_logp=TEACHER[:, None],
        support=support_of_every_token(source, OLD, TEACHER, K),
    )


def second_update_error(objective: Objective, sampler: Tensor) -> float:
    """Relative error of the mean gradient at the updated student over the sampler's tokens.

    The credit is an arbitrary number per token; the ratios to the sampler and to the student of the
    rollouts are 1 for tokens sampled from the updated student.
    """
    student_logits = MOVED_LOGITS.clone().requires_grad_()
    logp = student_logits.log_softmax(0)
    batch = every_token(objective.support, sampler)
    at_support = None if batch.support is None else logp[batch.support.ids]
    credit = logits(4)[:, None] if objective.has_credit else torch.zeros(V, 1).double()
    just_drawn = replace(batch, student_logp=logp.detach()[:, None])
    losses = [
        batch_losses(loss_objective, rollouts, logp[:, None], at_support, credit=credit)[:, 0]
        for loss_objective, rollouts in (
            (objective, batch),
            (replace(objective, ratio=RATIOS["none"]), just_drawn),
        )
    ]
    actual, expected = (
        torch.autograd.grad(
            (weight.exp().detach() * loss).sum(), student_logits, retain_graph=True
        )[0]
        for weight, loss in zip((sampler, logp), losses, strict=True)
    )
    return float((actual - expected).norm() / expected.norm())


def settings(name: str, **changes: object) -> Config:
    fields: dict[str, object] = {"objective": name, "allow_collapse": True, "updates_per_batch": 2}
    return with_settings(
        Config(student="s", teacher="t", out="o"), prompts_per_step=4, **(fields | changes)
    )


def refuse_problems(config: Config) -> None:
    raise_problems(validate(config))


@pytest.mark.parametrize("reward_weight", [0.0, 0.5])
@pytest.mark.parametrize("name", sorted(set(factory.OBJECTIVES) - {"sampled_token_clipped"}))
def test_several_updates_are_for_losses_whose_mean_stays_right(
    name: str, reward_weight: float
) -> None:
    config = settings(name, reward_weight=reward_weight)
    objective = factory.make_objective(name, reward_weight=reward_weight, allow_collapse=True)
    error = second_update_error(objective, OLD)
    assert (error < EXACT) == (not objective.requirements.on_policy), error
    if error < EXACT:
        refuse_problems(config)
    else:
        assert error > 1e-3
        with pytest.raises(ValueError, match=r"updates_per_batch is 2: .*allow_unweighted"):
            refuse_problems(config)
        refuse_problems(with_settings(config, allow_unweighted=True))


def test_the_ratio_of_the_rollouts_repairs_the_first_update_alone() -> None:
    """With another sampler, the ratios of both old and updated student are needed."""
    plain, weighted = (
        factory.make_objective(name, ratio="token")
        for name in ("sampled_token", "sampled_token_weighted")
    )
    assert second_update_error(plain, SAMPLER) > 0.01
    assert second_update_error(weighted, SAMPLER) < EXACT
    assert second_update_error(factory.make_objective("sampled_token_weighted"), SAMPLER) > 0.01
    served = {"engine": "servers", "rollout_servers": ("http://h:1/v1",), "ratio": "token"}
    with pytest.raises(ValueError, match="updates_per_batch is 2"):
        refuse_problems(settings("sampled_token", **served, rollout_lag=1))
    refuse_problems(settings("sampled_token_weighted", **served, rollout_lag=1))
    with pytest.raises(ValueError, match="rollout_lag is 1"):
        refuse_problems(
            settings("sampled_token_weighted", **(served | {"ratio": "none"}), rollout_lag=1)
        )


def test_a_wide_clip_leaves_the_mean_of_the_weighted_score() -> None:
    wide = factory.make_objective("sampled_token_clipped", clip=(1 - 1e-9, 1e9, 1e10))
    assert second_update_error(wide, OLD) < 1e-6


def test_what_an_objective_reads_depends_on_its_discount() -> None:
    for name in ("full_reverse_kl", "full_sampled_future"):
        refuse_problems(settings(name))  # at gamma 0 they do not read the sampled token
        with pytest.raises(ValueError, match="updates_per_batch is 2"):
            refuse_problems(settings(name, gamma=0.5))
