"""Claims of other work about what a teacher reads, and about controls of distillation."""

from figures.claims.claim import Claim
from figures.claims.matched_measures import (
    collapse_of,
    control_accuracy,
    equal_view_accuracy,
    view_accuracy,
)

MATCHED = (
    Claim(
        "A student improves with itself as the teacher that reads the solution",
        "2601.19897",
        "views",
        view_accuracy("frozen_solution"),
    ),
    Claim(
        "The solution of another problem is as good for the teacher as the right one",
        "2608.09228",
        "views",
        equal_view_accuracy("frozen_another", "frozen_solution"),
    ),
    Claim(
        "For a strong teacher the solution of another problem is as good (our claim)",
        "",
        "views",
        equal_view_accuracy("strong_another", "strong_solution"),
    ),
    Claim(
        "A moving average of the student is the better teacher than a frozen copy (70 against 65)",
        "2601.19897",
        "views",
        view_accuracy("moving_solution", "frozen_solution"),
    ),
    Claim(
        "Self-distillation with the solution in view collapses past about 100 steps",
        "OPSD, issue 20",
        "views",
        collapse_of("frozen_solution", "moving_solution", horizon=50),
    ),
    Claim(
        "The student's present weights are a teacher with which it diverges (33 against 65)",
        "2601.19897",
        "views",
        collapse_of("live_solution"),
    ),
    Claim(
        "On-policy distillation beats SFT on the teacher's responses at equal tokens",
        "2306.13649",
        "controls",
        control_accuracy("on_policy_topk", "sft", "tokens"),
    ),
    Claim(
        "SFT on the teacher's responses is ahead early at equal seconds (our claim)",
        "",
        "controls",
        control_accuracy("sft", "on_policy_topk", "seconds", share=0.25),
    ),
    Claim(
        "On-policy distillation beats the KL on the teacher's responses at equal tokens",
        "2306.13649",
        "controls",
        control_accuracy("on_policy_topk", "offline_kl", "tokens"),
    ),
    Claim(
        "On-policy distillation beats reinforcement learning of the reward at equal tokens",
        "2505.09388",
        "controls",
        control_accuracy("on_policy_topk", "reward_only", "tokens"),
    ),
    Claim(
        "The teacher's top K beats the sampled token at equal tokens",
        "2603.25562",
        "controls",
        control_accuracy("on_policy_topk", "on_policy_sampled", "tokens"),
    ),
)
