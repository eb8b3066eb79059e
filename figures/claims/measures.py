"""How a claim of the paper is measured from the recorded tables, and the verdict on it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.errors import InvalidInput
from figures.collect.paired import accuracy, difference, last, outcomes
from figures.collect.steps import over_seeds
from figures.registry import read_table

AGREES, DIFFERS, OPEN, UNTESTED = "agrees", "differs", "undecided", "not testable here"
MARGIN = 0.05
"""Accuracies within it are alike."""


@dataclass(frozen=True)
class ClaimResult:
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
            self._read[name] = read_table(path)
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
            raise InvalidInput(f"{name}: {where} selects {len(table)} rows, expected 1")
        return tuple(float(table[c].iloc[0]) for c in ("value", "low", "high"))  # type: ignore[return-value]

    def final(self, group: str, task: str = "") -> pd.DataFrame:
        """The last evaluation of every run of a group and task."""
        table = self["paper_evaluations"].fillna({"task": ""})
        return last(table[(table["group"] == group) & (table["task"] == task)])


Measure = Callable[[Tables], ClaimResult]
Verdict = Callable[[float, float], str]
"""Of the ends of an interval."""


def sign(low: float, high: float) -> str:
    """Of a difference that a claim says is positive."""
    return AGREES if low > 0 else DIFFERS if high < 0 else OPEN


def likeness(low: float, high: float) -> str:
    """Of a difference that a claim says is none: by MARGIN."""
    within, beyond = low > -MARGIN and high < MARGIN, low > MARGIN or high < -MARGIN
    return AGREES if within else DIFFERS if beyond else OPEN


def shown(value: float, low: float, high: float) -> str:
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def signed(value: float, low: float, high: float) -> str:
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def share_of(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def compared(ours: pd.DataFrame, theirs: pd.DataFrame, verdict: Verdict) -> ClaimResult:
    """Of (seeds, problems) outcomes."""
    cells = [share_of(*accuracy(x.to_numpy(float))) for x in (ours, theirs)]
    away = difference(ours, theirs)
    ends = (away["low"], away["high"])
    text = f"{cells[0]} against {cells[1]}: {signed(away['value'], *ends)}, "
    return ClaimResult(text + f"{away['seeds']:.0f} seeds", verdict(*ends))


def better(
    ours: str, theirs: str, group: str = "single", task: str = "", verdict: Verdict = sign
) -> Measure:
    """The claim that one method ends with a higher held-out accuracy than another."""

    def measure(tables: Tables) -> ClaimResult:
        final = tables.final(group, task)
        return compared(outcomes(final, ours), outcomes(final, theirs), verdict)

    return measure


def alike(ours: str, theirs: str, group: str = "single", task: str = "") -> Measure:
    """The claim that two methods end within MARGIN of each other."""
    return better(ours, theirs, group, task, likeness)


def gain(method: str, up: bool, group: str = "single", task: str = "") -> Measure:
    """The claim that a student is better, or worse, after training than before."""

    def measure(tables: Tables) -> ClaimResult:
        table = tables["paper_evaluations"].fillna({"task": ""})
        mine = table[(table["group"] == group) & (table["task"] == task)]
        before = outcomes(mine[mine["step"] == 0], method)
        both = (outcomes(last(mine), method), before)
        return compared(*(both if up else both[::-1]), sign)

    return measure


def agents(ours: str, theirs: str = "", group: str = "games", task: str = "rooms") -> Measure:
    """The claim that an agent ends with more held-out games than another, or than it began with."""

    def measure(tables: Tables) -> ClaimResult:
        table = tables["agents"]
        mine = table[(table["where"] == "held out") & (table["group"] == group)]
        mine = mine[mine["task"] == task]
        first, final = mine[mine["step"] == 0], last(mine)
        other = outcomes(final, theirs) if theirs else outcomes(first, ours)
        return compared(outcomes(final, ours), other, sign)

    return measure


def smaller(
    column: str,
    ours: str,
    theirs: str,
    group: str = "single",
    task: str = "",
    verdict: Verdict = sign,
    steps: int | None = 10,
    sense: int = 1,
) -> Measure:
    """The claim that a column is smaller for one method: its mean over the last steps, or all.

    sense: -1 for larger.
    """

    def measure(tables: Tables) -> ClaimResult:
        table = tables["paper_steps"].fillna({"task": ""}).dropna(subset=[column])
        table = table[(table["group"] == group) & (table["task"] == task)]
        means = []
        for method in (ours, theirs):
            mine = table[table["method"] == method]
            late = mine[mine["step"] > mine["step"].max() - (steps or len(mine))]
            means.append(late.groupby("seed")[column].mean())
        return apart(means[0], means[1], verdict, sense)

    return measure


def larger(column: str, ours: str, theirs: str, group: str = "single", task: str = "") -> Measure:
    """The claim that the mean of a column over all steps is larger for one method."""
    return smaller(column, ours, theirs, group, task, steps=None, sense=-1)


def apart(ours: pd.Series, theirs: pd.Series, verdict: Verdict, sense: int = 1) -> ClaimResult:
    """Of means by seed: that ours are smaller, or with a sense of -1 larger."""
    away = sense * (theirs - ours).dropna()
    both = pd.DataFrame({"step": 0, "seed": away.index, "away": away.to_numpy()})
    at = over_seeds(both, "away").iloc[0]
    text = (
        f"{ours.mean():.3g} against {theirs.mean():.3g}: {'smaller' if sense > 0 else 'larger'} by "
        f"{shown(at['value'], at['low'], at['high'])}, {at['seeds']:.0f} seeds"
    )
    return ClaimResult(text, verdict(at["low"], at["high"]))


def study(name: str, text: str, verdict: Callable[..., str], **where: Any) -> Measure:
    """A claim about one row of a table of the exact study."""

    def measure(tables: Tables) -> ClaimResult:
        at = tables.row(name, **where)
        return ClaimResult(text.format(shown(*at)), verdict(*at))

    return measure


def share(kind: str, text: str, verdict: Callable[..., str]) -> Measure:
    """A claim about one share of the scatter's tokens."""

    def measure(tables: Tables) -> ClaimResult:
        at = tables["scatter"].set_index("kind").loc[kind, ["share", "low", "high"]]
        return ClaimResult(text.format(shown(*map(float, at))), verdict(*map(float, at)))

    return measure


def untested(why: str) -> Measure:
    return lambda _: ClaimResult(why, UNTESTED)


def special(tables: Tables) -> ClaimResult:
    table = tables["segmentation"]
    table = table[table["teacher"] < -3]
    parts = [f"{r.text} {r.student:.2f} and {r.teacher:.1f}" for r in table.itertuples()]
    found = bool((table["student"] > -0.1).any())
    text = f"student and teacher: {'; '.join(parts)} (the models are made to write so)"
    return ClaimResult(text, AGREES if found else DIFFERS)


def widening(method: str) -> Measure:
    """The 1 % quantile of the gap in the last position bin lies below that of the second.

    The second: the first holds the neighbourhood of the tag.
    """

    def measure(tables: Tables) -> ClaimResult:
        table = tables["gap"]
        table = table[(table["method"] == method) & (table["quantile"] == 0.01)]
        table = table[table["step"] == table["step"].max()].sort_values("first")
        first, end = table.iloc[1], table.iloc[-1]
        text = (
            f"1 % quantile at positions {first['first']:.0f} to {first['last']:.0f}: "
            f"{shown(first['value'], first['low'], first['high'])}, at {end['first']:.0f} to "
            f"{end['last']:.0f}: {shown(end['value'], end['low'], end['high'])} nats (step "
            f"{end['step']:.0f})"
        )
        below, above = end["high"] < first["low"], end["low"] > first["high"]
        return ClaimResult(text, AGREES if below else DIFFERS if above else OPEN)

    return measure


def looping(tables: Tables) -> ClaimResult:
    inside = tables["loop"].query("repeated")
    text = (
        f"in the repeated part of one rollout the teacher's median probability is "
        f"{inside['teacher'].median():.3f}; {(inside['teacher'] < 0.5).mean():.0%} of its tokens "
        "are below 0.5"
    )
    return ClaimResult(text, AGREES if inside["teacher"].median() > 0.9 else DIFFERS)


def unpunished(tables: Tables) -> ClaimResult:
    """Repeated tokens cost less than others: the last ten steps of sampled tokens, by seed."""
    table = tables["paper_steps"]
    mine = table[(table["group"] == "single") & (table["method"] == "sampled")]
    mine = mine.dropna(subset=["repeated_cost", "regular_cost"])
    late = mine[mine["step"] > mine["step"].max() - 10].groupby("seed")
    found = apart(late["repeated_cost"].mean(), late["regular_cost"].mean(), sign)
    return ClaimResult(
        f"log p - log q of repeated and other tokens: {found.measured}", found.verdict
    )


def below(tables: Tables) -> ClaimResult:
    at = tables["scatter"].set_index("kind").loc["below the line", ["share", "low", "high"]]
    table = tables["paper_steps"]
    first = table[(table["method"] == "sampled") & (table["step"] == 0)]
    null = first["negative_null"].mean()
    text = f"{share_of(*map(float, at))} of the sampled tokens; the two models imply {null:.3f}"
    return ClaimResult(text, sign(float(at["low"]) - 0.5, float(at["high"]) - 0.5))


def explosion(tables: Tables) -> ClaimResult:
    """Entropy of the un-normalised objective: its last step over its first, by seed."""
    table = tables["paper_steps"].dropna(subset=["entropy"])
    mine = table[(table["group"] == "single") & (table["method"] == "lsm_unnormalised")]
    by = mine.pivot_table(index="step", columns="seed", values="entropy")
    ratio = (by.iloc[-1] / by.iloc[0]).rename("entropy").reset_index().assign(step=0)
    at = over_seeds(ratio, "entropy", log=True).iloc[0]
    text = f"entropy grows {shown(at['value'], at['low'], at['high'])} times"
    return ClaimResult(text, sign(at["low"] - 1, at["high"] - 1))


def vanishing(tables: Tables) -> ClaimResult:
    """Score of the un-normalised objective on its own rollouts at the last step."""
    table = tables["paper_steps"].dropna(subset=["reward"])
    mine = table[(table["group"] == "single") & (table["method"] == "lsm_unnormalised")]
    scores = over_seeds(mine, "reward")
    end = scores.iloc[-1]
    text = f"{scores['value'].max():.3g} at its best, {end['value']:.3g} at step {end['step']:.0f}"
    return ClaimResult(text, AGREES if end["value"] < MARGIN < scores["value"].max() else DIFFERS)


def doubt(tables: Tables) -> ClaimResult:
    """The teacher's doubt on the untrained student's text against its own, longest positions."""
    table = tables["fan"].query("method == 'sampled' and quantity == 'doubt'")
    table = table[table["first"] == table["first"].max()].set_index("source")
    own, text = (table.loc[name, ["value", "low", "high"]] for name in ("teacher", "student"))
    at = table["first"].iloc[0], table["last"].iloc[0]
    words = (
        f"doubt 1 - max q at positions {at[0]} to {at[1]}: {shown(*map(float, own))} on its own "
        f"text, {shown(*map(float, text))} on the student's"
    )
    over, under = text["low"] > own["high"], text["high"] < own["low"]
    return ClaimResult(words, AGREES if over else DIFFERS if under else OPEN)


def toy(quantity: str, text: str, verdict: Callable[..., str], gamma: float = 1.0) -> Measure:
    """A claim about the left task of the toy; the right one is its mirror image."""
    where = {"variant": "default", "quantity": quantity, "gamma": gamma, "task": "left"}
    return study("toy", text, verdict, **where)
