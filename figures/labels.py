"""Printed names of methods, metrics and model pairs: words of the field instead of code names.

A name that is not listed, such as that of a user's own run folder, is printed as it is.
"""

METHODS = {
    "healthy": "healthy runs",
    "teacher": "teacher",
    "start": "before training",
    "sampled_token": "sampled token",
    "sampled_token_long": "sampled token, 48 steps",
    "sampled": "sampled token",
    "sampled_mask": "sampled token, mask",
    "sampled_top_p": "sampled token, top-p",
    "sampled_mask_top_p": "sampled token, mask, top-p",
    "teacher_topk": "local support",
    "lsm": "local support (V1)",
    "lsm_mask": "local support (V1), mask",
    "lsm_whole": "local support, no top-p",
    "lsm_unnormalised": "local support, un-normalised",
    "lsm_k2": "local support, K = 2",
    "lsm_k4": "local support, K = 4",
    "lsm_top_p_0.8": "local support, top-p 0.8",
    "v2_student_and_sampled": "V2: student's K + sampled",
    "v3_teacher_and_sampled": "V3: teacher's K + sampled",
    "v4_student_tail": "V4: student's K, tail",
    "v5_teacher_tail": "V5: teacher's K, tail",
    "v2_student_and_sampled_mask": "V2, mask",
    "v3_teacher_and_sampled_mask": "V3, mask",
    "v4_student_tail_mask": "V4, mask",
    "v5_teacher_tail_mask": "V5, mask",
    "full_kl": "full reverse KL",
    "sampled_reward": "sampled token, reward",
    "sampled_gamma_0.5": "gamma 0.5",
    "sampled_gamma_0.5_baseline": "gamma 0.5, baseline",
    "sampled_gamma_1": "gamma 1",
    "sampled_gamma_1_baseline": "gamma 1, baseline",
    "sft": "SFT",
    "offline_kl": "offline KL",
    "mixed": "mixed prefixes",
    "reward_only": "reward only",
    "on_policy_sampled": "on-policy, sampled token",
    "on_policy_topk": "on-policy, top K",
    "solution": "solution of the problem",
    "another": "solution of another problem",
    "empty": "no solution",
    **{
        f"{teacher}_{view}": f"{teacher}: {shown}"
        for teacher in ("frozen", "moving", "live", "strong")
        for view, shown in (("solution", "solution"), ("another", "another"), ("empty", "none"))
    },
}
"""Printed name of each method that `opd paper` and `opd demo` run."""

METRICS = {
    "grad_norm": "gradient norm",
    "divergence/reverse_kl": "reverse KL",
    "divergence/outside_topk_expected": "student's mass outside top K",
    "divergence/student_entropy": "student's entropy",
    "divergence/teacher_entropy": "teacher's entropy",
    "signal/signal_top1_share": "signal in 1 % of the tokens",
    "tokens/confident_impossible_share": "confident, impossible tokens",
    "response/length": "response length",
    "repetition/repeated_share": "repeated tokens",
    "response/truncated_share": "truncated responses",
}
"""Printed name of each metric that a figure shows."""

REGIMES = {
    "density-0": "no foreign tag",
    "density-0.1": "a tag in 10 responses",
    "density-0.3": "a tag in 3 responses",
    "density-1": "a tag a response",
    "density-2": "two tags",
    "density-4": "four tags",
    "strength-2": "foreign tags at -2 nats",
    "strength-6": "foreign tags at -6 nats",
    "strength-20": "foreign tags at -20 nats",
    "ends-1": "another end token",
    "weakness-short": "student saw short problems",
    "weakness-small": "student too small",
    "teacher-errors": "teacher errs",
    "teacher-terse": "teacher is terse",
    "loops-both": "repeated steps",
    "budget-hit": "limit that is reached",
    "length-160": "longer responses",
    "vocabulary-4096": "vocabulary 4,096",
}
"""Printed name of regimes of `opd map`."""
PAIRS = {"lab": "lab pair", "smollm": "SmolLM2 pair"}
"""Printed name of each pair of models that a figure compares."""


def method_label(name: str) -> str:
    """Return the printed name of a method."""
    return METHODS.get(name, name)


def metric_label(name: str) -> str:
    """Return the printed name of a metric."""
    return METRICS.get(name, name)


def regime_label(name: str) -> str:
    """Return the printed name of a regime of the map."""
    return REGIMES.get(name, name)


def pair_label(name: str) -> str:
    """Return the printed name of a pair of models."""
    return PAIRS.get(name, name)
