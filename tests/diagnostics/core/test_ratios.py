"""The sums of ratios are those of plain loops, alone, together with others and after a merge."""

import math

import pytest
import torch
from torch import Tensor

from diagnostics.core.deciles import Deciles
from diagnostics.core.totals import (
    Accumulator,
    Mean,
    PositionMean,
    compute,
    means_without_error,
    merge,
    sum_rows,
)

B, T = 6, 5
PROMPT, OTHER = torch.tensor([4, 9, 4, 4, 7, 9]), torch.tensor([1, 1, 1, 2, 2, 2])


def columns() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, B, T, generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.7
    return x, y, mask


def by_hand(numerator: list[float], denominator: list[float], cluster: Tensor) -> tuple:
    """Ratio and its standard error from one numerator and denominator a row."""
    sums: dict[int, list[float]] = {}
    for n, d, c in zip(numerator, denominator, cluster.tolist(), strict=True):
        pair = sums.setdefault(c, [0.0, 0.0])
        pair[0] += n
        pair[1] += d
    value = sum(n for n, _ in sums.values()) / sum(d for _, d in sums.values())
    used = sum(d != 0 for _, d in sums.values())
    spread = sum((n - value * d) ** 2 for n, d in sums.values())
    total = abs(sum(d for _, d in sums.values()))
    return value, math.sqrt(used / (used - 1) * spread) / total


def accumulators() -> dict[str, Accumulator]:
    x, y, mask = columns()
    return {
        "mean": Mean.from_values(x, mask, PROMPT),
        "ratio": Mean.ratio(x, y.abs(), mask, PROMPT),
        "other": Mean.from_values(y, mask, OTHER),
        "rows": Mean.from_values(x, mask),
        "profile": PositionMean.from_values(x, mask, PROMPT),
        "tenths": Deciles.from_values(x, mask, PROMPT),
    }


def expected() -> dict[str, tuple]:
    x, y, mask = columns()
    count = mask.double().sum(1).tolist()

    def row_sums(values: Tensor, where: Tensor) -> list[float]:
        return (values.double() * where).sum(1).tolist()

    early = mask & (torch.arange(T) < 2)
    return {
        "mean": by_hand(row_sums(x, mask), count, PROMPT),
        "ratio": by_hand(row_sums(x, mask), row_sums(y.abs(), mask), PROMPT),
        "other": by_hand(row_sums(y, mask), count, OTHER),
        "rows": by_hand(row_sums(x, mask), count, torch.arange(B)),
        "profile": by_hand(row_sums(x, mask), count, PROMPT),
        "profile@0-1": by_hand(row_sums(x, early), early.double().sum(1).tolist(), PROMPT),
    }


@pytest.mark.parametrize("at_once", [False, True])
def test_ratios_of_several_shapes_and_clusters(at_once: bool) -> None:
    totals = accumulators()
    if at_once:
        sum_rows(totals.values())
    row = compute(totals)
    for name, (value, error) in expected().items():
        assert (row[name], row[name + "_se"]) == pytest.approx((value, error)), name
    assert "profile@8-15" not in row


def test_merged_ratios_are_those_of_both_parts() -> None:
    """The prompts of the second part are others: its clusters are new ones."""
    whole = compute(accumulators())
    row = compute(merge(accumulators(), accumulators()))
    assert row["mean"] == pytest.approx(whole["mean"])
    _, _, mask = columns()
    x = columns()[0].double() * mask
    twice = by_hand(
        [*x.sum(1).tolist()] * 2, [*mask.double().sum(1).tolist()] * 2, torch.cat([PROMPT, -PROMPT])
    )
    assert row["mean_se"] == pytest.approx(twice[1])


def test_numbers_without_an_error_stay_without_one() -> None:
    numbers = {"a": torch.tensor(3.0), "b": torch.tensor(float("nan")), "c": torch.tensor(7)}
    row = compute(means_without_error(numbers))
    assert row == pytest.approx({"a": 3.0, "b": float("nan"), "c": 7.0}, nan_ok=True)
    doubled = merge(
        means_without_error(numbers), means_without_error({**numbers, "a": numbers["c"]})
    )
    assert compute(doubled)["a"] == pytest.approx(5.0)
    assert means_without_error({}) == {}
