"""Mergeable totals: what a diagnostic returns instead of a number.

A total holds nothing but sums, so `a + b` is exact over micro-batches, ranks and steps, and the
division happens once, at readout. The sums stay on their device as float64 tensors; `read` moves
all of them to the host in a single transfer.

Shapes: B responses, T response positions, S slices of position (`diagnostics.core.position_bins`).

The sampling unit is the *cluster*: the prompt where `cluster` ids are given, else the response.
Clusters are summed inside the batch that a total is made from. Put all rollouts of one prompt into
one micro-batch: for a cluster cut in two, (z_a + z_b)^2 becomes z_a^2 + z_b^2, which drops
2 z_a z_b. Rollouts of one prompt usually err in the same direction, so the standard error comes out
too small (never below what treating the parts as independent prompts gives); where they err in
opposite directions it comes out too large. Values are exact either way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Self
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from diagnostics.core.position_bins import LABELS, slices, tenths
from diagnostics.errors import InvalidInput

_UNSET = torch.empty(0)


def remembered(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, with its last result kept: a panel asks for the same of one mask many times.

    Goes by the argument's identity and its version, which in-place changes raise; keeps no argument
    alive. Inference tensors have no version; theirs is not kept.
    """
    kept: list[tuple[ref[Tensor], int, Tensor]] = []

    @wraps(function)
    def remembering(x: Tensor) -> Tensor:
        if x.is_inference():
            return function(x)
        if not (kept and kept[0][0]() is x and kept[0][1] == x._version):
            kept[:] = [(ref(x), x._version, function(x))]
        return kept[0][2]

    return remembering


@remembered
def cluster_numbers(ids: Tensor) -> Tensor:
    """(B,) ids to (B,) numbers below B, equal where ids are; unlike `unique` it never syncs."""
    ordered, order = ids.sort()
    fresh = torch.zeros_like(ids)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(ids).scatter(0, order, fresh.cumsum(0))


def ratio_sums(above: Tensor, below: Tensor, cluster: Tensor | None) -> tuple[Tensor, ...]:
    """Six sums over clusters that a ratio and its standard error need.

    With N_c, D_c the sums of `above`, `below` (B, ...) over the rows of cluster c: sum N, sum D,
    number of clusters with D != 0, sum N^2, sum N D, sum D^2; each (...).
    """
    x = torch.stack([above.double(), below.double()])
    if cluster is not None:
        x = torch.zeros_like(x).index_add_(1, cluster_numbers(cluster), x)
    total, square = x.sum(1), x.square().sum(1)
    used, cross = (x[1] != 0).sum(0).double(), (x[0] * x[1]).sum(0)
    return total[0], total[1], used, square[0], cross, square[1]


def ratio_and_error(
    n: np.ndarray, d: np.ndarray, c: np.ndarray, nn: np.ndarray, nd: np.ndarray, dd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """R = N/D and its linearised standard error sqrt(c/(c-1) sum_c (N_c - R D_c)^2) / D.

    NaN where D is 0; the error is NaN with fewer than two clusters or unknown cluster sums.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(d != 0, n / d, np.nan)
        spread = np.maximum(nn - 2 * value * nd + value**2 * dd, 0)
        error = np.where(c > 1, np.sqrt(c / (c - 1) * spread) / np.abs(d), np.nan)
    return value, error


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x in float64, detached, 0 where the mask is False whatever stood there."""
    return torch.where(mask, x.detach().double(), 0.0)


@remembered
def counts(mask: Tensor) -> Tensor:
    """(B,) float64 of a mask (B,) or (B, T): entries of each row."""
    return mask.double() if mask.dim() == 1 else mask.double().sum(1)


@remembered
def position_counts(mask: Tensor) -> Tensor:
    """(B, S) float64 of a mask (B, T): entries of each row, whole and by position bin."""
    return mask.double() @ slices(mask.shape[1], mask.device)


class Accumulator(ABC):
    """Sums that add: a frozen dataclass of tensors with a `summary` of their host values."""

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())

    def __add__(self, other: Self) -> Self:
        if type(self) is not type(other):
            raise TypeError(f"cannot add {type(other).__name__} to {type(self).__name__}")
        return type(self)(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def values(self) -> dict[str, float]:
        """Every number of this total by its suffix ("" is the value itself); one host sync."""
        return read({"": self})

    @staticmethod
    @abstractmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        """The readout by suffix, from the host values of `tensors()` in their order."""


class Ratio(Accumulator):
    """Totals of the six sums that `ratio_sums` makes; `read` divides those of all at once."""

    @classmethod
    def summary(cls, *sums: np.ndarray) -> dict[str, float]:
        return cls.labelled(*ratio_and_error(*sums), *sums)

    @staticmethod
    @abstractmethod
    def labelled(value: np.ndarray, error: np.ndarray, *sums: np.ndarray) -> dict[str, float]:
        """The readout by suffix, from `ratio_and_error` of the sums."""


@dataclass(frozen=True, eq=False)
class Mean(Ratio):
    """A ratio of sums total / count, with the cluster sums of its standard error.

    Readout: "" the ratio (NaN when count is 0) and "_se" its standard error. `Mean(total, count)`
    alone knows no clusters: it reads out without "_se", and so does everything merged with it.
    """

    total: Tensor
    count: Tensor
    clusters: Tensor = _UNSET
    square: Tensor = _UNSET
    cross: Tensor = _UNSET
    count_square: Tensor = _UNSET

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) is _UNSET:
                unknown = torch.full_like(self.total, float("nan"), dtype=torch.float64)
                object.__setattr__(self, f.name, unknown)

    @classmethod
    def of(cls, x: Tensor, mask: Tensor, cluster: Tensor | None = None) -> Self:
        """Mean of x over the mask, pooled: sum m x / sum m. x, mask (B, T) or (B,)."""
        n = masked(x, mask)
        return cls(*ratio_sums(n.sum(1) if mask.dim() > 1 else n, counts(mask), cluster))

    @classmethod
    def ratio(
        cls, above: Tensor, below: Tensor, mask: Tensor, cluster: Tensor | None = None
    ) -> Self:
        """sum m above / sum m below. above, below, mask (B, T) or (B,); cluster (B,) ids."""
        n, d = masked(above, mask), masked(below, mask)
        if mask.dim() > 1:
            n, d = n.sum(1), d.sum(1)
        return cls(*ratio_sums(n, d, cluster))

    def value(self) -> float:
        return self.values()[""]

    def stderr(self) -> float:
        return self.values().get("_se", float("nan"))

    @staticmethod
    def labelled(value: np.ndarray, error: np.ndarray, *sums: np.ndarray) -> dict[str, float]:
        known = {} if np.isnan(sums[2]) else {"_se": float(error)}
        return {"": float(value)} | known


@dataclass(frozen=True, eq=False)
class PositionMean(Ratio):
    """A `Mean` over the whole response and over each position bin; every field (S,).

    Readout: "", "_se", and for each bin that holds tokens "@lo-hi", "@lo-hi_se". Late bins hold the
    responses that got there, a selected population, not the same ones as early bins.
    """

    total: Tensor
    count: Tensor
    clusters: Tensor
    square: Tensor
    cross: Tensor
    count_square: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor, cluster: Tensor | None = None) -> Self:
        """Mean of x (B, T) over the mask, by the response position of the token."""
        member = slices(mask.shape[1], mask.device)
        return cls(*ratio_sums(masked(x, mask) @ member, position_counts(mask), cluster))

    @staticmethod
    def labelled(value: np.ndarray, error: np.ndarray, *sums: np.ndarray) -> dict[str, float]:
        found = {}
        for i, label in enumerate(LABELS):
            if i == 0 or sums[1][i] > 0:
                found[label] = float(value[i])
                found[f"{label}_se"] = float(error[i])
        return found


@dataclass(frozen=True, eq=False)
class Counts(Accumulator):
    """Number of masked tokens over the whole response and in each position bin; field (S,).

    Readout: "" and "@lo-hi" for each bin that holds tokens.
    """

    count: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Self:
        """mask: (B, T)."""
        return cls(mask.double().sum(0) @ slices(mask.shape[1], mask.device))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        pairs = zip(LABELS, sums[0].tolist(), strict=True)
        return {label: n for label, n in pairs if n > 0 or not label}


@dataclass(frozen=True, eq=False)
class Deciles(Ratio):
    """A `Mean` in each tenth of the response, by relative position; every field (10,).

    Readout, for each tenth that holds tokens: "%0-10" to "%90-100" and the same with "_se". Every
    response is in every tenth (but for very short ones), so tenths compare one population, at
    positions that differ between responses: the opposite bargain of a `PositionMean`.
    """

    total: Tensor
    count: Tensor
    clusters: Tensor
    square: Tensor
    cross: Tensor
    count_square: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        mask: Tensor,
        cluster: Tensor | None = None,
        response: Tensor | None = None,
    ) -> Self:
        """Mean of x (B, T) over the mask, by the tenth of its response that the token is in.

        response: (B, T) bool, the tokens that the response consists of; the mask if None.
        """
        tenth = tenths(mask if response is None else response)

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(len(values), 10).scatter_add(1, tenth, values)

        return cls(*ratio_sums(spread(masked(x, mask)), spread(mask.double()), cluster))

    @staticmethod
    def labelled(value: np.ndarray, error: np.ndarray, *sums: np.ndarray) -> dict[str, float]:
        found = {}
        for i in range(10):
            if sums[1][i] > 0:
                found[f"%{10 * i}-{10 * i + 10}"] = float(value[i])
                found[f"%{10 * i}-{10 * i + 10}_se"] = float(error[i])
        return found


@dataclass(frozen=True, eq=False)
class Martingale(Accumulator):
    """z = sum m d / sqrt(sum m v) of differences d with mean 0 and variance v given the prefix.

    Readout: "" z over the whole response and "@lo-hi" over each bin where the variance is not 0,
    each about standard normal if the differences really have that mean (martingale central limit
    theorem); a fixed fault makes it grow like the square root of the tokens. Both fields (S,).
    """

    difference: Tensor
    variance: Tensor

    @classmethod
    def of(cls, difference: Tensor, variance: Tensor, mask: Tensor) -> Self:
        """difference, variance, mask: (B, T)."""
        member = slices(mask.shape[1], mask.device)
        return cls(*(masked(x, mask).sum(0) @ member for x in (difference, variance)))

    @staticmethod
    def summary(*sums: np.ndarray) -> dict[str, float]:
        found = {"": float("nan")}
        for label, difference, variance in zip(LABELS, *(x.tolist() for x in sums), strict=True):
            if variance > 0:
                found[label] = difference / variance**0.5
        return found


def pack(totals: Mapping[str, Accumulator]) -> Tensor:
    """All sums of all totals as one float64 vector: sum it over ranks, or store it."""
    parts = [x.detach().reshape(-1) for total in totals.values() for x in total.tensors()]
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    device = next((x.device for x in parts if x.device.type != "cpu"), parts[0].device)
    return torch.cat([x.to(device, torch.float64) for x in parts])


def unpack(vector: Tensor, like: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
    """The inverse of `pack`, with the names, kinds and shapes of `like`."""
    found: dict[str, Accumulator] = {}
    start = 0
    for name, total in like.items():
        parts = []
        for x in total.tensors():
            parts.append(vector[start : start + x.numel()].reshape(x.shape))
            start += x.numel()
        found[name] = type(total)(*parts)
    if start != vector.numel():
        raise InvalidInput(f"vector holds {vector.numel()} sums, the totals have {start}")
    return found


def read(totals: Mapping[str, Accumulator]) -> dict[str, float]:
    """Every number of every total, named total + suffix; exactly one transfer to the host."""
    host = pack(totals).cpu().numpy()
    sums: dict[str, list[np.ndarray]] = {}
    start = 0
    for name, total in totals.items():
        sums[name] = []
        for x in total.tensors():
            sums[name].append(host[start : start + x.numel()].reshape(x.shape))
            start += x.numel()
    ratios = [name for name, total in totals.items() if isinstance(total, Ratio)]
    divided = iter(_divided([sums[name] for name in ratios]))
    row: dict[str, float] = {}
    for name, total in totals.items():
        mine = sums[name]
        if isinstance(total, Ratio):
            found = total.labelled(*next(divided), *mine)
        else:
            found = total.summary(*mine)
        row |= {name + suffix: value for suffix, value in found.items()}
    return row


def _divided(ratios: list[list[np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """`ratio_and_error` of each one's six sums, computed on all of them at once."""
    if not ratios:
        return []
    flat = [np.concatenate([x.ravel() for x in column]) for column in zip(*ratios, strict=True)]
    ends = np.cumsum([sums[0].size for sums in ratios])[:-1]
    shapes = [sums[0].shape for sums in ratios]
    value, error = (np.split(x, ends) for x in ratio_and_error(*flat))
    both = zip(value, error, shapes, strict=True)
    return [(v.reshape(shape), e.reshape(shape)) for v, e, shape in both]


def merge(a: Mapping[str, Accumulator], b: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
    """Totals of both parts; raises ValueError when they do not hold the same names."""
    if a.keys() != b.keys():
        raise InvalidInput(f"totals in one part only: {sorted(a.keys() ^ b.keys())}")
    return {name: a[name] + b[name] for name in a}
