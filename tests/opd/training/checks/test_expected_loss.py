"""The expected loss against the loss that trains: every objective, denominator and credit."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from diagnostics.batch import ScoredRollouts
from opd.config.settings import Config
from opd.objectives.factory import COLLAPSING, DENOMINATORS, OBJECTIVES, make, reduce
from opd.training.checks.expected_loss import (
    ROUNDING,
    credit_of,
    expected_loss,
    loss_numbers,
    ratio_of,
    row_weights,
)
from tests.helpers.dense_batches import B, dense


def config(**changes: Any) -> Config:
    plain: dict[str, Any] = {"student": "s", "teacher": "t", "out": "o"}
    accepted = any(str(changes.get("objective", "")).endswith(end) for end in COLLAPSING)
    return Config(**plain | {"allow_collapse": accepted} | changes)


def batch_for(
    name: str, seed: int = 0, sharpness: float = 2.0
) -> tuple[ScoredRollouts, torch.Tensor]:
    """A batch with the objective's support, and (B, T, V) log-probabilities of the student."""
    source = name.split("_topk")[0] if "_topk" in name else "teacher"
    source = "full" if name.startswith("full_") else source
    made = dense(seed, source, k=6, sharpness=sharpness)
    batch = replace(made.batch, reward=torch.arange(B, dtype=torch.float64) % 3)
    return batch, made.p


def trained_loss(own: Config, batch: ScoredRollouts) -> float:
    """The loss as `opd.objectives.factory` and `opd.objectives.reduction` make it, at the weights that scored."""
    objective = make(
        own.objective,
        own.gamma,
        own.baseline,
        own.ratio,
        beta=own.beta,
        ratio_clip=math.inf if own.ratio_clip is None else own.ratio_clip,
        reward_weight=own.outcome,
        allow_collapse=own.allow_collapse,
    )
    some = batch if objective.support != "none" else replace(batch, support=None)
    support = None if some.support is None else some.support.student_logp
    loss = objective.loss(batch.student_logp, support, some)
    return float(reduce(loss, batch.mask, DENOMINATORS[own.denominator](batch)))


def vector_of(own: Config, batch: ScoredRollouts) -> torch.Tensor | None:
    rows = list(range(len(batch)))
    return expected_loss(
        own,
        batch,
        credit_of(own, batch),
        ratio_of(own, batch),
        rows=rows,
        micro_batches=[rows[:3], rows[3:]],
        counted=replace(batch, support=None),
        places=rows,
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
    own = config(**case, denominator=denominator)
    batch, _ = batch_for(own.objective)
    vector = vector_of(own, batch)
    if case in UNKNOWN:
        assert vector is None
        return
    loss = trained_loss(own, batch)
    assert float(vector[0]) == pytest.approx(loss, rel=1e-6, abs=1e-9)
    columns = loss_numbers(torch.tensor(loss), vector)
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


def flags(own: Config, batch: ScoredRollouts, loss: float) -> tuple[bool, set[str]]:
    columns = loss_numbers(torch.tensor(loss), vector_of(own, batch))
    named = {flag for flag in FLAGS if columns[f"consistency/loss_{flag}"] > 0}
    return bool(columns["consistency/loss_error"] > 0), named


def test_a_wrong_loss_is_named() -> None:
    own = config(objective="full_reverse_kl")
    batch, _ = batch_for("full_reverse_kl")
    right = trained_loss(own, batch)
    assert flags(own, batch, -right) == (True, {"negated"})
    forward = trained_loss(replace(own, objective="full_forward_kl"), batch)
    assert flags(own, batch, forward) == (True, {"exchanged"})
    for other in ("sequence_sum", "sequence_mean", "group_mean"):
        wrong = trained_loss(replace(own, denominator=other), batch)
        assert flags(own, batch, wrong) == (True, {"denominator"})
    value = batch.prefix.reverse_kl
    parts = [value[some].sum() / batch.mask[some].sum() for some in (slice(3), slice(3, B))]
    assert flags(own, batch, float(sum(parts) / 2)) == (True, {"denominator"})
    assert flags(own, batch, float(sum(parts))) == (True, {"denominator"})
    assert flags(own, batch, 1.01 * right) == (True, set())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_rounding_does_is_within_its_bound(dtype: str) -> None:
    """Log-probabilities of a second pass with errors of one unit: 200 losses, none outside."""
    own, unit = config(objective="full_reverse_kl", dtype=dtype), ROUNDING[dtype]
    made = dense(4, "full", sharpness=2.0)
    vector = vector_of(own, made.batch)
    generator = torch.Generator().manual_seed(0)
    weight = made.batch.mask / made.batch.mask.sum()
    errors = []
    for _ in range(200):
        noise = unit * torch.randn(made.p.shape, generator=generator).double()
        p = (made.p + noise).log_softmax(-1)
        loss = ((p.exp() * (p - made.q)).sum(-1) * weight).sum()
        errors.append(float(loss_numbers(loss, vector)["consistency/loss_error"]))
    assert errors == [0.0] * 200
