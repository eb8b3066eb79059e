"""The catalogue of all metrics with their versions, and the reference page that describes them.

`python -m diagnostics.catalogue > docs/metrics.md` writes the page.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diagnostics.alarms.rules import rules_table as alarm_table
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
from diagnostics.metrics.teacher_view import view_copying, view_effect
from diagnostics.metrics.token_attribution import (
    confident_impossible,
    coverage,
    impossible_table,
    one_id,
    token_table,
)
from diagnostics.metrics.topk import nested_outside, overlap, tail_share, top_uncertainty
from diagnostics.records.headline import headline_tables
from diagnostics.records.row_columns import COLUMNS

Metric = Callable[[ScoredRollouts], dict[str, Accumulator]]


@dataclass(frozen=True)
class Entry:
    """A metric of the catalogue, the version of its definition, and its requirements."""

    name: str
    """Name of the metric, as in panels and `Monitor.missing`."""
    metric: Metric
    level: str
    """Lowest access level: L0 sampled log-probabilities, L1 a top-K support, L2 exact distribution
    stats. Some of a metric's numbers may need a higher level."""
    token_set: str = "supervised"
    """Tokens of the averages: "sampled", all tokens that the student sampled, whatever the mask;
    "supervised", the tokens of the loss; "both", some numbers over each."""
    version: int = 1
    """Increases when a number of the same name changes its meaning; numbers of different versions
    are not comparable."""
    wide: bool = False
    """Many numbers or much work: not part of the default panel."""


CATALOGUE: tuple[Entry, ...] = (
    Entry("sign_shares", sign_shares, "L0"),
    Entry("sign_null", sign_null, "L2", "sampled", version=2),
    Entry("signal_concentration", signal_concentration, "L0"),
    Entry("signed_concentration", signed_concentration, "L0"),
    Entry("energy_concentration", energy_concentration, "L2"),
    Entry("repetition", repetition, "L0", "both", version=2),
    Entry("tail_share", tail_share, "L1"),
    Entry("action_dependence", action_dependence, "L2", "sampled", version=2),
    Entry("teachability", teachability, "L2", wide=True),
    Entry("quadrants", quadrants, "L2", wide=True),
    Entry("compatibility", compatibility, "L1", "sampled", version=2, wide=True),
    Entry("sampled_divergence", sampled_divergence, "L0"),
    Entry("exact_divergence", exact_divergence, "L2"),
    Entry("teacher_rank", teacher_rank, "L2", "sampled", version=2),
    Entry("rank_quantiles", rank_quantiles, "L2", "sampled", version=2, wide=True),
    Entry("support_mass", support_mass, "L1", "sampled", version=2),
    Entry("nested_outside", nested_outside, "L1", "sampled", version=2, wide=True),
    Entry("overlap", overlap, "L1", "sampled", version=2),
    Entry("kl_anatomy", kl_anatomy, "L1", "sampled", version=2),
    Entry("uncertainty", uncertainty, "L2", "sampled", version=2),
    Entry("top_uncertainty", top_uncertainty, "L1", "sampled", version=2, wide=True),
    Entry("ratio_quantiles", ratio_quantiles, "L0", wide=True),
    Entry("prefix_weights", prefix_weights, "L0", "sampled", version=2, wide=True),
    Entry("cost_by_tenth", cost_by_tenth, "L0", "both", version=2, wide=True),
    Entry("entropy_by_tenth", entropy_by_tenth, "L2", "both", version=2, wide=True),
    Entry("agreement", agreement(), "L2", "sampled", version=2, wide=True),
    Entry("tokens_by_position", tokens_by_position, "L0"),
    Entry("one_id", one_id, "L0"),
    Entry("confident_impossible", confident_impossible, "L0"),
    Entry("endings", endings, "L2", "both", version=2),
    Entry("length", length, "L0", "sampled", version=2),
    Entry("length_quantiles", length_quantiles, "L0", "sampled", version=2),
    Entry("length_incentive", length_incentive, "L0", "both", version=2),
    Entry("reward", reward, "L0", "sampled"),
    Entry("distinct", distinct, "L0", "sampled", version=2, wide=True),
    Entry("second_try", second_try, "L0", "sampled"),
    Entry("branching", branching, "L2", "sampled", version=2, wide=True),
    Entry("gradient_noise", gradient_noise, "L2"),
    Entry("baseline_noise", baseline_noise, "L2"),
    Entry("martingales", martingales, "L2", "sampled", version=2),
    Entry("support_consistency", support_consistency, "L1", "sampled"),
    Entry("sampler_ratio", sampler_ratio, "L0", "sampled", version=2),
    Entry("sampler_weights", sampler_weights, "L0", "sampled", version=2, wide=True),
    Entry("staleness", staleness, "L0", "sampled", wide=True),
)
"""All metrics without arguments; metrics with optional arguments at their defaults."""

MAKERS = (token_table, impossible_table, coverage, agreement, compression, by, without)
"""Functions that build a metric from a vocabulary size, ids, a decoder, a threshold or groups."""

FULL: Mapping[str, Metric] = {e.name: e.metric for e in CATALOGUE}
PANEL: Mapping[str, Metric] = {e.name: e.metric for e in CATALOGUE if not e.wide}

CODES: tuple[tuple[str, str], ...] = (
    ("A-1 sign shares and their null", "metrics.signal.sign_shares, metrics.signal.sign_null"),
    (
        "A-2 concentration",
        "metrics.signal.signal_concentration, metrics.signal.signed_concentration",
    ),
    ("A-3 repetition split", "metrics.repetition.repetition"),
    ("A-4 energy weights", "metrics.signal.energy_concentration"),
    ("A-5 tail share of the cost", "metrics.topk.tail_share"),
    (
        "A-6 attribution to token ids",
        "metrics.token_attribution.token_table, metrics.token_attribution.one_id",
    ),
    (
        "A-7 teachability",
        "metrics.teachability.teachability, metrics.teachability.quadrants, "
        "metrics.teachability.compatibility",
    ),
    ("A-8 action dependence", "metrics.signal.action_dependence"),
    ("B-1 outside the top-K", "metrics.divergence.support_mass, metrics.topk.nested_outside"),
    ("B-2 teacher's rank", "metrics.divergence.teacher_rank, metrics.divergence.rank_quantiles"),
    ("B-3 overlap", "metrics.topk.overlap"),
    (
        "B-4 teacher's mass on the student's choices",
        "metrics.divergence.sampled_divergence, metrics.teachability.compatibility",
    ),
    ("B-5 exact decomposition of the KL", "metrics.kl_decomposition.kl_anatomy"),
    ("B-6 uncertainty by position", "metrics.divergence.uncertainty, metrics.topk.top_uncertainty"),
    (
        "B-7 tails of the log-ratio",
        "metrics.divergence.ratio_quantiles, metrics.divergence.cost_by_tenth",
    ),
    (
        "B-8 own-prefix baseline",
        "metrics.own_prefix.own_prefix_gap; protocol: `opd probe-own-prefix`",
    ),
    ("B-9 continuation gain", "`opd probe-continuation` (protocol and intervals)"),
    ("B-10 prefix weights", "metrics.divergence.prefix_weights"),
    ("B-11 residual gap", "metrics.divergence.exact_divergence, last step over first"),
    ("B-12 low-KL agreement", "metrics.kl_decomposition.agreement"),
    ("C-1 vocabularies", "`opd doctor`, before training"),
    (
        "C-2 confident-impossible tokens",
        "metrics.token_attribution.confident_impossible, "
        "metrics.token_attribution.impossible_table",
    ),
    ("C-3 EOS tokens", "metrics.eos.endings"),
    (
        "C-4 retokenization",
        "metrics.retokenization.boundary_agreement, metrics.retokenization.noncanonical_share",
    ),
    ("C-5 span log-ratio", "metrics.retokenization.span_ratios"),
    ("C-6 signal removed by masks", "metrics.token_attribution.coverage"),
    (
        "D-1, D-2 length and truncation",
        "metrics.response.length, metrics.response.length_quantiles",
    ),
    ("D-3 repetition", "metrics.repetition.repetition, metrics.repetition.compression"),
    ("D-4 entropy", "metrics.divergence.uncertainty, metrics.divergence.entropy_by_tenth"),
    (
        "D-5 diversity",
        "metrics.diversity.distinct, metrics.diversity.second_try, metrics.diversity.branching",
    ),
    ("D-6 termination drift", "metrics.response.length_incentive, metrics.eos.endings (end_push)"),
    (
        "D-7 KL to the initial student",
        "metrics.divergence.exact_divergence of a batch scored with the initial student as the "
        "teacher, `opd diagnose RECORDS --student NOW --teacher THEN`",
    ),
    ("D-8 lead time", "alarms.alarms.lead_times; the figure `warning`"),
    ("E-1 signal, noise, noise scale", "gradients.signal_noise.signal_and_noise"),
    (
        "E-2 norms by sequence",
        "gradients.layers.sequence_gradients, gradients.layers.linear_squares",
    ),
    (
        "E-3 the gamma family",
        "gradients.estimators.estimator_weights, gradients.probe.gradient_row",
    ),
    (
        "E-4 bias",
        "gradients.bias.occupancy; its covariances by token class are not available, since they "
        "need the student's probability of every class at every token",
    ),
    (
        "E-5 noise at a prefix",
        "metrics.gradient_noise.gradient_noise, metrics.teachability.quadrants",
    ),
    ("E-6 baselines", "metrics.gradient_noise.baseline_noise"),
    (
        "E-7 learning-signal ratio",
        "gradients.signal_noise.signal_and_noise over the KL; the figure `signal_loss`",
    ),
    ("E-8 alignment with the task", "not available: it needs rollouts with forced tokens"),
    ("E-9 coherence", "gradients.bias.coherence"),
    (
        "E-10 proxies of other systems",
        "gradients.proxies.scalar_advantage_variance, gradients.proxies.adam_noise",
    ),
    ("F-1 sampler consistency", "metrics.consistency.martingales"),
    (
        "F-2 sampler and learner",
        "metrics.consistency.sampler_ratio, metrics.consistency.sampler_weights",
    ),
    ("F-3 staleness", "metrics.consistency.staleness"),
    ("F-4 determinism of the teacher", "metrics.consistency.rescoring"),
    ("F-5 support and sampled tokens", "metrics.support_consistency.support_consistency"),
)
"""The quantity of each code in the descriptions, and the functions below `diagnostics` for it."""

HEADER = """# Metrics

*Generated from the docstrings by `python -m diagnostics.catalogue > docs/metrics.md`.*

p is the student, q the teacher, y the sampled token, r = log p(y) - log q(y) its cost, m the mask
of the *supervised* tokens, which the loss is taken over. The *sampled* tokens are all tokens that
the student sampled; without a mask rule both sets are the same. Metrics that test the sampler,
multiply along the response or describe where the student went are taken over the sampled tokens,
metrics of the training signal over the supervised tokens; see the column "tokens". All logarithms
are natural, all distributions at the temperature of the loss.

Access levels: L0 log-probabilities of the sampled tokens; L1 also a top-K support; L2 exact
distribution stats of both full distributions. Cost: O(tokens) at L0, O(tokens K) at L1; at L2 the
stats are computed together with the logits, O(tokens V) once for all metrics. Suffixes: `_se` a
standard error over prompts, `@lo-hi` a bin of response positions, `%lo-hi` a tenth of the response.
The *default* panel is `diagnostics.monitor.PANEL`; `diagnostics.catalogue.FULL` contains all
metrics.

Means, shares and ratios have standard errors. Quantiles, concentrations (Gini, effective numbers),
correlations and effective sample sizes have none, because their errors are not sums that can be
merged. To estimate one, use `diagnostics.stats.bootstrap_interval` over the prompts of saved
batches, as the figures `gap` and `lorenz` do.
"""

OTHER = """## Other columns of a row

Rows of `opd train` and of an observed TRL run also contain columns that are not metrics of a batch.
In a step shared by several tasks, columns of one task begin with `task=NAME/`.

| columns | description |
|---|---|"""

HEADLINES = """## Headline columns

The log of an observed TRL run and the loggers of `opd train` show these columns by default, where a
run has them; `log_columns=None` and `--logger-columns all` show all. The file of rows always has
all.
"""

ALARMS = """## Alarms

A rule raises an alarm when the tested value was outside its healthy range by more than z of its
standard errors, in as many of the last readings as "persistence" says. A row that lacks the column
is not a reading: a rule without readings is *not watched*, and the report says so. In the report,
the card of a run is green only if an improvement is significant and no alarm is active, amber if
no change is significant, red if an alarm is active or a deterioration is significant.
"""


_BATCH_ONLY = "Args:\n    batch: Scored rollouts.\n\n"
"""The argument section of every metric, which the page leaves out."""


def page() -> str:
    """Return the page in Markdown: a table of all metrics, then the description of each."""
    lines = [
        HEADER,
        "| metric | codes | access | tokens | version | panel |",
        "|---|---|---|---|---|---|",
    ]
    for entry in CATALOGUE:
        panel = "full" if entry.wide else "default"
        description = inspect.getdoc(_documented_function(entry)) or ""
        code = description.split(":")[0] if description[1:2] == "-" else ""
        lines.append(
            f"| [`{entry.name}`](#{entry.name}) | {code} | {entry.level} | {entry.token_set} "
            f"| {entry.version} | {panel} |"
        )
    lines += [
        "",
        "## By code",
        "",
        "| quantity | function in `diagnostics` or command |",
        "|---|---|",
    ]
    lines += [f"| {quantity} | {sources} |" for quantity, sources in CODES]
    lines += ["", "## Metrics of a batch", ""]
    for entry in CATALOGUE:
        lines += _section(entry.name, _documented_function(entry))
    lines += ["## Metrics with arguments", ""]
    for maker in MAKERS:
        lines += _section(maker.__name__, maker)
    lines += ["## Metrics of two batches or prompts", ""]
    for function in (rescoring, own_prefix_gap, view_effect, view_copying):
        lines += _section(function.__name__, function)
    lines += [OTHER, *(f"| {names} | {description} |" for names, description in COLUMNS)]
    lines += ["", *_section("gradient_row", gradient_row)]
    lines += [HEADLINES, headline_tables(), ""]
    lines += [ALARMS, alarm_table()]
    return "\n".join(lines).rstrip() + "\n"


def _documented_function(entry: Entry) -> Callable[..., object]:
    makers = {maker.__name__: maker for maker in MAKERS}
    return makers.get(entry.name, entry.metric)


def _section(name: str, function: Callable[..., object]) -> list[str]:
    parameters = ", ".join(inspect.signature(function).parameters)
    signature = f"`{function.__module__}.{name}({parameters})`"
    description = (inspect.getdoc(function) or "").replace(_BATCH_ONLY, "")
    return [f"### {name}", "", signature, "", "```text", description, "```", ""]


if __name__ == "__main__":
    print(page(), end="")
