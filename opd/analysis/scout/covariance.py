"""Prior covariance of the runs of a bank, and its inverse from the parts that it is made of.

With methods m, features x and pairs g, two runs have the covariance

    C = C0 + 1[m = m'] + k(x, x') + 1[m = m'] k(x, x') + 1[g = g'],

a mean, an average of each method, what features do to all methods and to one, and what else the
runs of a pair share. All runs of a pair have its features, so that C = U A U^T + B: A is over
pairs, U says which pair a run is of, and B is 0 between methods. B is inverted method by method,
and the Woodbury identity gives the rest, in a small part of the operations of inverting C.

Shapes: n runs, d features, q queries, u different pairs of a pair and features.
"""

from dataclasses import dataclass

import numpy as np

from opd.analysis.scout.bank import Array, Bank

SHAPES = ("none", "linear", "gaussian")
"""Shapes of the covariance of features."""
MEAN_VARIANCE = 100.0
"""Prior variance C0 of the mean over all runs: it is hardly shrunk."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """Standardisation of features, from the runs that a model is made from."""

    mean: Array
    """(d,)."""
    scale: Array
    """(d,)."""
    low: Array
    """(d,) smallest values."""
    high: Array
    """(d,) largest values."""

    @classmethod
    def of_features(cls, features: Array) -> "Scaling":
        """Return the scaling of (n, d) features; NaN is left out of all."""
        present = np.isfinite(features)
        values = np.where(present, features, 0.0)
        count = present.sum(0).clip(min=1)
        mean = values.sum(0) / count
        variance = (np.square(values - mean) * present).sum(0) / count
        return cls(
            mean,
            np.where(variance > 1e-12, np.sqrt(variance), 1.0),
            np.where(present, features, np.inf).min(0),
            np.where(present, features, -np.inf).max(0),
        )

    def standardise(self, features: Array) -> Array:
        """Return (q, d) standardised features, held at the ends of the range; 0 for NaN."""
        clipped = np.clip(features, self.low, self.high)
        return np.where(np.isfinite(features), (clipped - self.mean) / self.scale, 0.0)


def feature_covariance(shape: str, x: Array, other_x: Array) -> Array:
    """Return the (q, n) covariances k of an effect of features.

    Args:
        shape: One of SHAPES.
        x: (q, d) standardised features.
        other_x: (n, d).

    Returns:
        The covariances.
    """
    dimensions = max(1, x.shape[1])
    if shape == "none":
        return np.zeros((len(x), len(other_x)))
    if shape == "linear":
        linear: Array = x @ other_x.T / dimensions
        return linear
    squares = np.square(x).sum(1)[:, None] + np.square(other_x).sum(1) - 2 * x @ other_x.T
    gaussian: Array = np.exp(-np.maximum(squares, 0.0) / (2 * dimensions))
    return gaussian


def covariance(shape: str, x: Array, method: Array, other_x: Array, other_method: Array) -> Array:
    """Return the (q, n) prior covariances of runs of different pairs.

    Args:
        shape: One of SHAPES.
        x: (q, d) standardised features.
        method: (q,) methods.
        other_x: (n, d).
        other_method: (n,).

    Returns:
        The covariances.
    """
    same_method = (method[:, None] == other_method[None]).astype(np.float64)
    k = feature_covariance(shape, x, other_x)
    return MEAN_VARIANCE + same_method + k + same_method * k


@dataclass(frozen=True, eq=False)
class BankCovariance:
    """The prior covariance C of the runs of a bank, in parts."""

    unit: Array
    """(n,) index of the pair, and features, of each run."""
    method_rows: tuple[Array, ...]
    """Runs of each method."""
    shared: Array
    """(u, u) A: mean, features and pair, for all methods."""
    of_method: Array
    """(u, u) covariance of two runs of one method beside A."""

    def dense(self) -> Array:
        """Return the (n, n) covariances."""
        c: Array = self.shared[np.ix_(self.unit, self.unit)]
        for rows in self.method_rows:
            c[np.ix_(rows, rows)] += self.of_method[np.ix_(self.unit[rows], self.unit[rows])]
        return c


def bank_covariance(shape: str, x: Array, bank: Bank) -> BankCovariance:
    """Return the prior covariance of the runs of a bank.

    Args:
        shape: One of SHAPES.
        x: (n, d) standardised features.
        bank: The runs.

    Returns:
        The covariance.
    """
    pair = np.unique(bank.pair, return_inverse=True)[1]
    units, unit = np.unique(np.column_stack([pair, x]), axis=0, return_inverse=True)
    k = feature_covariance(shape, units[:, 1:], units[:, 1:])
    same_pair = units[:, None, 0] == units[None, :, 0]
    return BankCovariance(
        unit=unit.reshape(-1),
        method_rows=tuple(np.flatnonzero(bank.method == name) for name in np.unique(bank.method)),
        shared=MEAN_VARIANCE + k + same_pair,
        of_method=1 + k,
    )


@dataclass(frozen=True, eq=False)
class BankInverse:
    """(noise I + R C R)^-1 = B^-1 - W H W^T, with B = noise I + R of_method R within methods.

    With U of the runs' units times R: W = B^-1 U and H = (I + A U^T B^-1 U)^-1 A.
    """

    within_method: Array
    """(n, n) B^-1, 0 between methods."""
    loadings: Array
    """(n, u) W."""
    core: Array
    """(u, u) H."""

    def times(self, x: Array) -> Array:
        """Return the product of the inverse and x, (n,) or (n, q)."""
        product: Array = self.within_method @ x - self.loadings @ (
            self.core @ (self.loadings.T @ x)
        )
        return product

    def blocks(self, rows: Array) -> Array:
        """Return the (b, s, s) blocks of the inverse at b sets of s runs, rows (b, s)."""
        loadings = self.loadings[rows]
        within: Array = self.within_method[rows[:, :, None], rows[:, None, :]]
        return within - loadings @ self.core @ loadings.transpose(0, 2, 1)


def noisy_inverse(c: BankCovariance, noise: float, root: Array) -> BankInverse:
    """Invert noise I + R C R, with R the diagonal matrix of `root`.

    Args:
        c: C, of n runs.
        noise: Positive.
        root: (n,) diagonal of R.

    Returns:
        The inverse.
    """
    num_runs, num_units = len(c.unit), len(c.shared)
    membership = np.zeros((num_runs, num_units))
    membership[np.arange(num_runs), c.unit] = root
    within, loadings = np.zeros((num_runs, num_runs)), np.empty((num_runs, num_units))
    inverses: dict[bytes, Array] = {}  # methods often have the same pairs
    for rows in c.method_rows:
        unit, scale = c.unit[rows], root[rows]
        key = unit.tobytes() + scale.tobytes()
        if key not in inverses:
            block = c.of_method[np.ix_(unit, unit)] * (scale[:, None] * scale)
            inverses[key] = np.linalg.inv(block + noise * np.eye(len(rows)))
        within[np.ix_(rows, rows)] = inverses[key]
        loadings[rows] = inverses[key] @ membership[rows]
    core = np.linalg.solve(np.eye(num_units) + c.shared @ (membership.T @ loadings), c.shared)
    return BankInverse(within, loadings, core)
