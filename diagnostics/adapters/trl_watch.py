"""The state of an observed TRL run: the step under way, the window of the log, the checkpoint.

`diagnostics.adapters.trl` is what to call.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import measured
from diagnostics.batch import ScoredRollouts, concatenate
from diagnostics.core.partial import absent, lacking
from diagnostics.core.totals import Accumulator, Counts, read
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.monitor import Monitor

Row = dict[str, float]


class Watch:
    """The micro-batches of the current step, the rows so far, and the totals since the last log.

    An error of a measurement, a metric or a sink costs the row of its step and is a warning: the
    training goes on. It is raised where several processes train, since the others would wait for
    this one, and where the loss does not pass through what is wrapped (`OperationFailed`).
    """

    def __init__(self, trainer: Any, monitor: Monitor, k: int, elements: int) -> None:
        self.trainer, self.monitor, self.k, self.elements = trainer, monitor, k, elements
        self.rows: list[Row] = []
        self.window: dict[str, Accumulator] = {}
        self.window_steps = 0
        self._start_step(0)

    def _start_step(self, step: int) -> None:
        self.step = step
        self.batches: list[ScoredRollouts] = []
        self.on_policy: list[float] = []  # of each micro-batch, whether the student sampled it
        self.failed = False

    def is_due(self, step: int) -> bool:
        return any(step % n == 0 for n in self.monitor.every.values())

    @property
    def due(self) -> bool:
        """A loss that is computed now is one of a training step at which a metric is due."""
        training = self.trainer.model.training and torch.is_grad_enabled()
        return training and self.is_due(self.trainer.state.global_step + 1)

    def take(self, make_batch: Callable[[], ScoredRollouts] | None) -> None:
        """A micro-batch of the step under way; None if the student did not sample it."""
        step = self.trainer.state.global_step + 1
        if step != self.step:
            self._start_step(step)
        self.on_policy.append(float(make_batch is not None))
        if make_batch is not None and not self.failed:
            try:
                self.batches.append(make_batch().trimmed().checked())
            except OperationFailed:
                raise
            except Exception as error:
                self._lose_row(error)

    def close(self, done: int) -> None:
        """Read out the step `done`, which has just ended."""
        if not self.is_due(done):
            return
        if self.step != done:
            raise OperationFailed(
                f"step {done}: no loss of {type(self.trainer).__name__} passed through what is "
                "observed: a subclass or a setting computes it elsewhere; do not observe this run"
            )
        if not self.failed:
            try:
                self._read_out()
            except Exception as error:
                self._lose_row(error)
        self._start_step(0)

    def _read_out(self) -> None:
        share = torch.tensor(self.on_policy, dtype=torch.float64).mean()
        together = []
        if self.batches:
            lost = frozenset().union(*map(absent, self.batches))
            who = vars(self.batches[0]).get("who", "")
            together = [lacking(concatenate(self.batches), lost, who)]
        row = self.monitor(self.step, together, **{"trl/on_policy_share": share})
        self.rows.append({"step": self.step, **row})
        for name, total in self.monitor.totals.items():
            self.window[name] = self.window[name] + total if name in self.window else total
        self.window_steps += 1

    def _lose_row(self, error: Exception) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise error
        self.failed = True
        warnings.warn(
            f"step {self.step} has no row: {type(error).__name__}: {error} (training goes on)",
            RuntimeWarning,
            stacklevel=2,
        )

    def logged(self, columns: Collection[str] | None) -> Row:
        """The values over all steps since the last log, and a new window; {} if none was measured.

        Sums are added over the steps and divided once, as for micro-batches, so that a mean is over
        all tokens of the window; counts are means over its steps. Finite values of `columns` only,
        all if None.
        """
        if not self.window_steps:
            return {}
        row = read(self.window)
        for name, total in self.window.items():
            if isinstance(total, Counts):
                row |= {key: row[key] / self.window_steps for key in read({name: total})}
        row["trl/observed_steps"] = float(self.window_steps)
        self.window, self.window_steps = {}, 0
        shown = row if columns is None else {name: row[name] for name in columns if name in row}
        return {name: x for name, x in shown.items() if math.isfinite(x)}

    def measured(
        self, tokens: Tensor, mask: Tensor, logits: Any, vocabulary: int
    ) -> dict[str, Any]:
        return measured(tokens, mask, logits, vocabulary, self.k, self.elements)

    def begin(self, step: int, saved: dict[str, Any] | None) -> None:
        """Training starts after `step`, 0 or that of a checkpoint, where `saved` is the monitor's.

        Rows after the step are about to come again and are dropped. The window of the log starts
        anew, as the trainer's own does.
        """
        self._start_step(0)
        self.window, self.window_steps = {}, 0
        if step and saved is not None:
            self.monitor.load_state_dict(saved)
        if step:
            self.rows[:] = [row for row in self.rows if row["step"] <= step]
        self.monitor.rewind(step)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """owner.name is `value` while the context is open."""
    if not hasattr(owner, name):
        raise InvalidInput(f"{type(owner).__name__} has no {name}; this TRL is not known here")
    mine, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if mine:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def called_back(watch: Watch) -> Iterator[None]:
    """The trainer tells the watch of steps and checkpoints while the context is open.

    The monitor's state is written into the checkpoint's trainer_state.json, with the rest of it or
    not at all, and is read from there whatever `restore_callback_states_from_checkpoint` says.
    """
    trainer, name = watch.trainer, "OpdlabMonitor"

    def state(self: Any) -> dict[str, Any]:
        return {"args": {}, "attributes": {"saved": watch.monitor.state_dict()}}

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        known = state.stateful_callbacks.get(name)
        known = known[-1] if isinstance(known, list) else known
        watch.begin(state.global_step, known and known["attributes"]["saved"])
        state.stateful_callbacks[name] = self.state()  # saving expects an entry

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        watch.close(state.global_step)

    bases = (
        _parent(trainer.callback_handler, "TrainerCallback"),
        _parent(trainer.control, "ExportableState"),
    )
    methods = {"state": state, "on_train_begin": on_train_begin, "on_step_end": on_step_end}
    kind = type(name, bases, methods)  # its instances a trainer may make anew from a checkpoint
    trainer.add_callback(kind())
    try:
        yield
    finally:
        trainer.remove_callback(kind)


def _parent(instance: Any, name: str) -> type:
    """The class of this name that the instance's class derives from, without importing it."""
    for kind in type(instance).__mro__:
        if kind.__name__ == name:
            return kind
    raise InvalidInput(f"{type(instance).__name__} is no {name}; these transformers are not known")
