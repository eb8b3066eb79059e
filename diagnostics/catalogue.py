"""Every metric there is, with its version, and the page that describes them.

`python -m diagnostics.catalogue > docs/metrics.md` writes the page anew.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diagnostics.alarms.rules import table as alarm_table
from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator
from diagnostics.gradients.probe import gradient_row
from diagnostics.metrics.consistency import (
    martingales,
    rescoring,
    sampler_ratio,
    sampler_weights,
    staleness,
)
from diagnostics.metrics.divergence import (
    cost_by_tenth,
    entropy_by_tenth,
    exact_divergence,
    prefix_weights,
    rank_quantiles,
    ratio_quantiles,
    sampled_divergence,
    support_mass,
    teacher_rank,
    tokens_by_position,
    uncertainty,
)
from diagnostics.metrics.diversity import branching, distinct, second_try
from diagnostics.metrics.eos import endings
from diagnostics.metrics.gradient_noise import baseline_noise, gradient_noise
from diagnostics.metrics.groupby import by, without
from diagnostics.metrics.kl_decomposition import agreement, kl_anatomy
from diagnostics.metrics.own_prefix import own_prefix_gap
from diagnostics.metrics.repetition import compression, repetition
from diagnostics.metrics.response import length, length_incentive, length_quantiles, reward
from diagnostics.metrics.signal import (
    action_dependence,
    energy_concentration,
    sign_null,
    sign_shares,
    signal_concentration,
    signed_concentration,
)
from diagnostics.metrics.support_consistency import support_consistency
from diagnostics.metrics.teachability import compatibility, quadrants, teachability
from diagnostics.metrics.token_attribution import (
    confident_impossible,
    coverage,
    impossible_table,
    one_id,
    token_table,
)
from diagnostics.metrics.topk import nested_outside, overlap, tail_share, top_uncertainty
from diagnostics.records.row_columns import COLUMNS

Metric = Callable[[ScoredRollouts], dict[str, Accumulator]]


@dataclass(frozen=True)
class Entry:
    """A metric, the version of its definition, and what it needs at least.

    over: the tokens that it is taken over: "sampled", all that the student chose, whatever the mask
      takes out; "supervised", those that the loss is taken over; "both", some numbers over the one
      and some over the other. version: rises when a number of the same name changes its meaning;
      numbers of different versions are not to be compared. level: L0 sampled log-probabilities, L1
      a top-K support, L2 exact functionals (some of a metric's numbers may need more; then it is
      the least). wide: many numbers or much work, so it is left out of the default panel.
    """

    metric: Metric
    level: str
    over: str = "supervised"
    version: int = 1
    wide: bool = False

    @property
    def name(self) -> str:
        return self.metric.__name__


def _named(metric: Metric, name: str) -> Metric:
    metric.__name__ = name
    return metric


CATALOGUE: tuple[Entry, ...] = (
    Entry(sign_shares, "L0"),
    Entry(sign_null, "L2", "sampled", version=2),
    Entry(signal_concentration, "L0"),
    Entry(signed_concentration, "L0"),
    Entry(energy_concentration, "L2"),
    Entry(repetition, "L0", "both", version=2),
    Entry(tail_share, "L1"),
    Entry(action_dependence, "L2", "sampled", version=2),
    Entry(teachability, "L2", wide=True),
    Entry(quadrants, "L2", wide=True),
    Entry(compatibility, "L1", "sampled", version=2, wide=True),
    Entry(sampled_divergence, "L0"),
    Entry(exact_divergence, "L2"),
    Entry(teacher_rank, "L2", "sampled", version=2),
    Entry(rank_quantiles, "L2", "sampled", version=2, wide=True),
    Entry(support_mass, "L1", "sampled", version=2),
    Entry(nested_outside, "L1", "sampled", version=2, wide=True),
    Entry(overlap, "L1", "sampled", version=2),
    Entry(kl_anatomy, "L1", "sampled", version=2),
    Entry(uncertainty, "L2", "sampled", version=2),
    Entry(top_uncertainty, "L1", "sampled", version=2, wide=True),
    Entry(ratio_quantiles, "L0", wide=True),
    Entry(prefix_weights, "L0", "sampled", version=2, wide=True),
    Entry(cost_by_tenth, "L0", "both", version=2, wide=True),
    Entry(entropy_by_tenth, "L2", "both", version=2, wide=True),
    Entry(_named(agreement(), "agreement"), "L2", "sampled", version=2, wide=True),
    Entry(tokens_by_position, "L0"),
    Entry(one_id, "L0"),
    Entry(confident_impossible, "L0"),
    Entry(endings, "L2", "both", version=2),
    Entry(length, "L0", "sampled", version=2),
    Entry(length_quantiles, "L0", "sampled", version=2),
    Entry(length_incentive, "L0", "both", version=2),
    Entry(reward, "L0", "sampled"),
    Entry(distinct, "L0", "sampled", version=2, wide=True),
    Entry(second_try, "L0", "sampled"),
    Entry(branching, "L2", "sampled", version=2, wide=True),
    Entry(gradient_noise, "L2"),
    Entry(baseline_noise, "L2"),
    Entry(martingales, "L2", "sampled", version=2),
    Entry(support_consistency, "L1", "sampled"),
    Entry(sampler_ratio, "L0", "sampled", version=2),
    Entry(sampler_weights, "L0", "sampled", version=2, wide=True),
    Entry(staleness, "L0", "sampled", wide=True),
)
"""Everything that needs no argument, at its default where it takes some."""

MAKERS = (token_table, impossible_table, coverage, agreement, compression, by, without)
"""What makes a metric from arguments: a vocabulary, ids, a decoder, a threshold, groups."""

FULL: Mapping[str, Metric] = {e.name: e.metric for e in CATALOGUE}
PANEL: Mapping[str, Metric] = {e.name: e.metric for e in CATALOGUE if not e.wide}

CODES: tuple[tuple[str, str], ...] = (
    ("A-1 sign shares and their null", "supervision.sign_shares, supervision.sign_null"),
    ("A-2 concentration", "supervision.signal_concentration, supervision.signed_concentration"),
    ("A-3 repetition split", "repetition.repetition"),
    ("A-4 energy weights", "supervision.energy_concentration"),
    ("A-5 tail share of the cost", "lists.tail_share"),
    ("A-6 blame by token id", "blame.token_table, blame.one_id"),
    (
        "A-7 teachability",
        "teachability.teachability, teachability.quadrants, teachability.compatibility",
    ),
    ("A-8 action dependence", "supervision.action_dependence"),
    ("B-1 outside the top-K", "drift.support_mass, lists.nested_outside"),
    ("B-2 teacher's rank", "drift.teacher_rank, drift.rank_quantiles"),
    ("B-3 overlap", "lists.overlap"),
    (
        "B-4 teacher's mass on the student's choices",
        "drift.sampled_divergence, teachability.compatibility",
    ),
    ("B-5 exact split of the KL", "anatomy.kl_anatomy"),
    ("B-6 uncertainty by position", "drift.uncertainty, lists.top_uncertainty"),
    ("B-7 tails of the log-ratio", "drift.ratio_quantiles, drift.cost_by_tenth"),
    ("B-8 own-prefix control", "control.own_prefix_gap; the protocol is `opd probe-own-prefix`"),
    ("B-9 continuation gain", "the protocol and its intervals are `opd probe-continuation`"),
    ("B-10 prefix weights", "drift.prefix_weights"),
    ("B-11 residual gap", "drift.exact_divergence, last step over first"),
    ("B-12 low-KL agreement", "anatomy.agreement"),
    ("C-1 vocabularies", "before training, `opd doctor`"),
    ("C-2 confident-impossible tokens", "blame.confident_impossible, blame.impossible_table"),
    ("C-3 ends", "ends.endings"),
    ("C-4 re-tokenisation", "spans.agreement, spans.uncanonical"),
    ("C-5 span log-ratio", "spans.span_ratios"),
    ("C-6 what masks remove", "blame.coverage"),
    ("D-1, D-2 length and truncation", "collapse.length, collapse.length_quantiles"),
    ("D-3 repetition", "repetition.repetition, repetition.compression"),
    ("D-4 entropy", "drift.uncertainty, drift.entropy_by_tenth"),
    ("D-5 diversity", "diversity.distinct, diversity.second_try, diversity.branching"),
    ("D-6 termination drift", "collapse.length_incentive, ends.endings (end_push)"),
    (
        "D-7 KL to the initial student",
        "drift.exact_divergence of a batch scored with the initial student in the teacher's place, "
        "`opd diagnose RECORDS --student NOW --teacher THEN`",
    ),
    ("D-8 lead time", "alarms.lead_times; the figure `warning`"),
    ("E-1 signal, noise, noise scale", "gradients.signal_and_noise"),
    ("E-2 norms by sequence", "blocks.sequence_gradients, blocks.linear_squares"),
    ("E-3 the gamma family", "family.weights, probe.gradient_row"),
    (
        "E-4 bias",
        "tradeoff.occupancy; its covariances by token class are not offered, since they need the "
        "student's probability of every class at every token",
    ),
    ("E-5 noise at a prefix", "noise.gradient_noise, teachability.quadrants"),
    ("E-6 baselines", "noise.baseline_noise"),
    (
        "E-7 learning-signal ratio",
        "gradients.signal_and_noise over the KL; `signal_loss`, a figure",
    ),
    ("E-8 alignment with the task", "not offered: it needs rollouts with forced tokens"),
    ("E-9 coherence", "tradeoff.coherence"),
    ("E-10 others' proxies", "proxies.scalar_advantage_variance, proxies.adam_noise"),
    ("F-1 sampler consistency", "validity.martingales"),
    ("F-2 sampler and learner", "validity.sampler_ratio, validity.sampler_weights"),
    ("F-3 staleness", "validity.staleness"),
    ("F-4 teacher's determinism", "validity.rescoring"),
    ("F-5 support and sampled tokens", "consistency.support_consistency"),
)
"""Every quantity that the codes in the descriptions stand for, and what measures it."""

HEADER = """# Metrics

*Written by `python -m diagnostics.catalogue > docs/metrics.md` from the docstrings.*

p is the student, q the teacher, y the sampled token, r = log p(y) - log q(y) its cost, m the mask,
which holds the *supervised* tokens, those that the loss is taken over. The *sampled* tokens are all
that the student chose: without a mask rule the same. What tests the sampler, multiplies along the
response or says where the student went is taken over the sampled tokens, what is about the signal
over the supervised ones; the column "over" says which. All logarithms are natural, all
distributions at the temperature of the loss. Access levels: L0 log-probabilities of the sampled
tokens, L1 a top-K support as well, L2 exact functionals of both whole distributions. Cost:
O(tokens) at L0, O(tokens K) at L1; at L2 the functionals are made where the logits are, O(tokens V)
once for all metrics. Suffixes: `_se` a standard error over prompts, `@lo-hi` a bin of response
positions, `%lo-hi` a tenth of the response. The *default* panel is `diagnostics.monitor.PANEL`;
`diagnostics.catalogue.FULL` holds all.

Means, shares and ratios have standard errors. Quantiles, concentrations (Gini, effective numbers),
correlations and effective sample sizes have none: theirs are not sums that merge. Where one
matters, take it from saved batches with `diagnostics.stats.bootstrap_interval` over prompts,
as the figures `gap` and `lorenz` do.
"""

OTHER = """## Other columns of a row

The rows of `opd train`, and of an observed TRL run, hold more than metrics of the batch. Of a step
that several tasks share, columns of one task begin with `task=NAME/`.

| columns | what they hold |
|---|---|"""

ALARMS = """## Alarms

A rule speaks when what is tested leaves its healthy range by more than z of its standard errors,
in as many of its last readings as "persistence" says. A column that a row lacks is no reading: a
rule without readings is *not watched*, and the report says so. A run's card there is green only
where an improvement is shown and no alarm is on, amber where nothing is shown, red where an alarm
is on or a change for the worse is shown.
"""


def page() -> str:
    """The page in Markdown: a table of all metrics, then each one's description."""
    lines = [
        HEADER,
        "| metric | codes | needs | over | version | panel |",
        "|---|---|---|---|---|---|",
    ]
    for e in CATALOGUE:
        panel = "full" if e.wide else "default"
        text = inspect.getdoc(_described(e)) or ""
        code = text.split(":")[0] if text[1:2] == "-" else ""
        lines.append(
            f"| [`{e.name}`](#{e.name}) | {code} | {e.level} | {e.over} | {e.version} | {panel} |"
        )
    lines += ["", "## By code", "", "| quantity | measured by |", "|---|---|"]
    lines += [f"| {quantity} | {where} |" for quantity, where in CODES]
    lines += ["", "## Metrics of a batch", ""]
    for e in CATALOGUE:
        lines += _section(e.name, _described(e))
    lines += ["## Metrics with arguments", ""]
    for maker in MAKERS:
        lines += _section(maker.__name__, maker)
    lines += ["## Of two batches", ""]
    for function in (rescoring, own_prefix_gap):
        lines += _section(function.__name__, function)
    lines += [OTHER, *(f"| {names} | {text} |" for names, text in COLUMNS)]
    lines += ["", *_section("gradient_row", gradient_row)]
    lines += [ALARMS, alarm_table()]
    return "\n".join(lines).rstrip() + "\n"


def _described(entry: Entry) -> Callable[..., object]:
    makers = {maker.__name__: maker for maker in MAKERS}
    return makers.get(entry.name, entry.metric)


def _section(name: str, function: Callable[..., object]) -> list[str]:
    where = f"`{function.__module__}.{name}({', '.join(inspect.signature(function).parameters)})`"
    return [f"### {name}", "", where, "", "```text", inspect.getdoc(function) or "", "```", ""]


if __name__ == "__main__":
    print(page(), end="")
