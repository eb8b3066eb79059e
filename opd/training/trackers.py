"""Loggers: the rows of a run, sent on to TensorBoard, Weights & Biases or Trackio.

`rows.jsonl` and `evals.jsonl` stay the record; a logger is a copy that may fail without harm. A
resumed run goes on in the same place of each, under an identity kept in the run folder. What lies
on this machine (TensorBoard, Trackio) is written anew from the record then, so it has no step of
before a kill twice, and a logger that is named late gets the steps that it missed.
"""

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.packages import load_package
from diagnostics.records import rows
from diagnostics.records.rows import Row

Log = Callable[[int, Row], None]
Opened = tuple[Log, Callable[[], None]]


@contextmanager
def open_loggers(names: tuple[str, ...], folder: Path, config: dict[str, Any]) -> Iterator[Log]:
    """A function (step, row) that sends a row's numbers to every named logger.

    Open it after the record in `folder` has been rewound to where the run goes on. Evaluations
    go under `eval/`: see `evaluation`. An error of a logger while the run goes on is a warning,
    once, and that logger gets no more rows; the others and the run go on.

    Args:
      names: of LOGGERS.
      folder: the run folder; its name is the run's name.
      config: the settings, shown beside the run.

    Raises:
      ValueError: unknown name. ImportError: the logger is not installed; names the extra.
      Whatever a logger raises at its start, such as missing credentials.
    """
    if unknown := [name for name in names if name not in LOGGERS]:
        raise InvalidInput(f"unknown loggers {unknown}; known: {', '.join(LOGGERS)}")
    sinks: dict[str, Log] = {}

    def guarded(name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            if sinks.pop(name, None) is not None:
                warnings.warn(
                    f"the logger {name} failed and gets no more rows; rows.jsonl has them all "
                    f"({type(error).__name__}: {error})",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def log(step: int, row: Row) -> None:
        values = numbers(row)
        for name, sink in list(sinks.items()):
            guarded(name, lambda sink=sink: sink(step, values))  # type: ignore[misc]

    with ExitStack() as stack:
        for name in dict.fromkeys(names):
            sinks[name], close = LOGGERS[name](folder, config)
            stack.callback(guarded, name, close)
        yield log


def numbers(row: Row) -> dict[str, float]:
    """The numbers of a row, without `step`; None, text and lists are left out."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def evaluation(row: Row) -> Row:
    """A row of evals.jsonl with its numbers under `eval/`, as they are logged."""
    return {name if name == "step" else f"eval/{name}": value for name, value in row.items()}


def recorded(folder: Path) -> Iterator[tuple[int, Row]]:
    """(step, numbers) of every row and evaluation in the record, in the order of steps."""
    found = [(row["step"], numbers(row)) for row in rows.read(folder / "rows.jsonl", {"step": int})]
    evals = rows.read(folder / "evals.jsonl", {"step": int})
    found += [(row["step"], numbers(evaluation(row))) for row in evals]
    yield from sorted(found, key=lambda pair: pair[0])


def tensorboard(folder: Path, config: dict[str, Any]) -> Opened:
    """Event files in `folder`/tensorboard, written anew from the record, so no step is twice."""
    library = load_package(
        "torch.utils.tensorboard", "the logger tensorboard", "tensorboard", "tensorboard"
    )
    where = folder / "tensorboard"
    for old in where.glob("events.out.tfevents.*"):
        old.unlink()
    writer = library.SummaryWriter(str(where))
    writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(step: int, row: Row) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    for step, row in recorded(folder):
        log(step, row)
    return log, writer.close


def wandb(folder: Path, config: dict[str, Any]) -> Opened:
    """A run of the project `opdlab`, or of WANDB_PROJECT; its files are in `folder`/wandb.

    A step that is there already, sent before the run was killed, is not sent again. WANDB_MODE and
    the other variables of wandb have their way.
    """
    library = load_package("wandb", "the logger wandb", "wandb")
    run = library.init(
        project=os.environ.get("WANDB_PROJECT", "opdlab"),
        id=identity(folder / "wandb_id.txt"),
        name=folder.name,
        resume="allow",
        dir=str(folder),
        config=config,
    )
    there = run.step  # 0 for a new run, and for every offline one

    def log(step: int, row: Row) -> None:
        if step >= there:
            run.log(row, step=step)

    return log, run.finish


def trackio(folder: Path, config: dict[str, Any]) -> Opened:
    """A run of the local Trackio project `opdlab`, or TRACKIO_PROJECT, made anew from the record.

    Where TRACKIO_SPACE_ID sends it to a Space instead, a resumed run's record is there twice.
    """
    library = load_package("trackio", "the logger trackio", "trackio")
    name = f"{folder.name}-{identity(folder / 'trackio_id.txt')[:8]}"
    project = os.environ.get("TRACKIO_PROJECT", "opdlab")
    with suppress(ValueError):  # no such project yet
        for old in library.Api().runs(project):
            if old.name == name:
                old.delete()
    run = library.init(project=project, name=name, config=config, resume="allow", embed=False)

    def log(step: int, row: Row) -> None:
        run.log(row, step=step)

    for step, row in recorded(folder):
        log(step, row)
    return log, run.finish


def identity(path: Path) -> str:
    """The identity kept in a file, made when first asked for."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


LOGGERS: Mapping[str, Callable[[Path, dict[str, Any]], Opened]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
}
