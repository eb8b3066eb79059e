"""Validity of the measurement (F-*): were these tokens sampled from the student that was scored?

Every identity that makes on-policy distillation unbiased assumes so; these are its tests.
Shapes: every per-token quantity is (B, T).
"""

from diagnostics.access import prefix_of
from diagnostics.batch import Scored
from diagnostics.totals import Martingale, Mean, Total


def martingales(batch: Scored) -> dict[str, Total]:
    """F-1: standardised sums of what must average to 0 at every prefix if y was drawn from p.

    z_H: differences -log p(y) - H_p with variance sum_v p (log p)^2 - H_p^2;
    z_K: differences r - KL(p || q) with variance sum_v p (log p - log q)^2 - KL^2.
    Access: L2 (z_H needs the student alone). Source: derived, martingale central limit theorem.
    Healthy: both about N(0, 1), so |z| < 4. z_H fires on top-p, temperature, stale weights and a
    shifted mask, negative where likely tokens are overrepresented; z_K on faults of the teacher's
    scores that go with the sampled token. A fixed fault
    grows as the square root of the number of tokens.
    """
    prefix, mask = prefix_of(batch), batch.mask
    entropy, kl = prefix.student_entropy, prefix.reverse_kl
    # Differences of squares: a one-point distribution may come out below 0 by rounding.
    surprise = (prefix.surprise_square - entropy.square()).clamp(min=0)
    ratio = (prefix.ratio_square - kl.square()).clamp(min=0)
    return {
        "validity/z_H": Martingale.of(-batch.student_logp - entropy, surprise, mask),
        "validity/z_K": Martingale.of(batch.log_ratio - kl, ratio, mask),
    }


def sampler_ratio(batch: Scored) -> dict[str, Total]:
    """F-2: how far the scored student is from the model that sampled.

    d = log p(y) - log sampler(y); sampler_log_ratio = mean d, sampler_log_ratio_square = mean d^2.
    The sampler's log-probability is `softmax_logp`, before top-p, where the batch has it; else
    `sampler_logp`. Access: the sampler's log-probabilities. Source: standard.
    Healthy: mean 0 and square at the level of the engine's arithmetic (1e-6 or less in float32,
    1e-3 in bfloat16). Without top-p their expectation under the sampler is -KL(sampler || student),
    so a clearly positive mean is not a mismatch of models but of bookkeeping. Where only
    `sampler_logp` is known, top-p sampling shows as a negative mean, the log of the kept mass;
    with `softmax_logp` it shows nothing here, only in z_H.
    """
    sampler = batch.sampler_logp if batch.softmax_logp is None else batch.softmax_logp
    d = batch.student_logp - sampler
    return {
        "validity/sampler_log_ratio": Mean.of(d, batch.mask, batch.prompt),
        "validity/sampler_log_ratio_square": Mean.of(d.square(), batch.mask, batch.prompt),
    }
