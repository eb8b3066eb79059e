"""The tokenizer panel: signal by id, impossible and special tokens, EOS, results of the doctor.

r = log student - log teacher of a sampled token. Shapes: B responses, T positions.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import read_object, short_repr
from diagnostics.records.eos_ids import read_eos_ids, read_eos_token
from diagnostics.records.vocabulary import Vocabulary, load_vocabulary
from opd.report.run_data import may_read

if TYPE_CHECKING:
    from diagnostics.batch import ScoredRollouts
    from opd.report.run_data import RunRecord

MAX_IDS = 40
"""Largest number of ids in a table."""


def attribution_rows(batch: "ScoredRollouts", seen_ids: set[int]) -> list[dict[str, Any]]:
    """Return the ids with the largest share of the signal in a batch.

    Args:
        batch: The batch.
        seen_ids: Set to which the ids are added.

    Returns:
        One row per id: share of tokens, signal and energy, and mean cost.
    """
    sums, ids = attribution_sums(batch)
    totals = sums.sum(0).tolist()
    rows = []
    for j in sums[:, 2].argsort(descending=True, stable=True)[:MAX_IDS].tolist():
        count, cost, signal, _, energy = sums[j].tolist()
        if count:
            seen_ids.add(ids[j])
            rows.append(
                {
                    "id": ids[j],
                    "count": int(count),
                    "tokens": ratio(count, totals[0]),
                    "signal": ratio(signal, totals[2]),
                    "energy": ratio(energy, totals[4]),
                    "cost": round(cost / count, 3),
                }
            )
    return rows


def attribution_sums(batch: "ScoredRollouts") -> tuple[Any, list[int]]:
    """Return the (N, 5) `TokenAttribution` sums of the ids that occur, and the ids."""
    from diagnostics.metrics.token_attribution import TokenAttribution

    ids, index = batch.tokens.unique(return_inverse=True)
    sums = TokenAttribution.from_batch(replace(batch, tokens=index), batch.mask, len(ids)).sums
    return sums, ids.tolist()


def ratio(numerator: float, denominator: float) -> float | None:
    """Return a rounded ratio; None if it is undefined."""
    return round(numerator / denominator, 5) if denominator > 0 and numerator == numerator else None


def tokenizer_panel(
    run: "RunRecord", vocabulary: Vocabulary, batch: "ScoredRollouts | None", seen_ids: set[int]
) -> dict[str, Any]:
    """Collect the data of the panel.

    Args:
        run: The run.
        vocabulary: The run's vocabulary.
        batch: The last saved batch, if there is one.
        seen_ids: Set to which the ids are added.

    Returns:
        The data; see `impossible_ids`, `special_token_rows`, `model_eos_tokens`,
        `read_doctor_report`.
    """
    panel: dict[str, Any] = {
        "ends": model_eos_tokens(run),
        "unread": unread_models(run),
        "doctor": read_doctor_report(run.folder.path)
        if may_read(run, run.folder.path / "doctor.json")
        else None,
        "impossible": None,
        "special": [],
    }
    if batch is not None:
        panel["impossible"] = impossible_ids(batch, seen_ids)
        panel["special"] = special_token_rows(batch, vocabulary, seen_ids)
    return panel


def impossible_ids(batch: "ScoredRollouts", seen_ids: set[int]) -> dict[str, Any]:
    """Find tokens that the student is confident of and the teacher considers impossible, by id."""
    from diagnostics.metrics.token_attribution import confident_impossible_mask

    is_impossible, signal = confident_impossible_mask(batch), batch.log_ratio.abs()
    rows = []
    for i in batch.tokens[is_impossible].unique().tolist():
        is_this_id = is_impossible & (batch.tokens == i)
        rows.append(
            {
                "id": i,
                "count": int(is_this_id.sum()),
                "student": round(float(batch.student_logp[is_this_id].mean()), 3),
                "teacher": round(float(batch.teacher_logp[is_this_id].mean()), 3),
            }
        )
    rows = sorted(rows, key=lambda row: -row["count"])[:MAX_IDS]
    seen_ids.update(row["id"] for row in rows)
    return {
        "rows": rows,
        "share": ratio(float(is_impossible.sum()), float(batch.mask.sum())),
        "signal": ratio(float(signal[is_impossible].sum()), float(signal[batch.mask].sum())),
        "ended": round(float(batch.ended.float().mean()), 4),
    }


def special_token_rows(
    batch: "ScoredRollouts", vocabulary: Vocabulary, seen_ids: set[int]
) -> list[dict[str, Any]]:
    """Describe the tokenizer's special ids: supervised count, share of the signal, mean cost."""
    sums, ids = attribution_sums(batch)
    index_by_id = {i: j for j, i in enumerate(ids)}
    ids_to_show = sorted(vocabulary.special, key=lambda i: (i not in index_by_id, i))[:MAX_IDS]
    seen_ids.update(ids_to_show)
    total_signal = float(sums[:, 2].sum())
    zero = sums.new_zeros(5)
    sums_by_id = {
        i: (sums[index_by_id[i]] if i in index_by_id else zero).tolist() for i in ids_to_show
    }
    return [
        {
            "id": i,
            "count": int(sums_by_id[i][0]),
            "signal": ratio(sums_by_id[i][2], total_signal),
            "cost": round(sums_by_id[i][1] / sums_by_id[i][0], 3) if sums_by_id[i][0] else None,
        }
        for i in ids_to_show
    ]


def model_eos_tokens(run: "RunRecord") -> list[dict[str, Any]]:
    """Return the ids that end a generation, their text and the EOS token of each model.

    The tokenizer's EOS token is what a model was trained to end with; a generation may stop at more
    ids. Folders that do not exist, such as models on the hub, are skipped.

    Args:
        run: The run.

    Returns:
        One row per model: role, ids, texts, and its EOS token ("own").
    """
    rows = []
    for role, folder in model_folders(run).items():
        names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
        allowed = all(may_read(run, folder / name) for name in names)
        if allowed and (folder / "tokenizer.json").exists():
            vocabulary = load_vocabulary(folder)
            ids = sorted(read_eos_ids(folder, vocabulary))
            texts = [vocabulary.text(i) for i in ids]
            rows.append({"role": role, "ids": ids, "texts": texts, "own": read_eos_token(folder)})
    return rows


def model_folders(run: "RunRecord") -> dict[str, Path]:
    """Return role -> folder of each model that the run's settings name."""
    config = run.config
    tasks = config.get("tasks") or ()
    names = {
        f"teacher of {task['name']}": task.get("teacher") or config.get("teacher") for task in tasks
    }
    names = {"student": config.get("student"), **(names or {"teacher": config.get("teacher")})}
    return {role: run.folder.resolve(name) for role, name in names.items() if name}


def unread_models(run: "RunRecord") -> list[str]:
    """List the models that were not read because they are outside the run folder."""
    return [
        f"{role}: {folder}"
        for role, folder in model_folders(run).items()
        if not may_read(run, folder)
    ]


def read_doctor_report(folder: Path) -> dict[str, Any] | None:
    """Read the output of `opd doctor STUDENT TEACHER --json > RUN/doctor.json`, if it exists."""
    path = folder / "doctor.json"
    if not path.exists():
        return None
    report = read_object(path, {"verdict": str, "items": list})
    for i, item in enumerate(report["items"]):
        if not isinstance(item, dict):
            raise InvalidInput(f"{path}, items[{i}]: {short_repr(item)} is not an object")
    fields = ("item", "verdict", "found", "advice")
    return {
        "verdict": report["verdict"],
        "items": [{name: item.get(name, "") for name in fields} for item in report["items"]],
    }
