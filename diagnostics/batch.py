"""The batch: the one type that the study, the trainer, every diagnostic and a stranger's run share.

`Rollouts` is what a student sampled. `ScoredRollouts` is the same after both models put a log-probability
on every sampled token, optionally with a `Support` (both models on K ids a position) and a
`DistributionStats` (exact functionals of the two next-token distributions).

Shapes: B responses, T response positions, K support ids, V vocabulary. Conventions:
- `mask` is bool and means *the student chose this token and the loss is taken over it*;
  `sampled` is every token that the student chose, of which `mask` is a subset. A test of sampling,
  a ratio along the response and a length go over `sampled`, a measure of the loss over `mask`;
- every per-token float is 0 where `sampled` is False, never NaN. It is *not* 0 at a token that was
  sampled and is not supervised: whoever sums over the mask multiplies by it;
- log-probabilities are natural, stored per role, and true (not renormalised on the support);
- the cost of a token is log student - log teacher; other systems' "advantage" is its negative.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import atomic_write

FORMAT = "opdlab-batch-1"
_UNSET = torch.empty(0)


class _Rows:
    """Row selection, device moves and flattening for the frozen tensor records below."""

    def _tensors(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: v for k, v in values.items() if isinstance(v, Tensor | _Rows)}

    def _map(self, function: Any) -> Self:
        changed = {
            k: v._map(function) if isinstance(v, _Rows) else function(v)
            for k, v in self._tensors().items()
        }
        return self._with(**changed)

    def _with(self, **values: Any) -> Self:
        """A copy with other fields."""
        return replace(self, **values)  # type: ignore[type-var]

    def rows(self, index: slice | Tensor | Sequence[int]) -> Self:
        """The responses at `index` (slice, list or long tensor), every field alike."""
        if isinstance(index, Sequence):
            index = torch.as_tensor(index, dtype=None if len(index) else torch.long)
        return self._map(lambda x: x[index])

    def to(self, device: str | torch.device) -> Self:
        return self._map(lambda x: x.to(device))

    def positions(self, stop: int) -> Self:
        """The first `stop` response positions."""
        return self._map(lambda x: x[:, :stop] if x.dim() > 1 else x)


def _require(name: str, x: Tensor, shape: tuple[int, ...], kind: str) -> None:
    if tuple(x.shape) != shape:
        raise InvalidInput(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    ok = {
        "float": x.dtype.is_floating_point,
        "long": x.dtype == torch.long,
        "bool": x.dtype == torch.bool,
    }
    if not ok[kind]:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {kind}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Support(_Rows):
    """K vocabulary ids a position and both models' true log-probabilities of them.

    ids, student_logp, teacher_logp: (B, T, K). `source` says whose ids they are: "teacher" or
    "student" (its K most probable, in descending order), "union" or "intersection" of the two,
    "full" (K = V), or another name. present: (B, T, K) bool, the ids that count, each of them
    once; all of them if None. Where it is False the id is any valid one and is to be ignored.
    """

    ids: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    source: str
    present: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 3:
            raise InvalidInput(f"support.ids must be (B, T, K), got {tuple(self.ids.shape)}")
        shape = tuple(self.ids.shape)
        _require("support.ids", self.ids, shape, "long")
        _require("support.student_logp", self.student_logp, shape, "float")
        _require("support.teacher_logp", self.teacher_logp, shape, "float")
        if self.present is not None:
            _require("support.present", self.present, shape, "bool")

    @property
    def k(self) -> int:
        """Slots a position; the ids present may be fewer."""
        return self.ids.shape[-1]

    def contains(self, tokens: Tensor) -> Tensor:
        """(B, T) bool: the token (B, T) is one of the ids present."""
        if self.source == "full":  # by definition; spares a (B, T, V) comparison
            return torch.ones_like(tokens, dtype=torch.bool)
        same = self.ids == tokens[..., None]
        return (same if self.present is None else same & self.present).any(-1)

    def masses(self) -> tuple[Tensor, Tensor]:
        """(B, T) p(S) and q(S), the student's and the teacher's probability of the ids present."""
        ours, theirs = self.student_logp.exp(), self.teacher_logp.exp()
        if self.present is not None:
            ours, theirs = ours * self.present, theirs * self.present
        return ours.sum(-1), theirs.sum(-1)

    @property
    def sizes(self) -> Tensor:
        """(B, T) long: how many ids are present."""
        if self.present is None:
            return torch.full_like(self.ids[..., 0], self.k)
        return self.present.sum(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class DistributionStats(_Rows):
    """Exact functionals of student p and teacher q at each student prefix, (B, T) each.

    With l(v) = log p(v) - log q(v) and y the sampled token; computed by `diagnostics.core.distribution_stats`.
    """

    reverse_kl: Tensor  # K = sum p l
    ratio_square: Tensor  # sum p l^2, so Var(r | prefix) = ratio_square - K^2
    student_entropy: Tensor  # H_p
    teacher_entropy: Tensor  # H_q
    surprise_square: Tensor  # sum p (log p)^2, so Var(-log p) = surprise_square - H_p^2
    collision: Tensor  # sum p^2
    overrated: Tensor  # sum p 1[p > q], the null of the negative share
    teacher_max: Tensor  # max q
    teacher_rank: Tensor  # 1 + number of ids that q prefers to y (float, exact integer)
    square_ratio: Tensor | None = None  # sum p^2 l; None in batches saved before it was kept
    square_ratio_square: Tensor | None = None  # sum p^2 l^2; the same
    forward_kl: Tensor | None = None  # sum q (log q - log p); the same
    student_end: Tensor | None = None  # log of p's mass on the student's end ids; None if unknown
    teacher_end: Tensor | None = None  # log of q's mass on the teacher's own end ids; the same
    ending: Tensor | None = None  # 1 where y is one of the student's end ids; None if unknown

    def __post_init__(self) -> None:
        shape = tuple(self.reverse_kl.shape)
        for name, x in self._tensors().items():
            _require(f"prefix.{name}", x, shape, "float")


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts(_Rows):
    """What a student sampled.

    tokens (B, T) long; mask (B, T) bool; sampler_logp (B, T), the log-probability under the
    distribution that was really sampled from (temperature and top-p included); prompt (B,) long,
    equal for rollouts of one prompt; ended (B,) bool, the response stopped by itself and was not
    cut at the budget. Optional: softmax_logp (B, T), the same tokens under the sampler's whole
    softmax at its temperature, before top-p (None where the engine cannot tell); task and turn
    (B,) long (default 0); age (B,) long, updates of the student since the response was begun
    (default 0); reward (B,) float (NaN where nothing graded it), temperature and top_p of the
    sampler, the name of the mask's rule; sampled_mask (B, T) bool, every token that the student
    chose, whether it is supervised or not (None if that is `mask`; read it as `sampled`).
    """

    tokens: Tensor
    mask: Tensor
    sampler_logp: Tensor
    prompt: Tensor
    ended: Tensor
    softmax_logp: Tensor | None = None
    task: Tensor = _UNSET
    turn: Tensor = _UNSET
    age: Tensor = _UNSET
    reward: Tensor = _UNSET
    temperature: float = 1.0
    top_p: float = 1.0
    mask_rule: str = "response"
    sampled_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2:
            raise InvalidInput(f"tokens must be (B, T), got {tuple(self.tokens.shape)}")
        b = self.tokens.shape[0]
        for name, fill in (("task", 0), ("turn", 0), ("age", 0), ("reward", float("nan"))):
            if getattr(self, name) is _UNSET:
                filled = torch.full((b,), fill, device=self.tokens.device)
                object.__setattr__(self, name, filled)
        shape = tuple(self.tokens.shape)
        _require("tokens", self.tokens, shape, "long")
        _require("mask", self.mask, shape, "bool")
        _require("sampler_logp", self.sampler_logp, shape, "float")
        if self.sampled_mask is not None:
            _require("sampled_mask", self.sampled_mask, shape, "bool")
        if self.softmax_logp is not None:
            _require("softmax_logp", self.softmax_logp, shape, "float")
        for name, kind in (("prompt", "long"), ("ended", "bool"), ("task", "long")):
            _require(name, getattr(self, name), (b,), kind)
        _require("turn", self.turn, (b,), "long")
        _require("age", self.age, (b,), "long")
        _require("reward", self.reward, (b,), "float")
        if not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p is {self.top_p}, expected a number in (0, 1]")
        if not self.temperature > 0:
            raise InvalidInput(f"temperature is {self.temperature}, expected a positive number")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def sampled(self) -> Tensor:
        """(B, T) bool: every token that the student chose, whether it is supervised or not."""
        return self.mask if self.sampled_mask is None else self.sampled_mask

    @property
    def lengths(self) -> Tensor:
        """(B,) sampled tokens of each response, whether they are supervised or not."""
        return self.sampled.sum(1)

    def supervise(self, keep: Tensor, rule: str | None = None) -> Self:
        """The batch with only those of its supervised tokens in the loss that are in `keep`.

        Nothing else changes: a token that is no longer supervised is still sampled and keeps its
        log-probabilities, so that ratios, costs to go and tests of sampling still see it.

        Args:
          keep: (B, T) bool. rule: the name of what took the others out, added to `mask_rule`.
        """
        changed: dict[str, Any] = {"mask": self.mask & keep, "sampled_mask": self.sampled}
        if rule is not None:
            changed["mask_rule"] = f"{self.mask_rule} - {rule}"
        return self._with(**changed)

    def trimmed(self) -> Self:
        """Without the trailing positions at which no response has a sampled token."""
        used = self.sampled.any(0).nonzero()
        return self.positions(int(used[-1]) + 1 if len(used) else 1)

    def checked(self) -> Self:
        """Self, after one pass over the values; raises with counts and the first offender.

        Raises ValueError where a supervised token was not sampled, or a per-token float is not
        finite, is a positive log-probability, or is not 0 where nothing was sampled. Costs a host
        sync: call it once, where data enters.
        """
        unsampled = self.mask & ~self.sampled
        wrong = [("mask", self.mask, unsampled, "supervised where sampled_mask is False")]
        wrong += [
            (name, x, bad, what)
            for name, x in self._floats()
            for bad, what in self._faults(name, x)
        ]
        if bool(torch.stack([bad.any() for _, _, bad, _ in wrong]).any()):
            for name, x, bad, what in wrong:
                _refuse(name, x, bad, what)
        return self

    def _faults(self, name: str, x: Tensor) -> list[tuple[Tensor, str]]:
        sampled = self.sampled if x.dim() == 2 else self.sampled[..., None]
        outside = "not 0 where " + ("the mask" if self.sampled_mask is None else "sampled_mask")
        faults = [
            (~x.isfinite(), "not finite (NaN or infinite)"),
            ((x != 0) & ~sampled, f"{outside} is False"),
        ]
        if name.endswith("logp"):
            faults.append((x > 1e-3, "positive log-probabilities"))
        return faults

    def _floats(self) -> list[tuple[str, Tensor]]:
        flat = flatten(self)
        return [(k, x) for k, x in flat.items() if x.dim() > 1 and x.dtype.is_floating_point]

    def save(self, path: str | Path) -> None:
        """Write one self-describing safetensors file (whole or not at all)."""
        plain = {k: v for k, v in vars(self).items() if isinstance(v, float | str)}
        for name in ("support", "student_support"):
            if (support := getattr(self, name, None)) is not None:
                plain[f"{name}.source"] = support.source
        header = {"format": FORMAT, "type": type(self).__name__, "settings": json.dumps(plain)}
        tensors = {k: v.detach().cpu().contiguous() for k, v in flatten(self).items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, header)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredRollouts(Rollouts):
    """Rollouts after both models scored them at the temperature of the loss.

    student_logp (B, T): the weights about to be updated, detached; teacher_logp (B, T). Optional:
    baseline (B, T), what is expected of the discounted cost to go given the prefix;
    student_support, the student's top-K beside a `support` that is the teacher's.
    """

    student_logp: Tensor
    teacher_logp: Tensor
    baseline: Tensor | None = None
    support: Support | None = None
    prefix: DistributionStats | None = None
    score_temperature: float = 1.0
    student_support: Support | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = tuple(self.tokens.shape)
        _require("student_logp", self.student_logp, shape, "float")
        _require("teacher_logp", self.teacher_logp, shape, "float")
        if self.baseline is not None:
            _require("baseline", self.baseline, shape, "float")
        for part in (self.support, self.student_support):
            if part is not None and tuple(part.ids.shape[:2]) != shape:
                raise InvalidInput(f"support is {tuple(part.ids.shape)}, tokens are {shape}")
        if self.prefix is not None and tuple(self.prefix.reverse_kl.shape) != shape:
            raise InvalidInput(
                f"prefix is {tuple(self.prefix.reverse_kl.shape)}, tokens are {shape}"
            )

    @property
    def log_ratio(self) -> Tensor:
        """(B, T) cost r = log student - log teacher of the token; 0 where none was sampled."""
        return (self.student_logp - self.teacher_logp).detach()


def concatenate(batches: Sequence[ScoredRollouts]) -> ScoredRollouts:
    """One batch of all rows, padded on the right with masked zeros to the longest."""
    if not batches:
        raise InvalidInput("no batches to concatenate")
    width = max(b.tokens.shape[1] for b in batches)
    if any(b.sampled_mask is not None for b in batches):
        batches = [b._with(sampled_mask=b.sampled) for b in batches]
    flat = [flatten(b) for b in batches]
    if any(f.keys() != flat[0].keys() for f in flat):
        raise InvalidInput(f"batches hold different fields: {sorted(set.union(*map(set, flat)))}")

    def pad(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x
        tail = x.new_zeros((x.shape[0], width - x.shape[1], *x.shape[2:]))
        return torch.cat([x, tail], 1)

    return unflatten(batches[0], {k: torch.cat([pad(f[k]) for f in flat]) for k in flat[0]})


def flatten(batch: _Rows) -> dict[str, Tensor]:
    """Every tensor of a batch by its name; those of its parts as "part.name"."""
    flat: dict[str, Tensor] = {}
    for name, value in batch._tensors().items():
        if isinstance(value, _Rows):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten(like: ScoredRollouts, flat: dict[str, Tensor]) -> ScoredRollouts:
    """The batch with other tensors, named as `flatten` names them."""
    changed: dict[str, Any] = {k: v for k, v in flat.items() if "." not in k}
    for name, part in like._tensors().items():
        if isinstance(part, _Rows):
            inside = {k: flat[f"{name}.{k}"] for k in part._tensors()}
            changed[name] = part._with(**inside)
    return like._with(**changed)


def _refuse(name: str, x: Tensor, bad: Tensor, what: str) -> None:
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        count, value = int(bad.sum()), float(x[where])
        raise InvalidInput(
            f"{name}: {count} of {x.numel()} values {what}; first {value} at {where}"
        )
