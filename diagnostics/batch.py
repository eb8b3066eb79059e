"""The batch type that trainer, diagnostics, exact study and external runs share.

`Rollouts` is what a student sampled. `ScoredRollouts` adds a log-probability of both models for
every sampled token, and optionally a `Support` (both models on K ids per position) and
`DistributionStats` (exact statistics of the two next-token distributions).

Shapes: B responses, T response positions, K support ids, V vocabulary. Conventions:
- `mask` is bool: *the student sampled this token and the loss includes it*; `sampled` is every
  token that the student sampled, a superset of `mask`. Tests of sampling, ratios along the response
  and lengths use `sampled`, measures of the loss use `mask`;
- every per-token float is 0 where `sampled` is False, never NaN. It is *not* 0 at a token that was
  sampled and is not supervised: multiply by the mask before summing over it;
- log-probabilities are natural, stored per role, and true (not renormalised on the support);
- the cost of a token is log student - log teacher; the "advantage" of other systems is its
negative.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import atomic_write
from diagnostics.missing import Missing, OptionalField, missing_fields
from diagnostics.ragged import up_to_last
from diagnostics.tensor_fields import TensorFields, check_tensor, flatten

FORMAT = "opdlab-batch-1"
ORIGINS = ("student", "teacher", "dataset")
"""Who wrote a response, by the number in `Rollouts.origin`."""
STUDENT, TEACHER, DATASET = range(3)
ZERO, NOT_GRADED = torch.tensor(0), torch.tensor(float("nan"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Support(TensorFields):
    """K vocabulary ids per position and both models' true log-probabilities of them."""

    ids: Tensor
    """(B, T, K) long."""
    student_logp: OptionalField[Tensor] = OptionalField()
    """(B, T, K)."""
    teacher_logp: OptionalField[Tensor] = OptionalField()
    """(B, T, K)."""
    source: str
    """How the ids were chosen: "teacher" or "student" (its K most probable, in descending order),
    "union" or "intersection" of the two, "full" (K = V), or another name.
    """
    present: Tensor | None = None
    """(B, T, K) bool, the ids that count, each of them once; None if all do. Where it is False the
    id is a placeholder to be ignored.
    """

    def __post_init__(self) -> None:
        if self.ids.dim() != 3:
            raise InvalidInput(f"support.ids must be (B, T, K), got {tuple(self.ids.shape)}")
        shape = tuple(self.ids.shape)
        check_tensor("support.ids", self.ids, shape, "long")
        for name in ("student_logp", "teacher_logp"):
            check_tensor(f"support.{name}", vars(self)[name], shape, "float")
        if self.present is not None:
            check_tensor("support.present", self.present, shape, "bool")

    @property
    def k(self) -> int:
        """Slots per position; the number of ids present may be smaller."""
        return self.ids.shape[-1]

    def contains(self, tokens: Tensor) -> Tensor:
        """Return (B, T) bool: whether the token (B, T) is one of the ids present."""
        if self.source == "full":  # by definition; avoids a (B, T, V) comparison
            return torch.ones_like(tokens, dtype=torch.bool)
        matches = self.ids == tokens[..., None]
        return (matches if self.present is None else matches & self.present).any(-1)

    def masses(self) -> tuple[Tensor, Tensor]:
        """Return p(S) and q(S), (B, T) each, both models' probability of the ids present."""
        student_prob, teacher_prob = self.student_logp.exp(), self.teacher_logp.exp()
        if self.present is not None:
            student_prob, teacher_prob = student_prob * self.present, teacher_prob * self.present
        return student_prob.sum(-1), teacher_prob.sum(-1)

    @property
    def sizes(self) -> Tensor:
        """(B, T) long: how many ids are present."""
        if self.present is None:
            return torch.full_like(self.ids[..., 0], self.k)
        return self.present.sum(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class DistributionStats(TensorFields):
    """Exact statistics of student p and teacher q at each student prefix, (B, T) each.

    With l(v) = log p(v) - log q(v) and y the sampled token; computed by
    `diagnostics.core.distribution_stats`.
    """

    reverse_kl: Tensor
    """K = sum p l."""
    ratio_square: Tensor
    """sum p l^2, so Var(r | prefix) = ratio_square - K^2."""
    student_entropy: Tensor
    """H_p."""
    teacher_entropy: Tensor
    """H_q."""
    surprise_square: Tensor
    """sum p (log p)^2, so Var(-log p) = surprise_square - H_p^2."""
    collision: Tensor
    """sum p^2."""
    overrated: Tensor
    """sum p 1[p > q], the expected negative share under p."""
    teacher_max: Tensor
    """max q."""
    teacher_rank: Tensor
    """1 + number of ids that q prefers to y (float, exact integer)."""
    square_ratio: Tensor | None = None
    """sum p^2 l; None in older batch files."""
    square_ratio_square: Tensor | None = None
    """sum p^2 l^2; None in older batch files."""
    forward_kl: Tensor | None = None
    """sum q (log q - log p); None in older batch files."""
    student_end: Tensor | None = None
    """log of p's mass on the student's EOS ids; None if unknown."""
    teacher_end: Tensor | None = None
    """log of q's mass on the teacher's EOS ids; None if unknown."""
    ending: Tensor | None = None
    """1 where y is one of the student's EOS ids; None if unknown."""

    def __post_init__(self) -> None:
        shape = tuple(self.reverse_kl.shape)
        for name, x in self._tensors().items():
            check_tensor(f"prefix.{name}", x, shape, "float")


PER_RESPONSE_KINDS = {
    "prompt": "long",
    "ended": "bool",
    "task": "long",
    "turn": "long",
    "age": "long",
    "reward": "float",
    "generated_lengths": "long",
    "origin": "long",
}
"""Fields of `Rollouts` of shape (B,), with the kind of their dtype."""


FIELDS_OF_ANOTHER = {"sampler_logp", "teacher_logp"}
"""Fields that a batch of our trainer may lack: of responses that nobody sampled, and of a run
without a teacher."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts(TensorFields):
    """Responses that a student sampled, or that it is trained on."""

    tokens: Tensor
    """(B, T) long."""
    mask: Tensor
    """(B, T) bool, tokens in the loss."""
    sampler_logp: OptionalField[Tensor] = OptionalField()
    """(B, T), log-probability under the distribution that was really sampled from (temperature and
    top-p included).
    """
    prompt: Tensor
    """(B,) long, equal for rollouts of one prompt."""
    ended: OptionalField[Tensor] = OptionalField()
    """(B,) bool: the response ended with EOS and was not truncated."""
    softmax_logp: Tensor | None = None
    """(B, T), the same tokens under the sampler's full softmax at its temperature, before top-p;
    None if the engine does not report it.
    """
    task: Tensor = ZERO
    """(B,) long; as the three below, one number holds for all responses."""
    turn: Tensor = ZERO
    """(B,) long."""
    age: OptionalField[Tensor] = OptionalField(ZERO)
    """(B,) long, updates of the student since the response was begun."""
    reward: OptionalField[Tensor] = OptionalField(NOT_GRADED)
    """(B,) float, NaN where nothing graded the response."""
    temperature: float = 1.0
    """Temperature of the sampler."""
    top_p: OptionalField[float] = OptionalField(1.0)
    """Top-p of the sampler."""
    mask_rule: str = "response"
    """Name of the rule that made the mask."""
    sampled_mask: Tensor | None = None
    """(B, T) bool, every token that the student sampled, supervised or not; None if that is `mask`.
    Read it as `sampled`.
    """
    generated_lengths: OptionalField[Tensor | None] = OptionalField(None)
    """(B,) long, sampled tokens of each response, for batches where some of them have no
    log-probabilities and `sampled_mask` therefore excludes them; None if all have them.
    """
    origin: Tensor | None = None
    """(B,) long, who wrote each response, an index of ORIGINS; None if the student sampled all. Of
    a response from a dataset, `sampler_logp` is 0 or missing: nothing is known of it.
    """

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2:
            raise InvalidInput(f"tokens must be (B, T), got {tuple(self.tokens.shape)}")
        shape = tuple(self.tokens.shape)
        check_tensor("tokens", self.tokens, shape, "long")
        check_tensor("mask", self.mask, shape, "bool")
        check_tensor("sampler_logp", vars(self)["sampler_logp"], shape, "float")
        if self.sampled_mask is not None:
            check_tensor("sampled_mask", self.sampled_mask, shape, "bool")
        if self.softmax_logp is not None:
            check_tensor("softmax_logp", self.softmax_logp, shape, "float")
        for name, kind in PER_RESPONSE_KINDS.items():
            x = vars(self)[name]
            if isinstance(x, Tensor) and not x.dim():
                x = x.to(self.tokens.device).repeat(len(self))
                object.__setattr__(self, name, x)
            if x is not None or name not in ("generated_lengths", "origin"):
                check_tensor(name, x, (len(self),), kind)
        top_p = vars(self)["top_p"]
        if not isinstance(top_p, Missing) and not 0 < top_p <= 1:
            raise InvalidInput(f"top_p is {top_p}, expected a number in (0, 1]")
        if not self.temperature > 0:
            raise InvalidInput(f"temperature is {self.temperature}, expected a positive number")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def sampled(self) -> Tensor:
        """(B, T) bool: every token that the student sampled, supervised or not."""
        return self.mask if self.sampled_mask is None else self.sampled_mask

    @property
    def lengths(self) -> Tensor:
        """(B,) number of sampled tokens in each response, supervised or not."""
        lengths = self.generated_lengths
        return self.sampled.sum(1) if lengths is None else lengths

    @property
    def own_rows(self) -> Tensor:
        """(B,) bool: whether the student sampled the response."""
        return (
            torch.ones_like(self.prompt, dtype=torch.bool)
            if self.origin is None
            else (self.origin == STUDENT)
        )

    @property
    def own_tokens(self) -> Tensor:
        """(B, T) bool: the tokens of responses that the student sampled."""
        return self.sampled if self.origin is None else self.sampled & self.own_rows[:, None]

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) bool: positions up to the last sampled one, without holes; the rest is padding."""
        return up_to_last(self.sampled)

    def restrict_mask(self, keep: Tensor, rule: str | None = None) -> Self:
        """Remove the tokens outside `keep` from the loss.

        Nothing else changes: a token that is no longer supervised is still sampled and keeps its
        log-probabilities, so that ratios, costs to go and tests of sampling include it.

        Args:
            keep: (B, T) bool.
            rule: Name of the rule that removed the others, added to `mask_rule`.

        Returns:
            The batch with the smaller mask.
        """
        changes: dict[str, Any] = {"mask": self.mask & keep, "sampled_mask": self.sampled}
        if rule is not None:
            changes["mask_rule"] = f"{self.mask_rule} - {rule}"
        return self.with_fields(**changes)

    def trim(self) -> Self:
        """Remove the trailing positions at which no response has a sampled token."""
        used = self.sampled.any(0).nonzero()
        return self.positions(int(used[-1]) + 1 if len(used) else 1)

    def validate(self) -> Self:
        """Check all values in one pass and return the batch itself.

        Costs a host sync: call it once, where data enters.

        Returns:
            The batch.

        Raises:
            InvalidInput: A supervised token was not sampled, or a per-token float is not finite, is
                a positive log-probability, or is not 0 where nothing was sampled; with the number
                of such values and the first one.
        """
        unsampled = self.mask & ~self.sampled
        checks = [("mask", self.mask, unsampled, "supervised where sampled_mask is False")]
        checks += [
            (name, x, is_invalid, message)
            for name, x in self._floats()
            for is_invalid, message in self._faults(name, x)
        ]
        if bool(torch.stack([is_invalid.any() for _, _, is_invalid, _ in checks]).any()):
            for name, x, is_invalid, message in checks:
                _raise_invalid(name, x, is_invalid, message)
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
        """Write one self-describing safetensors file, atomically.

        Args:
            path: The file.

        Raises:
            InvalidInput: Fields other than FIELDS_OF_ANOTHER are missing.
        """
        missing = missing_fields(self)
        if unknown := sorted(missing.keys() - FIELDS_OF_ANOTHER):
            raise InvalidInput(
                f"a batch without {', '.join(unknown)} cannot be saved as a batch file; write it "
                "with diagnostics.records.writer.save_records"
            )
        plain = {k: v for k, v in vars(self).items() if isinstance(v, float | str)}
        for name in ("support", "student_support"):
            if (support := getattr(self, name, None)) is not None:
                plain[f"{name}.source"] = support.source
        header = {"format": FORMAT, "type": type(self).__name__, "settings": json.dumps(plain)}
        if missing:
            header["missing"] = json.dumps(missing)
        tensors = {k: v.detach().cpu().contiguous() for k, v in flatten(self).items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, header)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredRollouts(Rollouts):
    """Rollouts after both models scored them at the temperature of the loss."""

    student_logp: OptionalField[Tensor] = OptionalField()
    """(B, T), under the weights that are about to be updated, detached."""
    teacher_logp: OptionalField[Tensor] = OptionalField()
    """(B, T)."""
    baseline: Tensor | None = None
    """(B, T), expected discounted cost to go given the prefix."""
    support: Support | None = None
    """Both models on K ids per position."""
    prefix: DistributionStats | None = None
    """Exact statistics of the next-token distribution at each prefix."""
    score_temperature: float = 1.0
    """Temperature at which both models were scored, that of the loss."""
    student_support: Support | None = None
    """The student's top-K, next to a `support` that holds the teacher's."""
    teacher_reads: str = "prompt"
    """What the teacher's distribution depends on beside the prefix: "prompt", or "response" if its
    prompt was written after the response, such as with feedback on it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = tuple(self.tokens.shape)
        for name in ("student_logp", "teacher_logp"):
            check_tensor(name, vars(self)[name], shape, "float")
        if self.baseline is not None:
            check_tensor("baseline", self.baseline, shape, "float")
        for part in (self.support, self.student_support):
            if part is not None and tuple(part.ids.shape[:2]) != shape:
                raise InvalidInput(f"support.ids has shape {tuple(part.ids.shape)}, tokens {shape}")
        if self.prefix is not None and tuple(self.prefix.reverse_kl.shape) != shape:
            raise InvalidInput(
                f"prefix has shape {tuple(self.prefix.reverse_kl.shape)}, tokens {shape}"
            )

    @property
    def log_ratio(self) -> Tensor:
        """(B, T) cost r = log student - log teacher of the token; 0 where none was sampled."""
        return (self.student_logp - self.teacher_logp).detach()


def _raise_invalid(name: str, x: Tensor, is_invalid: Tensor, message: str) -> None:
    if bool(is_invalid.any()):
        index = tuple(int(i) for i in is_invalid.nonzero()[0])
        count, value = int(is_invalid.sum()), float(x[index])
        raise InvalidInput(
            f"{name}: {count} of {x.numel()} values {message}; first {value} at {index}"
        )
