"""From two models' logits of what was sampled to a `ScoredRollouts`, a chunk of tokens at a time.

Shapes: B responses, T positions, N supervised tokens, n tokens of a chunk, V vocabulary, K ids.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import functionals
from diagnostics.core.partial import PartialRollouts, lacking

Logits = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(n,) places among the B x T positions, row by row -> student and teacher logits (n, V)."""


@torch.no_grad()
def measured(
    tokens: Tensor, mask: Tensor, logits: Logits, vocabulary: int, k: int, elements: int
) -> dict[str, Any]:
    """student_logp, teacher_logp, both models' top-K and `prefix` of the tokens of the mask.

    The teacher's K are the `support`, the student's the `student_support`.
    Logits are at the temperature of the loss; log-softmaxes are at least float32. At most
    `elements` numbers of a (n, V) tensor exist at a time.
    """
    places = mask.flatten().nonzero()[:, 0]
    flat = tokens.flatten()
    parts: list[dict[str, Tensor]] = []
    for some in places.split(max(1, elements // vocabulary)):
        p, q = (log_softmax(x) for x in logits(some))
        y = flat[some]
        best, own = (x.topk(min(k, vocabulary), -1) for x in (q, p))
        parts.append(
            {
                "student_logp": p.gather(-1, y[:, None])[:, 0],
                "teacher_logp": q.gather(-1, y[:, None])[:, 0],
                "support.ids": best.indices,
                "support.student_logp": p.gather(-1, best.indices),
                "support.teacher_logp": best.values,
                "student_support.ids": own.indices,
                "student_support.student_logp": own.values,
                "student_support.teacher_logp": q.gather(-1, own.indices),
                **{f"prefix.{name}": x for name, x in functionals(p, q, y).items()},
            }
        )
    names = parts[0] if parts else {}
    full = {name: _spread(torch.cat([part[name] for part in parts]), mask) for name in names}
    if not full:  # nothing is supervised: the same parts, all zeros
        return _nothing(mask, min(k, vocabulary))

    def part(name: str) -> dict[str, Tensor]:
        return {n.partition(".")[2]: full.pop(n) for n in [*full] if n.startswith(name + ".")}

    supports = {
        "support": Support(**part("support"), source="teacher"),
        "student_support": Support(**part("student_support"), source="student"),
    }
    prefix = DistributionStats(**part("prefix"))
    return {**full, **supports, "prefix": prefix}


def from_logits(
    tokens: Tensor,
    mask: Tensor,
    student: Tensor,
    teacher: Tensor,
    *,
    prompt: Tensor,
    ended: Tensor,
    sampler_logp: Tensor | None = None,
    k: int = 16,
    elements: int = 2**24,
    who: str = "this run",
    **parts: Any,
) -> ScoredRollouts:
    """The `ScoredRollouts` of a hand-written loop that has both models' logits.

    Args:
      tokens, mask: (B, T) ids that the student sampled, and whether it chose them.
      student, teacher: (B, T, V) logits of the distributions that predict them (from one position
        earlier in the sequence), at the temperature of the loss.
      prompt, ended: (B,) ids of the prompts, and whether a response stopped by itself.
      sampler_logp: (B, T) under the distribution that was sampled from, if the sampler tells.
      k, elements: as in `measured`. parts: further fields of `ScoredRollouts`, such as reward.
    """
    flat = [x.detach().flatten(0, 1) for x in (student, teacher)]
    found = measured(
        tokens, mask, lambda i: (flat[0][i], flat[1][i]), student.shape[-1], k, elements
    )
    return scored(
        tokens,
        mask,
        prompt=prompt,
        ended=ended,
        sampler_logp=sampler_logp,
        who=who,
        **found | parts,
    )


def log_softmax(logits: Tensor) -> Tensor:
    """(n, V), computed in float32, or float64 if the logits are."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def scored(
    tokens: Tensor,
    mask: Tensor,
    *,
    prompt: Tensor,
    ended: Tensor,
    sampler_logp: Tensor | None,
    who: str,
    **parts: Any,
) -> ScoredRollouts:
    """`ScoredRollouts` of a trainer's tensors; without `sampler_logp` where the trainer has none.

    who: names the trainer in `Monitor.missing`. Tokens are 0 where nothing was sampled.
    """
    sampled = parts.get("sampled_mask", mask)
    none = sampled * 0.0
    sampler = none if sampler_logp is None else torch.where(sampled, sampler_logp.detach(), 0.0)
    kind = PartialRollouts if "generated_lengths" in parts else ScoredRollouts
    whole = kind(
        tokens=tokens * sampled,
        mask=mask,
        prompt=prompt,
        ended=ended,
        sampler_logp=sampler,
        **parts,
    )
    return lacking(whole, ["sampler_logp"] if sampler_logp is None else [], f"{who} has")


def last_is_end(tokens: Tensor, real: Tensor, ends: Iterable[int]) -> Tensor:
    """(B,) bool: the last real token of each row is one of the end ids."""
    last = real.long().cumsum(1).argmax(1)
    known = torch.tensor([*ends], dtype=tokens.dtype, device=tokens.device)
    return torch.isin(tokens.gather(1, last[:, None])[:, 0], known) & real.any(1)


def from_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, T) that move each row's first True to position 0, and which of them exist."""
    width = mask.shape[1]
    place = mask.long().argmax(1, keepdim=True) + torch.arange(width, device=mask.device)
    return place.clamp(max=width - 1), place < width


def _spread(flat: Tensor, mask: Tensor) -> Tensor:
    out = flat.new_zeros((*mask.shape, *flat.shape[1:]))
    out[mask] = flat
    return out


def _nothing(mask: Tensor, k: int) -> dict[str, Any]:
    zero = torch.zeros(mask.shape, device=mask.device)
    wide = zero[..., None].expand(*mask.shape, k).contiguous()
    names = functionals(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    lists = {"ids": wide.long(), "student_logp": wide, "teacher_logp": wide}
    return {
        "student_logp": zero,
        "teacher_logp": zero,
        "support": Support(**lists, source="teacher"),
        "student_support": Support(**lists, source="student"),
        "prefix": DistributionStats(**dict.fromkeys(names, zero)),
    }
