"""Claims about ablations."""

from figures.claims.claim import Claim
from figures.claims.failure_measures import entropy_grows, score_vanishes
from figures.claims.measures import equal_accuracy, higher_accuracy, smaller_mean
from figures.claims.regime_measures import higher_gain

ABLATIONS = (
    Claim(
        "Nucleus rollouts help sampled tokens (21.6 against 20.4)",
        "table 3",
        "dose",
        higher_gain("sampled_top_p", "sampled"),
    ),
    Claim(
        "Nucleus rollouts help sampled tokens with a mask, which prevents a fall to 0 (our claim)",
        "table 3",
        "comparison",
        higher_accuracy("sampled_mask_top_p", "sampled_mask"),
    ),
    Claim(
        "Nucleus rollouts help local support (23.6 against 17.7)",
        "table 3",
        "dose",
        higher_gain("lsm", "lsm_whole"),
    ),
    Claim(
        "With nucleus rollouts local support beats sampled tokens (23.6 against 21.6)",
        "table 3",
        "dose",
        higher_gain("lsm", "sampled_top_p"),
    ),
    Claim(
        "With nucleus rollouts local support beats sampled tokens, both with a mask (our claim)",
        "table 3",
        "comparison",
        higher_accuracy("lsm_mask", "sampled_mask_top_p"),
    ),
    Claim(
        "At top-p 1 local support falls behind sampled tokens (17.7 against 20.4)",
        "table 3",
        "dose",
        higher_gain("sampled", "lsm_whole"),
    ),
    Claim("Without renormalisation the entropy explodes", "figure 6a", "ablations", entropy_grows),
    Claim(
        "Without renormalisation the train score falls to 0 within 30 steps",
        "figure 6a",
        "ablations",
        score_vanishes,
    ),
    Claim(
        "Without renormalisation the student ends with a lower accuracy",
        "figure 6a",
        "ablations",
        higher_accuracy("lsm", "lsm_unnormalised"),
    ),
    Claim(
        "A small K is worse (16 against 32; here 2 against 8)",
        "figure 6b",
        "ablations",
        higher_accuracy("lsm", "lsm_k2"),
    ),
    Claim(
        "A small K leaves more entropy",
        "figure 6b",
        "ablations",
        smaller_mean("entropy", "lsm", "lsm_k2"),
    ),
    Claim(
        "A moderate K is as good as a large one (32 against 48; here 4 against 8)",
        "figure 6b",
        "ablations",
        equal_accuracy("lsm", "lsm_k4"),
    ),
    Claim(
        "Rollouts at top-p 1 leave more entropy than at 0.9",
        "figure 6c",
        "ablations",
        smaller_mean("entropy", "lsm", "lsm_whole"),
    ),
    Claim(
        "top-p 0.8 is as good as 0.9",
        "figure 6c",
        "ablations",
        equal_accuracy("lsm", "lsm_top_p_0.8"),
    ),
)
