"""State of an observed TRL run: the current step, the log window, and the checkpoint.

`diagnostics.adapters.trl` is the public interface.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import score_logits
from diagnostics.batch import ScoredRollouts, concatenate
from diagnostics.core.partial import without_fields
from diagnostics.core.totals import Accumulator, Counts, compute
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.missing import missing_fields
from diagnostics.monitor import Monitor

Row = dict[str, float]


class TrainerObserver:
    """The micro-batches of the current step, the rows so far, and the sums since the last log line.

    An exception in a measurement, a metric or a sink costs the row of its step and is a warning:
    training continues. It is raised if several processes train, since the others would wait for
    this one, and if the loss does not call the wrapped functions (`OperationFailed`).

    Args:
        trainer: The TRL trainer.
        monitor: The monitor to run.
        k: Size of both models' top-K.
        max_logits_per_chunk: Elements of a (tokens, V) tensor that exist at a time.
    """

    def __init__(self, trainer: Any, monitor: Monitor, k: int, max_logits_per_chunk: int) -> None:
        self.trainer, self.monitor, self.k, self.max_logits_per_chunk = (
            trainer,
            monitor,
            k,
            max_logits_per_chunk,
        )
        self.rows: list[Row] = []
        self.window: dict[str, Accumulator] = {}
        self.window_steps = 0
        self._start_step(0)

    def _start_step(self, step: int) -> None:
        self.step = step
        self.batches: list[ScoredRollouts] = []
        self.on_policy: list[float] = []  # per micro-batch: whether the student sampled it
        self.failed = False

    def is_due(self, step: int) -> bool:
        """Return whether a metric is due at this step."""
        return any(step % n == 0 for n in self.monitor.interval.values())

    @property
    def is_measured(self) -> bool:
        """Whether a loss computed now belongs to a training step at which a metric is due."""
        training = self.trainer.model.training and torch.is_grad_enabled()
        return training and self.is_due(self.trainer.state.global_step + 1)

    def add_micro_batch(self, make_batch: Callable[[], ScoredRollouts] | None) -> None:
        """Add a micro-batch to the current step.

        Args:
            make_batch: Builds the batch; None if the student did not sample it.
        """
        step = self.trainer.state.global_step + 1
        if step != self.step:
            self._start_step(step)
        self.on_policy.append(float(make_batch is not None))
        if make_batch is not None and not self.failed:
            try:
                self.batches.append(make_batch().trim().validate())
            except OperationFailed:
                raise
            except Exception as error:
                self._drop_row(error)

    def finish_step(self, step: int) -> None:
        """Compute the row of a step that has just ended.

        Args:
            step: Its number.

        Raises:
            OperationFailed: No loss of the step called the wrapped functions.
        """
        if not self.is_due(step):
            return
        if self.step != step:
            raise OperationFailed(
                f"step {step}: the loss of {type(self.trainer).__name__} did not call the observed "
                "functions; a subclass or a setting computes it elsewhere; do not observe this run"
            )
        if not self.failed:
            try:
                self._compute_row()
            except Exception as error:
                self._drop_row(error)
        self._start_step(0)

    def _compute_row(self) -> None:
        share = torch.tensor(self.on_policy, dtype=torch.float64).mean()
        step_batches = []
        if self.batches:
            missing: dict[str, str] = {}
            for batch in self.batches:
                missing |= missing_fields(batch)
            subject = next(iter(missing.values()), "")
            step_batches = [
                concatenate([without_fields(batch, missing, subject) for batch in self.batches])
            ]
        row = self.monitor(self.step, step_batches, **{"trl/on_policy_share": share})
        self.rows.append({"step": self.step, **row})
        for name, total in self.monitor.totals.items():
            self.window[name] = self.window[name] + total if name in self.window else total
        self.window_steps += 1

    def _drop_row(self, error: Exception) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise error
        self.failed = True
        warnings.warn(
            f"step {self.step} has no row: {type(error).__name__}: {error} (training continues)",
            RuntimeWarning,
            stacklevel=2,
        )

    def log_values(self, columns: Collection[str] | None) -> Row:
        """Return the values over all steps since the last log line, and start a new window.

        Sums are added over the steps and divided once, as for micro-batches, so that a mean is over
        all tokens of the window; counts are means over its steps.

        Args:
            columns: Names of the values to return; all if None.

        Returns:
            The finite values; {} if no step was measured.
        """
        if not self.window_steps:
            return {}
        row = compute(self.window)
        for name, total in self.window.items():
            if isinstance(total, Counts):
                row |= {key: row[key] / self.window_steps for key in compute({name: total})}
        row["trl/observed_steps"] = float(self.window_steps)
        self.window, self.window_steps = {}, 0
        selected = row if columns is None else {name: row[name] for name in columns if name in row}
        return {name: x for name, x in selected.items() if math.isfinite(x)}

    def score_logits(
        self, tokens: Tensor, mask: Tensor, logits: Any, vocabulary: int
    ) -> dict[str, Any]:
        """Score a micro-batch with this observer's settings; see `from_logits.score_logits`."""
        return score_logits(tokens, mask, logits, vocabulary, self.k, self.max_logits_per_chunk)

    def start_training(self, step: int, saved: dict[str, Any] | None) -> None:
        """Prepare for training that starts after `step`.

        Rows after the step will be repeated and are dropped. The window of the log is reset, as the
        trainer's own is.

        Args:
            step: 0, or the step of a checkpoint.
            saved: The monitor's state in that checkpoint.
        """
        self._start_step(0)
        self.window, self.window_steps = {}, 0
        if step and saved is not None:
            self.monitor.load_state_dict(saved)
        if step:
            self.rows[:] = [row for row in self.rows if row["step"] <= step]
        self.monitor.rewind(step)


@contextmanager
def replace_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set owner.name to `value` while the context is open."""
    if not hasattr(owner, name):
        raise InvalidInput(
            f"{type(owner).__name__} has no {name}; this TRL version is not supported"
        )
    is_instance_attribute, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_instance_attribute:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextmanager
def register_callback(observer: TrainerObserver) -> Iterator[None]:
    """Register a trainer callback that reports steps and checkpoints while the context is open.

    The monitor's state is written into the checkpoint's trainer_state.json, atomically with the
    rest, and is restored from there whatever `restore_callback_states_from_checkpoint` says.

    Args:
        observer: The observer to notify.

    Yields:
        Nothing.
    """
    trainer, name = observer.trainer, "OpdlabMonitor"

    def state(self: Any) -> dict[str, Any]:
        return {"args": {}, "attributes": {"saved": observer.monitor.state_dict()}}

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved_state = state.stateful_callbacks.get(name)
        saved_state = saved_state[-1] if isinstance(saved_state, list) else saved_state
        observer.start_training(
            state.global_step, saved_state and saved_state["attributes"]["saved"]
        )
        state.stateful_callbacks[name] = self.state()  # saving a checkpoint expects an entry

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        observer.finish_step(state.global_step)

    bases = (
        _base_class(trainer.callback_handler, "TrainerCallback"),
        _base_class(trainer.control, "ExportableState"),
    )
    methods = {"state": state, "on_train_begin": on_train_begin, "on_step_end": on_step_end}
    # a class of its own: the trainer may rebuild instances from a checkpoint
    callback_class = type(name, bases, methods)
    trainer.add_callback(callback_class())
    try:
        yield
    finally:
        trainer.remove_callback(callback_class)


def _base_class(instance: Any, name: str) -> type:
    """Return the base class of this name of an instance's class, without importing it."""
    for kind in type(instance).__mro__:
        if kind.__name__ == name:
            return kind
    raise InvalidInput(
        f"{type(instance).__name__} is no {name}; this transformers version is not supported"
    )
