"""Mergeable accumulators: what a metric returns instead of a number.

An accumulator holds only sums, so `a + b` is exact over micro-batches, ranks and steps, and the
division happens once, in `compute`. The sums stay on their device as float64 tensors; `compute`
moves all of them to the host in a single transfer.

Shapes: B responses, T response positions, S position slices (`diagnostics.core.position_bins`).

The sampling unit is the *cluster*: the prompt where `cluster` ids are given, else the response.
Clusters are summed inside the batch that an accumulator is built from. Put all rollouts of a prompt
into one micro-batch: for a cluster that is split in two, (z_a + z_b)^2 becomes z_a^2 + z_b^2, which
drops 2 z_a z_b. Rollouts of a prompt usually err in the same direction, so the standard error comes
out too small (never below that of treating the parts as independent prompts); where they err in
opposite directions it comes out too large. Values are exact either way.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diagnostics.core.cluster_sums import (
    apply_mask,
    position_counts,
    ratio_and_error,
    ratio_sums,
    row_counts,
)
from diagnostics.core.position_bins import ERROR_LABELS, LABELS, bin_membership
from diagnostics.errors import InvalidInput


class Accumulator(ABC):
    """Sums that can be added, with a `summary` of their host values."""

    def tensors(self) -> list[Tensor]:
        """Return the sums, of a dataclass in field order."""
        return list(vars(self).values())

    def __add__(self, other: Self) -> Self:
        if type(self) is not type(other):
            raise TypeError(f"cannot add {type(other).__name__} to {type(self).__name__}")
        return type(self)(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def values(self) -> dict[str, float]:
        """Compute every value by its suffix ("" is the value itself); one host sync."""
        return compute({"": self})

    @staticmethod
    @abstractmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Compute the values by suffix from the host values of `tensors()`, in their order."""


class Ratio(Accumulator):
    """Accumulator of ratios of sums, with the cluster sums of their standard errors.

    The six sums (`ratio_sums`) of many accumulators are computed at once by `sum_rows`, or when
    they are first read; `compute` divides all ratios at once.

    Args:
        sums: (6, ...) sums in the order of `ratio_sums`.
    """

    def __init__(self, sums: Tensor) -> None:
        self._sums: Tensor | None = sums
        self._rows: Rows | None = None  # until the sums are computed

    @classmethod
    def from_rows(cls, numerator: Tensor, denominator: Tensor, cluster: Tensor | None) -> Self:
        """Accumulate the ratio of the sums of two columns.

        Args:
            numerator: (B, ...).
            denominator: (B, ...).
            cluster: (B,) cluster ids, or None if each row is a cluster.

        Returns:
            The accumulator, whose sums are not computed yet.
        """
        ratio = cls.__new__(cls)
        ratio._sums, ratio._rows = None, (numerator, denominator, cluster)
        return ratio

    @property
    def sums(self) -> Tensor:
        """The (6, ...) sums, in the order of `ratio_sums`."""
        if self._sums is None:
            sum_rows([self])
            assert self._sums is not None
        return self._sums

    def tensors(self) -> list[Tensor]:
        """Return the sums, as one tensor."""
        return [self.sums]

    @property
    def total(self) -> Tensor:
        """The numerator."""
        return self.sums[0]

    @property
    def count(self) -> Tensor:
        """The denominator."""
        return self.sums[1]

    @classmethod
    def summary(cls, *sums: np.ndarray) -> dict[str, float]:
        """Compute ratio and standard error from the host sums, by suffix."""
        return cls.label_values(*ratio_and_error(*sums[0]), sums[0])

    @staticmethod
    @abstractmethod
    def label_values(value: np.ndarray, error: np.ndarray, sums: np.ndarray) -> dict[str, float]:
        """Return the values by suffix, given `ratio_and_error` of the sums."""


Rows = tuple[Tensor, Tensor, Tensor | None]
"""Numerators and denominators of rows (B, ...), and their (B,) cluster ids."""


def sum_rows(accumulators: Iterable[Accumulator]) -> None:
    """Compute the sums of all ratios that have none yet, those of equal shape at once.

    Args:
        accumulators: Accumulators of any kind.
    """
    groups: dict[Any, list[tuple[Ratio, Rows]]] = {}
    for ratio in accumulators:
        if isinstance(ratio, Ratio) and ratio._rows is not None:
            numerator, _, cluster = ratio._rows
            key = (id(cluster), numerator.shape, numerator.device)
            groups.setdefault(key, []).append((ratio, ratio._rows))
    for group in groups.values():
        numerators = torch.stack([rows[0] for _, rows in group], 1)
        denominators = torch.stack([rows[1] for _, rows in group], 1)
        cluster = group[0][1][2]
        sums = torch.stack(ratio_sums(numerators, denominators, cluster))
        for (ratio, _), column in zip(group, sums.unbind(1), strict=True):
            ratio._sums, ratio._rows = column, None


class Mean(Ratio):
    """A ratio of sums total / count, with the cluster sums of its standard error; all 0-d.

    Computed values: "" the ratio (NaN when count is 0) and, if the cluster sums are known, "_se"
    its standard error.
    """

    @classmethod
    def without_error(cls, total: Tensor, count: Tensor) -> Self:
        """Return total / count without a standard error, which merged means then lack too."""
        unknown = torch.full_like(total, float("nan"), dtype=torch.float64)
        return cls(torch.stack([total.double(), count.double(), *[unknown] * 4]))

    @classmethod
    def from_values(cls, x: Tensor, mask: Tensor, cluster: Tensor | None = None) -> Self:
        """Accumulate the pooled mean of x over the mask: sum m x / sum m.

        Args:
            x: (B, T) or (B,) values.
            mask: Bool, of the same shape.
            cluster: (B,) cluster ids; each row is a cluster if None.

        Returns:
            The accumulator.
        """
        n = apply_mask(x, mask)
        return cls.from_rows(n.sum(1) if mask.dim() > 1 else n, row_counts(mask), cluster)

    @classmethod
    def ratio(
        cls, numerator: Tensor, denominator: Tensor, mask: Tensor, cluster: Tensor | None = None
    ) -> Self:
        """Accumulate sum m numerator / sum m denominator.

        Args:
            numerator: (B, T) or (B,).
            denominator: Of the same shape.
            mask: Bool, of the same shape.
            cluster: (B,) cluster ids; each row is a cluster if None.

        Returns:
            The accumulator.
        """
        n, d = apply_mask(numerator, mask), apply_mask(denominator, mask)
        if mask.dim() > 1:
            n, d = n.sum(1), d.sum(1)
        return cls.from_rows(n, d, cluster)

    def value(self) -> float:
        """Compute the ratio; one host sync."""
        return self.values()[""]

    def stderr(self) -> float:
        """Compute the standard error, NaN if unknown; one host sync."""
        return self.values().get("_se", float("nan"))

    @staticmethod
    def label_values(value: np.ndarray, error: np.ndarray, sums: np.ndarray) -> dict[str, float]:
        """Return the ratio as "" and, if known, its standard error as "_se"."""
        if math.isnan(sums[2]):
            return {"": float(value)}
        return {"": float(value), "_se": float(error)}


def means_without_error(values: Mapping[str, Tensor]) -> dict[str, Mean]:
    """Return every 0-d value as a mean over one count, without a standard error.

    Args:
        values: Values by name.

    Returns:
        Means by name.
    """
    if not values:
        return {}
    totals = torch.stack([x.detach().double() for x in values.values()])
    means = Mean.without_error(totals, torch.ones_like(totals)).sums.unbind(1)
    return {name: Mean(sums) for name, sums in zip(values, means, strict=True)}


class PositionMean(Ratio):
    """A `Mean` over the whole response and over each position bin; every sum is (S,).

    Computed values: "", "_se", and for each non-empty bin "@lo-hi", "@lo-hi_se". Late bins hold
    only the responses that are long enough, a selected population, not the same ones as early bins.
    """

    @classmethod
    def from_values(cls, x: Tensor, mask: Tensor, cluster: Tensor | None = None) -> Self:
        """Accumulate the mean of x over the mask, by response position.

        Args:
            x: (B, T) values.
            mask: (B, T) bool.
            cluster: (B,) cluster ids; each row is a cluster if None.

        Returns:
            The accumulator.
        """
        membership = bin_membership(mask.shape[1], mask.device)
        return cls.from_rows(apply_mask(x, mask) @ membership, position_counts(mask), cluster)

    @staticmethod
    def label_values(value: np.ndarray, error: np.ndarray, sums: np.ndarray) -> dict[str, float]:
        """Return values and standard errors of the response and of the non-empty bins."""
        entries = {}
        columns = zip(
            LABELS, ERROR_LABELS, *map(np.ndarray.tolist, (value, error, sums[1])), strict=True
        )
        for label, error_label, x, standard_error, count in columns:
            if count > 0 or not label:
                entries[label], entries[error_label] = x, standard_error
        return entries


@dataclass(frozen=True, eq=False)
class Counts(Accumulator):
    """Number of masked tokens in the whole response and in each position bin; field (S,).

    Computed values: "" and "@lo-hi" for each non-empty bin.
    """

    count: Tensor

    @classmethod
    def from_values(cls, mask: Tensor) -> Self:
        """Accumulate the number of True entries of a mask (B, T)."""
        return cls(mask.double().sum(0) @ bin_membership(mask.shape[1], mask.device))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Return the counts of the response and of the non-empty bins."""
        pairs = zip(LABELS, sums[0].tolist(), strict=True)
        return {label: n for label, n in pairs if n > 0 or not label}


def pack(totals: Mapping[str, Accumulator]) -> Tensor:
    """Concatenate all sums of all accumulators to one float64 vector, to reduce or store it."""
    parts = [x.detach().reshape(-1) for total in totals.values() for x in total.tensors()]
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    device = next((x.device for x in parts if x.device.type != "cpu"), parts[0].device)
    return torch.cat([x.to(device, torch.float64) for x in parts])


def unpack(vector: Tensor, template: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
    """Split a vector from `pack` into accumulators.

    Args:
        vector: (n,) sums.
        template: Accumulators with the names, classes and shapes of the result.

    Returns:
        Accumulators by name.

    Raises:
        InvalidInput: The vector has another number of sums than the template.
    """
    unpacked: dict[str, Accumulator] = {}
    start = 0
    for name, total in template.items():
        parts = []
        for x in total.tensors():
            parts.append(vector[start : start + x.numel()].reshape(x.shape))
            start += x.numel()
        unpacked[name] = type(total)(*parts)
    if start != vector.numel():
        raise InvalidInput(
            f"the vector holds {vector.numel()} sums, the template {start}; use the packed template"
        )
    return unpacked


def compute(totals: Mapping[str, Accumulator]) -> dict[str, float]:
    """Compute every value of every accumulator, named total + suffix; one transfer to the host."""
    host = pack(totals).cpu().numpy()
    sums: dict[str, list[np.ndarray]] = {}
    start = 0
    for name, total in totals.items():
        sums[name] = []
        for x in total.tensors():
            sums[name].append(host[start : start + x.numel()].reshape(x.shape))
            start += x.numel()
    ratios = [name for name, total in totals.items() if isinstance(total, Ratio)]
    divided = iter(_divide_all([sums[name][0] for name in ratios]))
    row: dict[str, float] = {}
    for name, total in totals.items():
        if isinstance(total, Ratio):
            entries = total.label_values(*next(divided), sums[name][0])
        else:
            entries = total.summary(*sums[name])
        for suffix, value in entries.items():
            row[name + suffix] = value
    return row


def _divide_all(ratios: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute `ratio_and_error` for the six sums of each ratio, on all of them at once."""
    if not ratios:
        return []
    columns = [sums.reshape(6, -1) for sums in ratios]
    value, error = ratio_and_error(*np.concatenate(columns, axis=1))
    results, end = [], 0
    for sums in ratios:
        part, shape = slice(end, end := end + sums[0].size), sums.shape[1:]
        results.append((value[part].reshape(shape), error[part].reshape(shape)))
    return results


def merge(a: Mapping[str, Accumulator], b: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
    """Add two sets of accumulators by name.

    Args:
        a: Accumulators by name.
        b: Accumulators with the same names.

    Returns:
        The sums by name.

    Raises:
        InvalidInput: The two do not hold the same names.
    """
    if a.keys() != b.keys():
        raise InvalidInput(
            f"accumulators in one of two parts only: {sorted(a.keys() ^ b.keys())}; give all "
            "micro-batches the same optional fields"
        )
    return {name: a[name] + b[name] for name in a}
