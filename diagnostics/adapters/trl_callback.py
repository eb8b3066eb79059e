"""What is attached to a TRL trainer while it is observed, and the callback that reports its steps.

`diagnostics.adapters.trl` is the public interface.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diagnostics.adapters.trl_watch import MicroBatches, TrainerObserver, replace_attribute
from diagnostics.errors import InvalidInput

Attach = Callable[[TrainerObserver, ExitStack], None]
"""Wraps the functions of a trainer's loss; the stack restores them."""


@contextmanager
def attached(
    observer: TrainerObserver,
    attach: Attach,
    log_columns: Collection[str] | None,
    evaluation: bool,
) -> Iterator[None]:
    """Wrap the trainer's loss, log and, if asked for, evaluation while the context is open.

    Args:
        observer: The observer of the trainer.
        attach: The function for this kind of trainer.
        log_columns: Columns that are added to the trainer's log; all if None.
        evaluation: Whether evaluations are observed too.

    Yields:
        Nothing.
    """
    trainer = observer.trainer
    with ExitStack() as stack:
        attach(observer, stack)
        log = trainer.log

        def log_with_row(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            if "loss" in logs:
                logs |= observer.log_values(log_columns)
            return log(logs, *args, **kwargs)

        stack.enter_context(replace_attribute(trainer, "log", log_with_row))
        if evaluation:
            loop = _observed_evaluation_loop(observer, log_columns)
            stack.enter_context(replace_attribute(trainer, "evaluation_loop", loop))
        yield


def _observed_evaluation_loop(
    observer: TrainerObserver, log_columns: Collection[str] | None
) -> Callable[..., Any]:
    """Return the trainer's `evaluation_loop` with the panel's columns among its metrics.

    The trainer logs these metrics, returns them from `evaluate` and may select its best model by
    one of them.
    """
    original = observer.trainer.evaluation_loop
    signature = inspect.signature(original)

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        observer.evaluation = MicroBatches()
        try:
            output = original(*args, **kwargs)
            values = observer.finish_evaluation(bound.arguments["metric_key_prefix"], log_columns)
        finally:
            observer.evaluation = None
        output.metrics.update(values)
        return output

    return evaluation_loop


@contextmanager
def register_callback(observer: TrainerObserver) -> Iterator[None]:
    """Register a trainer callback that reports steps and checkpoints while the context is open.

    Args:
        observer: The observer to notify.

    Yields:
        Nothing.
    """
    callback = make_callback(observer)
    observer.trainer.add_callback(callback)
    try:
        yield
    finally:
        observer.trainer.remove_callback(type(callback))


def make_callback(
    observer: TrainerObserver,
    on_begin: Callable[[], object] = lambda: None,
    on_end: Callable[[], object] = lambda: None,
) -> Any:
    """Return a trainer callback that reports steps and checkpoints to the observer.

    The monitor's state is written into the checkpoint's trainer_state.json, atomically with the
    rest, and is restored from there whatever `restore_callback_states_from_checkpoint` says.

    Args:
        observer: The observer to notify.
        on_begin: Called first when training begins.
        on_end: Called last when training ends.

    Returns:
        The callback; its `rows` are those of the observer.
    """
    trainer, name = observer.trainer, "OpdlabMonitor"

    def state(self: Any) -> dict[str, Any]:
        return {"args": {}, "attributes": {"saved": observer.monitor.state_dict()}}

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        on_begin()
        saved_state = state.stateful_callbacks.get(name)
        saved_state = saved_state[-1] if isinstance(saved_state, list) else saved_state
        observer.start_training(
            state.global_step, saved_state and saved_state["attributes"]["saved"]
        )
        state.stateful_callbacks[name] = self.state()  # saving a checkpoint expects an entry

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        observer.finish_step(state.global_step)

    def on_train_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        on_end()

    bases = (
        _base_class(trainer.callback_handler, "TrainerCallback"),
        _base_class(trainer.control, "ExportableState"),
    )
    members = {
        "state": state,
        "on_train_begin": on_train_begin,
        "on_step_end": on_step_end,
        "on_train_end": on_train_end,
        "rows": observer.rows,
    }
    # a class of its own: the trainer may rebuild instances from a checkpoint
    return type(name, bases, members)()


def _base_class(instance: Any, name: str) -> type:
    """Return the base class of this name of an instance's class, without importing it."""
    for kind in type(instance).__mro__:
        if kind.__name__ == name:
            return kind
    raise InvalidInput(
        f"{type(instance).__name__} is no {name}; this transformers version is not supported"
    )
