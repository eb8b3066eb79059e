"""Support consistency: 0 for correct lists, equal to loops for corrupted ones."""

from dataclasses import replace

import pytest
import torch

from diagnostics.alarms.alarms import replay
from diagnostics.alarms.rules import RULES
from diagnostics.batch import ScoredRollouts, Support
from diagnostics.core.totals import compute
from diagnostics.metrics.support_consistency import (
    MASS_TOLERANCE,
    TIE_TOLERANCE,
    support_consistency,
)
from tests.helpers.dense_batches import DenseBatch, make_dense_batch

COLUMNS = ("gap", "order_share", "twice_share", "mass_over_share")


def columns(batch: ScoredRollouts) -> dict[str, float]:
    row = compute(support_consistency(batch))
    return {name: row.get(f"consistency/support_{name}", 0.0) for name in COLUMNS}


def by_loop(batch: ScoredRollouts) -> dict[str, float]:
    """Compute the definitions token by token."""
    support = batch.support
    present = torch.ones_like(support.ids).bool() if support.present is None else support.present
    gaps, order, twice, over = [], [], [], []
    is_student = support.source == "student"
    for i, t in batch.mask.nonzero().tolist():
        y = int(batch.tokens[i, t])
        logp = {}
        ids = [int(v) for v in support.ids[i, t][present[i, t]]]
        for k, v in enumerate(support.ids[i, t].tolist()):
            if present[i, t, k]:
                logp[v] = float(support.student_logp[i, t, k]), float(support.teacher_logp[i, t, k])
        scores = float(batch.student_logp[i, t]), float(batch.teacher_logp[i, t])
        if y in logp:
            gaps.append(max(abs(a - b) for a, b in zip(logp[y], scores, strict=True)))
        last = min((pair[1 - is_student] for pair in logp.values()), default=float("inf"))
        order.append(y not in logp and scores[1 - is_student] > last + TIE_TOLERANCE)
        twice.append(len(ids) > len(set(ids)))
        mass = [sum(float(support.student_logp[i, t, k].exp()) for k in range(support.k)
                    if present[i, t, k]),
                sum(float(support.teacher_logp[i, t, k].exp()) for k in range(support.k)
                    if present[i, t, k])]  # fmt: skip
        over.append(max(mass) > 1 + MASS_TOLERANCE)

    def mean(x: list) -> float:
        return sum(x) / len(x) if x else float("nan")

    return {
        "gap": mean(gaps),
        "order_share": mean(order) if support.source in ("teacher", "student") else 0.0,
        "twice_share": mean(twice) if support.source != "full" else 0.0,
        "mass_over_share": mean(over),
    }


@pytest.mark.parametrize("source", ["teacher", "student", "union", "intersection", "full"])
def test_true_supports_contradict_nothing(source: str) -> None:
    batch = make_dense_batch(1, source).batch
    assert columns(batch) == pytest.approx(by_loop(batch), abs=1e-12)
    assert columns(batch) == pytest.approx(dict.fromkeys(COLUMNS, 0.0), abs=1e-12)


def corrupted(support: Support, **new: torch.Tensor) -> Support:
    return replace(support, **new)


def late(dense_batch: DenseBatch) -> Support:
    """Return the support of the previous position."""
    support = dense_batch.batch.support
    names = ("ids", "student_logp", "teacher_logp")
    return corrupted(support, **{n: getattr(support, n).roll(1, 1) for n in names})


def ids_late(dense_batch: DenseBatch) -> Support:
    return corrupted(dense_batch.batch.support, ids=dense_batch.batch.support.ids.roll(1, 1))


def rank_late(dense_batch: DenseBatch) -> Support:
    """Replace ranks 1 to K by ranks 2 to K."""
    support = dense_batch.batch.support
    names = ("ids", "student_logp", "teacher_logp")
    return corrupted(support, **{n: getattr(support, n)[..., 1:] for n in names})


def renormalised(dense_batch: DenseBatch) -> Support:
    support = dense_batch.batch.support
    return corrupted(support, teacher_logp=support.teacher_logp.log_softmax(-1))


def doubled(dense_batch: DenseBatch) -> Support:
    """Duplicate the first id in the last slot."""
    support, new = dense_batch.batch.support, {}
    for name in ("ids", "student_logp", "teacher_logp"):
        new[name] = getattr(support, name).clone()
        new[name][..., -1] = new[name][..., 0]
    return corrupted(support, **new)


EXPECTED = {
    late: {"support_values", "support_ids"},
    ids_late: {"support_values", "support_ids"},
    rank_late: {"support_ids"},
    renormalised: {"support_values"},
    doubled: {"support_twice", "support_mass"},
}


@pytest.mark.parametrize("corrupt", EXPECTED, ids=lambda function: function.__name__)
def test_corrupted_supports_equal_loops_and_raise_their_alarms(corrupt) -> None:
    # sharp, so that the sampled token is often the first id
    dense_batch = make_dense_batch(2, "teacher", k=4, sharpness=3.0)
    batch = replace(dense_batch.batch, support=corrupt(dense_batch))
    assert columns(batch) == pytest.approx(by_loop(batch), abs=1e-9)
    alarms = replay([{"step": i, **compute(support_consistency(batch))} for i in range(3)], RULES)
    assert {alarm.rule.name for alarm in alarms} >= EXPECTED[corrupt]
    healthy = [{"step": i, **compute(support_consistency(dense_batch.batch))} for i in range(3)]
    assert replay(healthy, RULES) == []


def test_absent_ids_are_never_doubled() -> None:
    batch = make_dense_batch(3, "union").batch
    support = batch.support
    assert not bool(support.present.all())
    first = support.ids[..., :1].expand_as(support.ids)
    duplicated = replace(support, ids=torch.where(support.present, support.ids, first))
    assert columns(replace(batch, support=duplicated))["twice_share"] == 0
