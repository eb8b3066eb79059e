"""`opd diagnose`: the panel offline, on saved batches or records of our runs or anybody's.

What a file lacks is named, and the rest computed. With both models given, records that hold only
tokens and prompt_tokens are scored first, so that the whole panel is there. Shapes: B responses,
T response positions, P prompt positions.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import short

if TYPE_CHECKING:
    from diagnostics.batch import ScoredRollouts
    from diagnostics.records.columns import Record
    from diagnostics.records.reader import Records
    from opd.data.prompts import Prompts
    from opd.teachers.pair import ModelPair

LEVELS = (
    "tokens and masks",
    "log-probabilities of the sampled tokens",
    "top-K log-probabilities",
    "whole next-token distributions",
)


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
    from diagnostics.batch import ScoredRollouts
    from diagnostics.records.batch_files import load

    batch = load(file)
    if not isinstance(batch, ScoredRollouts):
        raise InvalidInput(f"{file} holds rollouts without teacher log-probabilities")
    return panel([batch], {})


def panel(batches: Iterable["ScoredRollouts"], notes: dict[str, str]) -> Found:
    """The row of all batches together, `notes` as they are after the last one, and the levels."""
    from diagnostics.monitor import Monitor

    monitor = Monitor()
    level: dict[str, int] = {}

    def watched() -> Iterator["ScoredRollouts"]:
        for batch in batches:
            if not level:
                level.update(levels(batch))
            yield batch

    row = monitor(0, watched())
    return row, monitor.missing, notes, level


def levels(batch: "ScoredRollouts") -> dict[str, int]:
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


def _of_records(path: Path, pair: "ModelPair | None", given: argparse.Namespace) -> Found:
    from diagnostics.records.reader import Records

    records = Records(path, task=given.task)
    batches: Iterable[ScoredRollouts] = records
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
    records: "Records", pair: "ModelPair", k: int, temperature: float | None
) -> Iterator["ScoredRollouts"]:
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
            max_tokens_per_microbatch=2**14,
            max_logits_per_chunk=2**24,
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


def refuse_padding(rows: list["Record"], path: str, pair: "ModelPair") -> None:
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

    from opd.data.prompts import Prompts

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
