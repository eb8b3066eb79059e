"""Teacher-support drift (B-*): does the teacher still know what the student is talking about?

Every number comes for the whole response and by position bin (`PositionMean`), because drift is what
grows along a response. Costs, r and the KL, are taken over the supervised tokens, since they say
what is left to learn; ranks, masses, entropies and weights over all sampled tokens, since they say
where the student went. Shapes: B responses, T positions, K support ids. With p the student, q the
teacher, y the sampled token, S the support, r = log p(y) - log q(y).
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.histograms import Quantiles
from diagnostics.core.moments import EffectiveSize
from diagnostics.core.optional_fields import prefix_of, support_of
from diagnostics.core.totals import Accumulator, Counts, Deciles, Mean, PositionMean

RANKS = (8, 16, 32)
"""Depths of the exact rank shares: comparable across runs, whatever K each run keeps."""


def sampled_divergence(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-4, B-7: the sampled cost and the teacher's probability of what the student chose.

    k1 = mean r over the supervised tokens: without a mask that reads the sampled token an unbiased
    estimate of the per-token reverse KL, that can be negative;
    abs_ratio = mean |r|; teacher_prob = mean q(y); k1_per_response = mean over responses of
    sum_t r; k1_response_mean = mean over responses of mean_t r.
    Access: L0. Source: standard; mean |r| along the response as in 2605.07725.
    Healthy: k1 falls over training and grows slowly, if at all, along the response. A
    k1_response_mean far from k1 says that cost and length are correlated.
    """
    r = batch.log_ratio
    return {
        "divergence/k1": _profile(batch, r),
        "divergence/abs_ratio": _profile(batch, r.abs()),
        "divergence/teacher_prob": _profile(batch, batch.teacher_logp.exp()),
        **_by_response("divergence/k1", batch, r),
    }


def exact_divergence(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-11: the exact reverse KL at each prefix, sum_v p (log p - log q), in three aggregations.

    reverse_kl pooled over the supervised tokens, reverse_kl_per_response (mean of the sums over t),
    reverse_kl_response_mean (mean of the means over t).
    Access: L2. Source: standard; the same expectation as k1 with less variance.
    Healthy: falls over training. Low is not good by itself: a teacher that follows a broken prefix
    also agrees, so read it with repetition.
    """
    kl = prefix_of(batch).reverse_kl
    return {
        "divergence/reverse_kl": _profile(batch, kl),
        **_by_response("divergence/reverse_kl", batch, kl),
    }


def teacher_rank(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-2: shares of the sampled tokens by the teacher's rank of them, 1 + #{v: q(v) > q(y)}.

    teacher_rank_1 = share of rank 1, teacher_rank_over_R = share of rank > R for R in RANKS.
    Shares, not a mean rank: that is heavy-tailed, and not comparable with a rank censored at K.
    Access: L2. Source: rank shares, where others log a censored mean rank.
    Healthy: rank_1 high and flat along the response; over_R small and not growing.
    """
    rank = prefix_of(batch).teacher_rank
    deep = {f"divergence/teacher_rank_over_{k}": _everywhere(batch, rank > k) for k in RANKS}
    return {"divergence/teacher_rank_1": _everywhere(batch, rank == 1), **deep}


def support_mass(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-1, B-4: samples outside the support, observed and expected, and the masses on it.

    outside_topk = mean 1[y not in S]; outside_topk_expected = mean 1 - P_S, the same without
    sampling noise; outside_topk_excess = their paired difference; topk_teacher_mass = mean Q_S,
    topk_student_mass = mean P_S; topk_size = mean number of ids; all over the sampled tokens. For
    another support than the teacher's, "topk" reads "<source>_topk", so that two quantities never
    share a name.
    Access: L1. Source: the support masses that 2603.25562's local matching relies on.
    Healthy: outside small and flat, excess 0 up to its error, Q_S near 1. Mass outside the
    teacher's top-K is what a renormalised top-K objective can neither see nor repair.
    """
    support = support_of(batch)
    name = "topk" if support.source in ("teacher", "full") else f"{support.source}_topk"
    inside, theirs = support.masses()
    outside = (~in_support(batch)).to(inside.dtype)
    size = (support.sizes * batch.sampled).double()
    return {
        f"divergence/outside_{name}": _everywhere(batch, outside),
        f"divergence/outside_{name}_expected": _everywhere(batch, 1 - inside),
        f"divergence/outside_{name}_excess": _everywhere(batch, outside - (1 - inside)),
        f"divergence/{name}_teacher_mass": _everywhere(batch, theirs),
        f"divergence/{name}_student_mass": _everywhere(batch, inside),
        f"divergence/{name}_size": Mean(size.sum(), batch.sampled.sum().double()),
    }


def uncertainty(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-6, D-4: entropies (nats) on student prefixes and the teacher's largest probability.

    Over all sampled tokens: teacher_entropy = mean H_q, student_entropy = mean H_p, entropy_gap =
    mean H_q - H_p, teacher_max = mean max_v q(v), teacher_entropy_over_1 = share of tokens with H_q
    > 1.
    Access: L2. Source: 2605.07725 (teacher entropy doubling after tool errors), 2605.30833
    (teacher_max as fidelity of the supervision).
    Healthy: flat along the response. Rising teacher entropy with falling teacher_max late in it
    means that the teacher is lost; student entropy falling to 0 or exploding precedes collapse.
    """
    prefix = prefix_of(batch)
    gap = prefix.teacher_entropy - prefix.student_entropy
    return {
        "divergence/teacher_entropy": _everywhere(batch, prefix.teacher_entropy),
        "divergence/student_entropy": _everywhere(batch, prefix.student_entropy),
        "divergence/entropy_gap": _everywhere(batch, gap),
        "divergence/teacher_max": _everywhere(batch, prefix.teacher_max),
        "divergence/teacher_entropy_over_1": _everywhere(batch, prefix.teacher_entropy > 1),
    }


def tokens_by_position(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Supervised tokens in each position bin: what every profile of a cost in this step rests on.

    tokens = sum m, tokens@lo-hi = sum m over the bin. What is measured over all sampled tokens
    rests on as many or more. Access: the mask alone.
    Source: ours; a mean is worth what its count is.
    Healthy: a bin with few tokens speaks for few, selected responses; do not compare it with an
    early bin that all of them reach.
    """
    return {"divergence/tokens": Counts.of(batch.mask)}


def ratio_quantiles(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-7: quantiles of r in percent, over all supervised tokens and by position bin.

    log_ratios_q1 ... q99; by position q5, q50, q95. Resolution: `Quantiles`, 9 % of the value.
    Access: L0. Source: 2603.25562 figure 4, where the tail widens with position; the advantage
    there is -r, so that its lower tail is the upper one here.
    Healthy: the median near 0, q95 flat along the response. A q95 that grows with position is
    drift before any mean shows it.
    """
    return {"divergence/log_ratios": Quantiles.of(batch.log_ratio, batch.mask)}


def rank_quantiles(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-2: quantiles of the teacher's rank of the sampled token.

    teacher_ranks_q50 = the median, and so on; exact for ranks up to 12, then to 9 %.
    Access: L2. Source: ours. Unlike a mean, a quantile is not owned by a few huge ranks.
    Healthy: median 1, q95 a few, flat along the response.
    """
    return {"divergence/teacher_ranks": Quantiles.of(prefix_of(batch).teacher_rank, batch.sampled)}


def prefix_weights(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-10: effective share of responses if their prefixes stood for the teacher's.

    prefix_ess@lo-hi = (sum w)^2 / (n sum w^2), w = exp(-sum_{u <= hi} r) over all sampled tokens,
    supervised or not, of the n responses that reach position hi; prefix_ess the same at their ends;
    prefix_abs_ess with |r| for r.
    Access: L0. Source: the effective sample size of importance sampling; the absolute version is
    the weight of 2606.22600, in which signs cannot cancel.
    Healthy: falls along every response, about as exp(-variance of the sum). Where it nears 1/n
    student and teacher live on different prefixes, and no reweighting can undo that; n is the
    number of responses that get there, so compare runs of one batch size.
    """
    r = batch.log_ratio
    return {
        "divergence/prefix_ess": EffectiveSize.along(-r, batch.sampled),
        "divergence/prefix_abs_ess": EffectiveSize.along(-r.abs(), batch.sampled),
    }


def cost_by_tenth(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """B-7: the sampled cost by tenths of the response: k1, |r| and q(y) at relative positions.

    k1_tenth%0-10 ... k1_tenth%90-100, abs_ratio_tenth%..., teacher_prob_tenth%...: means over the
    supervised tokens of each tenth of what was sampled.
    Access: L0. Source: ours. Tenths hold nearly all responses each, bins by position only those
    that are long enough.
    Healthy: flat. A rise in the last tenth only is about stopping rather than about drift.
    """
    r, q = batch.log_ratio, batch.teacher_logp.exp()
    columns = {"k1": r, "abs_ratio": r.abs(), "teacher_prob": q}
    return {
        f"divergence/{k}_tenth": Deciles.of(x, batch.mask, batch.prompt, batch.sampled)
        for k, x in columns.items()
    }


def entropy_by_tenth(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """D-4: the exact divergence and both entropies by tenths of the response.

    reverse_kl_tenth%0-10 ... over the supervised tokens of each tenth; student_entropy_tenth%...,
    teacher_entropy_tenth%..., teacher_max_tenth%... over its sampled ones.
    Access: L2. Source: 2604.13016 figure 13, instability starts at the end of responses and moves
    forward.
    Healthy: flat and steady. Student entropy moving in the last tenth is an early warning.
    """
    prefix = prefix_of(batch)
    names = ("student_entropy", "teacher_entropy", "teacher_max")
    over = {"reverse_kl": batch.mask, **dict.fromkeys(names, batch.sampled)}
    return {
        f"divergence/{name}_tenth": Deciles.of(
            getattr(prefix, name), tokens, batch.prompt, batch.sampled
        )
        for name, tokens in over.items()
    }


def in_support(batch: ScoredRollouts) -> Tensor:
    """(B, T) bool: the sampled token is among the support ids."""
    return support_of(batch).contains(batch.tokens)


def _profile(batch: ScoredRollouts, x: Tensor) -> PositionMean:
    """Over the supervised tokens."""
    return PositionMean.of(x, batch.mask, batch.prompt)


def _everywhere(batch: ScoredRollouts, x: Tensor) -> PositionMean:
    """Over all sampled tokens."""
    return PositionMean.of(x, batch.sampled, batch.prompt)


def _by_response(name: str, batch: ScoredRollouts, x: Tensor) -> dict[str, Accumulator]:
    """Sum and mean over the supervised tokens of a response that has any, averaged over them."""
    length = batch.mask.sum(1)
    sums = torch.where(batch.mask, x.double(), 0.0).sum(1)
    return {
        f"{name}_per_response": Mean.of(sums, length > 0, batch.prompt),
        f"{name}_response_mean": Mean.of(sums / length.clamp(min=1), length > 0, batch.prompt),
    }
