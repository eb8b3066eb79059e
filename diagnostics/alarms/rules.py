"""The default rules of the alarms, as `print(table())` shows them.

What a rule is stands in `diagnostics.alarms.rule`; rules whose null is exact, in
`diagnostics.alarms.exact_rules`. Change one with `dataclasses.replace`.
"""

from collections.abc import Sequence

from diagnostics.alarms.exact_rules import EXACT
from diagnostics.alarms.rule import AlarmRule, Reading, average, growth, joined_z, rise

__all__ = [
    "EXACT",
    "RULES",
    "AlarmRule",
    "Reading",
    "average",
    "growth",
    "joined_z",
    "rise",
    "table",
]

_MISMATCH = (
    "check that temperature, top-p and weights of the sampler are those that are scored, and that "
    "token t is scored by the distribution after token t - 1"
)

RULES: tuple[AlarmRule, ...] = (
    AlarmRule(
        name="one_token_imbalance",
        metric="tokens/one_id_signal",
        null="0.05 to 0.3",
        high=0.5,
        means="one token id holds most of the signal",
        remedy="see which in the blame table; mask it if it is a tag or an end, or clip the ratio",
    ),
    AlarmRule(
        name="special_tokens",
        metric="tokens/confident_impossible_share",
        null="0; a few per mille where a careless student is sure of errors",
        high=0.005,
        z=3.0,
        need=1,
        last=1,
        over=4,
        means="the student is sure of tokens that the teacher holds impossible",
        remedy="compare end tokens, tags and templates of both models; mask them or set map_eos",
    ),
    AlarmRule(
        name="end_renamed",
        metric="divergence/end_name",
        null="below 1 nat if the student's end is one of the teacher's",
        high=5.0,
        z=3.0,
        need=2,
        last=3,
        means="the teacher ends with another token than the student, whose end it holds impossible",
        remedy="set map_eos, mask the end, or give the teacher's generation config the student's "
        "end token",
    ),
    AlarmRule(
        name="masked_signal",
        metric="mask/all/signal",
        null="the masks' share of the tokens",
        high=0.5,
        means="the mask rules take out most of the signal",
        remedy="see mask/RULE/signal for the rule; the models may disagree about the format",
    ),
    AlarmRule(
        name="drift_support",
        metric="divergence/outside_topk_expected",
        null="falls from its start",
        high=0.05,
        start=3,
        means="the student puts more and more mass outside the teacher's top-K",
        remedy="lower the learning rate or shorten the responses; use a tail or bucket term",
    ),
    AlarmRule(
        name="drift_kl",
        metric="divergence/reverse_kl",
        null="falls from its start",
        high=1.5,
        start=3,
        against=growth,
        means="the divergence from the teacher has grown by half",
        remedy="lower the learning rate; check the sign and the stop-gradients of the objective",
    ),
    AlarmRule(
        name="drift_k1",
        metric="divergence/k1",
        null="falls from its start",
        high=1.5,
        start=3,
        against=growth,
        means="the sampled cost has grown by half",
        remedy="lower the learning rate; check the sign and the stop-gradients of the objective",
    ),
    AlarmRule(
        name="repetition",
        metric="repetition/repeated_share",
        null="near 0",
        high=0.2,
        means="tokens repeat an earlier 8-gram of their response",
        remedy="compare signal/repeated_cost with regular_cost: where it is lower the teacher "
        "rewards loops; shorten the responses or change the teacher",
    ),
    AlarmRule(
        name="truncation",
        metric="response/truncated_share",
        null="steady",
        high=0.2,
        start=3,
        means="more and more responses run into the budget",
        remedy="check that the end token is supervised and the same for both models",
    ),
    AlarmRule(
        name="budget",
        metric="response/truncated_share",
        null="below 0.5",
        high=0.9,
        means="nearly every response is cut at the budget",
        remedy="raise max_response; if a model never ends by itself, check its end tokens",
    ),
    AlarmRule(
        name="mass_escapes",
        metric="divergence/topk_student_mass",
        null="rises from its start",
        low=-0.05,
        start=3,
        means="the student's mass leaves the support that the objective sees",
        remedy="renormalise the support or add a tail; un-normalised top-K collapses so",
    ),
    AlarmRule(
        name="sampler_mismatch",
        metric="consistency/z_H",
        null="standard normal",
        low=-5.0,
        high=5.0,
        need=1,
        last=1,
        over=16,
        pool=joined_z,
        means="the tokens were not drawn from the student that was scored",
        remedy=_MISMATCH,
    ),
    AlarmRule(
        name="teacher_mismatch",
        metric="consistency/z_K",
        null="standard normal",
        low=-5.0,
        high=5.0,
        need=1,
        last=1,
        over=16,
        pool=joined_z,
        means="the teacher's scores depend on which token was sampled as they must not",
        remedy=_MISMATCH,
    ),
    AlarmRule(
        name="stale_sampler",
        metric="consistency/sampler_log_ratio_square",
        null="1e-6 in float32, 1e-3 in bfloat16",
        high=1e-2,
        means="the sampler's log-probabilities are not those of the scored student",
        remedy="sync the sampler's weights each step (lower ahead); compare its temperature and "
        "arithmetic",
    ),
    AlarmRule(
        name="dead_gradient",
        metric="grad_norm",
        null="well above 0",
        low=1e-7,
        means="no gradient arrives",
        remedy="check the mask, the stop-gradients and that teacher and student differ",
    ),
    AlarmRule(
        name="no_progress",
        metric="divergence/reverse_kl",
        null="below 0.98",
        high=0.98,
        z=0.0,
        need=5,
        over=10,
        start=3,
        against=growth,
        after=30,
        means="the divergence is no lower than at the start, though the student is trained",
        remedy="check that the gradient depends on the teacher (k1 must not be differentiated "
        "directly), then the learning rate",
    ),
    AlarmRule(
        name="skipped",
        metric="skipped",
        null="0",
        high=0.0,
        need=3,
        last=20,
        means="updates are skipped because their gradient is not finite",
        remedy="lower the learning rate; look for log-probabilities of minus infinity",
    ),
    AlarmRule(
        name="not_finite",
        metric="loss",
        null="a number",
        need=1,
        last=1,
        undefined=True,
        means="the loss is not a number",
        remedy="go back to a checkpoint; look for log-probabilities of minus infinity",
    ),
    *EXACT,
)
"""The default rules. Thresholds of trends are conventions at the edge of what published runs
show (repetition and truncation: 2604.08527), and z and persistence set their false alarms;
`python -m benchmarks.faults` measures those of all."""


def table(rules: Sequence[AlarmRule] = RULES) -> str:
    """The rules as a Markdown table."""
    lines = ["| rule | tested | null | healthy | z | persistence | means | to do |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rules:
        cells = (r.name, r.tested, r.null, r.range, f"{r.z:g}", f"{r.need} of {r.last}")
        lines.append(f"| {' | '.join((*cells, r.means, r.remedy))} |")
    return "\n".join(lines)
