"""Claims about distillation on two tasks."""

from figures.claims.claim import Claim
from figures.claims.measures import (
    equal_accuracy,
    higher_accuracy,
    larger_mean,
)

MULTI = (
    Claim(
        "Two tasks, first: local support beats sampled tokens (41.7 against 34.8)",
        "table 2",
        "comparison",
        higher_accuracy("lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, first: local support beats sampled tokens, both with a mask (38.6 against "
        "36.6)",
        "table 2",
        "comparison",
        higher_accuracy("lsm_mask", "sampled_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, first: local support without a mask beats sampled tokens with one (41.7 "
        "against "
        "36.6)",
        "table 2",
        "comparison",
        higher_accuracy("lsm", "sampled_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support beats sampled tokens (95.3 against 90.6)",
        "table 2",
        "comparison",
        higher_accuracy("lsm", "sampled", "multi", "sort"),
    ),
    Claim(
        "Two tasks, second: local support beats sampled tokens, both with a mask (97.7 against "
        "93.8)",
        "table 2",
        "comparison",
        higher_accuracy("lsm_mask", "sampled_mask", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: a mask helps sampled tokens (36.6 against 34.8)",
        "table 2",
        "comparison",
        higher_accuracy("sampled_mask", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: a mask helps sampled tokens (93.8 against 90.6)",
        "table 2",
        "comparison",
        higher_accuracy("sampled_mask", "sampled", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: a mask hurts local support (38.6 against 41.7)",
        "table 2",
        "comparison",
        higher_accuracy("lsm", "lsm_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: a mask helps local support (97.7 against 95.3)",
        "table 2",
        "comparison",
        higher_accuracy("lsm_mask", "lsm", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: local support has the higher train score",
        "figure A5",
        "multitask",
        larger_mean("reward", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support and sampled tokens end with equal accuracy",
        "figure A5",
        "multitask",
        equal_accuracy("lsm", "sampled", "multi", "sort"),
    ),
)
