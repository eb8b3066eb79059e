"""Offline metrics of saved batches or records (`opd diagnose`).

Fields that a file does not have are reported, and all other metrics computed. With both models
given, records that hold only tokens and prompt_tokens are scored first, and dumps of text are
tokenised, so that all metrics are available. Shapes: B responses, T response positions, P prompt
positions.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import short_repr
from diagnostics.records.run_folder import RunFolder

if TYPE_CHECKING:
    from diagnostics.batch import ScoredRollouts
    from diagnostics.formats.dump_format import Scores
    from diagnostics.monitor import Metric
    from diagnostics.records.columns import Record
    from diagnostics.records.reader import Records
    from opd.data.prompts import Prompts
    from opd.teachers.pair import ModelPair

LEVELS = (
    "tokens and masks",
    "log-probabilities of the sampled tokens",
    "top-K log-probabilities",
    "full next-token distributions",
)


def batch_files(path: Path, all_batches: bool) -> list[Path]:
    """Return the file itself, or the saved batches of a run folder.

    Args:
        path: A batch file or a run folder.
        all_batches: Return all batches instead of the last one.

    Returns:
        The files.

    Raises:
        MissingFile: The path is neither, or the run saved no batches.
    """
    if path.is_file():
        return [path]
    files = list(RunFolder(path).batches().values())
    if not files:
        raise MissingFile(f"{path} has no saved batches; see --save-batch-every")
    return files if all_batches else files[-1:]


@dataclass(frozen=True)
class PanelResult:
    """The metrics of batches, and what is to be known about them."""

    row: dict[str, float]
    """Columns of the metrics."""
    missing: dict[str, str]
    """Why a metric could not be computed, by its name."""
    notes: dict[str, str]
    """Notes on the file, by subject."""
    levels: dict[str, int]
    """Lowest of LEVELS at which a metric can be computed, by its name."""
    is_text: bool = False
    """The tokens were made of text, and are not exactly those that were sampled."""


def diagnose(file: Path) -> PanelResult:
    """Compute the metrics of one batch file."""
    from diagnostics.batch import ScoredRollouts
    from diagnostics.records.batch_files import load_batch

    batch = load_batch(file)
    if not isinstance(batch, ScoredRollouts):
        raise InvalidInput(f"{file} contains rollouts without teacher log-probabilities")
    return compute_panel([batch], {})


def compute_panel(batches: Iterable["ScoredRollouts"], notes: dict[str, str]) -> PanelResult:
    """Compute the metrics of several batches together.

    Args:
        batches: The batches.
        notes: Notes that reading the batches may add to.

    Returns:
        The metrics.
    """
    from diagnostics.catalogue import PANEL
    from diagnostics.monitor import Monitor
    from opd.analysis.one_model import one_model_panel

    remaining = iter(batches)
    first_batch = next(remaining, None)
    panel = dict(PANEL) if first_batch is None else {**PANEL, **one_model_panel(first_batch)}
    levels = {} if first_batch is None else access_levels(first_batch, panel)
    monitor = Monitor(panel)
    row = monitor(0, remaining if first_batch is None else chain([first_batch], remaining))
    return PanelResult(row, monitor.missing, notes, levels)


def access_levels(batch: "ScoredRollouts", panel: "Mapping[str, Metric]") -> dict[str, int]:
    """Return the lowest of `LEVELS` at which each metric can be computed from such a batch."""
    from diagnostics.core.partial import without_fields
    from diagnostics.missing import missing_fields
    from diagnostics.monitor import Monitor

    full_batch = batch.rows([0])
    sampled_batch = full_batch.with_fields(support=None, prefix=None)
    logp_fields = {"student_logp", "teacher_logp", "sampler_logp"} - missing_fields(batch).keys()
    stages = (
        without_fields(sampled_batch, logp_fields),
        sampled_batch,
        full_batch.with_fields(prefix=None),
        full_batch,
    )
    level_by_metric: dict[str, int] = {}
    for level, stage in enumerate(stages):
        for name in Monitor(panel).measure(stage):
            level_by_metric.setdefault(name, level)
    return level_by_metric


def diagnose_records(
    path: Path,
    pair: "ModelPair | None" = None,
    *,
    task: str | None = None,
    k: int = 16,
    temperature: float | None = None,
    dump_format: str | None = None,
    rename: "Mapping[str, str] | None" = None,
    scores: "Scores | None" = None,
) -> PanelResult:
    """Compute the metrics of a records file or of a dump of another tool.

    Args:
        path: The file.
        pair: Models that score the records; None uses the log-probabilities in the file.
        task: Use only the records of this task.
        k: Size of the teacher's top-K when scoring.
        temperature: Temperature when scoring; None for the records' score_temperature.
        dump_format: Name of the dump format; None to recognise it.
        rename: Names in the file -> a column, or a field of the dump format.
        scores: The model of a server's log-probabilities; None for the format's default.

    Returns:
        See `compute_panel`.

    Raises:
        InvalidInput: There are no rows of the task, or the models cannot score the records.
    """
    from diagnostics.formats.dump_format import ReadContext
    from diagnostics.records.reader import Records
    from opd.analysis.dump_tokenizer import PairTokenizer

    tokenizer = None if pair is None else PairTokenizer(pair.tokenizer)
    records = Records(
        path,
        task=task,
        rename=rename,
        dump_format=dump_format,
        context=ReadContext(scores=scores, tokenizer=tokenizer),
    )
    batches: Iterable[ScoredRollouts] = records
    if pair is not None:
        batches = rescore_records(records, pair, k, temperature)
    elif not records.columns >= {"student_logp", "teacher_logp"}:
        records.notes["scores"] = "--student and --teacher add the missing log-probabilities"
    result = compute_panel(batches, records.notes)
    if not result.row:
        raise InvalidInput(f"{path} has no rows of task {task!r}")
    if records.unused:
        records.notes["unused"] = f"unused columns: {', '.join(records.unused)}"
    is_text = records.dump_format is not None and records.dump_format.is_text
    return replace(result, is_text=is_text)


def rescore_records(
    records: "Records", pair: "ModelPair", k: int, temperature: float | None
) -> Iterator["ScoredRollouts"]:
    """Score records with both models, including the teacher's top-K and distribution statistics.

    Log-probabilities in the file are not used; their distance from this student's becomes a note.

    Args:
        records: The records.
        pair: The models.
        k: Size of the teacher's top-K.
        temperature: Temperature of the scores; None for the records' score_temperature.

    Yields:
        The scored batches.

    Raises:
        InvalidInput: The records have no prompt_tokens, or an id is not in the shared vocabulary.
    """
    from diagnostics.batch import Rollouts
    from diagnostics.core.partial import without_fields
    from diagnostics.missing import missing_fields
    from opd.scoring.request import METRICS_ONLY, ScoreRequest
    from opd.scoring.score import score_batch

    if "prompt_tokens" not in records.columns:
        raise InvalidInput(
            f"{records.path} has no prompt_tokens; the models need the prompt ids to score the "
            "responses"
        )
    total, largest, tokens = 0.0, 0.0, 0
    for rows in records.groups():
        batch = records.batch(rows)
        reject_padding(rows, str(records.path), pair)
        prompts = make_prompts(rows, str(records.path), pair.student.vocabulary)
        if int(batch.tokens.max()) >= pair.student.vocabulary:
            raise InvalidInput(
                f"{records.path}: token {int(batch.tokens.max())} is not in the models' "
                f"vocabulary of {pair.student.vocabulary}"
            )
        field_names = set(Rollouts.__dataclass_fields__)
        fields = {name: vars(batch)[name] for name in field_names}
        request = ScoreRequest(
            requirements=replace(METRICS_ONLY, support_k=min(k, pair.student.vocabulary)),
            temperature=batch.score_temperature if temperature is None else temperature,
            eos_map=pair.eos_map,
        )
        device = pair.student.device
        scored = score_batch(
            pair.student,
            pair.teacher,
            prompts.to(device),
            Rollouts(**fields).to(device),
            request,
        ).scored
        if "student_logp" not in missing_fields(batch):
            distance = (scored.student_logp.cpu() - batch.student_logp).abs()
            total, tokens = total + float(distance.sum()), tokens + int(batch.lengths.sum())
            largest = max(largest, float(distance.max()))
            records.notes["student"] = (
                f"student_logp of the file differs from this student's by {total / tokens:.2g} per "
                f"token, {largest:.2g} at most; this student's values are used"
            )
        yield without_fields(scored.to("cpu"), missing_fields(batch).keys() & field_names)


def reject_padding(rows: list["Record"], path: str, pair: "ModelPair") -> None:
    """Reject padding that the file does not mask: the models would read it as text.

    Args:
        rows: The records.
        path: The file, for messages.
        pair: The models.

    Raises:
        InvalidInput: A prompt begins with two padding ids, or the supervised part of a response
            ends with the same padding or EOS id twice.
    """
    padding = pair.tokenizer.pad_token_id
    pad_differs_from_bos = padding is not None and padding != pair.tokenizer.bos_token_id
    for row in rows:
        head, tail = row["prompt_tokens"][:2].tolist(), row["tokens"][row["mask"]][-2:].tolist()
        if pad_differs_from_bos and head == [padding, padding]:
            raise InvalidInput(
                f"{path}: the prompt {short_repr(row['prompt_tokens'].tolist())} begins with the "
                f"padding id {padding}; add prompt_mask, or remove the padding"
            )
        if len(tail) == 2 and tail[0] == tail[1] and tail[0] in {padding, *pair.eos}:
            raise InvalidInput(
                f"{path}: the response {short_repr(row['tokens'].tolist())} ends with the id "
                f"{tail[0]} "
                "more than once, which is a padding or EOS id; add response_mask, or remove the "
                "padding"
            )


def make_prompts(rows: list["Record"], path: str, vocabulary: int) -> "Prompts":
    """Build the prompts (B, P) of checked rows, padded on the left."""
    import torch

    from opd.data.prompts import Prompts

    if any(len(row["prompt_tokens"]) == 0 for row in rows):
        raise InvalidInput(
            f"{path}: a row has no prompt_tokens; the first response token needs at least one "
            "before it"
        )
    index = torch.tensor([row["prompt"] for row in rows])
    prompts = Prompts.from_ids([row["prompt_tokens"] for row in rows], index)
    if int(prompts.tokens.max()) >= vocabulary:
        raise InvalidInput(
            f"{path}: prompt token {int(prompts.tokens.max())} is not in the models' vocabulary of "
            f"{vocabulary}"
        )
    return prompts
