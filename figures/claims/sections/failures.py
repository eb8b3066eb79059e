"""Claims about the failures of sampled tokens."""

from figures.claims.claim import Claim
from figures.claims.failure_measures import (
    below_diagonal,
    gap_tail_widens,
    loop_not_penalized,
    repeated_tokens_cost_less,
    special_token_logps,
    teacher_doubt,
)
from figures.claims.measures import token_share, verdict_positive

FAILURES = (
    Claim("Most sampled tokens lie below the diagonal", "figure 2", "scatter", below_diagonal),
    Claim(
        "The upward signal is concentrated on a small set of tokens",
        "2.2",
        "scatter",
        token_share(
            "top 1 %, of the upward signal",
            "the largest 1 % of the tokens have {} of it (0.01 if all were equal)",
            lambda value, low, high: verdict_positive(low - 0.1, high - 0.1),
        ),
    ),
    Claim("The teacher does not penalise a loop", "figure 3", "loop", loop_not_penalized),
    Claim(
        "Loops are not penalised throughout training",
        "figures 3, A8",
        "dynamics",
        repeated_tokens_cost_less,
    ),
    Claim(
        "The lower tail of the gap widens with the position (sampled tokens)",
        "figure 4",
        "gap",
        gap_tail_widens("sampled"),
    ),
    Claim(
        "The lower tail widens with a mask as well (our claim)",
        "figure 4",
        "gap",
        gap_tail_widens("sampled_mask"),
    ),
    Claim(
        "The teacher is less certain on the student's prefixes than on its own (there a "
        "hypothesis)",
        "2.2",
        "fan",
        teacher_doubt,
    ),
    Claim(
        "Another tokenization of a tag and another EOS have log-probabilities of -19 and -59",
        "figure 5",
        "segmentation",
        special_token_logps,
    ),
    Claim(
        "Such mismatched tokens dominate the signal",
        "2.2",
        "scatter",
        token_share(
            "impossible, of the signal",
            "{} of the sum of |log q - log p|",
            lambda value, low, high: verdict_positive(low - 0.5, high - 0.5),
        ),
    ),
)
