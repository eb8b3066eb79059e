"""Claims about distillation on a single task."""

from figures.claims.claim import Claim
from figures.claims.measures import (
    accuracy_change,
    equal_accuracy,
    higher_accuracy,
    larger_mean,
)

SINGLE = (
    Claim(
        "Sampled tokens improve the student (36.4 against 28.2)",
        "table 1",
        "comparison",
        accuracy_change("sampled", improves=True),
    ),
    Claim(
        "Sampled tokens with a mask improve the student (40.7)",
        "table 1",
        "comparison",
        accuracy_change("sampled_mask", improves=True),
    ),
    Claim(
        "Local support improves the student (41.7)",
        "table 1",
        "comparison",
        accuracy_change("lsm", improves=True),
    ),
    Claim(
        "Local support with a mask improves the student (41.5)",
        "table 1",
        "comparison",
        accuracy_change("lsm_mask", improves=True),
    ),
    Claim(
        "Local support beats sampled tokens, no mask (41.7 against 36.4)",
        "table 1",
        "comparison",
        higher_accuracy("lsm", "sampled"),
    ),
    Claim(
        "Local support beats sampled tokens, both with a mask (41.5 against 40.7)",
        "table 1",
        "comparison",
        higher_accuracy("lsm_mask", "sampled_mask"),
    ),
    Claim(
        "A mask of special tokens helps sampled tokens (40.7 against 36.4)",
        "table 1",
        "comparison",
        higher_accuracy("sampled_mask", "sampled"),
    ),
    Claim(
        "A mask is nearly neutral for local support (41.5 against 41.7)",
        "table 1",
        "comparison",
        equal_accuracy("lsm_mask", "lsm"),
    ),
    Claim(
        "Local support without a mask beats sampled tokens with one (41.7 against 40.7)",
        "table 1",
        "comparison",
        higher_accuracy("lsm", "sampled_mask"),
    ),
    Claim(
        "Local support has the higher train score (each on its own rollouts)",
        "figure A4",
        "dynamics",
        larger_mean("reward", "lsm", "sampled"),
    ),
)
