"""TRL trainers whose losses take both models' logits: GKD, GOLD, IW-OPD.

`diagnostics.adapters.trl` is the public interface. Shapes: B responses, T response positions,
P prompt positions, L = P + T, V vocabulary.
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import ends_with_eos, shift_to_first
from diagnostics.adapters.trl_batches import make_batch, prompt_ids
from diagnostics.adapters.trl_watch import TrainerObserver, replace_attribute, single_call
from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, OperationFailed


def gkd(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe GKDTrainer through `generalized_jsd_loss`."""
    trainer = observer.trainer
    original_compute_loss, original_generate = (
        trainer.compute_loss,
        trainer.generate_on_policy_outputs,
    )
    sampling_models: list[Any] = []

    def generate_outputs(model: Any, *args: Any, **kwargs: Any) -> Any:
        sampling_models.append(model)
        return original_generate(model, *args, **kwargs)

    def on_policy() -> bool:
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        return bool(sampling_models) and sampling_models[-1] is not teacher

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        try:
            return original_compute_loss(*args, **kwargs)
        finally:
            sampling_models.clear()

    stack.enter_context(replace_attribute(trainer, "compute_loss", compute_loss))
    _observe_jsd(observer, stack, on_policy)
    stack.enter_context(replace_attribute(trainer, "generate_on_policy_outputs", generate_outputs))


def gold(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe GOLDTrainer through `generalized_jsd_loss`."""
    trainer = observer.trainer
    if trainer.use_uld_loss and trainer.teacher_tokenizer is not None:
        raise InvalidInput(
            "GOLDTrainer.use_uld_loss compares spans of two tokenizers, so the student's tokens "
            "have no teacher log-probability; with one tokenizer set use_uld_loss=False"
        )
    _observe_jsd(
        observer,
        stack,
        lambda: (
            observer.evaluation is None  # evaluates on the data set's responses
            and _is_on_policy_batch(trainer, trainer._buffered_on_policy, trainer._step)
        ),
    )


def _observe_jsd(
    observer: TrainerObserver, stack: ExitStack, on_policy: Callable[[], bool]
) -> None:
    """Record both models' logits when `compute_loss` passes them to `generalized_jsd_loss`."""
    trainer = observer.trainer
    original_compute_loss, original_jsd = trainer.compute_loss, trainer.generalized_jsd_loss
    calls: list[dict[str, Any]] = []

    def jsd_with_recording(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original_jsd).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return original_jsd(*args, **kwargs)

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not observer.is_measured:
            return original_compute_loss(model, inputs, *args, **kwargs)
        sampled_by_student = on_policy()  # before the loss, which may clear it
        with replace_attribute(trainer, "generalized_jsd_loss", jsd_with_recording):
            loss = original_compute_loss(model, inputs, *args, **kwargs)
        arguments = single_call(calls, "generalized_jsd_loss")
        calls.clear()  # release the graph of the loss
        observer.add_micro_batch(
            (lambda: _from_logits(observer, inputs, arguments)) if sampled_by_student else None
        )
        return loss

    stack.enter_context(replace_attribute(trainer, "compute_loss", compute_loss))


def iw_opd(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe IWOPDTrainer through the student's outputs and `_get_teacher_logits`."""
    trainer = observer.trainer
    if trainer.teacher_model is None:
        raise InvalidInput(
            f"{type(trainer).__name__} has a remote teacher (use_teacher_server), which does not "
            "return full distributions; load it as teacher_model"
        )
    original_compute_loss, original_teacher_logits, name = (
        trainer.compute_loss,
        trainer._get_teacher_logits,
        "_get_teacher_logits",
    )
    calls: list[Tensor] = []

    def teacher_logits(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(original_teacher_logits(*args, **kwargs))
        return calls[-1]

    def compute_loss(
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not observer.is_measured:
            return original_compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with replace_attribute(trainer, name, teacher_logits):
            loss, outputs = original_compute_loss(model, inputs, True, num_items_in_batch)
        arguments = {
            "student_logits": outputs.logits[:, :-1],
            "teacher_logits": single_call(calls, name)[:, :-1],
            "labels": inputs["labels"][:, 1:],
            "temperature": trainer.temperature,
        }
        calls.clear()
        flags, step = trainer._buffered_on_policy_flags, trainer._buffer_step
        # an evaluation reads the data set's responses
        is_student_sampled = observer.evaluation is None and _is_on_policy_batch(
            trainer, flags, step
        )
        observer.add_micro_batch(
            (lambda: _from_logits(observer, inputs, arguments)) if is_student_sampled else None
        )
        return (loss, outputs) if return_outputs else loss

    stack.enter_context(replace_attribute(trainer, "compute_loss", compute_loss))


def _is_on_policy_batch(trainer: Any, flags: list[bool] | None, next_index: int) -> bool:
    """Return the on-policy flag of the micro-batch that was taken from the buffer last."""
    return flags is not None and flags[(next_index - 1) % trainer.args.gradient_accumulation_steps]


def _from_logits(
    observer: TrainerObserver, inputs: dict[str, Any], arguments: dict[str, Any]
) -> ScoredRollouts:
    trainer, labels = observer.trainer, arguments["labels"]
    if "prompts" not in inputs or labels is None:
        raise OperationFailed(
            f"the batch of {type(trainer).__name__} has no prompts or labels; use its own collator"
        )
    positions, exists = shift_to_first(labels != -100)
    mask = (labels != -100).gather(1, positions) & exists
    tokens = labels.gather(1, positions) * mask
    row_offset = torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1]
    source_positions = (positions + row_offset).flatten()
    flat_logits = [
        arguments[f"{role}_logits"].detach().flatten(0, 1) for role in ("student", "teacher")
    ]
    temperature = float(arguments["temperature"])

    def logits(selected: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x[source_positions[selected]] / temperature for x in flat_logits)

    sampler_logps = inputs.get("rollout_logprobs")
    eos_ids = trainer.generation_config.eos_token_id
    if not isinstance(eos_ids, list):
        eos_ids = [] if eos_ids is None else [eos_ids]
    return make_batch(
        trainer,
        inputs,
        tokens,
        mask,
        prompt=prompt_ids(inputs["prompts"], inputs["prompt_attention_mask"]),
        ended=ends_with_eos(tokens, mask, eos_ids),
        sampler_logp=None if sampler_logps is None else sampler_logps[:, 1:].gather(1, positions),
        score_temperature=temperature,
        **observer.score_logits(tokens, mask, logits, flat_logits[0].shape[-1]),
    )
