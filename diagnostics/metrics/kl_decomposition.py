"""Decomposition of the KL by the support (B-5) and runs of agreement (B-12).

Shapes: B responses, T positions, K support ids. p the student, q the teacher, S the support with
masses P and Q, y the sampled token, r = log p(y) - log q(y).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from diagnostics.core.optional_fields import require_distribution_stats, require_support
from diagnostics.core.totals import Accumulator, Mean, PositionMean
from diagnostics.metrics.repetition import repeated_ngram_mask

MIN_RUN_LENGTH = 16
"""Tokens of the shortest run of agreement that counts."""
KL_THRESHOLD = 0.01
"""KL in nats below which the models agree at a token."""


def kl_anatomy(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-5: Decompose the reverse KL into binary, head and tail parts, an exact chain rule over S.

    All over the sampled tokens: the tail is unbiased over all tokens that were sampled at a prefix,
    not over those that a mask keeps. For a support other than the teacher's, "kl" is replaced by
    "<source>_kl".

    Access: L1.
    Source: derived; the chain rule of KL. Masses outside S below the rounding error of a sum of K
    probabilities are set to that rounding error.
    Healthy: mostly head. A large binary share means that the student's mass leaves the support,
    which a renormalised top-K loss can neither see nor correct; a large tail share that K is small.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/kl_binary: Mean of P log(P/Q) + (1-P) log((1-P)/(1-Q)), in or out of S; exact.
        divergence/kl_head: Mean of P KL(p_S || q_S), within S; exact.
        divergence/kl_tail: Mean of 1[y not in S] (r - log((1-P)/(1-Q))), an unbiased estimate of
            (1-P) KL(p_out || q_out) from the sampled tokens.
        divergence/kl_parts: Their sum, an unbiased estimate of the reverse KL with less variance
            than k1.
        divergence/kl_binary_share: Share of sums.
        divergence/kl_head_share: Share of sums.
        divergence/kl_tail_share: Share of sums.
    """
    support = require_support(batch)
    parts = decompose_kl(batch)
    name = "kl" if support.source in ("teacher", "full") else f"{support.source}_kl"
    total = parts["binary"] + parts["head"] + parts["tail"]
    accumulators: dict[str, Accumulator] = {
        f"divergence/{name}_parts": _sampled_profile(batch, total)
    }
    for part, x in parts.items():
        accumulators[f"divergence/{name}_{part}"] = _sampled_profile(batch, x)
        share = Mean.ratio(x, total, batch.sampled, batch.prompt)
        accumulators[f"divergence/{name}_{part}_share"] = share
    return accumulators


def decompose_kl(batch: ScoredRollouts) -> dict[str, Tensor]:
    """Return the "binary", "head" and "tail" parts of each token, (B, T) float64."""
    support = require_support(batch)
    if support.source == "full":
        head = (support.student_logp.double().exp() * _support_log_ratio(support)).sum(-1)
        return {"binary": torch.zeros_like(head), "head": head, "tail": torch.zeros_like(head)}
    min_mass = 4 * torch.finfo(support.student_logp.dtype).eps
    p = support.student_logp.detach().double().exp()
    q = support.teacher_logp.detach().double().exp()
    if support.present is not None:
        p, q = p * support.present, q * support.present
    student_mass, teacher_mass = p.sum(-1), q.sum(-1)
    student_outside, teacher_outside = (
        (1 - x).clamp(min=min_mass) for x in (student_mass, teacher_mass)
    )
    mass_term = torch.where(
        student_mass > 0, student_mass * (student_mass / teacher_mass.clamp(min=1e-300)).log(), 0.0
    )
    outside_log_ratio = (student_outside / teacher_outside).log()
    sampled_outside = ~support.contains(batch.tokens) & batch.sampled
    return {
        "binary": mass_term + student_outside * outside_log_ratio,
        "head": (p * _support_log_ratio(support)).sum(-1) - mass_term,
        "tail": torch.where(sampled_outside, batch.log_ratio.double() - outside_log_ratio, 0.0),
    }


def agreement(
    threshold: float = KL_THRESHOLD, min_length: int = MIN_RUN_LENGTH
) -> Callable[[ScoredRollouts], dict[str, Accumulator]]:
    """B-12: Measure long runs of tokens at which both models agree, and how repetitive they are.

    A run is at least `min_length` consecutive sampled tokens, supervised or not (environment text
    is skipped), with KL(p || q) < threshold nats.

    Access: L2; the row sorts of `repeated_ngram_mask`.
    Source: 2606.09471, where stopping at such runs shortened responses by 60 % and raised accuracy.
    Healthy: a low KL alone is not a good sign: a teacher that follows a broken prefix also agrees.
    A growing share that is mostly repeated is a loop to which the teacher assigns high probability.
    Split it by reward: `by(agreement(), "reward", {1: "right", 0: "wrong"})`.

    Args:
        threshold: KL in nats below which a token counts as agreement.
        min_length: Tokens of the shortest run.

    Returns:
        A metric with
        divergence/agreeing_share: Share of the tokens in runs.
        divergence/agreeing_repeated_share: Share of those that end a repeated 8-gram.
        divergence/agreeing_runs: Number of runs a response.
        divergence/agreeing_run_length: Mean length of a run.
    """

    def agreement_metric(batch: ScoredRollouts) -> dict[str, Accumulator]:
        in_run, run_starts = _find_runs(
            require_distribution_stats(batch).reverse_kl < threshold, batch.sampled, min_length
        )
        repeated = repeated_ngram_mask(batch.tokens, batch.sampled)
        runs = run_starts.sum(1).double()
        has_tokens = batch.sampled.any(1)
        lengths = in_run.sum(1).double()
        return {
            "divergence/agreeing_share": _sampled_profile(batch, in_run),
            "divergence/agreeing_repeated_share": Mean.from_values(repeated, in_run, batch.prompt),
            "divergence/agreeing_runs": Mean.from_values(runs, has_tokens, batch.prompt),
            "divergence/agreeing_run_length": Mean.ratio(lengths, runs, has_tokens, batch.prompt),
        }

    return agreement_metric


def _find_runs(low_kl: Tensor, mask: Tensor, min_length: int) -> tuple[Tensor, Tensor]:
    """Find runs of consecutive low-KL tokens.

    Args:
        low_kl: (B, T) bool.
        mask: (B, T) bool; tokens outside it are skipped.
        min_length: Tokens of the shortest run.

    Returns:
        (B, T) bool: the token is in a run; and (B, T) bool: it is the first of a run.
    """
    width = mask.shape[1]
    slot = torch.where(mask, mask.cumsum(1) - 1, width)
    packed_low = mask.new_zeros(len(mask), width + 1)
    packed_low = packed_low.scatter(1, slot, low_kl & mask)[:, :width]
    position = torch.arange(width, device=mask.device).expand_as(packed_low)
    last_break = torch.where(packed_low, -1, position).cummax(1).values
    next_break = torch.where(packed_low, width, position).flip(1).cummin(1).values.flip(1)
    in_run = packed_low & (next_break - last_break - 1 >= min_length)
    run_starts = in_run & (position == last_break + 1)
    gather_slot = slot.clamp(max=width - 1)
    return in_run.gather(1, gather_slot) & mask, run_starts.gather(1, gather_slot) & mask


def _support_log_ratio(support: Support) -> Tensor:
    """Return (B, T, K) log p - log q of the support ids in float64, 0 where absent."""
    ratio = (support.student_logp - support.teacher_logp).detach().double()
    return ratio if support.present is None else torch.where(support.present, ratio, 0.0)


def _sampled_profile(batch: ScoredRollouts, x: Tensor) -> PositionMean:
    """Return the mean of x (B, T) over all sampled tokens, overall and by position."""
    return PositionMean.from_values(x, batch.sampled, batch.prompt)
