"""Specimens from a run's saved batches: rollouts token by token, ids to blame, special tokens.

Shapes: B responses, T positions, K support ids.
"""

import json
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput
from diagnostics.records.token_text import Spelling, read_run_spelling
from diagnostics.records.vocabulary import located
from opd.report.run_data import may_read
from opd.report.tokenizer_panel import blame, sheet

PROMPT = 4000
"""Most characters shown of a prompt."""
if TYPE_CHECKING:
    from diagnostics.batch import ScoredRollouts
    from opd.report.run_data import RunRecord

BATCHES, TOP, LEAST = 6, 5, 1e-3
"""Most batches shown; most ids of each model at a position; the probability below which both of
them must put an id for it to be left out."""


def specimens(run: "RunRecord", tokens: int) -> dict[str, Any]:
    """Data of the viewer and the tables: at most so many tokens of at most BATCHES batches.

    Of a batch the responses with the largest mean |r| and as many of the others, in their order, so
    that the worst are there and the ordinary beside them. A run without batches has empty parts.
    """
    files = [(step, file) for step, file in chosen_files(run.folder) if may_read(run, file)]
    spelling = read_run_spelling(tokenizer_places(run))
    labels = [task["name"] for task in run.config.get("tasks") or ()]
    found: dict[str, Any] = {"rollouts": [], "blame": None, "saved": []}
    seen: set[int] = set()
    last: ScoredRollouts | None = None
    for step, file in files:
        batch = read_batch(file)
        if batch is None:
            continue
        last = batch
        found["saved"].append({"step": step, "responses": len(batch)})
        shown = rollouts(batch, step, labels, spelling, tokens // len(files), seen)
        prompts = read_prompts(run, file, len(batch))
        found["rollouts"] += [roll | {"asked": prompts.get(roll["row"])} for roll in shown]
    if last is not None:
        found["blame"] = blame(last, seen)
    found["sheet"] = sheet(run, spelling, last, seen)
    found["texts"] = {str(i): spelling.text(i) for i in sorted(seen)}
    found["special"] = sorted(spelling.special & seen)
    return found


def tokenizer_places(run: "RunRecord") -> list[Path]:
    """Where the tokenizer of a run's ids may be read: its model, its copy, the student's folder."""
    places = [run.folder / "final", run.folder / "tokenizer"]
    if "student" in run.config:
        places.append(located(run.folder, str(run.config["student"])))
    return [place for place in places if may_read(run, place / "tokenizer.json")]


def chosen_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of at most BATCHES batches and, of other steps, dumps; the ends included."""
    kinds = (("dumps", "parquet"), ("batches", "safetensors"))
    files = {
        int(file.stem.split("_")[1]): file
        for place, kind in kinds
        for file in (folder / place).glob(f"step_*.{kind}")
    }
    steps = sorted(files)
    if len(steps) > BATCHES:
        steps = [steps[round(i * (len(steps) - 1) / (BATCHES - 1))] for i in range(BATCHES)]
    return [(step, files[step]) for step in steps]


def read_prompts(run: "RunRecord", file: Path, rows: int) -> dict[int, str]:
    """Row to the text of its prompt, from beside a saved batch; empty where there is none."""
    path = file.with_suffix(".prompts.json")
    if not path.exists() or not may_read(run, path):
        return {}
    texts = json.loads(path.read_text("utf-8"))
    if not isinstance(texts, list) or len(texts) != rows:
        raise InvalidInput(
            f"{path} must be a JSON list of {rows} prompts, one a row of {file.name}"
        )
    return {i: str(text)[:PROMPT] for i, text in enumerate(texts)}


def read_batch(file: Path) -> "ScoredRollouts | None":
    """A saved batch or dump; None where nothing was scored."""
    from diagnostics.batch import ScoredRollouts
    from diagnostics.records.batch_files import load
    from diagnostics.records.token_dumps import load_dump

    batch = load(file) if file.suffix == ".safetensors" else load_dump(file)
    return batch if isinstance(batch, ScoredRollouts) else None


def rollouts(
    batch: "ScoredRollouts",
    step: int,
    labels: list[str],
    spelling: Spelling,
    tokens: int,
    seen: set[int],
) -> list[dict[str, Any]]:
    """The chosen responses, as many as fit, at least one; adds their ids to `seen`."""
    size = shown_length(batch)
    mean = (batch.log_ratio.abs() * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)
    order = mean.argsort(descending=True, stable=True).tolist()
    half = (len(order) + 1) // 2
    pairs = zip_longest(order[:half], sorted(order[half:]))
    mixed = [i for pair in pairs for i in pair if i is not None]
    chosen: list[int] = []
    left = tokens
    for i in mixed:
        if size[i] <= left or not chosen:
            chosen.append(i)
            left -= size[i]
    return [one(batch, step, i, size[i], labels, spelling, seen) for i in sorted(chosen)]


def shown_length(batch: "ScoredRollouts") -> list[int]:
    """(B) positions up to the last sampled one; what is behind may be padding."""
    behind = batch.sampled.long().flip(1).cumsum(1).flip(1) > 0
    return behind.sum(1).tolist()


def one(
    batch: "ScoredRollouts",
    step: int,
    i: int,
    size: int,
    labels: list[str],
    spelling: Spelling,
    seen: set[int],
) -> dict[str, Any]:
    """One response and what both models said of it; numbers in hundredths, to be short.

    ids; "off", the places that are not supervised; "odd", place to text where it is not the id's
    own; s, t log-probs; e root energy; rank; "in", a digit a token: inside the support; mass, p(S)
    and q(S) in ten-thousandths; tops, for each token [id, student's log-prob, teacher's, ...] of
    the ids that matter.
    """
    ids = batch.tokens[i, :size].tolist()
    seen.update(ids)
    texts = spelling.texts(ids)
    reward, task = float(batch.reward[i]), int(batch.task[i])
    made: dict[str, Any] = {
        "step": step,
        "row": i,
        "task": labels[task] if task < len(labels) else "",
        "prompt": int(batch.prompt[i]),
        "turn": int(batch.turn[i]),
        "ended": bool(batch.ended[i]),
        "reward": None if reward != reward else reward,
        "ids": ids,
        "off": (~batch.mask[i, :size]).nonzero()[:, 0].tolist(),
        "odd": {str(k): t for k, t in enumerate(texts) if t != spelling.text(ids[k])},
        "s": hundredths(batch.student_logp[i, :size]),
        "t": hundredths(batch.teacher_logp[i, :size]),
    }
    if batch.prefix is not None:
        prefix = batch.prefix.rows([i])
        norm = (1 - 2 * batch.student_logp[i].exp() + prefix.collision[0]).clamp(min=0)
        made["e"] = hundredths((batch.log_ratio[i].square() * norm).sqrt()[:size])
        made["rank"] = prefix.teacher_rank[0, :size].long().tolist()
    if batch.support is not None:
        support = batch.support.rows([i])
        inside = support.contains(batch.tokens[[i]])[0, :size].tolist()
        made["in"] = "".join("01"[x] for x in inside)
        ours, theirs = support.masses()
        made["mass"] = [
            (x[0, :size].clamp(0, 1) * 1e4).round().long().tolist() for x in (ours, theirs)
        ]
        made["source"], made["k"] = support.source, support.k
        made["tops"] = tops(batch, i, size)
        seen.update(top for row in made["tops"] for top in row[::3])
    return made


def tops(batch: "ScoredRollouts", i: int, size: int) -> list[list[int]]:
    """For each token [id, s, t, ...]: the TOP ids of either model in the support that matter."""
    import torch

    support = batch.support.rows([i])  # type: ignore[union-attr]
    absent = torch.zeros_like(support.ids, dtype=torch.bool)
    if support.present is not None:
        absent = ~support.present
    both = [
        x.masked_fill(absent, -torch.inf)[0, :size]
        for x in (support.student_logp, support.teacher_logp)
    ]
    matters = torch.zeros_like(both[0], dtype=torch.bool)
    for x in both:
        best = x.topk(min(TOP, x.shape[-1]), -1)
        matters |= torch.zeros_like(matters).scatter(-1, best.indices, best.values.exp() >= LEAST)
    matters &= batch.mask[i, :size, None]
    order = both[1].argsort(dim=-1, descending=True, stable=True)
    made: list[list[int]] = [[] for _ in range(size)]
    columns = [x.gather(-1, order) for x in (support.ids[0, :size], *both)]
    keep = matters.gather(-1, order)
    place = keep.nonzero()[:, 0].tolist()
    kept = [columns[0][keep].tolist(), *(hundredths(x[keep]) for x in columns[1:])]
    for k, *entry in zip(place, *kept, strict=True):
        made[k] += entry
    return made


def hundredths(x: Any) -> list[int]:
    """Whole hundredths; what is below -99 is -99."""
    return (x.double().clamp(min=-99, max=999) * 100).round().long().tolist()
