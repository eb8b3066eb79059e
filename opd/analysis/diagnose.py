"""`opd diagnose`: the panel offline, on saved batches or records of our runs or anybody's.

What a file lacks is named, and the rest computed. With both models given, records that hold only
tokens and prompt_tokens are scored first, so that the whole panel is there. Shapes: B responses,
T response positions, P prompt positions.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import short

if TYPE_CHECKING:
    from diagnostics.batch import Scored
    from diagnostics.records.columns import Record
    from diagnostics.records.reader import Records
    from opd.data.tasks import Prompts
    from opd.models.model import Pair

LEVELS = (
    "tokens and masks",
    "log-probabilities of the sampled tokens",
    "top-K log-probabilities",
    "whole next-token distributions",
)
RECORDS = (".jsonl", ".parquet")


def main(argv: list[str]) -> None:
    """`opd diagnose PATH [PATH ...] [--student M --teacher M] [--task NAME] [--json]`."""
    given = options(argv)
    pair = None
    if given.student or given.teacher:
        from opd.models.model import load_pair

        pair = load_pair(given.student, given.teacher, given.device, given.dtype)
    for path in given.paths:
        if path.is_file() and path.suffix in RECORDS:
            show(str(path), *_of_records(path, pair, given), as_json=given.json)
            continue
        if pair is not None or given.task is not None:
            raise InvalidInput(
                f"{path} is no records file; --student, --teacher and --task need records (.jsonl "
                "or .parquet), which hold prompt_tokens and task"
            )
        for file in batch_files(path, given.all):
            show(str(file), *diagnose(file), as_json=given.json)


def options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="opd diagnose", description="the panel on saved batches, records or a run folder"
    )
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="batch file, records (.jsonl, .parquet) or run folder")
    add("--json", action="store_true", help="one JSON object a batch or a records file")
    add("--all", action="store_true", help="every saved batch of a run folder")
    add("--student", default="", help="folder or hub name; with --teacher, scores records anew")
    add("--teacher", default="", help="folder or hub name")
    add("--task", help="only the records of this task")
    add("--k", type=int, default=16, help="size of the teacher's top-K when scoring")
    add("--temperature", type=float, help="when scoring; default: the file's, or 1")
    add("--device", default="auto")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args(argv)


def batch_files(path: Path, every: bool) -> list[Path]:
    """The file itself, or the batches that a run folder saved."""
    if path.is_file():
        return [path]
    found = sorted((path / "batches").glob("*.safetensors"))
    if not found:
        raise MissingFile(f"{path} is neither a batch file nor a run folder with batches/")
    return found if every else found[-1:]


Found = tuple[dict[str, float], dict[str, str], dict[str, str], dict[str, int]]
"""A row; what could not be computed and why; notes; the level of each total."""


def diagnose(file: Path) -> Found:
    """The panel of one batch file."""
    from diagnostics.batch import Scored, load

    batch = load(file)
    if not isinstance(batch, Scored):
        raise InvalidInput(f"{file} holds rollouts without teacher log-probabilities")
    return panel([batch], {})


def panel(batches: Iterable["Scored"], notes: dict[str, str]) -> Found:
    """The row of all batches together, `notes` as they are after the last one, and the levels."""
    from diagnostics.monitor import Monitor

    monitor = Monitor()
    level: dict[str, int] = {}

    def watched() -> Iterator["Scored"]:
        for batch in batches:
            if not level:
                level.update(levels(batch))
            yield batch

    row = monitor(0, watched())
    return row, monitor.missing, notes, level


def levels(batch: "Scored") -> dict[str, int]:
    """The least of `LEVELS` at which each total of the panel can be had from such a batch."""
    from diagnostics.core.partial import absent, changed, lacking
    from diagnostics.monitor import Monitor

    whole = batch.rows([0])
    bare = changed(whole, support=None, prefix=None)
    logps = {"student_logp", "teacher_logp", "sampler_logp"} - absent(batch)
    stages = (lacking(bare, logps), bare, changed(whole, prefix=None), whole)
    found: dict[str, int] = {}
    for level, stage in enumerate(stages):
        for name in Monitor().measure(stage):
            found.setdefault(name, level)
    return found


def _of_records(path: Path, pair: "Pair | None", given: argparse.Namespace) -> Found:
    from diagnostics.records.reader import Records

    records = Records(path, task=given.task)
    batches: Iterable[Scored] = records
    if pair is not None:
        batches = rescored(records, pair, given.k, given.temperature)
    elif not records.columns >= {"student_logp", "teacher_logp"}:
        records.notes["scores"] = "--student and --teacher add the log-probabilities that lack"
    found = panel(batches, records.notes)
    if not found[0]:
        raise InvalidInput(f"{path} holds no rows of task {given.task!r}")
    if records.unused:
        records.notes["unused"] = f"columns that mean nothing here: {', '.join(records.unused)}"
    return found


def rescored(
    records: "Records", pair: "Pair", k: int, temperature: float | None
) -> Iterator["Scored"]:
    """The records with both models' log-probabilities, a teacher's top-K and prefix functionals.

    What the file says of the two models is not used; how far its student is from this one becomes
    a note. `temperature` None is the records' score_temperature.

    Raises:
      ValueError: the records have no prompt_tokens, or an id is not in the shared vocabulary.
    """
    from diagnostics.batch import Rollouts
    from diagnostics.core.partial import absent, lacking
    from opd.scoring.score import score

    if "prompt_tokens" not in records.columns:
        raise InvalidInput(
            f"{records.path} has no prompt_tokens; without the ids of the prompts the models "
            "cannot score its responses"
        )
    total, largest, tokens = 0.0, 0.0, 0
    for rows in records.groups():
        batch = records.batch(rows)
        refuse_padding(rows, str(records.path), pair)
        prompts = prompts_of(rows, str(records.path), pair.student.vocabulary)
        if int(batch.tokens.max()) >= pair.student.vocabulary:
            raise InvalidInput(
                f"{records.path}: token {int(batch.tokens.max())} is not in the models' "
                f"vocabulary of {pair.student.vocabulary}"
            )
        names = set(Rollouts.__dataclass_fields__)
        held = {name: vars(batch)[name] for name in names}
        scored, _ = score(
            pair,
            prompts.to(pair.student.device),
            Rollouts(**held).to(pair.student.device),
            k=min(k, pair.student.vocabulary),
            temperature=batch.score_temperature if temperature is None else temperature,
            micro_tokens=2**14,
            chunk_elements=2**24,
            keep_teacher=False,
        )
        if "student_logp" not in absent(batch):
            far = (scored.student_logp.cpu() - batch.student_logp).abs()
            total, tokens = total + float(far.sum()), tokens + int(batch.lengths.sum())
            largest = max(largest, float(far.max()))
            records.notes["student"] = (
                f"student_logp of the file differs from this student's by {total / tokens:.2g} a "
                f"token, {largest:.2g} at most; this student's are used"
            )
        yield lacking(scored.to("cpu"), absent(batch) & names)


def refuse_padding(rows: list["Record"], path: str, pair: "Pair") -> None:
    """Refuse padding that no mask of the file names: the models would read it as text.

    Raises:
      InvalidInput: a prompt begins with two padding ids, or the supervised part of a response ends
        with the same padding or end id twice; names the ids.
    """
    padding = pair.tokenizer.pad_token_id
    begins = padding is not None and padding != pair.tokenizer.bos_token_id
    for row in rows:
        head, tail = row["prompt_tokens"][:2].tolist(), row["tokens"][row["mask"]][-2:].tolist()
        if begins and head == [padding, padding]:
            raise InvalidInput(
                f"{path}: the prompt {short(row['prompt_tokens'].tolist())} begins with the "
                f"padding id {padding}; add prompt_mask, or take the padding out"
            )
        if len(tail) == 2 and tail[0] == tail[1] and tail[0] in {padding, *pair.eos}:
            raise InvalidInput(
                f"{path}: the response {short(row['tokens'].tolist())} ends with the id {tail[0]} "
                "more than once, which pads or ends; add response_mask, or take the padding out"
            )


def prompts_of(rows: list["Record"], path: str, vocabulary: int) -> "Prompts":
    """The prompts (B, P) of checked rows, padded on the left."""
    import torch

    from opd.data.tasks import Prompts

    sizes = [len(row["prompt_tokens"]) for row in rows]
    if min(sizes) == 0:
        raise InvalidInput(
            f"{path}: a row has no prompt_tokens; the first token needs one before it"
        )
    tokens = torch.zeros(len(rows), max(sizes), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, max(sizes) - sizes[i] :] = torch.from_numpy(row["prompt_tokens"])
    if int(tokens.max()) >= vocabulary:
        raise InvalidInput(
            f"{path}: prompt token {int(tokens.max())} is not in the models' vocabulary of "
            f"{vocabulary}"
        )
    mask = torch.arange(max(sizes)) >= max(sizes) - torch.tensor(sizes)[:, None]
    index = torch.tensor([row["prompt"] for row in rows])
    return Prompts(tokens=tokens, mask=mask, index=index, answers=[""] * len(rows))


def show(
    label: str,
    row: dict[str, float],
    missing: dict[str, str],
    notes: dict[str, str],
    level: dict[str, int],
    as_json: bool,
) -> None:
    """Print a row: JSON on stdout and the rest on stderr, or all of it as a table."""
    beside = sys.stderr if as_json else sys.stdout
    if as_json:
        clean = {k: v if math.isfinite(v) else None for k, v in row.items()}
        print(json.dumps({"batch": label, **clean}))
    else:
        print(f"\n{label}")
        for number, part in grouped(row, level).items():
            print(f"\n from {LEVELS[number]}\n{table(part)}")
        print()
    for name, lack in missing.items():
        print(f"not computed: {name} ({lack})", file=beside)
    for note in notes.values():
        print(f"note: {note}", file=beside)


def grouped(row: dict[str, float], level: dict[str, int]) -> dict[int, dict[str, float]]:
    """The columns of each level, by the total that they were read from."""
    parts: dict[int, dict[str, Any]] = {}
    for name, value in row.items():
        # a column is its total's name and a suffix
        total = max((t for t in level if name.startswith(t)), key=len)
        parts.setdefault(level[total], {})[name] = value
    return dict(sorted(parts.items()))


def table(row: dict[str, float]) -> str:
    """Aligned lines `name value +- standard error`; metrics by position on one line."""
    lines: list[str] = []
    positions: dict[str, list[str]] = {}
    for name, value in row.items():
        if name.endswith("_se") or (name + "_se" not in row and "@" not in name and value != value):
            continue
        if "@" in name:
            base, where = name.split("@", 1)
            positions.setdefault(base, []).append(f"{where}: {value:.3g}")
            continue
        error = row.get(name + "_se")
        lines.append(f"  {name:36} {value:10.4g}" + (f"  ± {error:.2g}" if error else ""))
    for base, parts in positions.items():
        lines.append(f"  {base} by position   " + "  ".join(parts))
    return "\n".join(lines)
