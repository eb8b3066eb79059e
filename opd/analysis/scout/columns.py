"""Measurements of a pair that are columns of a training step's row of metrics.

Shapes: B responses, T response positions.
"""

import math
from collections.abc import Sequence

import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.catalogue import FULL, Metric
from diagnostics.core.optional_fields import MissingField, require_distribution_stats
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.monitor import Monitor
from opd.tokens.masking import ResolvedMaskRules, rule_hits

PANEL = (
    *("sampled_divergence", "exact_divergence", "uncertainty", "overlap", "nested_outside"),
    *("signal_concentration", "one_id", "confident_impossible", "repetition", "length"),
    *("reward", "second_try", "endings", "prefix_weights", "compatibility"),
)
"""Metrics of the catalogue that are computed."""

COLUMNS = {
    "reverse_kl": "divergence/reverse_kl",
    "forward_kl": "divergence/forward_kl",
    "response_kl": "divergence/reverse_kl_per_response",
    "sampled_gap": "divergence/abs_ratio",
    "topk_overlap": "divergence/overlap_ratio",
    "teacher_overlap_mass": "divergence/overlap_teacher_mass",
    "teacher_mass": "divergence/compatibility",
    "outside_top1": "divergence/outside_top1_expected",
    "outside_top8": "divergence/outside_top8_expected",
    "outside_top16": "divergence/outside_top16_expected",
    "outside_top32": "divergence/outside_top32_expected",
    "student_entropy": "divergence/student_entropy",
    "teacher_entropy": "divergence/teacher_entropy",
    "entropy_gap": "divergence/entropy_gap",
    "signal_top1_share": "signal/signal_top1_share",
    "one_id_signal": "tokens/one_id_signal",
    "impossible_share": "tokens/confident_impossible_share",
    "impossible_signal": "tokens/confident_impossible_signal",
    "repeated_share": "repetition/repeated_share",
    "length": "response/length",
    "truncated_share": "response/truncated_share",
    "second_try": "diversity/second_try",
    "end_push": "divergence/end_push",
    "prefix_ess": "divergence/prefix_ess",
    "special_share": "tokens/special_share",
    "special_signal": "tokens/special_signal",
    "special_gap": "tokens/special_gap",
    "plain_gap": "tokens/plain_gap",
}
"""Measurement -> column of the row of metrics."""


def metric_values(batch: ScoredRollouts, rules: Sequence[ResolvedMaskRules]) -> dict[str, float]:
    """Compute the measurements of COLUMNS with their standard errors.

    Args:
        batch: Scored rollouts of the student.
        rules: Rules of the special tokens.

    Returns:
        Measurements by name; NaN where a metric is not defined.
    """

    def special_tokens(batch: ScoredRollouts) -> dict[str, Accumulator]:
        hits = [rule_hits(batch.tokens, batch.sampled, rule) for rule in rules]
        special, r = torch.stack(hits).any(0), batch.log_ratio
        plain, mask, prompt = batch.sampled & ~special, batch.sampled, batch.prompt
        return {
            "tokens/special_share": Mean.from_values(special, mask, prompt),
            "tokens/special_signal": Mean.ratio(r.abs() * special, r.abs(), mask, prompt),
            "tokens/special_gap": Mean.from_values(r, special, prompt),
            "tokens/plain_gap": Mean.from_values(r, plain, prompt),
        }

    metrics: dict[str, Metric] = {name: FULL[name] for name in PANEL}
    metrics |= {"forward KL": forward_divergence, "special tokens": special_tokens}
    row = Monitor(metrics)(0, [batch])
    values = {}
    for name, column in COLUMNS.items():
        values[name] = row.get(column, math.nan)
        if f"{column}_se" in row:
            values[f"{name}_se"] = row[f"{column}_se"]
    return values


def forward_divergence(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Compute the mean forward KL(teacher || student) of the next token, in nats."""
    forward_kl = require_distribution_stats(batch).forward_kl
    if forward_kl is None:
        raise MissingField("the distribution stats lack forward_kl; score the batch again")
    return {"divergence/forward_kl": Mean.from_values(forward_kl, batch.mask, batch.prompt)}
