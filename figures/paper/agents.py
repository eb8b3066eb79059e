"""An agent that plays a household in text, before and after distillation: games won, and how."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from diagnostics.records.run_folders import recorded_evaluations, recorded_rows
from figures import style
from figures.collect.paired import accuracy, difference, last, outcomes
from figures.collect.steps import about, over_seeds, rounded

COLUMNS = (
    *("group", "method", "seed", "step", "task", "where"),
    *("won", "turns", "inadmissible", "cost_1", "cost_2", "cost_4", "cost_8", "outcomes"),
)
CAPTION = (
    "Games of `env:household`, a household in text: 3 to 5 places, 1 or 2 things to be brought to "
    "one of them, at most 16 turns. Each turn is a sample, as in the paper. Above: the agent "
    "trained on games alone, and on games in turns with sorting digits, each task with a "
    "teacher of its own. Held-out games and digits are the same for all runs; bands and bars "
    "are 95 % intervals over seeds and games, or over seeds (turns, inadmissible actions, KL: "
    "Student's t). Dotted: the teacher of the games. Dashed: in turns with sorting. KL by "
    "turn is the mean of log p - log q over the student's own tokens at that turn, games "
    "alone, in the first five steps (hollow) and the last five. Student and teachers have 0.3 "
    "million weights and write alike; the student was taught by a player and a sorter who err "
    "once in ten. The paper's agents have 7B parameters and play ALFWorld, in turns with "
    "mathematics."
)
METHODS = {
    "sampled": ("sampled token", style.RED),
    "lsm": ("local support, top-p", style.SKY),
    "lsm_whole": ("local support", style.BLUE),
}
TEACHER = "teacher"
GROUPS = {"games": ("Games alone", "-"), "agents": ("Games and sorting", "--")}
GAMES, PROBLEMS = "rooms", "sort"
TURNS, ENDS = (1, 2, 4, 8), 5
HELD_OUT, ROLLOUTS = "held out", "rollouts"


def draw(table: pd.DataFrame) -> Figure:
    """Games and problems won along training; inadmissible actions, turns, KL by turn."""
    summary(table)  # refuses a table without any of it
    figure, axes = style.panels(2, 3, 4.6)
    held = table[table["where"] == HELD_OUT]
    games = held[held["task"] == GAMES]
    teacher = games[games["method"] == TEACHER]
    for place, (group, (title, _)) in zip(axes, GROUPS.items(), strict=False):
        draw_won(place, games[games["group"] == group], teacher)
        place.set_title(f"{title}: won")
    draw_won(axes[2], held[held["task"] == PROBLEMS], teacher[:0])
    axes[2].set_title("Games and sorting: sorted")
    lowest = min(place.get_ylim()[0] for place in axes[:3])
    for place in axes[:3]:
        place.set_ylim(lowest, 1.0)
    draw_way(axes[3], games, "inadmissible")
    axes[3].set_title("Inadmissible actions")
    draw_way(axes[4], games, "turns")
    axes[4].set_title("Turns of a game")
    draw_cost(axes[5], table[(table["where"] == ROLLOUTS) & (table["group"] == "games")])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_won(axes: Any, held: pd.DataFrame, teacher: pd.DataFrame) -> None:
    """Share of what is held out that is won, over seeds and games."""
    for method, (label, colour) in METHODS.items():
        mine = held[held["method"] == method]
        found = [(step, *accuracy(values(at, method))) for step, at in mine.groupby("step")]
        if found:
            x, y, low, high = zip(*found, strict=True)
            how: dict[str, Any] = {"color": colour, "marker": "o", "ms": 3, "label": label}
            style.curve(axes, x, y, low, high, **how)
    if len(teacher):
        share, bottom, top = accuracy(values(teacher, TEACHER))
        axes.axhline(share, ls=":", lw=1, color="#444444", label="teacher")
        axes.axhspan(bottom, top, color="#444444", alpha=0.08, lw=0)
    axes.set_xlabel("step")


def draw_way(axes: Any, games: pd.DataFrame, column: str) -> None:
    """A number of held-out games along training, dashed where problems were trained too."""
    for method, (_, colour) in METHODS.items():
        for group, (_, dash) in GROUPS.items():
            mine = games[(games["method"] == method) & (games["group"] == group)]
            mean = over_seeds(mine, column)
            if len(mean):
                place = mean["step"] / mean["step"].max()
                how: dict[str, Any] = {"color": colour, "ls": dash, "marker": "o", "ms": 3}
                style.curve(axes, place, mean["value"], mean["low"], mean["high"], **how)
    for value in games[games["method"] == TEACHER][column]:
        axes.axhline(value, ls=":", lw=1, color="#444444")
    axes.set_xlabel("share of the steps")


def draw_cost(axes: Any, table: pd.DataFrame) -> None:
    """KL at each turn of TURNS in the first and the last ENDS steps."""
    for place, (method, (_, colour)) in enumerate(METHODS.items()):
        mine = table[table["method"] == method]
        final = mine["step"].max()
        for ends, fill in (((0, ENDS - 1), "none"), ((final - ENDS + 1, final), colour)):
            some = mine[mine["step"].between(*ends)].groupby("seed").mean(numeric_only=True)
            for i, turn in enumerate(TURNS):
                at = pd.DataFrame({"step": 0, "seed": some.index, "value": some[f"cost_{turn}"]})
                mean = over_seeds(at.reset_index(drop=True), "value")
                if len(mean):
                    value, low, high = mean[["value", "low", "high"]].iloc[0]
                    where = i + (place - (len(METHODS) - 1) / 2) * 0.2
                    error = [[value - low], [high - value]]
                    look: dict[str, Any] = {"fmt": "o", "ms": 3.5, "color": colour, "mfc": fill}
                    axes.errorbar(where, value, yerr=error, **look)
    axes.set_xticks(range(len(TURNS)), [str(turn) for turn in TURNS])
    axes.set(title="KL by turn, nats a token", xlabel="turn of the game")
    axes.set_ylim(bottom=0)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """What is won before and after, the gain, and each method's difference to the first one.

    Columns: group, task, method, seeds, count (games or problems); before, won, gain, away, each
    with _low and _high; and of the share of turns with an inadmissible action inadmissible_before
    and inadmissible. The teacher has no gain.
    """
    held = table[table["where"] == HELD_OUT]
    found = []
    for group in GROUPS:
        for task in (GAMES, PROBLEMS):
            mine = held[(held["group"] == group) & (held["task"] == task)]
            final, first = last(mine), mine[mine["step"] == 0]
            for method in [m for m in (*METHODS, TEACHER) if m in set(mine["method"])]:
                row = {"group": group, "task": task, "method": method}
                found.append(row | one_row(final, first, method))
    if not found:
        raise InvalidInput(
            f"no evaluation of the groups {', '.join(GROUPS)} on {GAMES} or {PROBLEMS}; a run "
            "folder is GROUP/METHOD-SEED, as `opd paper --groups games agents` makes them"
        )
    return pd.DataFrame(found)


def one_row(final: pd.DataFrame, first: pd.DataFrame, method: str) -> dict[str, Any]:
    """`summary` of a method, from the last and the first evaluations of a group and task."""
    after, before = outcomes(final, method), outcomes(first, method)
    row: dict[str, Any] = {"seeds": len(after), "count": after.shape[1]}
    row |= named("won", accuracy(after.to_numpy(float)))
    ways = [x[x["method"] == method]["inadmissible"].mean() for x in (first, final)]
    row |= dict(zip(("inadmissible_before", "inadmissible"), ways, strict=True))
    if method != TEACHER:
        row |= named("before", accuracy(before.to_numpy(float)))
        row |= named("gain", apart(after, before))
    if method in list(METHODS)[1:]:
        row |= named("away", apart(after, outcomes(final, next(iter(METHODS)))))
    return row


def values(held: pd.DataFrame, method: str) -> np.ndarray:
    """(seeds, games) of what was won."""
    return outcomes(held, method).to_numpy(float)


def apart(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[float, float, float]:
    """Paired difference and its interval."""
    away = difference(ours, theirs)
    return away["value"], away["low"], away["high"]


def named(name: str, interval: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def markdown(table: pd.DataFrame) -> str:
    """`summary` as tables."""
    base = METHODS[next(iter(METHODS))][0]
    parts = [
        "Brackets: 95 % intervals over seeds and games; gains and differences are paired by seed "
        "and game. Inadmissible: share of turns with an action that the game does not admit."
    ]
    for (group, task), mine in summary(table).groupby(["group", "task"], sort=False):
        what = {GAMES: "games", PROBLEMS: "problems"}[str(task)]
        lines = [
            f"### {GROUPS[str(group)][0]}: {mine['count'].max()} held-out {what}",
            "",
            f"| model | seeds | before | after | gain | minus {base} | inadmissible |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in mine.to_dict("records")]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def cells(row: dict[Any, Any]) -> list[str]:
    found = [METHODS.get(row["method"], (TEACHER, ""))[0], str(row["seeds"])]
    for name, form in (("before", ".3f"), ("won", ".3f"), ("gain", "+.3f"), ("away", "+.3f")):
        ends = [row.get(x, np.nan) for x in (name, f"{name}_low", f"{name}_high")]
        value, low, high = (format(x, form) for x in ends)
        found.append("" if np.isnan(ends[0]) else f"{value} [{low}, {high}]")
    before, after = row["inadmissible_before"], row["inadmissible"]
    both = f"{after:.3f}" if row["method"] == TEACHER else f"{before:.3f} to {after:.3f}"
    return [*found, "" if np.isnan(after) else both]


def collect(runs: list[Path]) -> pd.DataFrame:
    """COLUMNS, a row a step (where: "rollouts") and a row an evaluation of a task ("held out").

    Raises:
      ValueError: runs were judged on different games or problems.
    """
    found: list[dict[str, Any]] = []
    judged: dict[str, str] = {}
    for run, whose in zip(runs, about(runs), strict=True):
        for row in recorded_rows(run):
            of = whose | {"step": row["step"], "task": row.get("task", GAMES), "where": ROLLOUTS}
            costs = {f"cost_{n}": rounded(row.get(f"turn={n}/divergence/k1")) for n in TURNS}
            found.append(of | numbers(row, "response/reward") | costs)
        for row in recorded_evaluations(run):
            task, problems = row.get("task", GAMES), row["problem_set"]
            if judged.setdefault(task, problems) != problems:
                raise InvalidInput(
                    f"{run} was judged on the {task} {problems}, others on {judged[task]}: leave "
                    "it out, or evaluate it anew"
                )
            of = {"step": row["step"], "task": task, "where": HELD_OUT}
            found.append(whose | of | numbers(row, "accuracy") | {"outcomes": row["outcomes"]})
    return pd.DataFrame(found, columns=list(COLUMNS))


def numbers(row: dict[str, Any], won: str) -> dict[str, float]:
    """Of rollouts or of what is held out."""
    known = {"won": won, "turns": "episodes/turns", "inadmissible": "episodes/invalid_share"}
    return {name: rounded(row.get(column)) for name, column in known.items()}
