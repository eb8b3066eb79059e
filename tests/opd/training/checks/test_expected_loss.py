"""The expected loss against the training loss: every objective, denominator and credit."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from diagnostics.batch import ScoredRollouts
from opd.config.settings import Config, with_settings
from opd.objectives.catalogue import COLLAPSING, OBJECTIVES
from opd.objectives.factory import make_objective
from opd.objectives.objective import batch_losses
from opd.objectives.reduction import DENOMINATORS
from opd.training.checks.expected_loss import (
    ROUNDING,
    credit_from_settings,
    expected_loss,
    loss_check_columns,
    ratio_from_settings,
    row_weights,
)
from tests.helpers.dense_batches import B, make_dense_batch


def config(**changes: Any) -> Config:
    plain: dict[str, Any] = {"student": "s", "teacher": "t", "out": "o"}
    accepted = any(str(changes.get("objective", "")).endswith(end) for end in COLLAPSING)
    return with_settings(
        Config(student="", teacher="", out=""), **plain | {"allow_collapse": accepted} | changes
    )


def batch_for(
    name: str, seed: int = 0, sharpness: float = 2.0
) -> tuple[ScoredRollouts, torch.Tensor]:
    """A batch with the objective's support, and (B, T, V) log-probabilities of the student."""
    source = name.split("_topk")[0] if "_topk" in name else "teacher"
    source = "full" if name.startswith("full_") else source
    dense_batch = make_dense_batch(seed, source, k=6, sharpness=sharpness)
    batch = replace(dense_batch.batch, reward=torch.arange(B, dtype=torch.float64) % 3)
    return batch, dense_batch.p


def trained_loss(settings: Config, batch: ScoredRollouts) -> float:
    """The loss of `opd.objectives.objective`, before any update."""
    objective = make_objective(
        settings.objective.objective,
        gamma=settings.objective.gamma,
        baseline=settings.objective.baseline,
        ratio=settings.objective.ratio,
        beta=settings.objective.beta,
        ratio_clip=math.inf
        if settings.objective.ratio_clip is None
        else settings.objective.ratio_clip,
        reward_weight=settings.objective.reward_weight,
        allow_collapse=settings.objective.allow_collapse,
    )
    loss_batch = batch if objective.support != "none" else replace(batch, support=None)
    support = None if loss_batch.support is None else loss_batch.support.student_logp
    denominator = DENOMINATORS[settings.objective.denominator](batch)
    losses = batch_losses(
        objective, loss_batch, batch.student_logp, support, denominator=denominator
    )
    return float(losses.sum())


def vector_of(settings: Config, batch: ScoredRollouts) -> torch.Tensor | None:
    rows = list(range(len(batch)))
    return expected_loss(
        settings,
        batch,
        credit_from_settings(settings, batch),
        ratio_from_settings(settings, batch),
        rows=rows,
        micro_batches=[rows[:3], rows[3:]],
        all_ranks_batch=replace(batch, support=None),
        positions=rows,
    )


CASES = [{"objective": name} for name in OBJECTIVES]
CASES += [
    {"objective": "full_jsd", "beta": 0.0},
    {"objective": "full_jsd", "beta": 1.0},
    {"objective": "full_reverse_kl", "gamma": 0.9},
    {"objective": "full_sampled_future", "gamma": 0.5},
    {"objective": "mean_future", "gamma": 1.0},
    {"objective": "sampled_token", "gamma": 0.7, "baseline": "leave_one_out"},
    {"objective": "sampled_token", "ratio": "token", "ratio_clip": 0.5},
    {"objective": "teacher_topk", "ratio_clip": 0.3},
    {"objective": "teacher_topk", "reward_weight": 2.0},
    {"objective": "sampled_token_clipped", "reward_weight": 1.0},
]
UNKNOWN = ({"objective": "full_jsd"},)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_expected_is_the_trained_loss(case: dict[str, Any], denominator: str) -> None:
    settings = config(**case, denominator=denominator)
    batch, _ = batch_for(settings.objective.objective)
    vector = vector_of(settings, batch)
    if case in UNKNOWN:
        assert vector is None
        return
    loss = trained_loss(settings, batch)
    assert float(vector[0]) == pytest.approx(loss, rel=1e-6, abs=1e-9)
    columns = loss_check_columns(torch.tensor(loss), [vector], [1.0])
    assert {
        name: float(x) for name, x in columns.items() if name != "consistency/loss_expected"
    } == {
        "consistency/loss_error": 0,
        "consistency/loss_negated": 0,
        "consistency/loss_exchanged": 0,
        "consistency/loss_denominator": 0,
    }


def test_weights_are_one_over_the_denominators() -> None:
    batch, _ = batch_for("k2")
    for name, weight in row_weights(batch).items():
        assert torch.allclose(weight, 1 / DENOMINATORS[name](batch).double()), name


FLAGS = ("negated", "exchanged", "denominator")


def flags(settings: Config, batch: ScoredRollouts, loss: float) -> tuple[bool, set[str]]:
    columns = loss_check_columns(torch.tensor(loss), [vector_of(settings, batch)], [1.0])
    raised_flags = {flag for flag in FLAGS if columns[f"consistency/loss_{flag}"] > 0}
    return bool(columns["consistency/loss_error"] > 0), raised_flags


def test_a_wrong_loss_is_named() -> None:
    settings = config(objective="full_reverse_kl")
    batch, _ = batch_for("full_reverse_kl")
    right = trained_loss(settings, batch)
    assert flags(settings, batch, -right) == (True, {"negated"})
    forward = trained_loss(with_settings(settings, objective="full_forward_kl"), batch)
    assert flags(settings, batch, forward) == (True, {"exchanged"})
    for denominator in ("sequence_sum", "sequence_mean", "group_mean"):
        wrong = trained_loss(with_settings(settings, denominator=denominator), batch)
        assert flags(settings, batch, wrong) == (True, {"denominator"})
    value = batch.prefix.reverse_kl
    parts = [value[rows].sum() / batch.mask[rows].sum() for rows in (slice(3), slice(3, B))]
    assert flags(settings, batch, float(sum(parts) / 2)) == (True, {"denominator"})
    assert flags(settings, batch, float(sum(parts))) == (True, {"denominator"})
    assert flags(settings, batch, 1.01 * right) == (True, set())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_rounding_does_is_within_its_bound(dtype: str) -> None:
    """200 losses from log-probabilities with one unit of error, none outside the bound."""
    settings, unit = config(objective="full_reverse_kl", dtype=dtype), ROUNDING[dtype]
    dense_batch = make_dense_batch(4, "full", sharpness=2.0)
    vector = vector_of(settings, dense_batch.batch)
    generator = torch.Generator().manual_seed(0)
    weight = dense_batch.batch.mask / dense_batch.batch.mask.sum()
    errors = []
    for _ in range(200):
        noise = unit * torch.randn(dense_batch.p.shape, generator=generator).double()
        p = (dense_batch.p + noise).log_softmax(-1)
        loss = ((p.exp() * (p - dense_batch.q)).sum(-1) * weight).sum()
        errors.append(float(loss_check_columns(loss, [vector], [1.0])["consistency/loss_error"]))
    assert errors == [0.0] * 200
