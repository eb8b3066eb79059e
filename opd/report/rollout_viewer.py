"""Data of the rollout viewer: rollouts of a run's saved batches, token by token.

Shapes: B responses, T positions, K support ids.
"""

import json
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput
from diagnostics.records.vocabulary import Vocabulary, load_first_vocabulary
from opd.report.run_data import may_read
from opd.report.tokenizer_panel import attribution_rows, tokenizer_panel

MAX_PROMPT_LENGTH = 4000
"""Largest number of characters shown of a prompt."""
if TYPE_CHECKING:
    from diagnostics.batch import ScoredRollouts
    from diagnostics.records.run_folder import RunFolder
    from opd.report.run_data import RunRecord

MAX_BATCHES, TOP_IDS, MIN_PROBABILITY = 6, 5, 1e-3
"""Largest number of batches; likeliest ids of each model per position; an id with a lower
probability in both models is left out."""


def viewer_data(run: "RunRecord", tokens: int) -> dict[str, Any]:
    """Collect the data of the rollout viewer and of the token tables.

    Of each batch, the responses with the largest mean |r| and equally many others, in their order,
    so that both the worst and ordinary ones are shown. The parts of a run without batches are
    empty.

    Args:
        run: The run.
        tokens: Largest number of tokens, over at most MAX_BATCHES batches.

    Returns:
        The data.
    """
    files = [(step, file) for step, file in choose_batch_files(run.folder) if may_read(run, file)]
    vocabulary = load_first_vocabulary(tokenizer_folders(run))
    labels = [task["name"] for task in run.config.get("tasks") or ()]
    data: dict[str, Any] = {"rollouts": [], "blame": None, "saved": []}
    seen_ids: set[int] = set()
    last_batch: ScoredRollouts | None = None
    for step, file in files:
        batch = read_batch(file)
        if batch is None:
            continue
        last_batch = batch
        data["saved"].append({"step": step, "responses": len(batch)})
        entries = rollout_entries(batch, step, labels, vocabulary, tokens // len(files), seen_ids)
        prompts = read_prompts(run, file, len(batch), ".prompts.json")
        views = read_prompts(run, file, len(batch), ".teacher_prompts.json")
        data["rollouts"] += [
            entry | {"asked": prompts.get(entry["row"]), "view": views.get(entry["row"])}
            for entry in entries
        ]
    if last_batch is not None:
        data["blame"] = attribution_rows(last_batch, seen_ids)
    data["sheet"] = tokenizer_panel(run, vocabulary, last_batch, seen_ids)
    data["texts"] = {str(i): vocabulary.text(i) for i in sorted(seen_ids)}
    data["special"] = sorted(vocabulary.special & seen_ids)
    return data


def tokenizer_folders(run: "RunRecord") -> list[Path]:
    """Return folders that may hold the run's tokenizer: final model, tokenizer copy, student."""
    places = [run.folder.path / "final", run.folder.path / "tokenizer"]
    if run.config.get("student"):
        places.append(run.folder.model_folder("student"))
    return [folder for folder in places if may_read(run, folder / "tokenizer.json")]


def choose_batch_files(folder: "RunFolder") -> list[tuple[int, Path]]:
    """Choose at most MAX_BATCHES saved batches or dumps, including the first and the last.

    Args:
        folder: The run folder.

    Returns:
        (step, file) of each; a step with both is read from its batch.
    """
    files = folder.dumps() | folder.batches()
    steps = sorted(files)
    if len(steps) > MAX_BATCHES:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_BATCHES - 1))] for i in range(MAX_BATCHES)]
    return [(step, files[step]) for step in steps]


def read_prompts(run: "RunRecord", file: Path, rows: int, suffix: str) -> dict[int, str]:
    """Read the prompts of the student, or of the teacher, saved with a batch.

    Args:
        run: The run.
        file: The batch file.
        rows: Number of responses of the batch.
        suffix: End of the name of the file of prompts, in the place of the batch's.

    Returns:
        Row -> text of its prompt; empty where no prompts were saved.

    Raises:
        InvalidInput: The file does not hold one prompt per row.
    """
    path = file.with_suffix(suffix)
    if not path.exists() or not may_read(run, path):
        return {}
    texts = json.loads(path.read_text("utf-8"))
    if not isinstance(texts, list) or len(texts) != rows:
        raise InvalidInput(
            f"{path} must be a JSON list of {rows} prompts, one per row of {file.name}"
        )
    return {i: str(text)[:MAX_PROMPT_LENGTH] for i, text in enumerate(texts)}


def read_batch(file: Path) -> "ScoredRollouts | None":
    """Read a saved batch or dump; None if it is not scored by both models."""
    from diagnostics.batch import ScoredRollouts
    from diagnostics.missing import missing_fields
    from diagnostics.records.batch_files import load_batch
    from diagnostics.records.token_dumps import load_dump

    batch = load_batch(file) if file.suffix == ".safetensors" else load_dump(file)
    if not isinstance(batch, ScoredRollouts) or "teacher_logp" in missing_fields(batch):
        return None
    return batch


def rollout_entries(
    batch: "ScoredRollouts",
    step: int,
    labels: list[str],
    vocabulary: Vocabulary,
    tokens: int,
    seen_ids: set[int],
) -> list[dict[str, Any]]:
    """Choose responses, as many as fit but at least one; add their ids to `seen_ids`."""
    lengths = shown_length(batch)
    mean_signal = (batch.log_ratio.abs() * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)
    order = mean_signal.argsort(descending=True, stable=True).tolist()
    num_worst = (len(order) + 1) // 2
    pairs = zip_longest(order[:num_worst], sorted(order[num_worst:]))
    interleaved = [i for pair in pairs for i in pair if i is not None]
    selected: list[int] = []
    tokens_left = tokens
    for i in interleaved:
        if lengths[i] <= tokens_left or not selected:
            selected.append(i)
            tokens_left -= lengths[i]
    return [
        rollout_entry(batch, step, i, lengths[i], labels, vocabulary, seen_ids)
        for i in sorted(selected)
    ]


def shown_length(batch: "ScoredRollouts") -> list[int]:
    """Return (B) the number of positions up to the last sampled one; the rest may be padding."""
    return batch.attention_mask.sum(1).tolist()


def rollout_entry(
    batch: "ScoredRollouts",
    step: int,
    i: int,
    length: int,
    labels: list[str],
    vocabulary: Vocabulary,
    seen_ids: set[int],
) -> dict[str, Any]:
    """Describe one response and both models' values; numbers in hundredths, to save space.

    Args:
        batch: The batch.
        step: Its step.
        i: The row of the response.
        length: Number of positions shown.
        labels: Names of the tasks.
        vocabulary: The run's vocabulary.
        seen_ids: Set to which the ids are added.

    Returns:
        "ids"; "off": positions that are not supervised; "odd": position -> text where it differs
        from the id's own text; "s", "t": log-probabilities of student and teacher; "e": root
        energy; "rank": teacher's rank; "in": one digit per token, 1 inside the support; "mass":
        p(S) and q(S) in ten-thousandths; "tops": for each token [id, student's log-probability,
        teacher's, ...] of the most likely ids.
    """
    ids = batch.tokens[i, :length].tolist()
    seen_ids.update(ids)
    texts = vocabulary.texts(ids)
    reward, task = float(batch.reward[i]), int(batch.task[i])
    entry: dict[str, Any] = {
        "step": step,
        "row": i,
        "task": labels[task] if task < len(labels) else "",
        "prompt": int(batch.prompt[i]),
        "turn": int(batch.turn[i]),
        "ended": bool(batch.ended[i]),
        "reward": None if reward != reward else reward,
        "ids": ids,
        "off": (~batch.mask[i, :length]).nonzero()[:, 0].tolist(),
        "odd": {str(k): t for k, t in enumerate(texts) if t != vocabulary.text(ids[k])},
        "s": to_hundredths(batch.student_logp[i, :length]),
        "t": to_hundredths(batch.teacher_logp[i, :length]),
    }
    if batch.prefix is not None:
        prefix = batch.prefix.rows([i])
        norm = (1 - 2 * batch.student_logp[i].exp() + prefix.collision[0]).clamp(min=0)
        entry["e"] = to_hundredths((batch.log_ratio[i].square() * norm).sqrt()[:length])
        entry["rank"] = prefix.teacher_rank[0, :length].long().tolist()
    if batch.support is not None:
        support = batch.support.rows([i])
        in_support = support.contains(batch.tokens[[i]])[0, :length].tolist()
        entry["in"] = "".join("01"[x] for x in in_support)
        student_mass, teacher_mass = support.masses()
        entry["mass"] = [
            (x[0, :length].clamp(0, 1) * 1e4).round().long().tolist()
            for x in (student_mass, teacher_mass)
        ]
        entry["source"], entry["k"] = support.source, support.k
        entry["tops"] = top_tokens(batch, i, length)
        seen_ids.update(top for row in entry["tops"] for top in row[::3])
    return entry


def top_tokens(batch: "ScoredRollouts", i: int, length: int) -> list[list[int]]:
    """Return for each token [id, s, t, ...]: the TOP_IDS likeliest ids of either model."""
    import torch

    support = batch.support.rows([i])  # type: ignore[union-attr]
    is_absent = torch.zeros_like(support.ids, dtype=torch.bool)
    if support.present is not None:
        is_absent = ~support.present
    logps = [
        x.masked_fill(is_absent, -torch.inf)[0, :length]
        for x in (support.student_logp, support.teacher_logp)
    ]
    is_shown = torch.zeros_like(logps[0], dtype=torch.bool)
    for x in logps:
        largest = x.topk(min(TOP_IDS, x.shape[-1]), -1)
        is_shown |= torch.zeros_like(is_shown).scatter(
            -1, largest.indices, largest.values.exp() >= MIN_PROBABILITY
        )
    is_shown &= batch.mask[i, :length, None]
    by_teacher = logps[1].argsort(dim=-1, descending=True, stable=True)
    entries: list[list[int]] = [[] for _ in range(length)]
    columns = [x.gather(-1, by_teacher) for x in (support.ids[0, :length], *logps)]
    is_kept = is_shown.gather(-1, by_teacher)
    token_index = is_kept.nonzero()[:, 0].tolist()
    shown_values = [columns[0][is_kept].tolist(), *(to_hundredths(x[is_kept]) for x in columns[1:])]
    for k, *entry in zip(token_index, *shown_values, strict=True):
        entries[k] += entry
    return entries


def to_hundredths(x: Any) -> list[int]:
    """Round to integer hundredths; values below -99 become -99."""
    return (x.double().clamp(min=-99, max=999) * 100).round().long().tolist()
