"""TRL: the panel on an unmodified trainer, from the tensors that its loss uses (TRL 1.16).

    with observe_trl(trainer, monitor) as rows:
        trainer.train()

or, where somebody else calls `train`:

    trainer.add_callback(trl_callback(trainer, monitor))

| trainer | observed | levels |
|---|---|---|
| DistillationTrainer | arguments of its chunked divergence: hidden states, heads, mask | L0 L1 L2 |
| ServerDistillationTrainer | student's outputs; the server's answer | L0 L1 |
| AsyncDistillationTrainer | arguments of its chunked divergence; the servers' answers | L0 L1 |
| GKDTrainer, GOLDTrainer (one tokenizer) | logits and labels of `generalized_jsd_loss` | L0 L1 L2 |
| IWOPDTrainer (teacher in the process) | the student's outputs, `_get_teacher_logits` | L0 L1 L2 |
| SDPOTrainer, SDFTTrainer | `_compute_teacher_student_logits`: each its own prompt | L0 L1 L2 |
| GRPOTrainer, GMPOTrainer, beta > 0 | token log-probabilities; `ref_model` is the teacher | L0 |
| RLOOTrainer, beta > 0 | the same, the teacher's when the rollouts are generated | L0 |

All but DistillationTrainer, GRPO and RLOO are experimental in TRL. Subclasses are observed as their
parents. Functions are wrapped on the trainer itself and restored at the end; training is not
changed and no random number is drawn. A `ref_model` that was assigned to a GRPOTrainer or an
RLOOTrainer gets the head through which TRL reads it, since training would fail without it.

Further fields:
- rewards (GRPO, GMPO, RLOO, SDPO): the sum over reward functions with TRL's weights, NaN where all
  returned None;
- `sampler_logp`: vLLM's, if the trainer keeps them; else the model's own at sampling time, if TRL
  computes them (RLOO; GRPO with rollouts used for several steps). Otherwise missing;
- `age`: updates since the rollouts were sampled. With num_iterations or steps_per_generation above
  what one step uses, every step is measured on the rollouts that it trains on, whatever their
  age, and the tests of sampling skip stale ones;
- lengths are those of the generated response, also where `mask_truncated_completions` removes it
  from the loss.
Fields that a trainer does not have are listed in `monitor.missing`, with the reason.
Shapes: B responses, T response positions, P prompt positions, L = P + T, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from diagnostics.adapters.trl_async import async_distillation
from diagnostics.adapters.trl_callback import Attach, attached, make_callback, register_callback
from diagnostics.adapters.trl_distillation import distillation, server_distillation
from diagnostics.adapters.trl_logits import gkd, gold, iw_opd
from diagnostics.adapters.trl_policy_gradient import grpo, rloo
from diagnostics.adapters.trl_self_distillation import self_distillation
from diagnostics.adapters.trl_watch import Rows, TrainerObserver
from diagnostics.errors import InvalidInput
from diagnostics.monitor import Monitor
from diagnostics.records.headline import HEADLINE

LOG_COLUMNS = ("trl/on_policy_share", "trl/observed_steps", *HEADLINE)
"""The columns that are added to the trainer's log; the rows and the monitor's sinks have all."""


@contextmanager
def observe_trl(
    trainer: Any,
    monitor: Monitor | None = None,
    *,
    k: int = 16,
    max_logits_per_chunk: int = 2**24,
    log_columns: Collection[str] | None = LOG_COLUMNS,
    evaluation: bool = False,
) -> Iterator[Rows]:
    """Run the monitor on each optimizer step of the trainer while the context is open.

    The micro-batches of a step are measured together, so that rollouts of one prompt stay one
    sampling unit.

    Values in the trainer's log cover the steps since its last line, as TRL's own do: sums are added
    over those steps and divided once, so that a mean is over all tokens of the window, a quantile
    or a z over all of it; `divergence/tokens` is a mean over steps, and `trl/observed_steps` is the
    number of measured steps. Finite values only.

    With `evaluation`, each evaluation of the trainer gives a row of its own in `rows.evaluation`,
    in the monitor's sinks and, with `log_columns`, in the evaluation's metrics. Its columns have
    the prefix of these metrics (`eval_`), and it is measured on the batches of the evaluation,
    which are kept until its end. No training row contains them, and alarms do not see them.
    GKD, GOLD and IW-OPD evaluate on the responses of the data set, which the student did not
    sample: their rows hold `eval_trl/on_policy_share` 0 and nothing else.

    The monitor's state, including that of its alarms, is saved with each checkpoint of the trainer.
    When training resumes it is restored, and the rows after the checkpoint are dropped, in the list
    and in the file of `sinks.to_file`; when training starts from scratch, such a file of an earlier
    run is moved aside with a warning.

    An exception in a metric or a sink costs the row of its step and is a RuntimeWarning: training
    continues. With several processes it is raised, since the others would wait.

    Cost: on steps when the monitor is due, both heads once more for DistillationTrainer, two
    log-softmaxes where logits are read; a copy of the prompt ids to the host. With several
    processes use a monitor with combine=all_reduce_totals, or each rank reports its own values.

    Args:
        trainer: A TRL trainer of the table above.
        monitor: `Monitor()` if None.
        k: Size of both models' top-K.
        max_logits_per_chunk: Elements of a (tokens, V) tensor that exist at a time.
        log_columns: Columns that are added to the trainer's log; all if None.
        evaluation: Whether evaluations are observed too.

    Yields:
        The rows, one per step with its number under "step", complete when the step ends.

    Raises:
        InvalidInput: The trainer is none of those above, or its settings hide what is needed.
        OperationFailed: While training, a loss did not call the wrapped functions.
    """
    attach = _attach_function(trainer)
    observer = TrainerObserver(trainer, monitor or Monitor(), k, max_logits_per_chunk)
    with attached(observer, attach, log_columns, evaluation), register_callback(observer):
        yield observer.rows


def trl_callback(
    trainer: Any,
    monitor: Monitor | None = None,
    *,
    k: int = 16,
    max_logits_per_chunk: int = 2**24,
    log_columns: Collection[str] | None = LOG_COLUMNS,
    evaluation: bool = False,
) -> Any:
    """Return a `TrainerCallback` that observes every training of the trainer, as `observe_trl`.

        callback = trl_callback(trainer, monitor)
        trainer.add_callback(callback)
        trainer.train()

    It attaches when training begins and detaches when it ends, also by an exception. The rows are
    in `callback.rows`, the same as those of `observe_trl`. transformers gives callbacks no access
    to their trainer, which is therefore an argument here; `trainer.train` is wrapped at once, since
    an exception in training reaches no callback.

    Args:
        trainer: See `observe_trl`.
        monitor: See `observe_trl`.
        k: See `observe_trl`.
        max_logits_per_chunk: See `observe_trl`.
        log_columns: See `observe_trl`.
        evaluation: See `observe_trl`; evaluations outside of training are not observed.

    Returns:
        The callback.

    Raises:
        InvalidInput: The trainer is none of those that `observe_trl` supports.
    """
    attach = _attach_function(trainer)
    observer = TrainerObserver(trainer, monitor or Monitor(), k, max_logits_per_chunk)
    stack, train = ExitStack(), trainer.train

    def train_and_detach(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            stack.close()

    trainer.train = train_and_detach
    return make_callback(
        observer,
        lambda: stack.enter_context(attached(observer, attach, log_columns, evaluation)),
        stack.close,
    )


def _attach_function(trainer: Any) -> Attach:
    """Return the function that attaches to this trainer, by the name of its class or a parent."""
    names = [base.__name__ for base in type(trainer).__mro__]
    for fused_setting in ("use_liger_gkd_loss", "use_liger_loss"):
        if getattr(trainer, fused_setting, False):
            raise InvalidInput(
                f"{names[0]}.{fused_setting} is set: the fused loss never computes the logits; "
                "disable it to observe this run"
            )
    for name in names:
        if name in NOT_OBSERVED:
            raise InvalidInput(f"{name} is not supported: {NOT_OBSERVED[name]}")
        if name in OBSERVED:
            return OBSERVED[name]
    raise InvalidInput(
        f"{names[0]} is not supported; supported: {', '.join(OBSERVED)} and subclasses"
    )


OBSERVED: Mapping[str, Attach] = {
    "DistillationTrainer": distillation,
    "ServerDistillationTrainer": server_distillation,
    "AsyncDistillationTrainer": async_distillation,
    "GKDTrainer": gkd,
    "GOLDTrainer": gold,
    "GRPOTrainer": grpo,
    "IWOPDTrainer": iw_opd,
    "RLOOTrainer": rloo,
    "SDFTTrainer": self_distillation,
    "SDPOTrainer": self_distillation,
}
"""Class of a trainer -> the function that attaches to it; subclasses as their parents."""

_OFFLINE = "it trains on given responses, and the student samples none"
NOT_OBSERVED: Mapping[str, str] = {
    "A2POTrainer": "it keeps its reference model's log-probabilities summed over responses only",
    "AsyncGRPOTrainer": "it has no reference model, which serves as the teacher",
    "CPOTrainer": _OFFLINE,
    "DPOTrainer": _OFFLINE,
    "KTOTrainer": _OFFLINE,
    "ORPOTrainer": _OFFLINE,
    "OnlineDPOTrainer": "its loss compares pairs of responses by their sums of log-probabilities",
    "SFTTrainer": _OFFLINE,
    "RewardTrainer": "a reward model has no distribution over tokens",
    "TPOTrainer": _OFFLINE,
}
"""Other trainers of TRL -> why there is nothing to observe."""
