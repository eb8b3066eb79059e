"""TRL: the panel on an unmodified trainer, from the tensors that its loss uses.

    with observe_trl(trainer, monitor) as rows:
        trainer.train()

Trainers, and where they are observed (TRL 1.16):

| trainer | observed | levels |
|---|---|---|
| DistillationTrainer | arguments of its chunked divergence: hidden states, heads, mask | L0 L1 L2 |
| GKDTrainer, GOLDTrainer (one tokenizer) | logits and labels of `generalized_jsd_loss` | L0 L1 L2 |
| IWOPDTrainer (teacher in the process) | the student's outputs, `_get_teacher_logits` | L0 L1 L2 |
| SDPOTrainer, SDFTTrainer | `_compute_teacher_student_logits`: each its own prompt | L0 L1 L2 |
| GRPOTrainer, beta > 0 | per-token log-probabilities; `ref_model` is the teacher | L0 |

GKD and the rows below it to SDFT are experimental in TRL. Subclasses are observed as their parents.
Functions are wrapped on the trainer itself and restored at the end; training is not changed and no
random number is drawn. A `ref_model` that was assigned to a GRPOTrainer gets the head through which
TRL reads it, since training would fail without it.

Further fields:
- rewards (GRPO, SDPO): the sum over reward functions with TRL's weights, NaN where all returned
  None;
- `sampler_logp`: vLLM's, if the trainer keeps them; else the model's own at sampling time, if TRL
  computes them (rollouts used for several steps). Otherwise missing;
- `age`: updates since the rollouts were sampled. With num_iterations or steps_per_generation above
  what one step uses, every step is measured on the rollouts that it trains on, whatever their
  age, and the tests of sampling skip stale ones;
- lengths are those of the generated response, also where `mask_truncated_completions` removes it
  from the loss.
Fields that a trainer does not have are listed in `monitor.missing`, with the reason.
Shapes: B responses, T response positions, P prompt positions, L = P + T, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diagnostics.adapters.trl_hooks import distillation, gkd, gold, grpo, iw_opd, self_distillation
from diagnostics.adapters.trl_watch import (
    Row,
    TrainerObserver,
    register_callback,
    replace_attribute,
)
from diagnostics.errors import InvalidInput
from diagnostics.monitor import Monitor

LOG_COLUMNS = (
    "trl/on_policy_share",
    "trl/observed_steps",
    "signal/negative_share",
    "signal/negative_share_excess",
    "signal/signal_n_eff_share",
    "divergence/tokens",
    "divergence/k1",
    "divergence/k1_se",
    "divergence/abs_ratio",
    "divergence/reverse_kl",
    "divergence/reverse_kl_se",
    "divergence/teacher_prob",
    "divergence/teacher_rank_1",
    "divergence/outside_topk",
    "divergence/outside_topk_expected",
    "divergence/topk_teacher_mass",
    "divergence/overlap_ratio",
    "divergence/student_entropy",
    "divergence/teacher_entropy",
    "tokens/one_id_signal",
    "tokens/confident_impossible_share",
    "response/length",
    "response/length_ended",
    "response/truncated_share",
    "repetition/repeated_share",
    "response/reward",
    "response/graded_share",
    "consistency/age",
    "consistency/z_H",
    "consistency/z_K",
    "consistency/sampler_log_ratio",
    "consistency/sampler_log_ratio_square",
)
"""The columns that are added to the trainer's log; the rows and the monitor's sinks have all."""


@contextmanager
def observe_trl(
    trainer: Any,
    monitor: Monitor | None = None,
    *,
    k: int = 16,
    max_logits_per_chunk: int = 2**24,
    log_columns: Collection[str] | None = LOG_COLUMNS,
) -> Iterator[list[Row]]:
    """Run the monitor on each optimizer step of the trainer while the context is open.

    The micro-batches of a step are measured together, so that rollouts of one prompt stay one
    sampling unit. Only training is observed, not evaluation.

    Values in the trainer's log cover the steps since its last line, as TRL's own do: sums are added
    over those steps and divided once, so that a mean is over all tokens of the window, a quantile
    or a z over all of it; `divergence/tokens` is a mean over steps, and `trl/observed_steps` is the
    number of measured steps. Finite values only.

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

    Yields:
        The rows, one per step with its number under "step", complete when the step ends.

    Raises:
        InvalidInput: The trainer is none of those above, or its settings hide what is needed.
        OperationFailed: While training, a loss did not call the wrapped functions.
    """
    attach = _attach_function(trainer)
    observer = TrainerObserver(trainer, monitor or Monitor(), k, max_logits_per_chunk)
    with ExitStack() as stack:
        attach(observer, stack)
        log = trainer.log

        def log_with_row(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            if "loss" in logs:
                logs |= observer.log_values(log_columns)
            return log(logs, *args, **kwargs)

        stack.enter_context(replace_attribute(trainer, "log", log_with_row))
        stack.enter_context(register_callback(observer))
        yield observer.rows


def _attach_function(trainer: Any) -> Callable[[TrainerObserver, ExitStack], None]:
    """Return the function that attaches to this trainer, by the name of its class or a parent."""
    names = [base.__name__ for base in type(trainer).__mro__]
    for fused_setting in ("use_liger_gkd_loss", "use_liger_loss"):
        if getattr(trainer, fused_setting, False):
            raise InvalidInput(
                f"{names[0]}.{fused_setting} is set: the fused loss never computes the logits; "
                "disable it to observe this run"
            )
    attach_functions = {
        "DistillationTrainer": distillation,
        "GKDTrainer": gkd,
        "GOLDTrainer": gold,
        "GRPOTrainer": grpo,
        "IWOPDTrainer": iw_opd,
        "SDFTTrainer": self_distillation,
        "SDPOTrainer": self_distillation,
    }
    for name in names:
        if name in attach_functions:
            return attach_functions[name]
    raise InvalidInput(
        f"{names[0]} is not supported; supported: {', '.join(attach_functions)} and subclasses"
    )
