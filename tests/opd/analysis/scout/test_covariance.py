"""The prior covariance written out, and its inverse against that of the whole matrix."""

import math

import numpy as np
import pytest

from opd.analysis.scout import covariance
from opd.analysis.scout.bank import Bank
from tests.helpers.records.scout_banks import synthetic_bank


@pytest.fixture(scope="module")
def bank() -> Bank:
    """A bank of pairs that lack methods, have several runs of one, or were measured twice."""
    bank = synthetic_bank(0, effects={}, families=3, pairs=3, methods=3)
    kept_rows = np.delete(np.arange(len(bank)), [1, 5, 9, 10])
    bank = bank.rows(np.concatenate([kept_rows, [0, 0, 13]]))
    bank.features[-1] += 0.3
    return bank


@pytest.mark.parametrize("shape", covariance.SHAPES)
def test_covariance_of_a_bank_is_the_sum_of_its_terms(bank: Bank, shape: str) -> None:
    x = covariance.Scaling.of_features(bank.features).standardise(bank.features)
    expected = np.empty((len(bank), len(bank)))
    for i in range(len(bank)):
        for j in range(len(bank)):
            k = {
                "none": 0.0,
                "linear": float(x[i] @ x[j]) / x.shape[1],
                "gaussian": math.exp(-float(np.square(x[i] - x[j]).sum()) / (2 * x.shape[1])),
            }[shape]
            same_method = float(bank.method[i] == bank.method[j])
            same_pair = float(bank.pair[i] == bank.pair[j])
            expected[i, j] = 100.0 + same_method + k + same_method * k + same_pair
    assert covariance.bank_covariance(shape, x, bank).dense() == pytest.approx(expected)
    different_pair = bank.pair[:, None] != bank.pair[None]
    c = covariance.covariance(shape, x, bank.method, x, bank.method)
    assert c[different_pair] == pytest.approx(expected[different_pair])


@pytest.mark.parametrize("shape", covariance.SHAPES)
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_inverse_is_that_of_the_whole_matrix(bank: Bank, shape: str, noise: float) -> None:
    generator = np.random.default_rng(1)
    c = covariance.bank_covariance(shape, generator.normal(size=bank.features.shape), bank)
    assert len(c.shared) == len(bank), "the features of all runs differ"
    c = covariance.bank_covariance(shape, bank.features, bank)
    assert len(c.shared) == 10 < len(bank), "nine pairs, one of them measured twice"
    root = generator.random(len(bank))
    expected = np.linalg.inv(noise * np.eye(len(bank)) + root[:, None] * c.dense() * root)
    inverse = covariance.noisy_inverse(c, noise, root)
    assert inverse.times(np.eye(len(bank))) == pytest.approx(expected, abs=1e-9)
    x = generator.normal(size=len(bank))
    assert inverse.times(x) == pytest.approx(expected @ x)
    rows = generator.permutation(len(bank))[:12].reshape(4, 3)
    for block, index in zip(inverse.blocks(rows), rows, strict=True):
        assert block == pytest.approx(expected[np.ix_(index, index)], abs=1e-9)


def test_scaling_leaves_out_what_is_missing_and_holds_the_range() -> None:
    features = np.array([[1.0, math.nan, 5.0], [3.0, math.nan, 5.0], [math.nan, 2.0, 5.0]])
    scaling = covariance.Scaling.of_features(features)
    queries = np.array([[1.0, 2.0, 5.0], [9.0, math.nan, 7.0]])
    assert scaling.standardise(queries).tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
