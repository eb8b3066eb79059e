"""TRL's policy-gradient trainers with a reference model as the teacher: GRPO, GMPO, RLOO.

`diagnostics.adapters.trl` is the public interface. Shapes: B responses, T response positions,
P prompt positions, L = P + T, V vocabulary.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import ends_with_eos
from diagnostics.adapters.trl_batches import (
    OLD_LOGP,
    TEACHER_LOGP,
    make_batch,
    prompt_ids,
    record_rollout_step,
)
from diagnostics.adapters.trl_watch import TrainerObserver, replace_attribute, single_call
from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, OperationFailed

LOGPS, GENERATE = "_get_per_token_logps_and_entropies", "_generate_and_score_completions"
"""Methods of both trainers: log-probabilities (B, T) first; a batch of rollouts."""


def grpo(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe GRPOTrainer through its per-token log-probabilities; it keeps the teacher's."""
    _prepare_reference(observer.trainer)
    record_rollout_step(observer, stack, GENERATE)
    _observe_logps(observer, stack, "ref_per_token_logps")


def rloo(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe RLOOTrainer, which uses the teacher's log-probabilities for its reward only.

    They are recorded where they are computed, while rollouts are generated, and become part of the
    batch of rollouts.

    Args:
        observer: The observer of the trainer.
        stack: Restores the wrapped functions.
    """
    trainer = observer.trainer
    _prepare_reference(trainer)
    record_rollout_step(observer, stack, GENERATE)
    generate = getattr(trainer, GENERATE)

    def generate_rollouts(*args: Any, **kwargs: Any) -> dict[str, Any]:
        calls: list[Tensor] = []
        with replace_attribute(trainer, LOGPS, _record_logps(trainer, calls)):
            batch = generate(*args, **kwargs)
        if len(calls) != 2:
            raise OperationFailed(
                f"{GENERATE} of {type(trainer).__name__} called {LOGPS} {len(calls)} times, "
                "expected twice, for student and reference; this TRL version is not supported"
            )
        batch[OLD_LOGP], batch[TEACHER_LOGP] = calls
        return batch

    stack.enter_context(replace_attribute(trainer, GENERATE, generate_rollouts))
    _observe_logps(observer, stack, TEACHER_LOGP)


def _record_logps(trainer: Any, calls: list[Tensor]) -> Callable[..., Any]:
    """Return the trainer's function of log-probabilities, with its results added to `calls`."""
    original = getattr(trainer, LOGPS)

    def logps_with_recording(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(result[0].detach())
        return result

    return logps_with_recording


def _observe_logps(observer: TrainerObserver, stack: ExitStack, teacher_key: str) -> None:
    """Measure each loss; the batch holds the teacher's log-probabilities under `teacher_key`."""
    trainer = observer.trainer
    original_compute_loss = trainer._compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not observer.is_measured:
            return original_compute_loss(model, inputs, *args, **kwargs)
        calls: list[Tensor] = []
        with replace_attribute(trainer, LOGPS, _record_logps(trainer, calls)):
            loss = original_compute_loss(model, inputs, *args, **kwargs)
        student = single_call(calls, LOGPS)
        observer.add_micro_batch(lambda: _from_logps(observer, inputs, student, teacher_key))
        return loss

    stack.enter_context(replace_attribute(trainer, "_compute_loss", compute_loss))


def _prepare_reference(trainer: Any) -> None:
    """Add to `trainer.ref_model`, the teacher, the head through which TRL reads log-probabilities.

    TRL adds it to the model that it loads itself, a copy of the student; a model that was assigned
    afterwards has none, and training would fail. A model with the head is unchanged.

    Args:
        trainer: A GRPOTrainer or an RLOOTrainer.

    Raises:
        InvalidInput: There is no reference model, or its vocabulary is too small.
    """
    name = type(trainer).__name__
    if not trainer.beta:
        raise InvalidInput(
            f"{name} with beta 0 has no reference model, which serves as the teacher; set beta "
            f"above 0 in {type(trainer.args).__name__} and assign trainer.ref_model = teacher, a "
            "causal language model with the student's vocabulary, before `observe_trl`"
        )
    if trainer.ref_model is None:  # PEFT: the reference is the model without the adapter
        if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
            return
        raise InvalidInput(f"{name}.ref_model is None; set it to the teacher before `observe_trl`")
    model = trainer.accelerator.unwrap_model(trainer.ref_model)
    add_head = getattr(sys.modules.get("trl.trainer.utils"), "add_fused_lm_head", None)
    if add_head is None or _has_variable(model.forward, "fused_lm_head"):
        # older TRL versions need no head
        return
    student_vocab_size = trainer.model.config.get_text_config().vocab_size
    teacher_vocab_size = model.config.get_text_config().vocab_size
    if teacher_vocab_size < student_vocab_size:
        raise InvalidInput(
            f"trainer.ref_model has {teacher_vocab_size} vocabulary ids, but the student has "
            f"{student_vocab_size}; the teacher needs the student's vocabulary"
        )
    add_head(model.eval(), temperature=trainer.temperature)
    prepare = trainer.accelerator.prepare_model
    trainer.ref_model = prepare(trainer.ref_model, evaluation_mode=True)


def _has_variable(function: Any, name: str) -> bool:
    """Return whether a function, or one that it wraps, has a variable of this name."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and name in code.co_varnames:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _from_logps(
    observer: TrainerObserver, inputs: dict[str, Any], student: Tensor, teacher_key: str
) -> ScoredRollouts:
    trainer, tokens = observer.trainer, inputs["completion_ids"]
    if teacher_key not in inputs:
        raise InvalidInput("the rollouts were generated before `observe_trl` was entered")
    not_padding = inputs["completion_mask"].bool()
    mask = not_padding & inputs["tool_mask"].bool() if "tool_mask" in inputs else not_padding
    lengths, missing_names = mask.sum(1), []
    if trainer.mask_truncated_completions:
        if "tool_mask" in inputs:  # zeroed for truncated responses
            missing_names = ["generated_lengths"]
        is_truncated = ~not_padding.any(1)
        lengths = torch.where(
            is_truncated, _truncated_lengths(tokens, trainer._tokenizer.pad_token_id), lengths
        )
    sampler_logp = inputs.get("sampling_per_token_logps")
    if sampler_logp is not None:
        mask = mask & ~sampler_logp.isnan()  # tokens without a log-probability from the engine
    return make_batch(
        trainer,
        inputs,
        tokens,
        mask,
        prompt=prompt_ids(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=ends_with_eos(tokens, not_padding, trainer.eos_token_ids),
        sampler_logp=sampler_logp,
        student_logp=torch.where(mask, student, 0.0),
        teacher_logp=torch.where(mask, inputs[teacher_key].detach(), 0.0),
        score_temperature=float(trainer.temperature),
        generated_lengths=lengths,
        missing_names=missing_names,
    )


def _truncated_lengths(tokens: Tensor, pad_id: int) -> Tensor:
    """Return (B,) lengths of truncated responses, whose last token by definition is no padding."""
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return (positions * (tokens != pad_id)).amax(1)
