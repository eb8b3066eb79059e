"""Claims about methods by the regime of a pair of models, beyond the paper's tables."""

from figures.claims.claim import Claim
from figures.claims.regime_measures import higher_gain

REGIMES = (
    Claim(
        "A discount of 0.5 improves on the sampled token (our question)",
        "2603.25562, 2.1",
        "dose",
        higher_gain("sampled_gamma_0.5", "sampled"),
    ),
    Claim(
        "Without a discount the sampled token gains less than with gamma 0 (the variance of the "
        "sequence-level gradient)",
        "2.1",
        "dose",
        higher_gain("sampled", "sampled_gamma_1"),
    ),
    Claim(
        "A baseline helps the sequence-level gradient (our claim)",
        "",
        "dose",
        higher_gain("sampled_gamma_1_baseline", "sampled_gamma_1"),
    ),
    Claim(
        "The exact reverse KL of the whole vocabulary beats its estimate by the sampled token",
        "2306.13649",
        "dose",
        higher_gain("full_kl", "sampled"),
    ),
    Claim(
        "A graded reward added to the sampled token helps",
        "2505.09388",
        "dose",
        higher_gain("sampled_reward", "sampled"),
    ),
    Claim(
        "On-policy distillation by the sampled token beats SFT on the teacher's responses",
        "2306.13649",
        "regime_gains",
        higher_gain("sampled", "sft"),
    ),
    Claim(
        "Masked local support beats SFT on the teacher's responses",
        "2306.13649",
        "regime_gains",
        higher_gain("lsm_mask", "sft"),
    ),
    Claim(
        "The full reverse KL beats SFT on the teacher's responses",
        "2306.13649",
        "regime_gains",
        higher_gain("full_kl", "sft"),
    ),
    Claim(
        "Masked local support beats the sampled token without a mask (our question)",
        "",
        "regime_gains",
        higher_gain("lsm_mask", "sampled"),
    ),
    Claim(
        "Local support beats SFT on the teacher's responses at equal responses",
        "2306.13649",
        "dose",
        higher_gain("lsm", "sft"),
    ),
)
