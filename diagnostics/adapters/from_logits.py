"""Building `ScoredRollouts` from both models' logits, one chunk of tokens at a time.

Shapes: B responses, T positions, N supervised tokens, n tokens of a chunk, V vocabulary, K ids.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.missing import Missing
from diagnostics.ragged import scatter_to_mask

Logits = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(n,) indices into the B x T positions, row by row -> student and teacher logits (n, V)."""


@torch.no_grad()
def score_logits(
    tokens: Tensor, mask: Tensor, logits: Logits, vocabulary: int, k: int, max_logits_per_chunk: int
) -> dict[str, Any]:
    """Compute log-probabilities, both models' top-K and distribution statistics of masked tokens.

    The teacher's top-K is the `support`, the student's the `student_support`. Logits are at the
    temperature of the loss; log-softmaxes are at least float32.

    Args:
        tokens: (B, T) sampled ids.
        mask: (B, T) bool, tokens to score.
        logits: Returns the logits of a chunk of positions.
        vocabulary: V.
        k: K.
        max_logits_per_chunk: Elements of an (n, V) tensor that exist at a time.

    Returns:
        Fields of `ScoredRollouts`.
    """
    positions = mask.flatten().nonzero()[:, 0]
    flat = tokens.flatten()
    parts: list[dict[str, Tensor]] = []
    for chunk in positions.split(max(1, max_logits_per_chunk // vocabulary)):
        p, q = (log_softmax(x) for x in logits(chunk))
        sampled_ids = flat[chunk]
        teacher_topk, student_topk = (x.topk(min(k, vocabulary), -1) for x in (q, p))
        parts.append(
            {
                "student_logp": p.gather(-1, sampled_ids[:, None])[:, 0],
                "teacher_logp": q.gather(-1, sampled_ids[:, None])[:, 0],
                "support.ids": teacher_topk.indices,
                "support.student_logp": p.gather(-1, teacher_topk.indices),
                "support.teacher_logp": teacher_topk.values,
                "student_support.ids": student_topk.indices,
                "student_support.student_logp": student_topk.values,
                "student_support.teacher_logp": q.gather(-1, student_topk.indices),
                **{
                    f"prefix.{name}": x
                    for name, x in compute_distribution_stats(p, q, sampled_ids).items()
                },
            }
        )
    names = parts[0] if parts else {}
    full = {
        name: scatter_to_mask(torch.cat([chunk_scores[name] for chunk_scores in parts]), mask)
        for name in names
    }
    if not full:  # nothing is supervised: the same fields, all zeros
        return _empty_scores(mask, min(k, vocabulary))

    def split_part(name: str) -> dict[str, Tensor]:
        return {n.partition(".")[2]: full.pop(n) for n in [*full] if n.startswith(name + ".")}

    supports = {
        "support": Support(**split_part("support"), source="teacher"),
        "student_support": Support(**split_part("student_support"), source="student"),
    }
    prefix = DistributionStats(**split_part("prefix"))
    return {**full, **supports, "prefix": prefix}


@torch.no_grad()
def score_answers(
    tokens: Tensor,
    mask: Tensor,
    logits: Callable[[Tensor], Tensor],
    vocabulary: int,
    k: int,
    max_logits_per_chunk: int,
    *,
    teacher_logp: Tensor,
    ids: Tensor,
    teacher_topk_logp: Tensor,
    subject: str,
) -> dict[str, Any]:
    """Compute the student's side for a teacher on a server, which answers with its top-K only.

    Args:
        tokens: (B, T) sampled ids.
        mask: (B, T) bool, tokens to score.
        logits: (n,) indices into the B x T positions -> the student's logits (n, V).
        vocabulary: V.
        k: K of the student's own top-K.
        max_logits_per_chunk: Elements of an (n, V) tensor that exist at a time.
        teacher_logp: (B, T), the server's log-probability of each token.
        ids: (B, T, K), the server's most probable ids in descending order.
        teacher_topk_logp: (B, T, K), theirs.
        subject: Beginning of the message about what the server does not answer.

    Returns:
        Fields of `ScoredRollouts`.
    """
    positions, flat_tokens, flat_ids = (
        mask.flatten().nonzero()[:, 0],
        tokens.flatten(),
        ids.flatten(0, 1),
    )
    parts: list[tuple[Tensor, ...]] = []
    for chunk in positions.split(max(1, max_logits_per_chunk // vocabulary)):
        p = log_softmax(logits(chunk))
        topk = p.topk(min(k, vocabulary), -1)
        token_logp = p.gather(-1, flat_tokens[chunk, None])[:, 0]
        parts.append(
            (token_logp, p.gather(-1, flat_ids[chunk].clamp(min=0)), topk.indices, topk.values)
        )
    if parts:
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    else:
        shapes = [(0,), (0, ids.shape[-1]), (0, min(k, vocabulary)), (0, min(k, vocabulary))]
        columns = [torch.zeros(shape, device=mask.device) for shape in shapes]
        columns[2] = columns[2].long()
    student_logp, support_logp, student_ids, student_topk_logp = (
        scatter_to_mask(column, mask) for column in columns
    )
    wide_mask = mask[..., None]  # where the server answered fewer ids, -inf is refused later
    return {
        "student_logp": student_logp,
        "teacher_logp": torch.where(mask, teacher_logp, 0.0),
        "support": Support(
            ids=torch.where(wide_mask, ids, 0),
            student_logp=support_logp,
            teacher_logp=torch.where(wide_mask, teacher_topk_logp, 0.0),
            source="teacher",
        ),
        "student_support": Support(
            ids=student_ids,
            student_logp=student_topk_logp,
            teacher_logp=Missing(subject),  # type: ignore[arg-type]
            source="student",
        ),
    }


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
    max_logits_per_chunk: int = 2**24,
    trainer_name: str = "this run",
    **fields: Any,
) -> ScoredRollouts:
    """Build the `ScoredRollouts` of a training loop that has both models' logits.

    Args:
        tokens: (B, T) ids that the student sampled.
        mask: (B, T) bool, whether the student sampled them.
        student: (B, T, V) logits that predict the tokens (from one position earlier in the
            sequence), at the temperature of the loss.
        teacher: (B, T, V), likewise.
        prompt: (B,) ids of the prompts.
        ended: (B,) bool, whether the response ended with EOS.
        sampler_logp: (B, T) under the distribution that was sampled from, if known.
        k: See `score_logits`.
        max_logits_per_chunk: See `score_logits`.
        trainer_name: Beginning of the message about a missing field.
        **fields: Further fields of `ScoredRollouts`, such as reward.

    Returns:
        The batch.
    """
    flat = [x.detach().flatten(0, 1) for x in (student, teacher)]
    scores = score_logits(
        tokens, mask, lambda i: (flat[0][i], flat[1][i]), student.shape[-1], k, max_logits_per_chunk
    )
    return build_scored_rollouts(
        tokens,
        mask,
        prompt=prompt,
        ended=ended,
        sampler_logp=sampler_logp,
        trainer_name=trainer_name,
        **scores | fields,
    )


def log_softmax(logits: Tensor) -> Tensor:
    """Compute (n, V) log-softmax in float32, or in float64 if the logits are."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def build_scored_rollouts(
    tokens: Tensor,
    mask: Tensor,
    *,
    prompt: Tensor,
    ended: Tensor,
    sampler_logp: Tensor | None,
    trainer_name: str,
    **fields: Any,
) -> ScoredRollouts:
    """Build `ScoredRollouts` from a trainer's tensors.

    `sampler_logp` is a missing field if None. Tokens are set to 0 where nothing was sampled.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool.
        prompt: (B,) ids of the prompts.
        ended: (B,) bool.
        sampler_logp: (B, T), or None if the trainer has none.
        trainer_name: Name of the trainer in `Monitor.missing`.
        **fields: Further fields of `ScoredRollouts`.

    Returns:
        The batch.
    """
    sampled = fields.get("sampled_mask", mask)
    missing: Any = Missing(f"{trainer_name} has")
    return ScoredRollouts(
        tokens=tokens * sampled,
        mask=mask,
        prompt=prompt,
        ended=ended,
        sampler_logp=(
            missing if sampler_logp is None else torch.where(sampled, sampler_logp.detach(), 0.0)
        ),
        **fields,
    )


def ends_with_eos(tokens: Tensor, not_padding: Tensor, eos_ids: Iterable[int]) -> Tensor:
    """Return (B,) bool: whether the last non-padding token of each row is an EOS id."""
    last_index = not_padding.long().cumsum(1).argmax(1)
    eos_ids_tensor = torch.tensor([*eos_ids], dtype=tokens.dtype, device=tokens.device)
    return torch.isin(
        tokens.gather(1, last_index[:, None])[:, 0], eos_ids_tensor
    ) & not_padding.any(1)


def shift_to_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, T) indices that move each row's first True to position 0, and their validity."""
    width = mask.shape[1]
    positions = mask.long().argmax(1, keepdim=True) + torch.arange(width, device=mask.device)
    return positions.clamp(max=width - 1), positions < width


def _empty_scores(mask: Tensor, k: int) -> dict[str, Any]:
    zeros = torch.zeros(mask.shape, device=mask.device)
    topk_zeros = zeros[..., None].expand(*mask.shape, k).contiguous()
    names = compute_distribution_stats(
        torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    )
    topk_fields = {"ids": topk_zeros.long(), "student_logp": topk_zeros, "teacher_logp": topk_zeros}
    return {
        "student_logp": zeros,
        "teacher_logp": zeros,
        "support": Support(**topk_fields, source="teacher"),
        "student_support": Support(**topk_fields, source="student"),
        "prefix": DistributionStats(**dict.fromkeys(names, zeros)),
    }
