"""Gradient noise of a token against enumeration of the tokens and autograd over the logits."""

import math
from dataclasses import replace

import pytest
import torch

from diagnostics.core.optional_fields import MissingField
from diagnostics.core.totals import compute
from diagnostics.metrics.gradient_noise import baseline_noise, gradient_noise, prefix_noise
from tests.helpers.dense_batches import DenseBatch, make_dense_batch, mean


def enumerated(d: DenseBatch, i: int, t: int, b: float) -> tuple[float, float]:
    """Return |mean|^2 and variance of (r - b) grad log p(y) over y, gradients by autograd."""
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
    d = make_dense_batch(1)
    n = prefix_noise(d.batch.prefix)
    tokens = list(d.tokens())[::9]
    for i, t in tokens:
        k = float(d.batch.prefix.reverse_kl[i, t])
        best = float(n.slope[i, t] / n.curve[i, t])
        signal, zero = enumerated(d, i, t, 0.0)
        assert float(n.signal[i, t]) == pytest.approx(signal)
        assert float(n.zero[i, t]) == pytest.approx(zero)
        assert float(n.value[i, t]) == pytest.approx(enumerated(d, i, t, k)[1])
        least = enumerated(d, i, t, best)[1]
        assert float(n.best[i, t]) == pytest.approx(least)
        for baseline in (best - 0.1, best + 0.1):
            assert enumerated(d, i, t, baseline)[1] > least


def test_the_rows() -> None:
    d = make_dense_batch(2)
    n, prefix = prefix_noise(d.batch.prefix), d.batch.prefix
    row = compute(gradient_noise(d.batch) | baseline_noise(d.batch))
    places = list(d.tokens())

    def total(x: torch.Tensor, selected: list[tuple[int, int]]) -> float:
        return sum(float(x[place]) for place in selected)

    torn = [index for index in places if float(prefix.student_entropy[index]) > 1]
    calm = [index for index in places if float(prefix.student_entropy[index]) <= 1]
    assert torn
    assert calm
    assert row["noise/token_signal"] == pytest.approx(total(n.signal, places) / len(places))
    early = [index for index in places if index[1] < 2]
    assert row["noise/token_noise@0-1"] == pytest.approx(total(n.zero, early) / len(early))
    for name, group in (("", places), ("_decided", calm), ("_undecided", torn)):
        want = total(n.signal, group) / total(n.zero, group)
        assert row[f"noise/signal_to_noise{name}"] == pytest.approx(want)
    zero = total(n.zero, places)
    assert row["noise/value_noise_ratio"] == pytest.approx(total(n.value, places) / zero)
    assert row["noise/best_noise_ratio"] == pytest.approx(total(n.best, places) / zero)
    worse = mean([float(n.value[index] > n.zero[index]) for index in places])
    assert row["noise/value_worse_share"] == pytest.approx(worse)
    best = row["noise/best_constant"]

    def constant(b: float) -> float:
        return total(n.zero - 2 * b * n.slope + b * b * n.curve, places)

    assert constant(best) < min(constant(best - 1e-3), constant(best + 1e-3))
    assert sum(enumerated(d, *index, best)[1] for index in places[:5]) == pytest.approx(
        total(n.zero - 2 * best * n.slope + best**2 * n.curve, places[:5])
    )
    assert row["noise/best_noise_ratio"] < min(1, row["noise/value_noise_ratio"])


def test_a_certain_student_and_an_equal_teacher_have_no_noise() -> None:
    prefix = make_dense_batch(3).batch.prefix
    certain = torch.ones_like(prefix.collision)
    cost = 2 * certain
    sure = replace(
        prefix,
        collision=certain,
        reverse_kl=cost,
        ratio_square=cost.square(),
        square_ratio=cost,
        square_ratio_square=cost.square(),
    )
    n = prefix_noise(sure)
    for x in (n.signal, n.zero, n.value, n.best):
        assert float(x.abs().max()) < 1e-12
    equal_models = make_dense_batch(3, gap=0.0).batch
    row = compute(gradient_noise(equal_models) | baseline_noise(equal_models))
    assert row["noise/token_noise"] == pytest.approx(0, abs=1e-20)
    assert math.isnan(row["noise/value_noise_ratio"]) or row["noise/value_noise_ratio"] >= 0


def test_old_functionals_are_named() -> None:
    b = make_dense_batch(1).batch
    old = replace(b, prefix=replace(b.prefix, square_ratio=None))
    with pytest.raises(MissingField, match="score the batch again"):
        gradient_noise(old)
