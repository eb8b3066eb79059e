"""Validity of the measurement (F-*): were these tokens sampled from the student that was scored?

Every identity that makes on-policy distillation unbiased assumes so; these are its tests.
Shapes: every per-token quantity is (B, T).
"""

import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.histograms import Quantiles
from diagnostics.core.moments import EffectiveSize
from diagnostics.core.optional_fields import MissingField, prefix_of
from diagnostics.core.totals import Accumulator, Martingale, Mean
from diagnostics.errors import InvalidInput


def martingales(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-1: standardised sums of what must average to 0 at every prefix if y was drawn from p.

    z_H: differences -log p(y) - H_p with variance sum_v p (log p)^2 - H_p^2;
    z_K: differences r - KL(p || q) with variance sum_v p (log p - log q)^2 - KL^2.
    Over the whole response and by position bin, where a shifted mask or a stale cache shows first.
    Over all sampled tokens: those that a mask leaves were chosen by what was drawn, and what is
    left of a sum of mean 0 has another mean.
    Access: L2 (z_H needs the student alone). Source: derived, martingale central limit theorem.
    Healthy: both about N(0, 1), so |z| < 4. z_H fires on top-p, temperature, stale weights and a
    shifted mask, negative where likely tokens are overrepresented; z_K on faults of the teacher's
    scores that go with the sampled token. A fixed fault grows as the square root of the number of
    tokens. Rollouts that are declared to come from another distribution than the scored softmax
    (top_p below 1, another temperature, an age above 0) would fail both by right, and are not
    tested.
    """
    if batch.top_p < 1 or batch.temperature != batch.score_temperature:
        raise MissingField(
            f"the rollouts were drawn with top_p {batch.top_p:g} at temperature "
            f"{batch.temperature:g} and scored whole at {batch.score_temperature:g}; a test of one "
            "against the other needs them equal"
        )
    prefix, fresh = prefix_of(batch), batch.sampled & (batch.age == 0)[:, None]
    entropy, kl = prefix.student_entropy, prefix.reverse_kl
    # Differences of squares: a one-point distribution may come out below 0 by rounding.
    surprise = (prefix.surprise_square - entropy.square()).clamp(min=0)
    ratio = (prefix.ratio_square - kl.square()).clamp(min=0)
    return {
        "consistency/z_H": Martingale.of(-batch.student_logp - entropy, surprise, fresh),
        "consistency/z_K": Martingale.of(batch.log_ratio - kl, ratio, fresh),
    }


def sampler_weights(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-2: tails and effective sizes of the ratio student / sampler.

    With d as in `sampler_ratio`: sampler_log_ratios_q1 ... q99, by position q5, q50, q95;
    sampler_ess = (sum w)^2 / (N sum w^2) with w = e^d over tokens; sampler_prefix_ess@lo-hi with
    w = exp(sum_{u <= hi} d) over the responses that reach hi, sampler_prefix_ess at their ends;
    all over the sampled tokens, supervised or not.
    Access: the sampler's log-probabilities. Source: standard.
    Healthy: quantiles symmetric about 0 at the level of the arithmetic, both sizes 1.
    sampler_prefix_ess is what correcting whole responses for staleness would leave of the batch.
    """
    d = _off_sampler(batch)
    return {
        "consistency/sampler_log_ratios": Quantiles.of(d, batch.sampled),
        "consistency/sampler_ess": EffectiveSize.of(d, batch.sampled),
        "consistency/sampler_prefix_ess": EffectiveSize.along(d, batch.sampled),
    }


def staleness(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-3: how many updates the student has moved since a response was begun.

    age = mean over responses, stale_share = share with an age above 0.
    Access: the ages, which an asynchronous engine gives. Source: standard; 2606.24143 found scoring
    anew under the present student better than corrections of reinforcement learning.
    Healthy: 0 for a synchronous loop. Read it with `sampler_ratio`, which says what the age costs.
    """
    every = torch.ones_like(batch.ended)
    return {
        "consistency/age": Mean.of(batch.age, every, batch.prompt),
        "consistency/stale_share": Mean.of(batch.age > 0, every, batch.prompt),
    }


def rescoring(first: ScoredRollouts, second: ScoredRollouts) -> dict[str, Accumulator]:
    """F-4: the noise floor of the teacher, from scoring the same tokens twice.

    teacher_noise = mean |log q - log q'|; teacher_noise_square = mean of its square;
    teacher_noise_share = sum |log q - log q'| / sum |r|.
    Access: two scorings, best in different batch sizes; not a metric of one batch. Source: ours.
    Healthy: 0, or the level of the arithmetic. A signal below the noise is none.

    Raises:
      ValueError: the two do not hold the same tokens.
    """
    same = first.tokens.shape == second.tokens.shape
    if not same or not bool((first.mask == second.mask).all()):
        raise InvalidInput("the two scorings hold different responses; pass one batch scored twice")
    if not bool(((first.tokens == second.tokens) | ~first.mask).all()):
        raise InvalidInput("the two scorings hold different tokens; pass one batch scored twice")
    d = (first.teacher_logp - second.teacher_logp).abs()
    mask, prompt = first.mask, first.prompt
    return {
        "consistency/teacher_noise": Mean.of(d, mask, prompt),
        "consistency/teacher_noise_square": Mean.of(d.square(), mask, prompt),
        "consistency/teacher_noise_share": Mean.ratio(d, first.log_ratio.abs(), mask, prompt),
    }


def _off_sampler(batch: ScoredRollouts) -> Tensor:
    sampler = batch.sampler_logp if batch.softmax_logp is None else batch.softmax_logp
    return batch.student_logp - sampler


def sampler_ratio(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """F-2: how far the scored student is from the model that sampled.

    d = log p(y) - log sampler(y); sampler_log_ratio = mean d, sampler_log_ratio_square = mean d^2,
    over all sampled tokens.
    The sampler's log-probability is `softmax_logp`, before top-p, where the batch has it; else
    `sampler_logp`. Access: the sampler's log-probabilities. Source: standard.
    Healthy: mean 0 and square at the level of the engine's arithmetic (1e-6 or less in float32,
    1e-3 in bfloat16). Without top-p their expectation under the sampler is -KL(sampler || student),
    so a clearly positive mean is not a mismatch of models but of bookkeeping. Where only
    `sampler_logp` is known, top-p sampling shows as a negative mean, the log of the kept mass;
    with `softmax_logp` it shows nothing here, only in z_H.
    """
    d = _off_sampler(batch)
    return {
        "consistency/sampler_log_ratio": Mean.of(d, batch.sampled, batch.prompt),
        "consistency/sampler_log_ratio_square": Mean.of(d.square(), batch.sampled, batch.prompt),
    }
