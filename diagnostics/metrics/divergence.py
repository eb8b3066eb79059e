"""Divergence and drift metrics (B-*): how reliable is the teacher on student prefixes?

Every number is given for the whole response and by position bin (`PositionMean`), because drift
grows along a response. Costs (r and the KL) are averaged over the supervised tokens, since they
measure what is left to learn; ranks, masses, entropies and weights over all sampled tokens, since
they describe where the student went. Shapes: B responses, T positions, K support ids. p is the
student, q the teacher, y the sampled token, S the support, r = log p(y) - log q(y).
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.deciles import Deciles
from diagnostics.core.histograms import Quantiles
from diagnostics.core.moments import EffectiveSampleSize
from diagnostics.core.optional_fields import require_distribution_stats, require_support
from diagnostics.core.totals import Accumulator, Counts, Mean, PositionMean

RANKS = (8, 16, 32)
"""Depths of the exact rank shares: comparable across runs with different top-K."""


def sampled_divergence(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-4, B-7: Compute the sampled cost and the teacher's probability of the sampled tokens.

    Access: L0.
    Source: standard; mean |r| along the response as in 2605.07725.
    Healthy: k1 falls over training and grows slowly, if at all, along the response. A
    k1_response_mean far from k1 means that cost and length are correlated.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/k1: Mean r over the supervised tokens. Without a mask that depends on the sampled
            token, an unbiased estimate of the per-token reverse KL, which can be negative.
        divergence/abs_ratio: Mean |r|.
        divergence/teacher_prob: Mean q(y).
        divergence/k1_per_response: Mean over responses of sum_t r.
        divergence/k1_response_mean: Mean over responses of mean_t r.
    """
    r = batch.log_ratio
    return {
        "divergence/k1": _supervised_profile(batch, r),
        "divergence/abs_ratio": _supervised_profile(batch, r.abs()),
        "divergence/teacher_prob": _supervised_profile(batch, batch.teacher_logp.exp()),
        **_response_means("divergence/k1", batch, r),
    }


def exact_divergence(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-11: Compute the exact reverse KL at each prefix, in three aggregations.

    The exact reverse KL is sum_v p (log p - log q).

    Access: L2.
    Source: standard; the same expectation as k1 with less variance.
    Healthy: falls over training. A low value alone is not a good sign: a teacher that follows a
    broken prefix also agrees, so read it together with repetition.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/reverse_kl: Mean over the supervised tokens, pooled.
        divergence/reverse_kl_per_response: Mean over responses of the sums over t.
        divergence/reverse_kl_response_mean: Mean over responses of the means over t.
    """
    kl = require_distribution_stats(batch).reverse_kl
    return {
        "divergence/reverse_kl": _supervised_profile(batch, kl),
        **_response_means("divergence/reverse_kl", batch, kl),
    }


def teacher_rank(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-2: Compute the shares of the sampled tokens by their teacher rank, 1 + #{v: q(v) > q(y)}.

    Shares instead of a mean rank, because the mean is heavy-tailed and not comparable with a rank
    that is censored at K.

    Access: L2.
    Source: rank shares; other systems log a censored mean rank.
    Healthy: rank_1 high and flat along the response; over_R small and not growing.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/teacher_rank_1: Share of rank 1.
        divergence/teacher_rank_over_R: Share of rank > R, for R in RANKS.
    """
    rank = require_distribution_stats(batch).teacher_rank
    rank_shares = {
        f"divergence/teacher_rank_over_{k}": _sampled_profile(batch, rank > k) for k in RANKS
    }
    return {"divergence/teacher_rank_1": _sampled_profile(batch, rank == 1), **rank_shares}


def support_mass(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-1, B-4: Compute the share of samples outside the support and the masses on it.

    All over the sampled tokens. For a support other than the teacher's, "topk" is replaced by
    "<source>_topk", so that different quantities have different names.

    Access: L1.
    Source: the support masses on which the local matching of 2603.25562 relies.
    Healthy: outside small and flat, excess 0 within its error, Q_S near 1. A renormalised top-K
    objective can neither see nor correct mass outside the teacher's top-K.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/outside_topk: Mean 1[y not in S].
        divergence/outside_topk_expected: Mean 1 - P_S, the same without sampling noise.
        divergence/outside_topk_excess: Their paired difference.
        divergence/topk_teacher_mass: Mean Q_S.
        divergence/topk_student_mass: Mean P_S.
        divergence/topk_size: Mean number of ids.
    """
    support = require_support(batch)
    name = "topk" if support.source in ("teacher", "full") else f"{support.source}_topk"
    student_mass, teacher_mass = support.masses()
    outside = (~sampled_in_support(batch)).to(student_mass.dtype)
    size = (support.sizes * batch.sampled).double()
    return {
        f"divergence/outside_{name}": _sampled_profile(batch, outside),
        f"divergence/outside_{name}_expected": _sampled_profile(batch, 1 - student_mass),
        f"divergence/outside_{name}_excess": _sampled_profile(batch, outside - (1 - student_mass)),
        f"divergence/{name}_teacher_mass": _sampled_profile(batch, teacher_mass),
        f"divergence/{name}_student_mass": _sampled_profile(batch, student_mass),
        f"divergence/{name}_size": Mean.without_error(size.sum(), batch.sampled.sum().double()),
    }


def uncertainty(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-6, D-4: Compute entropies on student prefixes and the teacher's largest probability.

    Over all sampled tokens, entropies in nats.

    Access: L2.
    Source: 2605.07725 (teacher entropy doubles after tool errors), 2605.30833 (teacher_max as
    fidelity of the supervision).
    Healthy: flat along the response. Teacher entropy that rises late in the response while
    teacher_max falls means that the teacher's predictions are unreliable there; student entropy
    that falls to 0 or explodes precedes collapse.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/teacher_entropy: Mean H_q.
        divergence/student_entropy: Mean H_p.
        divergence/entropy_gap: Mean H_q - H_p.
        divergence/teacher_max: Mean max_v q(v).
        divergence/teacher_entropy_over_1: Share of tokens with H_q > 1.
    """
    prefix = require_distribution_stats(batch)
    gap = prefix.teacher_entropy - prefix.student_entropy
    return {
        "divergence/teacher_entropy": _sampled_profile(batch, prefix.teacher_entropy),
        "divergence/student_entropy": _sampled_profile(batch, prefix.student_entropy),
        "divergence/entropy_gap": _sampled_profile(batch, gap),
        "divergence/teacher_max": _sampled_profile(batch, prefix.teacher_max),
        "divergence/teacher_entropy_over_1": _sampled_profile(batch, prefix.teacher_entropy > 1),
    }


def tokens_by_position(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Count the supervised tokens in each position bin, the sample size of every cost profile.

    Metrics over all sampled tokens have as many or more.

    Access: the mask alone.
    Source: this toolkit; the count shows how reliable a mean is.
    Healthy: a bin with few tokens represents few, selected responses; do not compare it with an
    early bin that all responses reach.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/tokens: sum m; tokens@lo-hi is the sum over the bin.
    """
    return {"divergence/tokens": Counts.from_values(batch.mask)}


def ratio_quantiles(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-7: Compute quantiles of r, over all supervised tokens and by position bin.

    Access: L0.
    Source: 2603.25562 figure 4, where the tail widens with position; the advantage there is -r, so
    its lower tail is the upper tail here.
    Healthy: the median near 0, q95 flat along the response. A q95 that grows with position
    indicates drift before any mean does.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/log_ratios: log_ratios_q1 ... q99 (percent); by position q5, q50 and q95.
            Resolution of `Quantiles`: 9 % of the value.
    """
    return {"divergence/log_ratios": Quantiles.from_values(batch.log_ratio, batch.mask)}


def rank_quantiles(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-2: Compute quantiles of the teacher's rank of the sampled token.

    Access: L2.
    Source: this toolkit. Quantiles are robust to the heavy tail of ranks.
    Healthy: median 1, q95 a few, flat along the response.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/teacher_ranks: teacher_ranks_q50 is the median, and so on; exact for ranks up to
            12, then to 9 %.
    """
    return {
        "divergence/teacher_ranks": Quantiles.from_values(
            require_distribution_stats(batch).teacher_rank, batch.sampled
        )
    }


def prefix_weights(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-10: Compute the effective sample size of responses reweighted to the teacher.

    Access: L0.
    Source: the effective sample size of importance sampling; the absolute version is the weight of
    2606.22600, in which signs cannot cancel.
    Healthy: falls along every response, about as exp(-variance of the sum). Where it approaches
    1/n, student and teacher visit different prefixes, which no reweighting can correct; n is the
    number of responses that reach the position, so compare runs with the same batch size.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/prefix_ess: prefix_ess@lo-hi = (sum w)^2 / (n sum w^2) with w = exp(-sum_{u <=
            hi} r) over all sampled tokens, supervised or not, of the n responses that reach
            position hi; prefix_ess is the same at the end of each response.
        divergence/prefix_abs_ess: The same with |r| for r.
    """
    r = batch.log_ratio
    return {
        "divergence/prefix_ess": EffectiveSampleSize.from_prefixes(-r, batch.sampled),
        "divergence/prefix_abs_ess": EffectiveSampleSize.from_prefixes(-r.abs(), batch.sampled),
    }


def cost_by_tenth(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-7: Compute the sampled cost, |r| and q(y) by tenths of the response.

    Means over the supervised tokens of each tenth of the sampled tokens.

    Access: L0.
    Source: this toolkit. Nearly all responses contribute to every tenth; only long responses
    contribute to late position bins.
    Healthy: flat. A rise in the last tenth alone concerns stopping rather than drift.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/k1_tenth: k1_tenth%0-10 ... k1_tenth%90-100, mean r.
        divergence/abs_ratio_tenth: Mean |r|.
        divergence/teacher_prob_tenth: Mean q(y).
    """
    r, q = batch.log_ratio, batch.teacher_logp.exp()
    columns = {"k1": r, "abs_ratio": r.abs(), "teacher_prob": q}
    return {
        f"divergence/{k}_tenth": Deciles.from_values(x, batch.mask, batch.prompt, batch.sampled)
        for k, x in columns.items()
    }


def entropy_by_tenth(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-4: Compute the exact divergence and both entropies by tenths of the response.

    Access: L2.
    Source: 2604.13016 figure 13, where instability starts at the end of responses and moves
    forward.
    Healthy: flat and steady. Student entropy that changes in the last tenth is an early warning.

    Args:
        batch: Scored rollouts.

    Returns:
        divergence/reverse_kl_tenth: reverse_kl_tenth%0-10 ... over the supervised tokens of each
            tenth.
        divergence/student_entropy_tenth: Over the sampled tokens of each tenth.
        divergence/teacher_entropy_tenth: Over the sampled tokens of each tenth.
        divergence/teacher_max_tenth: Over the sampled tokens of each tenth.
    """
    prefix = require_distribution_stats(batch)
    names = ("student_entropy", "teacher_entropy", "teacher_max")
    masks = {"reverse_kl": batch.mask, **dict.fromkeys(names, batch.sampled)}
    return {
        f"divergence/{name}_tenth": Deciles.from_values(
            getattr(prefix, name), mask, batch.prompt, batch.sampled
        )
        for name, mask in masks.items()
    }


def sampled_in_support(batch: ScoredRollouts) -> Tensor:
    """Return (B, T) bool: the sampled token is among the support ids."""
    return require_support(batch).contains(batch.tokens)


def _supervised_profile(batch: ScoredRollouts, x: Tensor) -> PositionMean:
    """Return the mean of x (B, T) over the supervised tokens, overall and by position."""
    return PositionMean.from_values(x, batch.mask, batch.prompt)


def _sampled_profile(batch: ScoredRollouts, x: Tensor) -> PositionMean:
    """Return the mean of x (B, T) over all sampled tokens, overall and by position."""
    return PositionMean.from_values(x, batch.sampled, batch.prompt)


def _response_means(name: str, batch: ScoredRollouts, x: Tensor) -> dict[str, Accumulator]:
    """Return the averages of per-response sums and means over responses with supervised tokens."""
    length = batch.mask.sum(1)
    sums = torch.where(batch.mask, x.double(), 0.0).sum(1)
    return {
        f"{name}_per_response": Mean.from_values(sums, length > 0, batch.prompt),
        f"{name}_response_mean": Mean.from_values(
            sums / length.clamp(min=1), length > 0, batch.prompt
        ),
    }
