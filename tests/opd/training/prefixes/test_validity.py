"""Every objective on every writer's tokens: its exact bias, and whether the settings are refused.

A vocabulary of V tokens after one prefix, all of them enumerated. An objective is valid on a
writer's tokens if its mean gradient over them is the one over the student's own: the loss of the
prefix does not depend on who wrote the token after it. The likelihood is the exception: it is right
on tokens of others, and teaches nothing on the student's own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from opd.config.settings import Config, with_settings
from opd.objectives.catalogue import CONTROLS, OBJECTIVES
from opd.objectives.factory import make_objective
from opd.objectives.objective import Objective, batch_losses
from opd.training.validation import validate
from tests.helpers.batches import support_of_every_token
from tests.helpers.runs import settings

V, K = 8, 3
EXACT = 1e-9


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, generator=generator, dtype=torch.float64)


STUDENT_LOGITS = logits(0)
STUDENT, TEACHER, WRITER = (logits(seed).log_softmax(0) for seed in (0, 1, 2))


def mean_gradient(objective: Objective, writer: Tensor) -> Tensor:
    """Gradient by the student's logits, a mean over every token by its probability.

    The credit of a token is an arbitrary number, as later costs or the reward may be.
    """
    tokens = torch.arange(V)[:, None]
    batch = ScoredRollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=writer[:, None],
        prompt=torch.zeros(V, dtype=torch.long),
        ended=torch.ones(V, dtype=torch.bool),
        student_logp=STUDENT[:, None],
        teacher_logp=TEACHER[:, None],
        support=support_of_every_token(objective.support, STUDENT, TEACHER, K),
    )
    leaf = STUDENT_LOGITS.clone().requires_grad_()
    logp = leaf.log_softmax(0)
    credit = logits(4)[:, None] if objective.has_credit else torch.zeros(V, 1).double()
    losses = batch_losses(
        objective,
        batch,
        logp[:, None],
        None if batch.support is None else logp[batch.support.ids],
        credit=credit,
    )
    return torch.autograd.grad((writer.exp() * losses[:, 0]).sum(), leaf)[0]


def config_of(tiny: tuple[Path, Path], name: str, **changes: Any) -> Config:
    options = {"objective": name, "allow_collapse": True, "teacher": "t"}
    if name in ("reward_only",):
        options["reward_weight"] = 1.0
    return with_settings(settings(tiny, Path("unused")), **(options | changes))


@pytest.mark.parametrize("reward_weight", [0.0, 1.0])
@pytest.mark.parametrize("name", [*OBJECTIVES, *CONTROLS])
def test_what_is_refused_is_biased_and_the_rest_is_not(
    name: str, reward_weight: float, tmp_path: Path
) -> None:
    if name == "reward_only" and not reward_weight:
        return
    options: dict[str, Any] = {"reward_weight": reward_weight, "allow_collapse": True}
    objective = make_objective(name, **options)
    own = mean_gradient(objective, STUDENT)
    bias = float((mean_gradient(objective, WRITER) - own).norm())
    is_likelihood = name == "negative_log_likelihood"
    if is_likelihood and not reward_weight:
        assert own.norm() < EXACT, "its own samples teach nothing"
    else:
        assert (bias < EXACT) == (not objective.requirements.own_samples), bias
    pair = (tmp_path / "s", tmp_path / "t")
    changes: dict[str, Any] = {"reward_weight": reward_weight}

    def refused(prefixes: str, **further: Any) -> bool:
        settings_of_case = config_of(pair, name, **changes, prefixes=prefixes, **further)
        messages = validate(settings_of_case)
        return any(
            start in text for text in messages for start in ("prefixes is", "ratio is token")
        )

    valid = bias < EXACT or (is_likelihood and not reward_weight)
    assert refused("teacher") == (not valid)
    assert refused("mixed:0.5:dataset") == (not valid)
    assert refused("replay:1") == (bias > EXACT and not (is_likelihood and not reward_weight))
    if valid:
        return
    weighted = make_objective(name, **options, ratio="token")
    assert (mean_gradient(weighted, WRITER) - own).norm() < EXACT, "the ratio repairs it"
    if not (is_likelihood and reward_weight):
        assert not refused("replay:1", ratio="token")
        assert not refused("teacher", ratio="sequence")
        assert refused("teacher", ratio="token") == bool(reward_weight)


def test_a_ratio_of_tokens_leaves_what_later_tokens_decide() -> None:
    """Two tokens, the second one's cost depending on the first; every response is enumerated.

    With the ratio of the sequence the mean gradient of the first token's later cost is that under
    the student. With the ratio of the token, the second token is the writer's.
    """
    p, q = STUDENT.exp(), WRITER.exp()
    cost = torch.outer(logits(5), logits(6))  # of the second token, after the first
    first, second = torch.arange(V).repeat_interleave(V), torch.arange(V).repeat(V)
    tokens = torch.stack([first, second], 1)
    costs = torch.stack([torch.zeros(V * V).double(), cost[first, second]], 1)
    batch = ScoredRollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=WRITER[tokens],
        prompt=torch.zeros(V * V, dtype=torch.long),
        ended=torch.ones(V * V, dtype=torch.bool),
        student_logp=STUDENT[tokens],
        teacher_logp=STUDENT[tokens] - costs,
    )

    def gradient(ratio: str) -> Tensor:
        objective = make_objective("sampled_token", gamma=1.0, ratio=ratio)
        leaf = STUDENT_LOGITS.clone().requires_grad_()
        logp = torch.stack([leaf.log_softmax(0)[first], STUDENT[second]], 1)
        losses = batch_losses(objective, batch, logp)[:, 0]
        return torch.autograd.grad((q[first] * q[second] * losses).sum(), leaf)[0]

    def exact(second_writer: Tensor) -> Tensor:
        leaf = STUDENT_LOGITS.clone().requires_grad_()
        value = (leaf.softmax(0) * (cost @ second_writer)).sum()
        return torch.autograd.grad(value, leaf)[0]

    torch.testing.assert_close(gradient("sequence"), exact(p))
    torch.testing.assert_close(gradient("token"), exact(q))
    assert (exact(p) - exact(q)).norm() > 0.01
