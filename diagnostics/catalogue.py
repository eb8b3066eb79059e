"""Every metric there is, with its version, and the page that describes them.

`python -m diagnostics.catalogue > docs/metrics.md` writes the page anew.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diagnostics.anatomy import agreement, kl_anatomy
from diagnostics.batch import Scored
from diagnostics.blame import confident_impossible, coverage, impossible_table, token_table
from diagnostics.collapse import length, length_incentive, length_quantiles, reward
from diagnostics.control import own_prefix_gap
from diagnostics.diversity import branching, distinct, second_try
from diagnostics.drift import (
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
from diagnostics.ends import endings
from diagnostics.groups import by, without
from diagnostics.lists import nested_outside, overlap, tail_share, top_uncertainty
from diagnostics.noise import baseline_noise, gradient_noise
from diagnostics.repetition import compression, repetition
from diagnostics.supervision import (
    action_dependence,
    energy_concentration,
    sign_null,
    sign_shares,
    signal_concentration,
    signed_concentration,
)
from diagnostics.teachability import compatibility, quadrants, teachability
from diagnostics.totals import Total
from diagnostics.validity import (
    martingales,
    rescoring,
    sampler_ratio,
    sampler_weights,
    staleness,
)

Metric = Callable[[Scored], dict[str, Total]]


@dataclass(frozen=True)
class Entry:
    """A metric, the version of its definition, and what it needs at least.

    version: rises when a number of the same name changes its meaning; numbers of different
      versions are not to be compared. level: L0 sampled log-probabilities, L1 a top-K support, L2
      exact functionals (some of a metric's numbers may need more; then it is the least). wide:
      many numbers or much work, so it is left out of the default panel.
    """

    metric: Metric
    level: str
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
    Entry(sign_null, "L2"),
    Entry(signal_concentration, "L0"),
    Entry(signed_concentration, "L0"),
    Entry(energy_concentration, "L2"),
    Entry(repetition, "L0"),
    Entry(tail_share, "L1"),
    Entry(action_dependence, "L2"),
    Entry(teachability, "L2", wide=True),
    Entry(quadrants, "L2", wide=True),
    Entry(compatibility, "L1", wide=True),
    Entry(sampled_divergence, "L0"),
    Entry(exact_divergence, "L2"),
    Entry(teacher_rank, "L2"),
    Entry(rank_quantiles, "L2", wide=True),
    Entry(support_mass, "L1"),
    Entry(nested_outside, "L1", wide=True),
    Entry(overlap, "L1"),
    Entry(kl_anatomy, "L1"),
    Entry(uncertainty, "L2"),
    Entry(top_uncertainty, "L1", wide=True),
    Entry(ratio_quantiles, "L0", wide=True),
    Entry(prefix_weights, "L0", wide=True),
    Entry(cost_by_tenth, "L0", wide=True),
    Entry(entropy_by_tenth, "L2", wide=True),
    Entry(_named(agreement(), "agreement"), "L2", wide=True),
    Entry(tokens_by_position, "L0"),
    Entry(confident_impossible, "L0"),
    Entry(endings, "L2"),
    Entry(length, "L0"),
    Entry(length_quantiles, "L0"),
    Entry(length_incentive, "L0"),
    Entry(reward, "L0"),
    Entry(distinct, "L0", wide=True),
    Entry(second_try, "L0"),
    Entry(branching, "L2", wide=True),
    Entry(gradient_noise, "L2"),
    Entry(baseline_noise, "L2"),
    Entry(martingales, "L2"),
    Entry(sampler_ratio, "L0"),
    Entry(sampler_weights, "L0", wide=True),
    Entry(staleness, "L0", wide=True),
)
"""Everything that needs no argument, at its default where it takes some."""

MAKERS = (token_table, impossible_table, coverage, agreement, compression, by, without)
"""What makes a metric from arguments: a vocabulary, ids, a decoder, a threshold, groups."""

FULL: Mapping[str, Metric] = {e.name: e.metric for e in CATALOGUE}
PANEL: Mapping[str, Metric] = {e.name: e.metric for e in CATALOGUE if not e.wide}

HEADER = """# Metrics

*Written by `python -m diagnostics.catalogue > docs/metrics.md` from the docstrings.*

p is the student, q the teacher, y the sampled token, r = log p(y) - log q(y) its cost, m the mask;
all logarithms are natural, all distributions at the temperature of the loss. Access levels: L0
log-probabilities of the sampled tokens, L1 a top-K support as well, L2 exact functionals of both
whole distributions. Cost: O(tokens) at L0, O(tokens K) at L1; at L2 the functionals are made where
the logits are, O(tokens V) once for all metrics. Suffixes: `_se` a standard error over prompts,
`@lo-hi` a bin of response positions, `%lo-hi` a tenth of the response. The *default* panel is
`diagnostics.monitor.PANEL`; `diagnostics.catalogue.FULL` holds all.
"""


def page() -> str:
    """The page in Markdown: a table of all metrics, then each one's description."""
    lines = [HEADER, "| metric | codes | needs | version | panel |", "|---|---|---|---|---|"]
    for e in CATALOGUE:
        panel = "full" if e.wide else "default"
        text = inspect.getdoc(_described(e)) or ""
        code = text.split(":")[0] if text[1:2] == "-" else ""
        lines.append(f"| [`{e.name}`](#{e.name}) | {code} | {e.level} | {e.version} | {panel} |")
    lines += ["", "## Metrics of a batch", ""]
    for e in CATALOGUE:
        lines += _section(e.name, _described(e))
    lines += ["## Metrics with arguments", ""]
    for maker in MAKERS:
        lines += _section(maker.__name__, maker)
    lines += ["## Of two batches", ""]
    for function in (rescoring, own_prefix_gap):
        lines += _section(function.__name__, function)
    return "\n".join(lines).rstrip() + "\n"


def _described(entry: Entry) -> Callable[..., object]:
    makers = {maker.__name__: maker for maker in MAKERS}
    return makers.get(entry.name, entry.metric)


def _section(name: str, function: Callable[..., object]) -> list[str]:
    where = f"`{function.__module__}.{name}({', '.join(inspect.signature(function).parameters)})`"
    return [f"### {name}", "", where, "", "```text", inspect.getdoc(function) or "", "```", ""]


if __name__ == "__main__":
    print(page(), end="")
