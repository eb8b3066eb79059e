"""The study of the tail: teachers leave out what they should; times are those of descent."""

import numpy as np
import pandas as pd
import pytest
import torch

from synthetic.experiments.tail import ACTIONS, RATE, K, measure, summarize, teacher_logits

SETTING = {
    "objective": "teacher_topk_unnormalised",
    "tails": (0.3, 0.1),
    "prefixes": 2,
    "iterations": 40,
}


def half_time(q: np.ndarray, rate: float, iterations: int) -> int:
    """Descend on sum_S p log(p/q) from p = q by its gradient, written out by hand."""
    logits, ids = np.log(q), np.argsort(-q)[:K]
    goal = q[ids].sum() * (1 + np.exp(-1)) / 2
    for iteration in range(iterations + 1):
        p = np.exp(logits) / np.exp(logits).sum()
        if p[ids].sum() <= goal:
            return iteration
        inner = np.zeros_like(p)  # d/dp of the loss
        inner[ids] = np.log(p[ids] / q[ids]) + 1
        logits = logits - rate * p * (inner - (p * inner).sum())
    raise AssertionError


def test_times_are_those_of_a_descent_by_hand() -> None:
    noise = torch.randn(2, ACTIONS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rows = measure(SETTING, torch.Generator().manual_seed(4))
    for tail in (0.3, 0.1):
        teacher = teacher_logits(noise, tail)
        ids = noise.topk(K, -1).indices
        outside = 1 - teacher.softmax(-1).gather(-1, ids).sum(-1)
        assert outside.tolist() == pytest.approx([tail] * 2, abs=1e-12)
        for prefix in range(2):
            own = [r for r in rows if r["tail"] == tail and r["seed"] == prefix]
            expected = half_time(teacher[prefix].softmax(-1).numpy(), RATE, 200)
            assert own[0]["half_time"] == expected


def test_a_loss_at_rest_at_the_teacher_has_no_time() -> None:
    rows = pd.DataFrame(
        [
            row
            for name in ("teacher_topk_unnormalised", "teacher_topk_bucket")
            for row in measure(SETTING | {"objective": name}, torch.Generator().manual_seed(4))
        ]
    )
    table = summarize(rows).set_index(["quantity", "objective", "tail"]).sort_index()
    assert ("half_time", "teacher_topk_bucket", 0.3) not in table.index
    assert table.loc[("largest_change", "teacher_topk_bucket", 0.3), "value"].item() == 0
    times = [
        table.loc[("half_time", "teacher_topk_unnormalised", tail), "value"].item()
        for tail in (0.3, 0.1)
    ]
    assert times[0] < times[1]
    exponent = table.loc[("exponent", "teacher_topk_unnormalised", 0.1), "value"].item()
    assert -1.3 < exponent < -0.7
