"""Means over pairs, intervals and leave-one-out replicates, by hand."""

import math

import pytest
import torch

from diagnostics.core.optional_fields import MissingField
from diagnostics.gradients.jackknife import (
    degrees_of_freedom,
    mean_estimate,
    positive_estimate,
    ratio_estimate,
    squared_length_estimate,
    student_t_quantile,
)
from diagnostics.gradients.signal_noise import (
    pair_products,
    signal_and_noise,
)
from tests.diagnostics.gradients.tabular_gradients import (
    seeded,
)


def test_inner_products_are_means_over_pairs_and_their_replicates_leave_out_prompts() -> None:
    x = torch.randn(7, 2, 1, 4, generator=seeded(1), dtype=torch.float64)
    prompt = torch.tensor([5, 9, 5, 2, 2, 2, 0])
    products = pair_products(x, prompt)
    left_out = [None, 0, 2, 5, 9]
    assert len(products.different_prompts) == len(left_out)
    for r, out in enumerate(left_out):
        rows = [i for i in range(7) if out is None or prompt[i] != out]
        v = x[:, :, 0]
        different_prompts = [v[i] @ v[j].T for i in rows for j in rows if prompt[i] != prompt[j]]
        same_prompt = [
            (v[i] * v[j]).sum(1) for i in rows for j in rows if i != j and prompt[i] == prompt[j]
        ]
        self_products = torch.stack([v[i].square().sum(1) for i in rows]).mean(0)
        mean = v[rows].mean(0)
        torch.testing.assert_close(
            products.different_prompts[r], torch.stack(different_prompts).mean(0)
        )
        torch.testing.assert_close(products.same_prompt[r], torch.stack(same_prompt).mean(0))
        torch.testing.assert_close(products.self_products[r], self_products)
        torch.testing.assert_close(
            products.noise[r],
            len(rows) * (mean.square().sum(1) - torch.stack(different_prompts).mean(0).diagonal()),
        )


def test_copies_are_averaged_and_left_out_one_by_one() -> None:
    x = torch.randn(6, 2, 3, 4, generator=seeded(1), dtype=torch.float64)
    products = pair_products(x, torch.arange(6))
    parts = [pair_products(x[:, :, j : j + 1] * 3**0.5, torch.arange(6)) for j in range(3)]
    torch.testing.assert_close(products.self_products[:7], sum(p.self_products for p in parts) / 3)
    torch.testing.assert_close(
        products.different_prompts[8],
        (parts[0].different_prompts[0] + parts[2].different_prompts[0]) / 2,
    )
    signal = torch.stack([p.signal[0, 0] for p in parts])
    spread = products.mean_estimate(products.signal[:, 0])
    assert spread.sketch == pytest.approx(float(signal.std() / 3**0.5))


@pytest.mark.parametrize(("degrees", "expected"), [(2, 4.30265), (5, 2.57058), (30, 2.04227)])
def test_the_quantile_is_students(degrees: int, expected: float) -> None:
    assert student_t_quantile(degrees) == pytest.approx(expected, rel=0.02 if degrees < 5 else 1e-3)


def test_intervals_by_hand() -> None:
    x = torch.tensor([10.0, 9.0, 11.0, 10.0, 8.0, 12.0], dtype=torch.float64)
    deviations = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0])  # 5 prompts, sum of squares 10
    plain, t = mean_estimate(x, 5), student_t_quantile(4)
    assert (plain.value, plain.sketch) == (10, 0)
    assert plain.error == pytest.approx((4 / 5 * 10) ** 0.5)
    spread = float((deviations.square() - 2).square().sum())
    assert degrees_of_freedom(deviations) == min(4, 2 * 100 / spread) == 4
    assert plain.high == pytest.approx(10 + t * 8**0.5)
    long = positive_estimate(x, 5)
    assert long.low * long.high == pytest.approx(100)
    assert long.high == pytest.approx(10 * math.exp(t * 8**0.5 / 10))
    reach = t * 8**0.5
    assert squared_length_estimate(plain).high == pytest.approx(10 + reach + reach**2 / 40)
    low = mean_estimate(x - 10, 5)
    assert squared_length_estimate(low).high == pytest.approx(reach + reach / 2)
    assert positive_estimate(x - 10, 5) == low
    # one prompt causes the entire error
    assert degrees_of_freedom(torch.tensor([9.0] + [0.0] * 99)) == pytest.approx(200 / 99)
    two = torch.cat([x, torch.tensor([9.0, 11.0])])  # two copies of a sketch
    assert mean_estimate(two, 5).sketch == pytest.approx((1 / 2 * 2) ** 0.5)
    # Fieller: at the ends (N - rho D)^2 = t^2 Var(N - rho D), with the jackknife variance
    denominator = torch.tensor([20.0, 20.5, 19.0, 20.0, 21.0, 19.5], dtype=torch.float64)
    estimate = ratio_estimate(x, denominator, 5)
    assert estimate.value == 0.5
    assert estimate.low < 0.5 < estimate.high
    t = student_t_quantile(
        degrees_of_freedom((x - 0.5 * denominator)[1:] - (x - 0.5 * denominator)[1:].mean())
    )
    for rho in (estimate.low, estimate.high):
        ends = mean_estimate(x - rho * denominator, 5)
        assert ends.value**2 == pytest.approx((t * ends.error) ** 2)
    assert math.isnan(ratio_estimate(x, denominator - 20, 5).low)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(MissingField, match="2 prompts"):
        signal_and_noise(torch.randn(8, 3), torch.arange(8) // 4)
    with pytest.raises(ValueError, match=r"expected \(4, F, J, m\)"):
        pair_products(torch.randn(4, 3), torch.arange(4))
