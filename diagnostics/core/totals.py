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

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

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
from diagnostics.core.position_bins import LABELS, bin_membership, decile_indices
from diagnostics.errors import InvalidInput


class Accumulator(ABC):
    """Sums that can be added: a frozen dataclass of tensors with a `summary` of host values."""

    def tensors(self) -> list[Tensor]:
        """Return the sums in field order."""
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
    """Accumulator of the six sums of `ratio_sums`; `compute` divides all ratios at once."""

    @classmethod
    def summary(cls, *sums: np.ndarray) -> dict[str, float]:
        """Compute ratio and standard error from the host sums, by suffix."""
        return cls.label_values(*ratio_and_error(*sums), *sums)

    @staticmethod
    @abstractmethod
    def label_values(value: np.ndarray, error: np.ndarray, *sums: np.ndarray) -> dict[str, float]:
        """Return the values by suffix, given `ratio_and_error` of the sums."""


@dataclass(frozen=True, eq=False)
class Mean(Ratio):
    """A ratio of sums total / count, with the cluster sums of its standard error.

    Computed values: "" the ratio (NaN when count is 0) and, if the cluster sums are known, "_se"
    its standard error.
    """

    total: Tensor
    count: Tensor
    clusters: Tensor
    square: Tensor
    cross: Tensor
    count_square: Tensor

    @classmethod
    def without_error(cls, total: Tensor, count: Tensor) -> Self:
        """Return total / count without a standard error, which merged means then lack too."""
        unknown = torch.full_like(total, float("nan"), dtype=torch.float64)
        return cls(total, count, unknown, unknown, unknown, unknown)

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
        return cls(*ratio_sums(n.sum(1) if mask.dim() > 1 else n, row_counts(mask), cluster))

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
        return cls(*ratio_sums(n, d, cluster))

    def value(self) -> float:
        """Compute the ratio; one host sync."""
        return self.values()[""]

    def stderr(self) -> float:
        """Compute the standard error, NaN if unknown; one host sync."""
        return self.values().get("_se", float("nan"))

    @staticmethod
    def label_values(value: np.ndarray, error: np.ndarray, *sums: np.ndarray) -> dict[str, float]:
        """Return the ratio as "" and, if known, its standard error as "_se"."""
        stderr_entry = {} if np.isnan(sums[2]) else {"_se": float(error)}
        return {"": float(value)} | stderr_entry


@dataclass(frozen=True, eq=False)
class PositionMean(Ratio):
    """A `Mean` over the whole response and over each position bin; every field is (S,).

    Computed values: "", "_se", and for each non-empty bin "@lo-hi", "@lo-hi_se". Late bins hold
    only the responses that are long enough, a selected population, not the same ones as early bins.
    """

    total: Tensor
    count: Tensor
    clusters: Tensor
    square: Tensor
    cross: Tensor
    count_square: Tensor

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
        return cls(*ratio_sums(apply_mask(x, mask) @ membership, position_counts(mask), cluster))

    @staticmethod
    def label_values(value: np.ndarray, error: np.ndarray, *sums: np.ndarray) -> dict[str, float]:
        """Return values and standard errors of the response and of the non-empty bins."""
        entries = {}
        for i, label in enumerate(LABELS):
            if i == 0 or sums[1][i] > 0:
                entries[label] = float(value[i])
                entries[f"{label}_se"] = float(error[i])
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


@dataclass(frozen=True, eq=False)
class Deciles(Ratio):
    """A `Mean` in each tenth of the response, by relative position; every field is (10,).

    Computed values, for each non-empty tenth: "%0-10" to "%90-100" and the same with "_se". Every
    response is in every tenth (except for very short ones), so tenths compare one population at
    positions that differ between responses; a `PositionMean` compares equal positions of different
    populations.
    """

    total: Tensor
    count: Tensor
    clusters: Tensor
    square: Tensor
    cross: Tensor
    count_square: Tensor

    @classmethod
    def from_values(
        cls,
        x: Tensor,
        mask: Tensor,
        cluster: Tensor | None = None,
        response: Tensor | None = None,
    ) -> Self:
        """Accumulate the mean of x over the mask, by tenth of the response.

        Args:
            x: (B, T) values.
            mask: (B, T) bool.
            cluster: (B,) cluster ids; each row is a cluster if None.
            response: (B, T) bool, the tokens that the response consists of; the mask if None.

        Returns:
            The accumulator.
        """
        tenth = decile_indices(mask if response is None else response)

        def sum_by_tenth(values: Tensor) -> Tensor:
            return values.new_zeros(len(values), 10).scatter_add(1, tenth, values)

        return cls(
            *ratio_sums(sum_by_tenth(apply_mask(x, mask)), sum_by_tenth(mask.double()), cluster)
        )

    @staticmethod
    def label_values(value: np.ndarray, error: np.ndarray, *sums: np.ndarray) -> dict[str, float]:
        """Return values and standard errors of the non-empty tenths."""
        entries = {}
        for i in range(10):
            if sums[1][i] > 0:
                entries[f"%{10 * i}-{10 * i + 10}"] = float(value[i])
                entries[f"%{10 * i}-{10 * i + 10}_se"] = float(error[i])
        return entries


@dataclass(frozen=True, eq=False)
class Martingale(Accumulator):
    """z = sum m d / sqrt(sum m v) for differences d with mean 0 and variance v given the prefix.

    Computed values: "" z over the whole response and "@lo-hi" over each bin with nonzero variance,
    each approximately standard normal if the differences really have mean 0 (martingale central
    limit theorem); under a fixed bias it grows like the square root of the number of tokens. Both
    fields are (S,).
    """

    difference: Tensor
    variance: Tensor

    @classmethod
    def from_values(cls, difference: Tensor, variance: Tensor, mask: Tensor) -> Self:
        """Accumulate one batch.

        Args:
            difference: (B, T) martingale differences.
            variance: (B, T) their conditional variances.
            mask: (B, T) bool.

        Returns:
            The accumulator.
        """
        membership = bin_membership(mask.shape[1], mask.device)
        return cls(*(apply_mask(x, mask).sum(0) @ membership for x in (difference, variance)))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """Compute z from the host sums."""
        z_scores = {"": float("nan")}
        for label, difference, variance in zip(LABELS, *(x.tolist() for x in sums), strict=True):
            if variance > 0:
                z_scores[label] = difference / variance**0.5
        return z_scores


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
    divided = iter(_divide_all([sums[name] for name in ratios]))
    row: dict[str, float] = {}
    for name, total in totals.items():
        host_sums = sums[name]
        if isinstance(total, Ratio):
            entries = total.label_values(*next(divided), *host_sums)
        else:
            entries = total.summary(*host_sums)
        row |= {name + suffix: value for suffix, value in entries.items()}
    return row


def _divide_all(ratios: list[list[np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute `ratio_and_error` for the six sums of each ratio, on all of them at once."""
    if not ratios:
        return []
    flat = [np.concatenate([x.ravel() for x in column]) for column in zip(*ratios, strict=True)]
    ends = np.cumsum([sums[0].size for sums in ratios])[:-1]
    shapes = [sums[0].shape for sums in ratios]
    value, error = (np.split(x, ends) for x in ratio_and_error(*flat))
    results = zip(value, error, shapes, strict=True)
    return [(v.reshape(shape), e.reshape(shape)) for v, e, shape in results]


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
