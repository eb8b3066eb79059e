"""TRL: the panel on an unmodified trainer, from the numbers that its loss really saw.

    with observe(trainer, monitor) as rows:
        trainer.train()

Trainers, and where they are read (TRL 1.16):

| trainer | read | levels |
|---|---|---|
| DistillationTrainer | arguments of its chunked divergence: hidden states, heads, mask | L0 L1 L2 |
| GKDTrainer, GOLDTrainer (one tokenizer) | logits and labels of `generalized_jsd_loss` | L0 L1 L2 |
| IWOPDTrainer (teacher in the process) | the student's outputs, `_get_teacher_logits` | L0 L1 L2 |
| SDPOTrainer, SDFTTrainer | `_compute_teacher_student_logits`: each its own prompt | L0 L1 L2 |
| GRPOTrainer, beta > 0 | per-token log-probabilities; `ref_model` is the teacher | L0 |

GKD and the rows below it to SDFT are experimental in TRL. Subclasses are read as their parents.
Functions are wrapped on the trainer itself and put back at the end; nothing that trains is changed
and no random number is drawn. To a `ref_model` that was assigned to a GRPOTrainer the head is added
through which TRL reads it, since the training would die without.

What is read besides:
- rewards (GRPO, SDPO): the sum over reward functions with TRL's weights, NaN where all gave None;
- `sampler_logp`: vLLM's, where the trainer keeps them; else what the model itself gave when it
  sampled, where TRL computes that (rollouts used for several steps). Else there are none;
- `age`: updates since the rollouts were sampled. With num_iterations or steps_per_generation above
  what one step takes, every step is measured on the rollouts that it trains on, whatever their
  age, and the tests of sampling skip what is not fresh;
- lengths are of what was generated, also where `mask_truncated_completions` takes it out of the
  loss.
What a trainer does not know is in `monitor.missing`, with the reason.
Shapes: B responses, T response positions, P prompt positions, L = P + T, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diagnostics.adapters.trl_hooks import distillation, gkd, gold, grpo, iw_opd, self_distillation
from diagnostics.adapters.trl_watch import Row, Watch, called_back, replaced
from diagnostics.errors import InvalidInput
from diagnostics.monitor import Monitor

HEADLINE = (
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
"""The columns that join the trainer's log; the rows and the monitor's sinks have all."""


@contextmanager
def observe(
    trainer: Any,
    monitor: Monitor | None = None,
    *,
    k: int = 16,
    elements: int = 2**24,
    log_columns: Collection[str] | None = HEADLINE,
) -> Iterator[list[Row]]:
    """Run the monitor on each optimizer step of the trainer while the context is open.

    Yields the rows, one a step with its number under "step", complete when the step ends. The
    micro-batches of a step are measured together, so that rollouts of one prompt stay one sampling
    unit. Only training is observed, not evaluation.

    What joins the trainer's log covers the steps since its last line, as its own columns do: sums
    are added over those steps and divided once, so that a mean is over all tokens of the window, a
    quantile or a z over all of it; `divergence/tokens` is a mean over steps, and `trl/observed_steps`
    says how many of them were measured. Finite values only.

    The monitor's state, the memory of its alarms included, is written with each checkpoint of the
    trainer. A training that resumes takes it from there, and the rows after the checkpoint are
    dropped, in the list and in the file of `sinks.to_file`; where a training begins, such a file
    of an earlier one is set aside with a warning.

    An error of a metric or a sink costs the row of its step and is a RuntimeWarning: the training
    goes on. With several processes it is raised, since the others would wait.

    Cost: on steps when the monitor is due, both heads once more for DistillationTrainer, two
    log-softmaxes where logits are read; a copy of the prompt ids to the host.
    With several processes give a monitor with combine=across_ranks, or each rank reports its own.

    Args:
      monitor: `Monitor()` if None.
      k: size of both models' top-K.
      elements: numbers of a (tokens, V) tensor that exist at a time.
      log_columns: columns that join the trainer's log; all if None.

    Raises:
      ValueError: the trainer is none of those above, or hides what is needed.
      RuntimeError: while training, a loss did not pass through what is wrapped.
    """
    attach = _seam(trainer)
    watch = Watch(trainer, monitor or Monitor(), k, elements)
    with ExitStack() as stack:
        attach(watch, stack)
        log = trainer.log

        def logged(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            if "loss" in logs:
                logs |= watch.logged(log_columns)
            return log(logs, *args, **kwargs)

        stack.enter_context(replaced(trainer, "log", logged))
        stack.enter_context(called_back(watch))
        yield watch.rows


def _seam(trainer: Any) -> Callable[[Watch, ExitStack], None]:
    """How to attach to this trainer, by the name of its class or of a parent."""
    names = [kind.__name__ for kind in type(trainer).__mro__]
    for fused in ("use_liger_gkd_loss", "use_liger_loss"):
        if getattr(trainer, fused, False):
            raise InvalidInput(
                f"{names[0]}.{fused} is set: the fused loss never makes the logits that are "
                "needed; switch it off to observe this run"
            )
    known = {
        "DistillationTrainer": distillation,
        "GKDTrainer": gkd,
        "GOLDTrainer": gold,
        "GRPOTrainer": grpo,
        "IWOPDTrainer": iw_opd,
        "SDFTTrainer": self_distillation,
        "SDPOTrainer": self_distillation,
    }
    for name in names:
        if name in known:
            return known[name]
    raise InvalidInput(f"{names[0]} is not known here; known: {', '.join(known)} and subclasses")
