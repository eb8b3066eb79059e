"""The page on top-K supports: what each form of the reverse KL estimates, and when it collapses.

Rendered from docs/audits.json and the recorded table of `opd study run tail`.
"""

import csv
import json
from typing import Any

from diagnostics.io.recorded_data import recorded_data
from docs.generate.attributes import table
from docs.generate.audit_targets import PROPOSALS
from docs.generate.audits import RECORD

FORMS = {
    "unnormalised": ("un-normalised", "Σ_S p log(p/q)"),
    "": ("renormalised", "Σ_S p′ log(p′/q′), p′ = p/p(S), q′ = q/q(S)"),
    "bucket": ("tail bucket", "Σ_S p log(p/q) + (1−p(S)) log((1−p(S))/(1−q(S)))"),
    "stopped": ("stop-gradient head", "Σ_S p sg[log(p/q)]"),
    "sampled_tail": ("sampled tail", "stop-gradient head + 1[y∉S] sg[log(p(y)/q(y))] log p(y)"),
    "published_tail": (
        "published tail",
        "un-normalised head + 1[y∉S] sg[log(p(y)/q(y))] log p(y)",
    ),
}
"""Suffix of an objective's name -> its name in words, and the loss of a prefix."""

START = """# Reverse KL on a top-K: when it collapses

*Generated from `docs/audits.json` and `figures/data/tail.csv` by `python -m docs.generate`.*

Trainers that distil on K tokens of the teacher or the student disagree in public: one side sees
the student collapse under a reverse KL on the top-K, another trains with it for thousands of
steps. Both are right. The un-normalised loss on the teacher's support S has its minimum at
p(S) = q(S)/e, not at the teacher, for every K. On the student's own top-K it leaves the teacher
at the same pace, and S changes on the way. How soon that shows depends on one number, the mass
1 − q(S) that the support leaves out: where it leaves out 0.3, half of the collapse takes {first}
updates of a prefix, where it leaves out a thousandth, {last}.

p is the student, q the teacher, sg[·] a stop-gradient, y the sampled token.

## Why

Differentiate Σ_S p log(p/q) by the student's logits at p = q. The term p ∇log p/q vanishes, and
what is left is the gradient of p(S) itself: descent lowers the mass of S although the student
equals its teacher. It goes on until log(p_v/q_v) + 1 = 0 for every v in S, so that p(S) = q(S)/e
and the tokens outside S have the rest. With full sums the same extra term is the gradient of Σ p
= 1, which is 0.

At p = q that gradient is p_v (1[v∈S] − p(S)), of the order of 1 − q(S). This is the condition
that separates the two experiences: **learning rate × updates of a prefix × (1 − q(S))**. Measured
below, half of the collapse has happened when this product is {low:.1f} to {high:.1f} (plain
descent on free logits).
"""

FORMS_TEXT = """## What each form estimates

One audit a row (`opd audit ours:NAME`, K = 2 of 4 to 6 tokens). "Mean at the teacher" is the mean
gradient at teacher = student, relative to that at the start; "mass at rest" is log p(S)/q(S)
where descent ends, on the teacher's own top-K: −1 is q(S)/e.
"""

TIMES_TEXT = """## How soon

`opd study run tail` descends from a student that equals its teacher, K = 4 of 32 tokens, learning
rate {rate:g}. Iterations until half of the collapse, median over {worlds} prefixes with 95 %
intervals:
"""

PROPOSALS_TEXT = """## The forms proposed for verl

verl 0.9 has no reverse KL on a top-K. A first draft (pull request 5041, January 2026) summed over
the union of both models' top-K, saw the student leave the support, and was taken out. A later
proposal (pull request 7806, September 2026) sums over the student's top-K and saw no collapse; the
function of verl under which it is registered cuts each position's sum at 0. The cut is the second
half of the answer: the gradient is 0 once the sum is negative, so that descent stops on the way
out. It never pulls a student back, and the teacher is still no place of rest. Written from the
public descriptions, `examples/verl/reverse_topk.py`, K = 2:
"""

END = """![p(S)/q(S) by iteration, and times of half a collapse](../figures/shown/tail.png)

A renormalised loss does not move the teacher, but does not see p(S) at all: from a distant
student it rests wherever p(S) happens to be ([collapse](../figures/shown/collapse.png), upper
right). A bucket for the tail, or a sampled tail, sees it and rests at the teacher.

## What to use

- Renormalise, and watch p(S): `divergence/topk_student_mass` in a run, with the alarm
  `mass_escapes`.
- Or add a bucket for the tail: exact for K + 1 events, blind to the shape of the tail.
- Or add the sampled tail: unbiased for the reverse KL over the whole vocabulary, on policy.
- A clip of the log-ratios does not help: the extra term is the gradient of p(S), whose factor is
  1.

## Repeat

    opd audit ours:teacher_topk_unnormalised
    opd audit examples/verl/reverse_topk.py:student_support_cut
    opd study run tail --update-figures
    opd study run collapse --update-figures
    python -m docs.generate.audits --record ours && python -m docs.generate topk

"""


def page() -> str:
    """Return the page in Markdown."""
    times = half_times()
    products = [RATE * float(row["value"]) * float(row["tail"]) for row in times]
    first, last = (f"{float(row['value']):,.0f}" for row in (times[0], times[-1]))
    lines = [START.format(low=min(products), high=max(products), first=first, last=last)]
    lines += [FORMS_TEXT, *form_table(), ""]
    lines += [PROPOSALS_TEXT, *proposal_table(), ""]
    lines += [TIMES_TEXT.format(rate=RATE, worlds=times[0]["worlds"]), *time_table(times), ""]
    lines.append(END.rstrip())
    return "\n".join(lines) + "\n"


RATE = 2.0
"""Learning rate of the recorded study, `synthetic.experiments.tail.RATE`."""


def form_table() -> list[str]:
    """Return the table of forms and supports."""
    rows = {row["loss"]: row for row in json.loads(RECORD.read_text())["ours"]["rows"]}
    cells = []
    for suffix, (words, formula) in FORMS.items():
        for source in ("teacher", "student"):
            name = f"{source}_topk{'_' if suffix else ''}{suffix}"
            cells.append(form_cells(name, words, formula, source, rows[name]))
    columns = (
        *("form", "loss of a prefix", "support", "estimates the gradient of"),
        *("mean at the teacher", "mass at rest", "faults"),
    )
    return table(columns, cells)


PROPOSED = {
    "union": ("union of both top-K", "no"),
    "union_cut": ("union of both top-K", "at 0"),
    "student_support": ("student's top-K", "no"),
    "student_support_cut": ("student's top-K", "at 0"),
}
"""Function -> its support, and where each position's sum is cut."""


def proposal_table() -> list[str]:
    """Return the table of the forms that were proposed for verl."""
    rows = {row["loss"]: row for row in json.loads(RECORD.read_text())[PROPOSALS]["rows"]}
    cells = []
    for name, (support, cut) in PROPOSED.items():
        rest = rows[name]["rest"]
        faults = ", ".join(f"`{code}`" for code in rows[name]["faults"])
        mass = f"{rest['student_mass']:.3f} of {rest['teacher_mass']:.3f}"
        mean = f"{rest['mean_at_teacher']:.2g}"
        cells.append((f"`{name}`", support, cut, mean, mass, faults))
    columns = (
        *("function", "support", "cut", "mean at the teacher"),
        *("student's mass on the teacher's top-K at rest, of the teacher's", "faults"),
    )
    return table(columns, cells)


def form_cells(
    name: str, words: str, formula: str, source: str, row: dict[str, Any]
) -> tuple[str, ...]:
    """Return the cells of one form and support.

    Args:
        name: Name of the objective.
        words: The form in words.
        formula: Its loss.
        source: Whose top-K the support is.
        row: Row of the record.

    Returns:
        Cells of `form_table`.
    """
    rest = row["rest"]
    return (
        f"{words} (`{name}`)",
        formula,
        source,
        f"`{row['target']['name']}`",
        f"{rest['mean_at_teacher']:.2g}",
        f"{rest['log_mass_ratio']:+.3f}",
        ", ".join(f"`{code}`" for code in row["faults"]),
    )


def half_times() -> list[dict[str, str]]:
    """Return the recorded times of half of the collapse, on the teacher's support."""
    with open(recorded_data() / "tail.csv", newline="") as file:
        return [
            row
            for row in csv.DictReader(file)
            if row["quantity"] == "half_time" and row["objective"] == "teacher_topk_unnormalised"
        ]


def time_table(times: list[dict[str, str]]) -> list[str]:
    """Return the table of times by the mass outside the support."""
    cells = [
        (
            row["tail"],
            f"{float(row['value']):,.0f} [{float(row['low']):,.0f}, {float(row['high']):,.0f}]",
            f"{RATE * float(row['value']) * float(row['tail']):.1f}",
        )
        for row in times
    ]
    return table(("1 − q(S)", "iterations", "rate × iterations × (1 − q(S))"), cells)
