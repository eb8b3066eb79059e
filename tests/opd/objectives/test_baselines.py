"""Baselines over other responses, over every pair of responses of random length.

One id ends a response and two do not, at most T tokens: 15 responses. Two of them, drawn
independently, form a batch, as answers to two prompts or as rollouts of one.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.gradients.estimators import estimator_index, estimator_weights
from opd.objectives import factory as o
from opd.objectives.credit import Baseline

V, T, END = 3, 3, 0
PREFIXES = [p for n in range(T) for p in itertools.product((1, 2), repeat=n)]
RESPONSES = [
    (*prefix, token)
    for prefix in PREFIXES
    for token in range(V)
    if token == END or len(prefix) == T - 1
]


def table(seed: int) -> Tensor:
    """Return (prefixes, V) random logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), V, generator=generator, dtype=torch.float64)


def padded(value: Callable[[int, int], float], dtype: torch.dtype) -> Tensor:
    """Return (responses, T) values of a function of prefix and token, 0 after the end."""
    rows = torch.zeros(len(RESPONSES), T, dtype=dtype)
    for i, response in enumerate(RESPONSES):
        for t, token in enumerate(response):
            rows[i, t] = value(PREFIXES.index(response[:t]), token)
    return rows


STUDENT, TEACHER = table(0).log_softmax(-1), table(1).log_softmax(-1)
TOKENS = padded(lambda _, token: token, torch.long)
STATES = padded(lambda prefix, _: prefix, torch.long)
MASK = padded(lambda *_: 1, torch.bool)
CHANCE = padded(lambda prefix, token: float(STUDENT[prefix, token]), torch.float64).sum(1).exp()
FIRST, SECOND = torch.cartesian_prod(*[torch.arange(len(RESPONSES))] * 2).T


def pairs(prompt: tuple[int, int], sampled_mask: Tensor | None = None) -> list[ScoredRollouts]:
    """Return every pair as a batch of two rows."""

    def column(x: Tensor) -> Tensor:
        return padded(lambda prefix, token: float(x[prefix, token]), torch.float64)

    student_logp, teacher_logp = column(STUDENT), column(TEACHER)
    batches = []
    for pair in torch.stack([FIRST, SECOND], 1):
        mask = MASK[pair]
        if sampled_mask is not None:
            mask = mask & sampled_mask
        batches.append(
            ScoredRollouts(
                tokens=TOKENS[pair],
                mask=mask,
                sampled_mask=MASK[pair],
                sampler_logp=student_logp[pair],
                prompt=torch.tensor(prompt),
                ended=torch.ones(2, dtype=torch.bool),
                student_logp=student_logp[pair],
                teacher_logp=teacher_logp[pair],
            )
        )
    return batches


def mean_gradient(
    batches: list[ScoredRollouts], credit: Callable[[ScoredRollouts], Tensor]
) -> Tensor:
    """Return the (prefixes, V) mean of sum credit_t grad log p(y_t) over both rows of all pairs."""
    total = torch.zeros_like(STUDENT)
    for batch, first, second in zip(batches, FIRST, SECOND, strict=True):
        w = CHANCE[first] * CHANCE[second] * credit(batch) * batch.mask
        for row, response in enumerate((first, second)):
            states, tokens = STATES[response], TOKENS[response]
            total.index_put_((states, tokens), w[row], accumulate=True)
            total.index_add_(0, states, -w[row][:, None] * STUDENT[states].exp())
    return total


def test_the_responses_are_all_there_are() -> None:
    assert len(RESPONSES) == 15
    assert float(CHANCE.sum()) == pytest.approx(1)


@pytest.mark.parametrize("scope", ["cost", "loss"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("baseline", "prompt"), [("position_mean", (0, 1)), ("leave_one_out", (0, 0))]
)
def test_a_baseline_leaves_the_mean_gradient(
    baseline: str, prompt: tuple[int, int], masked: bool, scope: str
) -> None:
    """Includes the tail of the longest response, where no other response is alive.

    The mask removes the second position, whatever was sampled there.
    """
    sampled_mask = torch.tensor([True, False, True]) if masked else None
    batches = pairs(prompt, sampled_mask)
    for gamma in (0.0, 0.7, 1.0):
        plain = o.make_objective("sampled_token", gamma=gamma)
        if masked and gamma:
            plain = replace(plain, mask_scope=scope)
        want = mean_gradient(batches, plain.credit)
        with_baseline = replace(
            plain, baseline=o.make_objective("sampled_token", gamma=0.5, baseline=baseline).baseline
        )
        assert any(bool((with_baseline.credit(b) - plain.credit(b)).any()) for b in batches[-3:])
        torch.testing.assert_close(mean_gradient(batches, with_baseline.credit), want)


def test_a_mean_with_the_own_credit_in_it_shrinks_the_gradient() -> None:
    """The former position_mean: (k - 1)/k of the mean with k alive, 0 where no other one is."""

    def own_included(batch: ScoredRollouts, credit: Tensor) -> Tensor:
        return ((credit * batch.mask).sum(0) / batch.mask.sum(0).clamp(min=1)).expand_as(credit)

    plain, batches = o.make_objective("sampled_token", gamma=0.0), pairs((0, 1))
    want = mean_gradient(batches, plain.credit)
    biased = mean_gradient(batches, replace(plain, baseline=Baseline(function=own_included)).credit)
    torch.testing.assert_close(biased[0], want[0] / 2)  # both are alive at the first token
    assert float((biased - want).norm() / want.norm()) > 0.3


@pytest.mark.parametrize("baseline", ["position_mean", "leave_one_out"])
def test_the_probe_measures_the_baseline_that_trains(baseline: str) -> None:
    batch = pairs((0, 1) if baseline == "position_mean" else (0, 0))[100]
    gammas = (0.0, 0.9, 1.0)
    family = estimator_weights(batch, [baseline], gammas)
    for gamma in gammas:
        objective: Any = o.make_objective("sampled_token", gamma=gamma, baseline=baseline)
        probe_credit = family.values[..., estimator_index(family, baseline, gamma)]
        torch.testing.assert_close(probe_credit, objective.credit(batch))
