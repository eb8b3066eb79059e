"""Noise of a token's gradient against enumeration of the token and autograd over the logits."""

import math
from dataclasses import replace

import pytest
import torch

from diagnostics.core.optional_fields import MissingField
from diagnostics.core.totals import read
from diagnostics.metrics.gradient_noise import baseline_noise, gradient_noise, prefix_noise
from tests.helpers.dense_batches import Dense, dense, mean


def enumerated(d: Dense, i: int, t: int, b: float) -> tuple[float, float]:
    """|mean|^2 and variance of (r - b) grad log p(y) over y, each gradient by autograd."""
    z = d.p[i, t].clone().requires_grad_()
    p, size = d.p[i, t].exp(), len(d.p[i, t])
    grads = []
    for y in range(size):
        (score,) = torch.autograd.grad(z.log_softmax(-1)[y], z)
        grads.append((float(d.p[i, t, y] - d.q[i, t, y]) - b) * score)
    g = torch.stack(grads)
    centre = p @ g
    return float(centre @ centre), float(p @ (g - centre).square().sum(1))


def test_signal_and_noise_by_enumeration() -> None:
    d = dense(1)
    n = prefix_noise(d.batch.prefix)
    some = list(d.tokens())[::9]
    for i, t in some:
        k = float(d.batch.prefix.reverse_kl[i, t])
        best = float(n.slope[i, t] / n.curve[i, t])
        signal, zero = enumerated(d, i, t, 0.0)
        assert float(n.signal[i, t]) == pytest.approx(signal)
        assert float(n.zero[i, t]) == pytest.approx(zero)
        assert float(n.value[i, t]) == pytest.approx(enumerated(d, i, t, k)[1])
        least = enumerated(d, i, t, best)[1]
        assert float(n.best[i, t]) == pytest.approx(least)
        for other in (best - 0.1, best + 0.1):
            assert enumerated(d, i, t, other)[1] > least


def test_the_rows() -> None:
    d = dense(2)
    n, prefix = prefix_noise(d.batch.prefix), d.batch.prefix
    row = read(gradient_noise(d.batch) | baseline_noise(d.batch))
    places = list(d.tokens())

    def total(x: torch.Tensor, where: list[tuple[int, int]]) -> float:
        return sum(float(x[at]) for at in where)

    torn = [at for at in places if float(prefix.student_entropy[at]) > 1]
    calm = [at for at in places if float(prefix.student_entropy[at]) <= 1]
    assert torn
    assert calm
    assert row["noise/token_signal"] == pytest.approx(total(n.signal, places) / len(places))
    early = [at for at in places if at[1] < 2]
    assert row["noise/token_noise@0-1"] == pytest.approx(total(n.zero, early) / len(early))
    for name, where in (("", places), ("_decided", calm), ("_undecided", torn)):
        want = total(n.signal, where) / total(n.zero, where)
        assert row[f"noise/signal_to_noise{name}"] == pytest.approx(want)
    zero = total(n.zero, places)
    assert row["noise/value_noise_ratio"] == pytest.approx(total(n.value, places) / zero)
    assert row["noise/best_noise_ratio"] == pytest.approx(total(n.best, places) / zero)
    worse = mean([float(n.value[at] > n.zero[at]) for at in places])
    assert row["noise/value_worse_share"] == pytest.approx(worse)
    best = row["noise/best_constant"]

    def constant(b: float) -> float:
        return total(n.zero - 2 * b * n.slope + b * b * n.curve, places)

    assert constant(best) < min(constant(best - 1e-3), constant(best + 1e-3))
    assert sum(enumerated(d, *at, best)[1] for at in places[:5]) == pytest.approx(
        total(n.zero - 2 * best * n.slope + best**2 * n.curve, places[:5])
    )
    assert row["noise/best_noise_ratio"] < min(1, row["noise/value_noise_ratio"])


def test_a_certain_student_and_an_equal_teacher_have_no_noise() -> None:
    prefix = dense(3).batch.prefix
    one = torch.ones_like(prefix.collision)
    cost = 2 * one
    sure = replace(
        prefix,
        collision=one,
        reverse_kl=cost,
        ratio_square=cost.square(),
        square_ratio=cost,
        square_ratio_square=cost.square(),
    )
    n = prefix_noise(sure)
    for x in (n.signal, n.zero, n.value, n.best):
        assert float(x.abs().max()) < 1e-12
    same = dense(3, gap=0.0).batch
    row = read(gradient_noise(same) | baseline_noise(same))
    assert row["noise/token_noise"] == pytest.approx(0, abs=1e-20)
    assert math.isnan(row["noise/value_noise_ratio"]) or row["noise/value_noise_ratio"] >= 0


def test_old_functionals_are_named() -> None:
    b = dense(1).batch
    old = replace(b, prefix=replace(b.prefix, square_ratio=None))
    with pytest.raises(MissingField, match="score again"):
        gradient_noise(old)
