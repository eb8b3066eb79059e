"""State of an observed TRL run: the current step, the current evaluation, and the log window.

`diagnostics.adapters.trl` is the public interface.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import score_answers, score_logits
from diagnostics.batch import ScoredRollouts
from diagnostics.concatenation import concatenate
from diagnostics.core.partial import without_fields
from diagnostics.core.totals import Accumulator, Counts, compute
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.missing import missing_fields
from diagnostics.monitor import Monitor

Row = dict[str, float]


class Rows(list[Row]):
    """Rows of the training steps; those of evaluations, which have a prefix, are kept apart.

    Attributes:
        evaluation: One row per evaluation, with its step under "step".
    """

    def __init__(self) -> None:
        super().__init__()
        self.evaluation: list[Row] = []


@dataclass
class MicroBatches:
    """The micro-batches of one optimizer step or of one evaluation."""

    batches: list[ScoredRollouts] = field(default_factory=list)
    """Those that the student sampled."""
    on_policy: list[float] = field(default_factory=list)
    """Per micro-batch: whether the student sampled it."""
    failed: bool = False
    """Whether a measurement raised an exception, which costs the row."""

    def concatenated(self) -> list[ScoredRollouts]:
        """Return one batch, without the fields that some micro-batch lacks; [] if there is none."""
        missing: dict[str, str] = {}
        for batch in self.batches:
            missing |= missing_fields(batch)
        subject = next(iter(missing.values()), "")
        parts = [without_fields(batch, missing, subject) for batch in self.batches]
        return [concatenate(parts)] if parts else []

    def on_policy_share(self) -> Tensor:
        """Return the share of micro-batches that the student sampled, NaN if there is none."""
        return torch.tensor(self.on_policy, dtype=torch.float64).mean()


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
        self.rows = Rows()
        self.evaluation: MicroBatches | None = None  # while an evaluation is observed
        self.window: dict[str, Accumulator] = {}
        self.window_steps = 0
        self._start_step(0)

    def _start_step(self, step: int) -> None:
        self.step, self.training = step, MicroBatches()

    def is_due(self, step: int) -> bool:
        """Return whether a metric is due at this step."""
        return any(step % n == 0 for n in self.monitor.interval.values())

    @property
    def is_measured(self) -> bool:
        """Whether a loss computed now belongs to an observed evaluation or to a due step."""
        if self.evaluation is not None:
            return True
        training = self.trainer.model.training and torch.is_grad_enabled()
        return training and self.is_due(self.trainer.state.global_step + 1)

    def add_micro_batch(self, make_batch: Callable[[], ScoredRollouts] | None) -> None:
        """Add a micro-batch to the current step.

        Args:
            make_batch: Builds the batch; None if the student did not sample it.
        """
        collected = self.evaluation
        if collected is None:
            step = self.trainer.state.global_step + 1
            if step != self.step:
                self._start_step(step)
            collected = self.training
        collected.on_policy.append(float(make_batch is not None))
        if make_batch is not None and not collected.failed:
            try:
                collected.batches.append(make_batch().trim().validate())
            except OperationFailed:
                raise
            except Exception as error:
                self._drop_row(collected, error)

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
        if not self.training.failed:
            try:
                self._compute_row()
            except Exception as error:
                self._drop_row(self.training, error)
        self._start_step(0)

    def _compute_row(self) -> None:
        collected = self.training
        share = {"trl/on_policy_share": collected.on_policy_share()}
        row = self.monitor(self.step, collected.concatenated(), **share)
        self.rows.append({"step": self.step, **row})
        for name, total in self.monitor.totals.items():
            self.window[name] = self.window[name] + total if name in self.window else total
        self.window_steps += 1

    def finish_evaluation(self, prefix: str, columns: Collection[str] | None) -> Row:
        """Compute the row of an evaluation that has just ended, and call the monitor's sinks.

        The monitor's alarms and intervals are those of training and take no part.

        Args:
            prefix: Put before the names of columns, such as "eval".
            columns: Names of the values to return, without the prefix; all if None.

        Returns:
            The finite values for the trainer's log; {} if a measurement failed.

        Raises:
            OperationFailed: No loss of the evaluation called the wrapped functions.
        """
        collected, self.evaluation = self.evaluation, None
        step = self.trainer.state.global_step
        if collected is None or not collected.on_policy:
            raise OperationFailed(
                f"evaluation at step {step}: {type(self.trainer).__name__} computed no loss "
                "through the observed functions; pass evaluation=False"
            )
        if collected.failed:
            return {}
        try:
            monitor = Monitor(self.monitor.panel, combine=self.monitor.combine)
            share = {"trl/on_policy_share": collected.on_policy_share()}
            row = monitor(step, collected.concatenated(), **share)
            prefixed_row = {f"{prefix}_{name}": x for name, x in row.items()}
            self.rows.evaluation.append({"step": step, **prefixed_row})
            for sink in self.monitor.sinks:
                sink(step, prefixed_row)
        except Exception as error:
            self._drop_row(collected, error)
            return {}
        return {f"{prefix}_{name}": x for name, x in _select_finite(row, columns).items()}

    def _drop_row(self, collected: MicroBatches, error: Exception) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise error
        collected.failed = True
        subject = (
            f"step {self.step}"
            if collected is self.training
            else f"the evaluation at step {self.trainer.state.global_step}"
        )
        warnings.warn(
            f"{subject} has no row: {type(error).__name__}: {error} (training continues)",
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
        return _select_finite(row, columns)

    def score_logits(
        self, tokens: Tensor, mask: Tensor, logits: Any, vocabulary: int
    ) -> dict[str, Any]:
        """Score a micro-batch with this observer's settings; see `from_logits.score_logits`."""
        return score_logits(tokens, mask, logits, vocabulary, self.k, self.max_logits_per_chunk)

    def score_answers(
        self, tokens: Tensor, mask: Tensor, logits: Any, vocabulary: int, **answers: Any
    ) -> dict[str, Any]:
        """Score a micro-batch of a server's teacher; see `from_logits.score_answers`."""
        limit = self.max_logits_per_chunk
        return score_answers(tokens, mask, logits, vocabulary, self.k, limit, **answers)

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
            for rows in (self.rows, self.rows.evaluation):
                rows[:] = [row for row in rows if row["step"] <= step]
        self.monitor.rewind(step)


def _select_finite(row: Row, columns: Collection[str] | None) -> Row:
    """Return the finite values of the named columns that a row has; of all columns if None."""
    selected = row if columns is None else {name: row[name] for name in columns if name in row}
    return {name: x for name, x in selected.items() if math.isfinite(x)}


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


def single_call(calls: list[Any], name: str) -> Any:
    """Return the recorded call; raise unless there was exactly one."""
    if len(calls) != 1:
        raise OperationFailed(
            f"the loss called {name} {len(calls)} times, expected once: it is computed elsewhere "
            "(a fused kernel, an override); disable that, or do not observe this run"
        )
    return calls[0]
