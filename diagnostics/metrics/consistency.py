"""Consistency metrics (F-*): were the tokens sampled from the student that was scored?

Every identity that makes on-policy distillation unbiased assumes so; these metrics test it. Shapes:
every per-token quantity is (B, T).
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.histograms import Quantiles
from diagnostics.core.moments import EffectiveSampleSize, Martingale
from diagnostics.core.optional_fields import MissingField, require_distribution_stats
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput


def martingales(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-1: Compute standardised sums of terms with mean 0 at every prefix if y is drawn from p.

    They are computed for the whole response and by position bin, where a shifted mask or a stale
    cache shows first, over all sampled tokens: a mask may depend on the sampled token, and the
    masked sum of a quantity of mean 0 then has another mean. Responses with an age above 0, and
    those that the student did not write (`Rollouts.origin`), are left out.

    Access: L2 (z_H needs the student alone).
    Source: derived, martingale central limit theorem.
    Healthy: both about N(0, 1), so |z| < 4. z_H detects top-p, temperature, stale weights and a
    shifted mask; it is negative where likely tokens are overrepresented. z_K detects faults of the
    teacher's scores that correlate with the sampled token. A constant fault grows as the square
    root of the number of tokens. Rollouts that are declared to come from another distribution than
    the scored softmax (top_p below 1, another temperature, an age above 0) would fail both tests by
    construction and are not tested; nor is z_K where the teacher reads the response itself, such as
    feedback on it, and its distribution depends on the token.

    Args:
        batch: Scored rollouts.

    Returns:
        consistency/z_H: Differences -log p(y) - H_p with variance sum_v p (log p)^2 - H_p^2.
        consistency/z_K: Differences r - KL(p || q) with variance sum_v p (log p - log q)^2 - KL^2.

    Raises:
        MissingField: The rollouts were sampled with top_p below 1 or at another temperature than
            they were scored at.
    """
    if batch.top_p < 1 or batch.temperature != batch.score_temperature:
        raise MissingField(
            f"the rollouts were sampled with top_p={batch.top_p:g} at temperature "
            f"{batch.temperature:g} but scored at temperature {batch.score_temperature:g}; this "
            "test requires top_p=1 and equal temperatures"
        )
    prefix, on_policy_mask = (
        require_distribution_stats(batch),
        batch.own_tokens & (batch.age == 0)[:, None],
    )
    entropy, kl = prefix.student_entropy, prefix.reverse_kl
    # rounding can make the variance of a one-point distribution slightly negative
    entropy_variance = (prefix.surprise_square - entropy.square()).clamp(min=0)
    kl_variance = (prefix.ratio_square - kl.square()).clamp(min=0)
    accumulators: dict[str, Accumulator] = {
        "consistency/z_H": Martingale.from_values(
            -batch.student_logp - entropy, entropy_variance, on_policy_mask
        )
    }
    if batch.teacher_reads != "response":
        accumulators["consistency/z_K"] = Martingale.from_values(
            batch.log_ratio - kl, kl_variance, on_policy_mask
        )
    return accumulators


def sampler_weights(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-2: Compute the tails and the effective sample sizes of the ratio student / sampler.

    With d as in `sampler_ratio`, over the same tokens.

    Access: the sampler's log-probabilities.
    Source: standard.
    Healthy: quantiles symmetric about 0 at the level of numerical noise, both sizes 1.
    sampler_prefix_ess is the share of the batch that remains effective when whole responses are
    importance-weighted for staleness.

    Args:
        batch: Scored rollouts.

    Returns:
        consistency/sampler_log_ratios: Quantiles of d: sampler_log_ratios_q1 ... q99; by position
            q5, q50 and q95.
        consistency/sampler_ess: (sum w)^2 / (N sum w^2) with w = e^d over tokens.
        consistency/sampler_prefix_ess: The same over responses: sampler_prefix_ess@lo-hi with w =
            exp(sum_{u <= hi} d) over the responses that reach hi, sampler_prefix_ess at the end of
            each response.
    """
    log_ratio, own_tokens = _sampler_log_ratio(batch)
    return {
        "consistency/sampler_log_ratios": Quantiles.from_values(log_ratio, own_tokens),
        "consistency/sampler_ess": EffectiveSampleSize.from_values(log_ratio, own_tokens),
        "consistency/sampler_prefix_ess": EffectiveSampleSize.from_prefixes(log_ratio, own_tokens),
    }


def staleness(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-3: Compute how many updates the student has made since a response was started.

    Access: the ages, which an asynchronous engine provides.
    Source: standard; 2606.24143 found rescoring under the current student better than the
    corrections used in reinforcement learning.
    Healthy: 0 for a synchronous loop. Read it with `sampler_ratio`, which measures the effect of
    the age.

    Args:
        batch: Scored rollouts.

    Returns:
        consistency/age: Mean age over responses.
        consistency/stale_share: Share of responses with an age above 0.
    """
    all_responses = torch.ones_like(batch.ended)
    return {
        "consistency/age": Mean.from_values(batch.age, all_responses, batch.prompt),
        "consistency/stale_share": Mean.from_values(batch.age > 0, all_responses, batch.prompt),
    }


def rescoring(first: ScoredRollouts, second: ScoredRollouts) -> dict[str, Accumulator]:
    """F-4: Compute the noise floor of the teacher from two scorings of the same tokens.

    Access: two scorings, preferably in different batch sizes; not a metric of one batch.
    Source: this toolkit.
    Healthy: 0, or the level of numerical noise. A signal below this noise is not meaningful.

    Args:
        first: Rollouts with the first scores.
        second: The same rollouts with the second scores.

    Returns:
        consistency/teacher_noise: Mean |log q - log q'|.
        consistency/teacher_noise_square: Mean of its square.
        consistency/teacher_noise_share: sum |log q - log q'| / sum |r|.

    Raises:
        InvalidInput: The two batches do not hold the same tokens.
    """
    same_shape = first.tokens.shape == second.tokens.shape
    if not same_shape or not bool((first.mask == second.mask).all()):
        raise InvalidInput(
            "the two scorings have different shapes or masks; pass the same batch scored twice"
        )
    if not bool(((first.tokens == second.tokens) | ~first.mask).all()):
        raise InvalidInput(
            "the two scorings have different tokens; pass the same batch scored twice"
        )
    difference = (first.teacher_logp - second.teacher_logp).abs()
    mask, prompt = first.mask, first.prompt
    return {
        "consistency/teacher_noise": Mean.from_values(difference, mask, prompt),
        "consistency/teacher_noise_square": Mean.from_values(difference.square(), mask, prompt),
        "consistency/teacher_noise_share": Mean.ratio(
            difference, first.log_ratio.abs(), mask, prompt
        ),
    }


def _sampler_log_ratio(batch: ScoredRollouts) -> tuple[Tensor, Tensor]:
    """Return (B, T) log student - log sampler, and which tokens the student sampled itself."""
    sampler = batch.sampler_logp if batch.softmax_logp is None else batch.softmax_logp
    return batch.student_logp - sampler, batch.own_tokens


def sampler_ratio(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-2: Compute the difference between the scored student and the model that sampled.

    With d = log p(y) - log sampler(y) over all tokens that the student sampled; the responses of a
    teacher or of a dataset are left out. The sampler's log-probability is `softmax_logp`, before
    top-p, where the batch has it; otherwise `sampler_logp`.

    Access: the sampler's log-probabilities.
    Source: standard.
    Healthy: mean 0 and square at the level of the engine's numerical noise (1e-6 or less in
    float32, 1e-3 in bfloat16). Without top-p the expectation of d under the sampler is -KL(sampler
    || student), so a clearly positive mean indicates misaligned data, not a difference between the
    models. Where only `sampler_logp` is known, top-p sampling gives a negative mean, the log of the
    kept mass; with `softmax_logp` it has no effect here, only in z_H.

    Args:
        batch: Scored rollouts.

    Returns:
        consistency/sampler_log_ratio: Mean d.
        consistency/sampler_log_ratio_square: Mean d^2.
    """
    log_ratio, own_tokens = _sampler_log_ratio(batch)
    return {
        "consistency/sampler_log_ratio": Mean.from_values(log_ratio, own_tokens, batch.prompt),
        "consistency/sampler_log_ratio_square": Mean.from_values(
            log_ratio.square(), own_tokens, batch.prompt
        ),
    }
