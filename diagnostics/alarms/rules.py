"""The default alarm rules, as `print(rules_table())` shows them.

Rules are defined in `diagnostics.alarms.rule`; rules whose null is exact are in
`diagnostics.alarms.exact_rules`. Change a rule with `dataclasses.replace`.
"""

from collections.abc import Sequence

from diagnostics.alarms.exact_rules import EXACT
from diagnostics.alarms.rule import AlarmRule, Reading, average, combined_z, growth, rise

__all__ = [
    "EXACT",
    "RULES",
    "AlarmRule",
    "Reading",
    "average",
    "combined_z",
    "growth",
    "rise",
    "rules_table",
]

_MISMATCH = (
    "check that sampling and scoring use the same temperature, top-p and weights, and that token t "
    "is scored by the distribution after token t - 1"
)

RULES: tuple[AlarmRule, ...] = (
    AlarmRule(
        name="one_token_imbalance",
        metric="tokens/one_id_signal",
        null="0.05 to 0.3",
        high=0.5,
        means="one token id holds most of the signal",
        remedy="find the id in the token table; mask it if it is a tag or an EOS token, or clip "
        "the ratio",
    ),
    AlarmRule(
        name="special_tokens",
        metric="tokens/confident_impossible_share",
        null="0; a few per mille for a student that is confident about wrong tokens",
        high=0.005,
        z=3.0,
        min_outside=1,
        window=1,
        num_pooled=4,
        means="the student is confident about tokens to which the teacher gives almost no "
        "probability",
        remedy="compare EOS tokens, tags and templates of both models; mask them or set map_eos",
    ),
    AlarmRule(
        name="end_renamed",
        metric="divergence/end_name",
        null="below 1 nat if the student's EOS id is one of the teacher's",
        high=5.0,
        z=3.0,
        min_outside=2,
        window=3,
        means="the teacher uses another EOS token and gives almost no probability to the student's",
        remedy="set map_eos, mask the EOS token, or add the student's EOS id to the teacher's "
        "generation config",
    ),
    AlarmRule(
        name="masked_signal",
        metric="mask/all/signal",
        null="the share of the tokens that is masked",
        high=0.5,
        means="the mask rules remove most of the signal",
        remedy="find the rule in mask/RULE/signal; the models may disagree about the format",
    ),
    AlarmRule(
        name="drift_support",
        metric="divergence/outside_topk_expected",
        null="decreases from its initial value",
        high=0.05,
        num_reference=3,
        means="the student's probability mass outside the teacher's top-K is growing",
        remedy="lower the learning rate or shorten the responses; use a tail or bucket term",
    ),
    AlarmRule(
        name="drift_kl",
        metric="divergence/reverse_kl",
        null="decreases from its initial value",
        high=1.5,
        num_reference=3,
        compare=growth,
        means="the divergence from the teacher is above 1.5 times its initial value",
        remedy="lower the learning rate; check the sign and the stop-gradients of the objective",
    ),
    AlarmRule(
        name="drift_k1",
        metric="divergence/k1",
        null="decreases from its initial value",
        high=1.5,
        num_reference=3,
        compare=growth,
        means="the sampled cost is above 1.5 times its initial value",
        remedy="lower the learning rate; check the sign and the stop-gradients of the objective",
    ),
    AlarmRule(
        name="repetition",
        metric="repetition/repeated_share",
        null="near 0",
        high=0.2,
        means="many tokens repeat an earlier 8-gram of the response",
        remedy="compare signal/repeated_cost with signal/regular_cost: if the repeated cost is the "
        "lower one, the teacher rewards loops; shorten the responses or change the teacher",
    ),
    AlarmRule(
        name="truncation",
        metric="response/truncated_share",
        null="steady",
        high=0.2,
        num_reference=3,
        means="the share of responses that reach max_response is growing",
        remedy="check that the EOS token is supervised and the same for both models",
    ),
    AlarmRule(
        name="budget",
        metric="response/truncated_share",
        null="below 0.5",
        high=0.9,
        means="nearly all responses are truncated at max_response",
        remedy="increase max_response; if a model never emits an EOS token, check its EOS ids",
    ),
    AlarmRule(
        name="mass_escapes",
        metric="divergence/topk_student_mass",
        null="increases from its initial value",
        low=-0.05,
        num_reference=3,
        means="the student's probability mass on the support of the objective is shrinking",
        remedy="renormalise the support or add a tail term; unnormalised top-K objectives collapse "
        "like this",
    ),
    AlarmRule(
        name="sampler_mismatch",
        metric="consistency/z_H",
        null="standard normal",
        low=-5.0,
        high=5.0,
        min_outside=1,
        window=1,
        num_pooled=16,
        pool=combined_z,
        means="the tokens were not sampled from the scored student",
        remedy=_MISMATCH,
    ),
    AlarmRule(
        name="teacher_mismatch",
        metric="consistency/z_K",
        null="standard normal",
        low=-5.0,
        high=5.0,
        min_outside=1,
        window=1,
        num_pooled=16,
        pool=combined_z,
        means="the teacher's scores are inconsistent with the sampled tokens",
        remedy=_MISMATCH,
    ),
    AlarmRule(
        name="stale_sampler",
        metric="consistency/sampler_log_ratio_square",
        null="1e-6 in float32, 1e-3 in bfloat16",
        high=1e-2,
        means="the sampler's log-probabilities are not those of the scored student",
        remedy="sync the sampler's weights every step (lower rollout_lag, or the age of replay); "
        "compare its temperature and precision",
    ),
    AlarmRule(
        name="dead_gradient",
        metric="grad_norm",
        null="well above 0",
        low=1e-7,
        means="the gradient is zero",
        remedy="check the mask and the stop-gradients, and that teacher and student differ",
    ),
    AlarmRule(
        name="no_progress",
        metric="divergence/reverse_kl",
        null="below 0.98",
        high=0.98,
        z=0.0,
        min_outside=5,
        num_pooled=10,
        num_reference=3,
        compare=growth,
        min_readings=30,
        means="the divergence has not decreased although the student is trained",
        remedy="check that the gradient depends on the teacher (k1 must not be differentiated "
        "directly), then the learning rate",
    ),
    AlarmRule(
        name="reward_falls",
        metric="response/reward",
        null="steady or rising",
        low=0.8,
        num_pooled=4,
        num_reference=3,
        compare=growth,
        means="the graded reward of the student's own responses has fallen below 0.8 times its "
        "initial value",
        remedy="evaluate the teacher on the prompts that it reads (`opd eval TEACHER`); lower the "
        "learning rate; find the tokens with the largest cost in the token table",
    ),
    AlarmRule(
        name="skipped",
        metric="skipped",
        null="0",
        high=0.0,
        min_outside=3,
        window=20,
        means="updates are skipped because the gradient is not finite",
        remedy="lower the learning rate; look for log-probabilities of -inf",
    ),
    AlarmRule(
        name="not_finite",
        metric="loss",
        null="a number",
        min_outside=1,
        window=1,
        nan_is_outside=True,
        means="the loss is not a number",
        remedy="resume from a checkpoint; look for log-probabilities of -inf",
    ),
    *EXACT,
)
"""The default rules.

Thresholds of trends are conventions at the edge of what published runs show (repetition and
truncation: 2604.08527), and z and persistence determine their false-alarm rates; `python -m
benchmarks.faults` measures those of all rules."""


def rules_table(rules: Sequence[AlarmRule] = RULES) -> str:
    """Return the rules as a Markdown table."""
    lines = ["| rule | tested | null | healthy | z | persistence | means | to do |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for rule in rules:
        cells = (
            rule.name,
            rule.tested,
            rule.null,
            rule.range,
            f"{rule.z:g}",
            f"{rule.min_outside} of {rule.window}",
        )
        lines.append(f"| {' | '.join((*cells, rule.means, rule.remedy))} |")
    return "\n".join(lines)
