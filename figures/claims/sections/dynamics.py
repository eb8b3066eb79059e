"""Claims about training dynamics."""

from figures.claims.claim import Claim
from figures.claims.measures import (
    not_testable,
    smaller_mean,
    verdict_equal,
)

DYNAMICS = (
    Claim(
        "Local support has the smaller gradient norm",
        "figure A6a",
        "dynamics",
        smaller_mean("grad_norm", "lsm", "sampled"),
    ),
    Claim(
        "Two tasks, first: local support has the smaller gradient norm",
        "figure A6b",
        "multitask",
        smaller_mean("grad_norm", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support has the smaller gradient norm",
        "figure A6b",
        "multitask",
        smaller_mean("grad_norm", "lsm", "sampled", "multi", "sort"),
    ),
    Claim(
        "The entropy of local support stays sufficient",
        "figure A6a",
        "dynamics",
        not_testable("the paper does not say what is sufficient; the figure has the curves"),
    ),
    Claim(
        "Local support has fewer truncated responses",
        "figure A6c",
        "dynamics",
        smaller_mean("truncated", "lsm", "sampled"),
    ),
    Claim(
        "Local support has shorter responses",
        "figure A6c",
        "dynamics",
        smaller_mean("length", "lsm", "sampled"),
    ),
    Claim(
        "The mask lowers the share of truncated responses of sampled tokens",
        "figure A6c",
        "dynamics",
        smaller_mean("truncated", "sampled_mask", "sampled"),
    ),
    Claim(
        "The mask hardly changes the share of truncated responses of local support",
        "figure A6c",
        "dynamics",
        smaller_mean("truncated", "lsm_mask", "lsm", verdict=verdict_equal),
    ),
    Claim(
        "Local support ends closer to the teacher on sampled tokens (mean gap)",
        "figure A6d",
        "dynamics",
        smaller_mean("cost", "lsm", "sampled"),
    ),
    Claim(
        "Local support ends closer to the teacher, both with a mask (our claim)",
        "figure A6d",
        "dynamics",
        smaller_mean("cost", "lsm_mask", "sampled_mask"),
    ),
    Claim(
        "Two tasks, first: local support has the smaller mean gap",
        "figure A6d",
        "multitask",
        smaller_mean("cost", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support has the smaller mean gap",
        "figure A6d",
        "multitask",
        smaller_mean("cost", "lsm", "sampled", "multi", "sort"),
    ),
)
