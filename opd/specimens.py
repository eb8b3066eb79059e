"""Specimens from a run's saved batches: rollouts token by token, ids to blame, special tokens.

Shapes: B responses, T positions, K support ids.
"""

import json
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnostics.batch import Scored

BATCHES, TOP, BLAMED = 6, 5, 40


def specimens(folder: Path, tokens: int) -> dict[str, Any]:
    """Data of the viewer and the tables: at most so many tokens of at most BATCHES batches.

    Of a batch the responses with the largest mean |r| and as many of the others, in their order, so
    that the worst are there and the ordinary beside them. A run without batches has empty parts.
    """
    from diagnostics.batch import Scored, load

    files = sorted((folder / "batches").glob("step_*.safetensors"))
    if len(files) > BATCHES:
        files = [files[round(i * (len(files) - 1) / (BATCHES - 1))] for i in range(BATCHES)]
    found: dict[str, Any] = {"rollouts": [], "blame": [], "sheet": {}, "texts": {}}
    names, special = vocabulary(folder)
    labels = task_names(folder)
    seen: set[int] = set()
    last = None
    for file in files:
        batch = load(file)
        if not isinstance(batch, Scored):
            continue
        step, last = int(file.stem.split("_")[1]), batch
        found["rollouts"] += rollouts(batch, step, labels, tokens // len(files), seen)
    if last is not None:
        found["blame"] = blame(last, seen)
        found["sheet"] = sheet(last)
    found["texts"] = {str(i): names.get(i, f"#{i}") for i in sorted(seen)}
    found["special"] = sorted(special & seen)
    return found


def vocabulary(folder: Path) -> tuple[dict[int, str], frozenset[int]]:
    """Text of every id and which are special; empty where the run's tokenizer is not to be had."""
    from figures.vocabulary import read

    try:
        known = read(folder)
    except (FileNotFoundError, KeyError):
        return {}, frozenset()
    return {i: visible(name) for i, name in known.names.items()}, known.special


def visible(text: str) -> str:
    """The text with controls, marks of direction and lone surrogates as their escapes."""
    return "".join(
        c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"
        for c in text
    )


def task_names(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    return [task["name"] for task in config.get("tasks") or ()]


def rollouts(
    batch: "Scored", step: int, labels: list[str], tokens: int, seen: set[int]
) -> list[dict[str, Any]]:
    """The chosen responses, numbers in hundredths to be short; adds their ids to `seen`."""
    size = batch.mask.sum(1).clamp(min=1)
    mean = batch.log_ratio.abs().sum(1) / size
    order = mean.argsort(descending=True, stable=True).tolist()
    half = (len(order) + 1) // 2
    pairs = zip_longest(order[:half], sorted(order[half:]))
    mixed = [i for pair in pairs for i in pair if i is not None]
    chosen, left = [], tokens
    for i in mixed:
        if int(size[i]) <= left:
            chosen.append(i)
            left -= int(size[i])
    return [one(batch, step, i, labels, seen) for i in sorted(chosen)]


def one(batch: "Scored", step: int, i: int, labels: list[str], seen: set[int]) -> dict[str, Any]:
    """One response: its tokens up to the last supervised one, and what both models said of them."""
    import torch

    mask = batch.mask[i]
    at = mask.nonzero()[:, 0]
    ids = batch.tokens[i][at].tolist()
    seen.update(ids)
    reward = float(batch.reward[i])
    task = int(batch.task[i])
    made: dict[str, Any] = {
        "step": step,
        "row": i,
        "task": labels[task] if task < len(labels) else "",
        "prompt": int(batch.prompt[i]),
        "ended": bool(batch.ended[i]),
        "reward": None if reward != reward else reward,
        "ids": ids,
        "at": at.tolist() if int(at[-1:].sum()) + 1 != len(at) else None,
        "s": hundredths(batch.student_logp[i][at]),
        "t": hundredths(batch.teacher_logp[i][at]),
    }
    if batch.prefix is not None:
        prefix = batch.prefix.rows([i])
        norm = (1 - 2 * batch.student_logp[i].exp() + prefix.collision[0]).clamp(min=0)
        made["e"] = hundredths((batch.log_ratio[i].square() * norm).sqrt()[at])
        made["rank"] = prefix.teacher_rank[0][at].long().tolist()
    if batch.support is not None:
        support = batch.support.rows([i])
        made["in"] = "".join("01"[int(x)] for x in support.contains(batch.tokens[[i]])[0][at])
        made["mass"] = hundredths(support.masses()[0][0][at])
        theirs = support.teacher_logp[0][at]
        if support.present is not None:
            theirs = theirs.masked_fill(~support.present[0][at], -torch.inf)
        best = theirs.topk(min(TOP, support.k), -1).indices
        top = support.ids[0][at].gather(-1, best)
        seen.update(top.flatten().tolist())
        made["top"] = top.tolist()
        made["topS"] = [hundredths(x) for x in support.student_logp[0][at].gather(-1, best)]
        made["topT"] = [hundredths(x) for x in support.teacher_logp[0][at].gather(-1, best)]
    return made


def hundredths(x: Any) -> list[int]:
    """Whole hundredths; what is below -99 nats is -99."""
    return (x.double().clamp(min=-99, max=999) * 100).round().long().tolist()


def blame(batch: "Scored", seen: set[int]) -> list[dict[str, Any]]:
    """The ids with the most signal in a batch: share of tokens, signal and energy, mean cost."""
    from diagnostics.blame import COLUMNS, TokenTable

    ids, place = batch.tokens.unique(return_inverse=True)
    sums = TokenTable.of(replace(batch, tokens=place), batch.mask, len(ids)).sums
    whole = sums.sum(0)
    order = sums[:, COLUMNS.index("signal")].argsort(descending=True)[:BLAMED]
    made = []
    for j in order.tolist():
        count, cost, signal, _, energy = sums[j].tolist()
        if count == 0:
            continue
        seen.add(int(ids[j]))
        made.append(
            {
                "id": int(ids[j]),
                "count": int(count),
                "tokens": ratio(count, float(whole[0])),
                "signal": ratio(signal, float(whole[2])),
                "energy": ratio(energy, float(whole[4])),
                "cost": round(cost / count, 3),
            }
        )
    return made


def ratio(above: float, below: float) -> float | None:
    return round(above / below, 5) if below > 0 and above == above else None


def sheet(batch: "Scored") -> dict[str, Any]:
    """Tokens of which the student is sure and that the teacher holds impossible, by id; ends."""
    from diagnostics.blame import impossible

    found = impossible(batch) & batch.mask
    rows = []
    for i in batch.tokens[found].unique().tolist():
        mine = found & (batch.tokens == i)
        rows.append(
            {
                "id": i,
                "count": int(mine.sum()),
                "student": round(float(batch.student_logp[mine].mean()), 3),
                "teacher": round(float(batch.teacher_logp[mine].mean()), 3),
            }
        )
    rows.sort(key=lambda row: -row["count"])
    return {
        "impossible": rows[:BLAMED],
        "share": ratio(float(found.sum()), float(batch.mask.sum())),
        "signal": ratio(
            float(batch.log_ratio.abs()[found].sum()),
            float(batch.log_ratio.abs()[batch.mask].sum()),
        ),
        "ended": round(float(batch.ended.float().mean()), 4),
    }
