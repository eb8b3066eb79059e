"""The paper's claims beside our measurements, from the recorded tables: `opd figures claims`.

A claim is what arXiv 2603.25562 says or shows; its measurement is read from a table in figures/data
when this is run, and so is the verdict: no number here is typed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from figures.paired import accuracy, difference, last, outcomes
from figures.steps import over_seeds

AGREES, DIFFERS, OPEN, UNTESTED = "agrees", "differs", "undecided", "not testable here"
MARGIN = 0.05
"""Accuracies within it are alike."""


@dataclass(frozen=True)
class Finding:
    """What was measured, in words, and what that says of a claim."""

    measured: str
    verdict: str


class Tables:
    """The recorded tables, each read once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._read = folder, dict[str, pd.DataFrame]()

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._read:
            path = self.folder / f"{name}.csv"
            self._read[name] = pd.read_csv(path, dtype={"outcomes": str})
        return self._read[name]

    def row(self, name: str, **where: Any) -> tuple[float, float, float]:
        """(value, low, high) of the one row of a study's table with these values.

        Raises:
          ValueError: not exactly one row.
        """
        table = self[name]
        for column, value in where.items():
            table = table[table[column] == value]
        if len(table) != 1:
            raise ValueError(f"{name}: {where} selects {len(table)} rows, expected 1")
        return tuple(float(table[c].iloc[0]) for c in ("value", "low", "high"))  # type: ignore[return-value]

    def final(self, group: str, task: str = "") -> pd.DataFrame:
        """The last evaluation of every run of a group and task."""
        table = self["paper_evaluations"].fillna({"task": ""})
        return last(table[(table["group"] == group) & (table["task"] == task)])


Measure = Callable[[Tables], Finding]


@dataclass(frozen=True)
class Claim:
    """A claim, where the paper makes it, the figure beside it here, and how it is measured."""

    text: str
    where: str
    figure: str
    measure: Measure


def sign(low: float, high: float) -> str:
    """Of a difference that a claim says is positive."""
    return AGREES if low > 0 else DIFFERS if high < 0 else OPEN


def shown(value: float, low: float, high: float) -> str:
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def better(ours: str, theirs: str, group: str = "single", task: str = "") -> Measure:
    """The claim that one method ends with a higher held-out accuracy than another."""

    def measure(tables: Tables) -> Finding:
        final = tables.final(group, task)
        both = [outcomes(final, method) for method in (ours, theirs)]
        cells = [shown(*accuracy(x.to_numpy(float))) for x in both]
        away = difference(*both)
        text = (
            f"{cells[0]} against {cells[1]}; difference "
            f"{shown(away['value'], away['low'], away['high'])}, {away['seeds']:.0f} seeds"
        )
        return Finding(text, sign(away["low"], away["high"]))

    return measure


def alike(ours: str, theirs: str, group: str = "single", task: str = "") -> Measure:
    """The claim that two methods end within MARGIN of each other."""

    def measure(tables: Tables) -> Finding:
        found = better(ours, theirs, group, task)(tables)
        final = tables.final(group, task)
        away = difference(*(outcomes(final, method) for method in (ours, theirs)))
        within = away["low"] > -MARGIN and away["high"] < MARGIN
        beyond = away["low"] > MARGIN or away["high"] < -MARGIN
        return Finding(found.measured, AGREES if within else DIFFERS if beyond else OPEN)

    return measure


def smaller(column: str, ours: str, theirs: str, group: str = "single") -> Measure:
    """The claim that a column is smaller for one method, by the mean of the last ten steps."""

    def measure(tables: Tables) -> Finding:
        table = tables["paper_steps"]
        table = table[table["group"] == group]
        means = []
        for method in (ours, theirs):
            mine = table[table["method"] == method]
            late = mine[mine["step"] > mine["step"].max() - 10]
            means.append(late.groupby("seed")[column].mean())
        away = (means[1] - means[0]).dropna()
        both = pd.DataFrame({"step": 0, "seed": away.index, column: away.to_numpy()})
        at = over_seeds(both, column).iloc[0]
        text = (
            f"{means[0].mean():.3g} against {means[1].mean():.3g}; smaller by "
            f"{shown(at['value'], at['low'], at['high'])}, {at['seeds']:.0f} seeds"
        )
        return Finding(text, sign(at["low"], at["high"]))

    return measure


def study(name: str, text: str, verdict: Callable[..., str], **where: Any) -> Measure:
    """A claim about one row of a table of the exact study."""

    def measure(tables: Tables) -> Finding:
        at = tables.row(name, **where)
        return Finding(text.format(shown(*at)), verdict(*at))

    return measure


def share(kind: str, text: str, verdict: Callable[..., str]) -> Measure:
    """A claim about one share of the scatter's tokens."""

    def measure(tables: Tables) -> Finding:
        at = tables["scatter"].set_index("kind").loc[kind, ["share", "low", "high"]]
        return Finding(text.format(shown(*map(float, at))), verdict(*map(float, at)))

    return measure


def untested(why: str) -> Measure:
    return lambda _: Finding(why, UNTESTED)


def special(tables: Tables) -> Finding:
    table = tables["segmentation"]
    table = table[table["teacher"] < -3]
    parts = [f"{r.text}: {r.student:.2f} and {r.teacher:.1f}" for r in table.itertuples()]
    found = bool((table["student"] > -0.1).any())
    return Finding("; ".join(parts), AGREES if found else DIFFERS)


def widening(tables: Tables) -> Finding:
    """The 1 % quantile of the gap in the last position bin against the first, sampled tokens."""
    table = tables["gap"]
    table = table[(table["method"] == "sampled_mask") & (table["quantile"] == 0.01)]
    table = table[table["step"] == table["step"].max()].sort_values("first")
    first, end = table.iloc[1], table.iloc[-1]  # the first bin holds the tag's neighbourhood
    text = (
        f"1 % quantile at positions {first['first']:.0f} to {first['last']:.0f}: "
        f"{shown(first['value'], first['low'], first['high'])}, at {end['first']:.0f} to "
        f"{end['last']:.0f}: {shown(end['value'], end['low'], end['high'])} nats (step "
        f"{end['step']:.0f}, masked)"
    )
    apart = end["high"] < first["low"]
    return Finding(text, AGREES if apart else DIFFERS if end["low"] > first["high"] else OPEN)


def looping(tables: Tables) -> Finding:
    table = tables["loop"]
    inside = table[table["repeated"]]
    text = (
        f"in the repeated part of one rollout the teacher's median probability is "
        f"{inside['teacher'].median():.3f}; {(inside['teacher'] < 0.5).mean():.0%} of its tokens "
        "are below 0.5"
    )
    return Finding(text, AGREES if inside["teacher"].median() > 0.9 else DIFFERS)


def below(tables: Tables) -> Finding:
    at = tables["scatter"].set_index("kind").loc["below the line", ["share", "low", "high"]]
    table = tables["paper_steps"]
    first = table[(table["method"] == "sampled") & (table["step"] == 0)]
    null = first["negative_null"].mean()
    text = f"{shown(*map(float, at))} of the sampled tokens; the two models imply {null:.3f}"
    return Finding(text, sign(float(at["low"]) - 0.5, float(at["high"]) - 0.5))


def collapse(tables: Tables) -> Finding:
    """Un-normalised against renormalised: accuracy, and entropy over its start."""
    found = better("lsm", "lsm_unnormalised")(tables)
    table = tables["paper_steps"]
    mine = table[(table["group"] == "single") & (table["method"] == "lsm_unnormalised")]
    mean = over_seeds(mine, "entropy", log=True)
    grown = mean["value"].iloc[-1] / mean["value"].iloc[0]
    return Finding(f"{found.measured}; its entropy grows {grown:.3g} times", found.verdict)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "The variance of the sequence-level gradient is O(T^4), of the token-level one O(T^2)",
        "1.2, appendix D",
        "horizon",
        study(
            "horizon",
            "upper bounds, true and not tight: T^3 is attained and never exceeded (proof in the "
            "study); exponent at T = 512 with gamma 1: {}",
            lambda value, low, high: AGREES if high < 4 else DIFFERS,
            quantity="last_slope",
            world="mixing",
            estimator="plain",
            gamma=1.0,
        ),
    ),
    Claim(
        "Larger gamma has one to several orders more gradient variance in the toy",
        "figure 1a",
        "toy",
        study(
            "toy",
            "the published metric, gamma 1 over gamma 0, on each one's own path: {} times",
            lambda value, low, high: sign(low - 10, high - 10),
            variant="default",
            task="left",
            quantity="published_ratio",
            gamma=1.0,
        ),
    ),
    Claim(
        "That difference is the estimators'",
        "figure 1a",
        "toy",
        study(
            "toy",
            "at equal policies, without the metric's confound: {} times",
            lambda value, low, high: sign(low - 10, high - 10),
            variant="default",
            task="left",
            quantity="equal_ratio",
            gamma=1.0,
        ),
    ),
    Claim(
        "gamma = 1 drifts away from the target in the toy",
        "figure 1b",
        "toy",
        study(
            "toy",
            "final distance to the target with gamma 1 (the step is 1): {}",
            lambda value, low, high: sign(low - 1, high - 1),
            variant="default",
            task="left",
            quantity="distance",
            gamma=1.0,
        ),
    ),
    Claim("Most sampled tokens lie below the diagonal", "figure 2", "scatter", below),
    Claim(
        "The upward signal sits on a small set of tokens",
        "3.1",
        "scatter",
        share(
            "top 1 %, of the upward signal",
            "its largest 1 % hold {} of it (all alike would hold 0.01)",
            lambda value, low, high: sign(low - 0.1, high - 0.1),
        ),
    ),
    Claim("The teacher does not penalise a loop", "figure 3", "loop", looping),
    Claim("The lower tail of the gap widens with the position", "figure 4", "gap", widening),
    Claim(
        "Another segmentation of a tag and another end give log-probabilities of -19 and -59",
        "figure 5",
        "segmentation",
        special,
    ),
    Claim(
        "Such tokens dominate the signal",
        "3.3",
        "scatter",
        share(
            "impossible, of the signal",
            "{} of the sum of |log q - log p|",
            lambda value, low, high: sign(low - 0.5, high - 0.5),
        ),
    ),
    Claim(
        "Local support matching beats sampled tokens, no mask",
        "table 1",
        "comparison",
        better("lsm", "sampled"),
    ),
    Claim(
        "A mask of special tokens helps sampled tokens",
        "table 1",
        "comparison",
        better("sampled_mask", "sampled"),
    ),
    Claim(
        "It is nearly neutral for local support (41.5 against 41.7)",
        "table 1",
        "comparison",
        alike("lsm_mask", "lsm"),
    ),
    Claim(
        "Local support without a mask beats sampled tokens with one (41.7 against 40.7)",
        "table 1",
        "comparison",
        better("lsm", "sampled_mask"),
    ),
    Claim(
        "Nucleus rollouts help sampled tokens (21.6 against 20.4), with a mask here",
        "table 3",
        "comparison",
        better("sampled_mask_top_p", "sampled_mask"),
    ),
    Claim(
        "Nucleus rollouts help local support (23.6 against 17.7)",
        "table 3",
        "comparison",
        better("lsm", "lsm_whole"),
    ),
    Claim(
        "Without renormalisation the entropy explodes and the score falls to 0 in 30 steps",
        "figure 6a",
        "ablations",
        collapse,
    ),
    Claim(
        "A small K is worse (16 against 32; here 2 against 8)",
        "figure 6b",
        "ablations",
        better("lsm", "lsm_k2"),
    ),
    Claim(
        "A moderate K is as good as a large one (32 against 48; here 4 against 8)",
        "figure 6b",
        "ablations",
        alike("lsm", "lsm_k4"),
    ),
    Claim(
        "top-p 0.8 is as good as 0.9",
        "figure 6c",
        "ablations",
        alike("lsm", "lsm_top_p_0.8"),
    ),
    Claim(
        "Local support has the smaller gradient norm",
        "figure A6",
        "dynamics",
        smaller("grad_norm", "lsm", "sampled"),
    ),
    Claim(
        "Local support has fewer responses cut at the budget",
        "figure A6",
        "dynamics",
        smaller("truncated", "lsm", "sampled"),
    ),
    Claim(
        "The mask lowers the share of cut responses of sampled tokens",
        "figure A6",
        "dynamics",
        smaller("truncated", "sampled_mask", "sampled"),
    ),
    Claim(
        "Local support ends nearer to the teacher on sampled tokens (mean gap)",
        "figure A6",
        "dynamics",
        smaller("cost", "lsm", "sampled"),
    ),
    Claim(
        "The support variants are alike on one task: V2 (41.9 against 41.7)",
        "table 4",
        "comparison",
        alike("v2_student_and_sampled", "lsm"),
    ),
    Claim("V3 as well (42.9)", "table 4", "comparison", alike("v3_teacher_and_sampled", "lsm")),
    Claim("V4 as well (41.2)", "table 4", "comparison", alike("v4_student_tail", "lsm")),
    Claim("V5 is behind (38.1)", "table 4", "comparison", better("lsm", "v5_teacher_tail")),
    Claim(
        "On two tasks local support beats sampled tokens on the first task",
        "table 2",
        "comparison",
        better("lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "and on the second (95.3 against 90.6)",
        "table 2",
        "comparison",
        better("lsm", "sampled", "multi", "sort"),
    ),
    Claim(
        "On two tasks V2 falls behind V1 on the first task (the paper has no explanation)",
        "table 4b",
        "comparison",
        better("lsm", "v2_student_and_sampled", "multi", "chain"),
    ),
    Claim(
        "and so does V3",
        "table 4b",
        "comparison",
        better("lsm", "v3_teacher_and_sampled", "multi", "chain"),
    ),
    Claim(
        "What V3 lacks is the mask: the sampled special token comes back into the support (ours)",
        "none",
        "comparison",
        better("v3_teacher_and_sampled_mask", "v3_teacher_and_sampled"),
    ),
    Claim(
        "A mask of sampled tokens does not mask the student's top-K: V2 with a mask stays behind "
        "V1 with one (ours)",
        "none",
        "comparison",
        better("lsm_mask", "v2_student_and_sampled_mask"),
    ),
    Claim(
        "Scores of 7B students on MATH500, AIME, Minerva, OlympiadBench, ALFWorld, WebShop",
        "tables 1 to 4, A2",
        "",
        untested("no such models, data or machines; `opd train paper-math` has the settings"),
    ),
    Claim(
        "Loops of filler words and gibberish late in training",
        "figures A7 to A9",
        "",
        untested("the models here have no words; `opd report RUN` shows rollouts token by token"),
    ),
)


def written(folder: Path, claims: Iterable[Claim] = CLAIMS) -> str:
    """docs/claims.md: a table of all claims, and how often they agree."""
    tables, found = Tables(folder), []
    for claim in claims:
        found.append((claim, claim.measure(tables)))
    counts = {v: sum(f.verdict == v for _, f in found) for v in (AGREES, DIFFERS, OPEN, UNTESTED)}
    lines = [
        "# The paper's claims and our measurements",
        "",
        "Generated by `opd figures claims` from the recorded tables. Brackets: 95 % intervals. "
        "A claim of a difference agrees or differs where its interval leaves out 0, of likeness "
        f"where it lies within or beyond {MARGIN:g}, and is undecided elsewhere. Models and tasks "
        "are those of `opd lab --strangers` (`opd paper` trains them), or the exact study: a claim "
        "that agrees holds there, and one that differs is not refuted for the paper's models.",
        "",
        ", ".join(f"{verdict}: {n}" for verdict, n in counts.items()) + ".",
        "",
        "| claim | in the paper | measured here | verdict | figure |",
        "|---|---|---|---|---|",
    ]
    for claim, finding in found:
        link = f"[{claim.figure}](../figures/shown/{claim.figure}.png)" if claim.figure else ""
        cells = (claim.text, claim.where, finding.measured, finding.verdict, link)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
