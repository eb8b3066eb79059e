"""Hooks into the loss of each TRL trainer; `diagnostics.adapters.trl` is the public interface.

Shapes: B responses, T response positions, P prompt positions, V vocabulary.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import ends_with_eos, shift_to_first
from diagnostics.adapters.trl_batches import make_batch, prompt_ids, record_rollout_step
from diagnostics.adapters.trl_watch import TrainerObserver, replace_attribute
from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, OperationFailed


def distillation(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe DistillationTrainer through the arguments of its chunked divergence."""
    trainer, name = observer.trainer, "_chunked_divergence_loss"
    if trainer.teacher_model is None:
        raise InvalidInput(
            f"{type(trainer).__name__} has no teacher_model in this process; a remote teacher does "
            "not return full distributions"
        )
    kinds = [k for k in type(trainer).__mro__ if "_compute_loss" in vars(k)]
    module = sys.modules[kinds[0].__module__] if kinds else None
    original = getattr(module, name, None)
    if original is None:
        raise InvalidInput(
            f"{type(trainer).__name__}: its loss calls no {name}; this TRL version is not supported"
        )
    signature, original_compute_loss = inspect.signature(original), trainer._compute_loss
    required = {"student_hidden_states", "teacher_hidden_states", "completion_mask", "temperature"}
    if not required <= signature.parameters.keys():
        raise InvalidInput(
            f"{name} of this TRL version takes {[*signature.parameters]}; required: {required}"
        )

    def compute_loss(student: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not observer.is_measured:
            return original_compute_loss(student, inputs, *args, **kwargs)
        calls: list[dict[str, Any]] = []

        def divergence_with_recording(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append(bound.arguments)
            return original(*args, **kwargs)

        with replace_attribute(module, name, divergence_with_recording):
            loss = original_compute_loss(student, inputs, *args, **kwargs)
        arguments = _single_call(calls, name)
        observer.add_micro_batch(lambda: _from_hidden(observer, inputs, arguments))
        return loss

    record_rollout_step(observer, stack, "_generate_and_score_completions")
    stack.enter_context(replace_attribute(trainer, "_compute_loss", compute_loss))


def _from_hidden(
    observer: TrainerObserver, inputs: dict[str, Any], arguments: dict[str, Any]
) -> ScoredRollouts:
    trainer = observer.trainer
    mask = arguments["completion_mask"].bool()
    tokens, completion_mask = (
        inputs[n].to(mask.device) for n in ("completion_ids", "completion_mask")
    )
    temperature = arguments["temperature"]

    def logits(positions: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(
            _head_logits(arguments, role, positions) / temperature
            for role in ("student", "teacher")
        )

    vocab_size = arguments["student_lm_head_weight"].shape[0]
    return make_batch(
        trainer,
        inputs,
        tokens,
        mask,
        prompt=prompt_ids(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=ends_with_eos(tokens, completion_mask.bool(), trainer.eos_token_ids),
        score_temperature=float(temperature),
        **observer.score_logits(tokens, mask, logits, vocab_size),
    )


def _head_logits(arguments: dict[str, Any], role: str, positions: Tensor) -> Tensor:
    """Compute logits (n, V) as the chunked divergence defines them, before the temperature."""
    states = arguments[f"{role}_hidden_states"].detach().flatten(0, 1)[positions]
    weight, bias = arguments[f"{role}_lm_head_weight"], arguments.get(f"{role}_lm_head_bias")
    if hasattr(weight, "full_tensor"):
        weight, bias = (x if x is None else x.full_tensor() for x in (weight, bias))
    weight = weight.to(states.dtype)
    bias = None if bias is None else bias.to(states.dtype)
    logits = torch.nn.functional.linear(states, weight, bias).float()
    logits = logits * arguments.get(f"{role}_logit_scale", 1.0)
    softcap = arguments.get(f"{role}_final_logit_softcapping")
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
        lambda: _is_on_policy_batch(trainer, trainer._buffered_on_policy, trainer._step),
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
        arguments = _single_call(calls, "generalized_jsd_loss")
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
            "teacher_logits": _single_call(calls, name)[:, :-1],
            "labels": inputs["labels"][:, 1:],
            "temperature": trainer.temperature,
        }
        calls.clear()
        flags, step = trainer._buffered_on_policy_flags, trainer._buffer_step
        is_student_sampled = _is_on_policy_batch(trainer, flags, step)
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


def grpo(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe GRPOTrainer through its per-token log-probabilities."""
    trainer, name = observer.trainer, "_get_per_token_logps_and_entropies"
    _prepare_reference(trainer)
    original_compute_loss = trainer._compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not observer.is_measured:
            return original_compute_loss(model, inputs, *args, **kwargs)
        calls: list[Tensor] = []
        original = getattr(trainer, name)

        def logps_with_recording(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            calls.append(result[0].detach())
            return result

        with replace_attribute(trainer, name, logps_with_recording):
            loss = original_compute_loss(model, inputs, *args, **kwargs)
        student = _single_call(calls, name)
        observer.add_micro_batch(lambda: _from_logps(observer, inputs, student))
        return loss

    record_rollout_step(observer, stack, "_generate_and_score_completions")
    stack.enter_context(replace_attribute(trainer, "_compute_loss", compute_loss))


def _prepare_reference(trainer: Any) -> None:
    """Add to `trainer.ref_model`, the teacher, the head through which TRL reads log-probabilities.

    TRL adds it to the model that it loads itself, a copy of the student; a model that was assigned
    afterwards has none, and training would fail. A model with the head is unchanged.

    Args:
        trainer: A GRPOTrainer.

    Raises:
        InvalidInput: There is no reference model, or its vocabulary is too small.
    """
    if not trainer.beta:
        raise InvalidInput(
            "GRPOTrainer with beta 0 has no reference model, which serves as the teacher; set beta "
            "above 0 in GRPOConfig and assign trainer.ref_model = teacher, a causal language model "
            "with the student's vocabulary, before `observe`"
        )
    if trainer.ref_model is None:  # PEFT: the reference is the model without the adapter
        if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
            return
        raise InvalidInput("GRPOTrainer.ref_model is None; set it to the teacher before `observe`")
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
    observer: TrainerObserver, inputs: dict[str, Any], student: Tensor
) -> ScoredRollouts:
    trainer, tokens = observer.trainer, inputs["completion_ids"]
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
        teacher_logp=torch.where(mask, inputs["ref_per_token_logps"].detach(), 0.0),
        score_temperature=float(trainer.temperature),
        generated_lengths=lengths,
        missing_names=missing_names,
    )


def _truncated_lengths(tokens: Tensor, pad_id: int) -> Tensor:
    """Return (B,) lengths of truncated responses, whose last token by definition is no padding."""
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return (positions * (tokens != pad_id)).amax(1)


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
        arguments = _single_call(calls, name)
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


def _single_call(calls: list[Any], name: str) -> Any:
    """Return the recorded call; raise unless there was exactly one."""
    if len(calls) != 1:
        raise OperationFailed(
            f"the loss called {name} {len(calls)} times, expected once: it is computed elsewhere "
            "(a fused kernel, an override); disable that, or do not observe this run"
        )
    return calls[0]
