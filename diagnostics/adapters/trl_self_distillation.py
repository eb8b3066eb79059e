"""TRL's SDPO and SDFT, whose teacher is the student with a longer prompt.

`diagnostics.adapters.trl` is the public interface. Shapes: B responses, T response positions,
P prompt positions, L = P + T, V vocabulary.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import ends_with_eos
from diagnostics.adapters.trl_batches import make_batch, prompt_ids, record_rollout_step
from diagnostics.adapters.trl_watch import TrainerObserver, replace_attribute, single_call
from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput


def self_distillation(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe SDPO and SDFT: the teacher is the student, or an older one, with a longer prompt."""
    trainer, name = observer.trainer, "_compute_teacher_student_logits"
    if trainer.use_teacher_server:
        raise InvalidInput(
            f"{type(trainer).__name__}.use_teacher_server is set: a remote teacher does not return "
            "full distributions; disable it to observe this run"
        )
    if getattr(trainer.args, "distillation_weight", 1.0) == 0:
        raise InvalidInput(
            f"{type(trainer).__name__} with distillation_weight 0 uses no teacher; set it above 0"
        )
    original_compute_loss, original_logits = trainer.compute_loss, getattr(trainer, name)
    calls: list[Any] = []

    def logits_with_recording(*args: Any, **kwargs: Any) -> Any:
        calls.append(original_logits(*args, **kwargs))
        return calls[-1]

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not observer.is_measured:
            return original_compute_loss(model, inputs, *args, **kwargs)
        with replace_attribute(trainer, name, logits_with_recording):
            loss = original_compute_loss(model, inputs, *args, **kwargs)
        arguments = single_call(calls, name)
        calls.clear()
        is_student_sampled = not getattr(trainer, "generate_from_teacher", False)
        observer.add_micro_batch(
            (lambda: _from_context(observer, inputs, arguments)) if is_student_sampled else None
        )
        return loss

    record_rollout_step(observer, stack, "_prepare_training_batch")
    stack.enter_context(replace_attribute(trainer, "compute_loss", compute_loss))


def _from_context(
    observer: TrainerObserver, inputs: dict[str, Any], logits_output: Any
) -> ScoredRollouts:
    trainer, tokens = observer.trainer, inputs["completion_ids"]
    completion_mask = inputs["completion_mask"].bool()  # may be all 0 for truncated responses
    lengths = inputs["raw_completion_lengths"]
    sampled = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    flat_logits = [
        x.detach().flatten(0, 1)
        for x in (logits_output.student_logits, logits_output.teacher_logits)
    ]

    def logits(positions: Tensor) -> tuple[Tensor, Tensor]:
        return flat_logits[0][positions], flat_logits[1][positions]

    return make_batch(
        trainer,
        inputs,
        tokens,
        logits_output.loss_mask.bool(),
        prompt=prompt_ids(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=ends_with_eos(tokens, sampled, trainer.eos_token_ids),
        sampled_mask=completion_mask,
        generated_lengths=lengths,
        score_temperature=float(trainer.temperature),
        **observer.score_logits(tokens, completion_mask, logits, flat_logits[0].shape[-1]),
    )
