"""The tokenizer sheet: ids to blame, impossible and special ones, ends of both models, the doctor.

r = log student - log teacher of a sampled token. Shapes: B responses, T positions.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import has_type, read_object, short
from diagnostics.records.token_text import Spelling, read_spelling
from diagnostics.records.vocabulary import located
from opd.report.run_data import may_read

if TYPE_CHECKING:
    from diagnostics.batch import ScoredRollouts
    from opd.report.run_data import RunRecord

BLAMED = 40
"""Most ids of a table."""


def blame(batch: "ScoredRollouts", seen: set[int]) -> list[dict[str, Any]]:
    """The ids with the most signal in a batch: share of tokens, signal and energy, mean cost."""
    sums, ids = table(batch)
    whole = sums.sum(0).tolist()
    made = []
    for j in sums[:, 2].argsort(descending=True, stable=True)[:BLAMED].tolist():
        count, cost, signal, _, energy = sums[j].tolist()
        if count:
            seen.add(ids[j])
            made.append(
                {
                    "id": ids[j],
                    "count": int(count),
                    "tokens": ratio(count, whole[0]),
                    "signal": ratio(signal, whole[2]),
                    "energy": ratio(energy, whole[4]),
                    "cost": round(cost / count, 3),
                }
            )
    return made


def table(batch: "ScoredRollouts") -> tuple[Any, list[int]]:
    """`TokenAttribution` sums of the ids that occur, (N, 5), and the ids."""
    from diagnostics.metrics.token_attribution import TokenAttribution

    ids, place = batch.tokens.unique(return_inverse=True)
    sums = TokenAttribution.of(replace(batch, tokens=place), batch.mask, len(ids)).sums
    return sums, ids.tolist()


def ratio(above: float, below: float) -> float | None:
    return round(above / below, 5) if below > 0 and above == above else None


def sheet(
    run: "RunRecord", spelling: Spelling, batch: "ScoredRollouts | None", seen: set[int]
) -> dict[str, Any]:
    """What goes wrong between two vocabularies: `impossible_ids`, `specials`, `ends`, `doctor`."""
    made: dict[str, Any] = {
        "ends": ends(run),
        "unread": unread(run),
        "doctor": doctor(run.folder) if may_read(run, run.folder / "doctor.json") else None,
        "impossible": None,
        "special": [],
    }
    if batch is not None:
        made["impossible"] = impossible_ids(batch, seen)
        made["special"] = specials(batch, spelling, seen)
    return made


def impossible_ids(batch: "ScoredRollouts", seen: set[int]) -> dict[str, Any]:
    """Tokens of which the student is sure and that the teacher holds impossible, by id."""
    from diagnostics.metrics.token_attribution import impossible

    found, size = impossible(batch), batch.log_ratio.abs()
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
    rows = sorted(rows, key=lambda row: -row["count"])[:BLAMED]
    seen.update(row["id"] for row in rows)
    return {
        "rows": rows,
        "share": ratio(float(found.sum()), float(batch.mask.sum())),
        "signal": ratio(float(size[found].sum()), float(size[batch.mask].sum())),
        "ended": round(float(batch.ended.float().mean()), 4),
    }


def specials(batch: "ScoredRollouts", spelling: Spelling, seen: set[int]) -> list[dict[str, Any]]:
    """Special ids of the run's tokenizer: how often sampled and supervised, their signal."""
    sums, ids = table(batch)
    place = {i: j for j, i in enumerate(ids)}
    chosen = sorted(spelling.special, key=lambda i: (i not in place, i))[:BLAMED]
    seen.update(chosen)
    whole = float(sums[:, 2].sum())
    zero = sums.new_zeros(5)
    mine = {i: (sums[place[i]] if i in place else zero).tolist() for i in chosen}
    return [
        {
            "id": i,
            "count": int(mine[i][0]),
            "signal": ratio(mine[i][2], whole),
            "cost": round(mine[i][1] / mine[i][0], 3) if mine[i][0] else None,
        }
        for i in chosen
    ]


def ends(run: "RunRecord") -> list[dict[str, Any]]:
    """Of the student and of every teacher: the ids that end a generation, their text, its own end.

    Own is the end token that the tokenizer names: what a model was taught to end by, though a
    generation may stop at more.

    Folders that are not there, such as models of a hub, are left out.
    """
    made = []
    for role, folder in model_folders(run).items():
        names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
        allowed = all(may_read(run, folder / name) for name in names)
        if allowed and (folder / "tokenizer.json").exists():
            known = read_spelling(folder)
            ids = end_ids(folder, known)
            texts = [known.text(i) for i in ids]
            made.append({"role": role, "ids": ids, "texts": texts, "own": map_eos(folder)})
    return made


def model_folders(run: "RunRecord") -> dict[str, Path]:
    """Role to the folder of each model that the run's settings name."""
    config = run.config
    tasks = config.get("tasks") or ()
    names = {
        f"teacher of {task['name']}": task.get("teacher") or config.get("teacher") for task in tasks
    }
    names = {"student": config.get("student"), **(names or {"teacher": config.get("teacher")})}
    return {role: located(run.folder, name) for role, name in names.items() if name}


def unread(run: "RunRecord") -> list[str]:
    """The models that were not looked at, because the record alone names their folders."""
    return [
        f"{role}: {folder}"
        for role, folder in model_folders(run).items()
        if not may_read(run, folder)
    ]


def end_ids(folder: Path, known: Spelling) -> list[int]:
    """The ids that end a generation, as `opd.models.model.end_ids`: the tokenizer's own end token, and
    those of generation_config.json, else of config.json.

    Raises:
      ValueError: a file names something else than ids.
    """
    text, ids = map_eos(folder), set[int]()
    if text is not None:
        ids.update(i for i, piece in known.pieces.items() if piece == text.encode())
    for name in ("generation_config.json", "config.json"):
        named = configured_ends(folder / name) if (folder / name).exists() else None
        if named is not None:
            return sorted(ids | named)
    return sorted(ids)


def configured_ends(path: Path) -> set[int] | None:
    """The end ids of a model's settings, also of a text model inside another; None if it has none.

    Raises:
      ValueError: names the file and the value.
    """
    settings = read_object(path)
    inner = settings.get("text_config")
    named = settings.get("eos_token_id")
    if named is None and isinstance(inner, dict):
        named = inner.get("eos_token_id")
    if named is None:
        return None
    ids = named if isinstance(named, list) else [named]
    if not all(has_type(i, int) for i in ids):
        raise InvalidInput(f"{path}, field eos_token_id: {short(named)} is no id or list of ids")
    return set(ids)


def map_eos(folder: Path) -> str | None:
    """The end token of tokenizer_config.json, if it names one."""
    settings = folder / "tokenizer_config.json"
    token = read_object(settings).get("eos_token") if settings.exists() else None
    return token.get("content") if isinstance(token, dict) else token


def doctor(folder: Path) -> dict[str, Any] | None:
    """What `opd doctor STUDENT TEACHER --json > RUN/doctor.json` found, if the file is there."""
    path = folder / "doctor.json"
    if not path.exists():
        return None
    found = read_object(path, {"verdict": str, "items": list})
    for i, item in enumerate(found["items"]):
        if not isinstance(item, dict):
            raise InvalidInput(f"{path}, items[{i}]: {short(item)} is not an object")
    kept = ("item", "verdict", "found", "advice")
    return {
        "verdict": found["verdict"],
        "items": [{name: item.get(name, "") for name in kept} for item in found["items"]],
    }
