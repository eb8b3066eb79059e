"""Experiment trackers: send the rows of a run to TensorBoard, Weights & Biases or Trackio.

`rows.jsonl` and `evals.jsonl` are the primary record; a tracker is a copy that may fail without
harm to the run. A resumed run continues the same tracker run, under an id stored in the run folder.
Local trackers (TensorBoard, Trackio) are rewritten from the record on resume, so that no step from
before a kill appears twice and a tracker that is added later gets earlier steps too.
"""

import os
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.packages import load_package
from diagnostics.records import rows
from diagnostics.records.headline import select_columns
from diagnostics.records.rows import Row

Log = Callable[[int, Row], None]
TrackerHandles = tuple[Log, Callable[[], None]]
"""A function (step, row) that logs a row, and one that closes the tracker."""


@contextmanager
def open_trackers(
    names: tuple[str, ...],
    folder: Path,
    config: dict[str, Any],
    columns: Collection[str] | None = None,
) -> Iterator[Log]:
    """Open the named trackers and yield a function (step, row) that logs a row to all of them.

    Open it after the record in `folder` has been rewound to the step where the run continues.
    Evaluations are logged under `eval/` (see `with_eval_prefix`). If a tracker fails during the
    run, a warning is issued once and it gets no more rows; the other trackers and the run continue.

    Args:
        names: Names of trackers, from TRACKERS (the setting `loggers`).
        folder: Run folder; its name is the name of the tracker run.
        config: Settings, stored with the tracker run.
        columns: Columns to log, evaluations aside (`diagnostics.records.headline`); all if None.

    Yields:
        The logging function.

    Raises:
        InvalidInput: A name is unknown.
        ImportError: A tracker is not installed; the message names the extra.
        Exception: Whatever a tracker raises when it starts, such as missing credentials.
    """
    if unknown := [name for name in names if name not in TRACKERS]:
        raise InvalidInput(f"unknown loggers {unknown}; known: {', '.join(TRACKERS)}")
    log_functions: dict[str, Log] = {}

    def run_guarded(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if log_functions.pop(name, None) is not None:
                warnings.warn(
                    f"logger {name} failed and gets no more rows; rows.jsonl has all of them "
                    f"({type(error).__name__}: {error})",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def log(step: int, row: Row) -> None:
        values = select_columns(numeric_values(row), columns)
        for name, log_function in list(log_functions.items()):
            run_guarded(name, lambda log_function=log_function: log_function(step, values))  # type: ignore[misc]

    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            log_functions[name], close = TRACKERS[name](folder, config)
            stack.callback(run_guarded, name, close)
            if name in REWRITTEN:
                for step, row in recorded_rows(folder):
                    log_functions[name](step, select_columns(row, columns))
        yield log


def numeric_values(row: Row) -> dict[str, float]:
    """Return the numbers of a row, without `step`, text, lists and None."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def with_eval_prefix(row: Row) -> Row:
    """Prefix the columns of a row of evals.jsonl with `eval/`, as they are logged."""
    return {name if name == "step" else f"eval/{name}": value for name, value in row.items()}


def recorded_rows(folder: Path) -> Iterator[tuple[int, Row]]:
    """Yield (step, numbers) of all recorded rows and evaluations, sorted by step."""
    step_rows = [
        (row["step"], numeric_values(row))
        for row in rows.read_rows(folder / "rows.jsonl", {"step": int})
    ]
    evaluation_rows = rows.read_rows(folder / "evals.jsonl", {"step": int})
    step_rows += [(row["step"], numeric_values(with_eval_prefix(row))) for row in evaluation_rows]
    yield from sorted(step_rows, key=lambda pair: pair[0])


def open_tensorboard(folder: Path, config: dict[str, Any]) -> TrackerHandles:
    """Open new event files in `folder`/tensorboard; those of an earlier start are deleted."""
    library = load_package(
        "torch.utils.tensorboard", "the logger tensorboard", "tensorboard", "tensorboard"
    )
    log_folder = folder / "tensorboard"
    for old_file in log_folder.glob("events.out.tfevents.*"):
        old_file.unlink()
    writer = library.SummaryWriter(str(log_folder))
    writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(step: int, row: Row) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def open_wandb(folder: Path, config: dict[str, Any]) -> TrackerHandles:
    """Open a wandb run in the project `opdlab` (or WANDB_PROJECT), with files in `folder`/wandb.

    Steps that were sent before the run was killed are not sent again. WANDB_MODE and the other
    environment variables of wandb apply.

    Args:
        folder: Run folder.
        config: Settings, stored with the wandb run.

    Returns:
        The functions that log and close.
    """
    library = load_package("wandb", "the logger wandb", "wandb")
    run = library.init(
        project=os.environ.get("WANDB_PROJECT", "opdlab"),
        id=read_run_id(folder / "wandb_id.txt"),
        name=folder.name,
        resume="allow",
        dir=str(folder),
        config=config,
    )
    next_step = run.step  # 0 for a new run, and for every offline run

    def log(step: int, row: Row) -> None:
        if step >= next_step:
            run.log(row, step=step)

    return log, run.finish


def open_trackio(folder: Path, config: dict[str, Any]) -> TrackerHandles:
    """Open a new run in the local Trackio project `opdlab` (or TRACKIO_PROJECT).

    The run of an earlier start is deleted.

    With TRACKIO_SPACE_ID, which sends rows to a Space, the record of a resumed run is there twice.

    Args:
        folder: Run folder.
        config: Settings, stored with the Trackio run.

    Returns:
        The functions that log and close.
    """
    library = load_package("trackio", "the logger trackio", "trackio")
    name = f"{folder.name}-{read_run_id(folder / 'trackio_id.txt')[:8]}"
    project = os.environ.get("TRACKIO_PROJECT", "opdlab")
    with suppress(ValueError):  # the project does not exist yet
        for previous_run in library.Api().runs(project):
            if previous_run.name == name:
                previous_run.delete()
    run = library.init(project=project, name=name, config=config, resume="allow", embed=False)

    def log(step: int, row: Row) -> None:
        run.log(row, step=step)

    return log, run.finish


def read_run_id(path: Path) -> str:
    """Read the run id from a file, creating it if necessary."""
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return path.read_text()


TRACKERS: Mapping[str, Callable[[Path, dict[str, Any]], TrackerHandles]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "trackio": open_trackio,
}

REWRITTEN = ("tensorboard", "trackio")
"""Local trackers, which begin anew on resume and get all recorded rows first."""
