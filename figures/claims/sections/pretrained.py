"""The main comparison of the paper on a real pretrained model."""

from figures.claims.claim import Claim
from figures.claims.matched_measures import pretrained_accuracy

PRETRAINED = (
    Claim(
        "A pretrained model, 48 steps: sampled tokens improve the student (36.4 against 28.2)",
        "table 1",
        "pretrained",
        pretrained_accuracy("sampled_token_long"),
    ),
    Claim(
        "A pretrained model, 24 steps: local support improves the student (41.7 against 28.2)",
        "table 1",
        "pretrained",
        pretrained_accuracy("teacher_topk"),
    ),
    Claim(
        "A pretrained model, 24 steps: local support beats sampled tokens (41.7 against 36.4)",
        "table 1",
        "pretrained",
        pretrained_accuracy("teacher_topk", "sampled_token"),
    ),
)
