"""Claims about distillation on a single task."""

from figures.claims.claim import Claim
from figures.claims.measures import larger_mean
from figures.claims.regime_measures import equal_gain, higher_gain

SINGLE = (
    Claim(
        "Sampled tokens improve the student (36.4 against 28.2)",
        "table 1",
        "dose",
        higher_gain("sampled"),
    ),
    Claim(
        "Sampled tokens with a mask improve the student (40.7)",
        "table 1",
        "dose",
        higher_gain("sampled_mask"),
    ),
    Claim(
        "Local support improves the student (41.7)",
        "table 1",
        "dose",
        higher_gain("lsm"),
    ),
    Claim(
        "Local support with a mask improves the student (41.5)",
        "table 1",
        "dose",
        higher_gain("lsm_mask"),
    ),
    Claim(
        "Local support beats sampled tokens, no mask (41.7 against 36.4)",
        "table 1",
        "dose",
        higher_gain("lsm", "sampled"),
    ),
    Claim(
        "Local support beats sampled tokens, both with a mask (41.5 against 40.7)",
        "table 1",
        "dose",
        higher_gain("lsm_mask", "sampled_mask"),
    ),
    Claim(
        "A mask of special tokens helps sampled tokens (40.7 against 36.4)",
        "table 1",
        "mask_gain",
        higher_gain("sampled_mask", "sampled"),
    ),
    Claim(
        "A mask is nearly neutral for local support (41.5 against 41.7)",
        "table 1",
        "mask_gain",
        equal_gain("lsm_mask", "lsm"),
    ),
    Claim(
        "Local support without a mask beats sampled tokens with one (41.7 against 40.7)",
        "table 1",
        "dose",
        higher_gain("lsm", "sampled_mask"),
    ),
    Claim(
        "Local support has the higher train score (each on its own rollouts)",
        "figure A4",
        "dynamics",
        larger_mean("reward", "lsm", "sampled"),
    ),
)
