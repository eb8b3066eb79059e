"""Claims about theory: bias, variance and the toy example."""

from figures.claims.claim import Claim
from figures.claims.measures import (
    AGREES,
    DIFFERS,
    study_value,
    toy_value,
    verdict_positive,
)

THEORY = (
    Claim(
        "The token-level gradient is biased for the sequence-level one",
        "appendix D",
        "bias_variance",
        study_value(
            "bias_variance",
            "exact squared bias at T = 64, median world: {}; with gamma 1 it is 0 up to rounding",
            lambda value, low, high: verdict_positive(low, high),
            quantity="bias2",
            estimator="plain",
            horizon=64,
            gamma=0.0,
        ),
    ),
    Claim(
        "The variance of the sequence-level gradient is O(T^4)",
        "appendix D",
        "horizon",
        study_value(
            "horizon",
            "a valid upper bound, not tight: T^3 is attained and never exceeded (proof in the "
            "study); exponent at T = 512 with gamma 1: {}",
            lambda value, low, high: AGREES if high < 4 else DIFFERS,
            quantity="last_slope",
            world="mixing",
            estimator="plain",
            gamma=1.0,
        ),
    ),
    Claim(
        "The variance of the token-level gradient is O(T^2)",
        "appendix D",
        "horizon",
        study_value(
            "horizon",
            "an upper bound; exponent at T = 512 with gamma 0: {}",
            lambda value, low, high: AGREES if high < 2 else DIFFERS,
            quantity="last_slope",
            world="mixing",
            estimator="plain",
            gamma=0.0,
        ),
    ),
    Claim(
        "Larger gamma has one to several orders more gradient variance in the toy",
        "figure 1a",
        "toy",
        toy_value(
            "published_ratio",
            "the published metric, gamma 1 over gamma 0, each at its own policies: {} times",
            lambda value, low, high: verdict_positive(low - 10, high - 10),
        ),
    ),
    Claim(
        "The difference is due to the estimators",
        "figure 1a",
        "toy",
        toy_value(
            "equal_ratio",
            "at equal policies, without the metric's confound: {} times",
            lambda value, low, high: verdict_positive(low - 10, high - 10),
        ),
    ),
    Claim(
        "gamma = 0 reaches the targets in the toy",
        "figure 1b",
        "toy",
        toy_value(
            "distance",
            "final distance to the target (a step is 1): {}",
            lambda value, low, high: verdict_positive(1 - high, 1 - low),
            gamma=0.0,
        ),
    ),
    Claim(
        "gamma = 1 drifts away from the targets in the toy",
        "figure 1b",
        "toy",
        toy_value(
            "distance",
            "final distance to the target (a step is 1): {}",
            lambda value, low, high: verdict_positive(low - 1, high - 1),
        ),
    ),
)
