"""The study of hidden contexts: controls and resting points against direct computations."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from synthetic.exact import contexts
from synthetic.exact.moments import sequence_kl
from synthetic.experiments import hidden_context
from synthetic.experiments.hidden_context import (
    control_rows,
    estimator_rows,
    measure,
    remaining_rows,
    shortened,
    summarize,
)
from synthetic.worlds.contexts import random_contexts
from tests.helpers.worlds import seeded

WORLD = random_contexts(3, 2, 3, seeded(1), strength=1.5)


def test_another_problems_context_teaches_the_same_until_the_prompt_tells_it() -> None:
    rows = {(row["informed"], row["view"]): row for row in control_rows(WORLD)}
    assert rows[0.0, "other"]["kl_by_view"] == rows[0.0, "right"]["kl_by_view"]
    excess = [rows[x, "other"]["excess_by_view"] for x in hidden_context.INFORMED]
    assert excess == sorted(excess)
    assert rows[0.0, "empty"]["excess_by_view"] > 1e-3
    # the prompt tells everything: the right teacher is imitated, another one's product is not
    assert abs(rows[1.0, "right"]["kl_by_view"]) < 1e-14
    assert abs(rows[1.0, "empty"]["kl_by_view"]) < 1e-14
    product = WORLD.teacher_logp.mean(0)
    right = sequence_kl(WORLD.mdp, product, WORLD.teacher_logp[0]).total
    assert rows[1.0, "other"]["kl_by_view"] == pytest.approx(float(right), abs=1e-13)
    # in between: the mean over the contexts that fit the prompt
    prior = torch.tensor([0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3], dtype=torch.float64)
    mean = sum(
        weight * sequence_kl(WORLD.mdp, product, teacher).total
        for weight, teacher in zip(prior, WORLD.teacher_logp, strict=True)
    )
    assert rows[0.5, "other"]["kl_by_view"] == pytest.approx(float(mean), abs=1e-13)


def test_what_remains_is_bounded_on_the_teachers_prefixes_only() -> None:
    longest = random_contexts(3, 4, 6, seeded(2), strength=2.0)
    rows = pd.DataFrame([x for t in (1, 4, 6) for x in remaining_rows(shortened(longest, t), 2.0)])
    table = rows.pivot(index="horizon", columns="student", values="remaining")
    assert rows["error"].max() < 1e-12
    # one token: both forward KLs are I(A; C) at the empty prefix, and both reverse ones equal
    assert table.loc[1, "teacher_prefixes"] == pytest.approx(table.loc[1, "student_prefixes"])
    assert table.loc[1, "token"] == pytest.approx(table.loc[1, "sequence"])
    entropy = float(contexts.entropy(longest.prior))
    assert table.loc[6, "teacher_prefixes"] < entropy < table.loc[6, "student_prefixes"]
    assert (table["sequence"] <= table["token"] + 1e-14).all()
    told = rows.pivot(index="horizon", columns="student", values="context_in_response")
    lost = rows.pivot(index="horizon", columns="student", values="context_lost")
    assert told.loc[6, "token"] < told.loc[6, "teacher_prefixes"]
    assert lost.loc[6, "token"] == pytest.approx(
        1 - told.loc[6, "token"] / told.loc[6, "teacher_prefixes"]
    )
    assert (lost["teacher_prefixes"] == 0).all()


def test_a_shorter_world_has_the_first_tokens_of_the_longer_one() -> None:
    short = shortened(WORLD, 2)
    assert short.horizon == 2
    assert torch.equal(short.teacher_logp, WORLD.teacher_logp[:, :3])


def test_estimators_rest_where_their_gradient_is_zero_but_their_noise_is_not() -> None:
    compared = [("plain", 0.0), ("plain", 1.0), ("k3", 0.0), ("teacher_topk_bucket", 0.0)]
    rows = {(r["estimator"], r["gamma"]): r for r in estimator_rows(WORLD, compared, 60)}
    for row in rows.values():
        assert row["gradient_at_rest"] < 1e-5
        assert row["between_at_rest"] > 1e-3
        assert row["within_at_rest"] > 1e-3
    assert rows["plain", 1.0]["bias"] < 1e-12
    assert rows["plain", 1.0]["excess"] == pytest.approx(0, abs=1e-13)
    assert rows["plain", 0.0]["bias"] > 1e-3
    assert rows["k3", 0.0]["excess"] > rows["plain", 0.0]["excess"] > 1e-6
    # a bucket of one token is that token: with two actions the form is the full reverse KL
    full = rows["teacher_topk_bucket", 0.0]
    assert full["excess"] == pytest.approx(rows["plain", 0.0]["excess"], abs=1e-6)
    # without a hidden context the same noise is zero at the best student
    known = replace(WORLD, prior=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    _, within, between = contexts.context_moments(known, WORLD.teacher_logp[1], "plain", 0.0)
    assert max(float(within), float(between)) < 1e-25


def test_errors_are_summarised_by_the_largest() -> None:
    setting = hidden_context.SETTINGS["smoke"][0]
    rows = pd.DataFrame(
        [x for seed in (0, 1) for x in measure(setting | {"seed": seed}, seeded(seed))]
    )
    table = summarize(rows)
    (largest,) = table[table["quantity"] == "error"]["value"]
    assert largest == rows["error"].max()
    medians = table[(table["quantity"] == "remaining") & (table["student"] == "token")]
    cell = rows[(rows["student"] == "token") & (rows["horizon"] == 8) & (rows["strength"] == 1)]
    chosen = medians[(medians["horizon"] == 8) & (medians["strength"] == 1)]
    assert chosen["value"].item() == pytest.approx(cell["remaining"].median())
