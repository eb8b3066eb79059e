"""TRL's DistillationTrainer and its variant with a teacher on a server.

`diagnostics.adapters.trl` is the public interface. Shapes: B responses, T response positions,
P prompt positions, L = P + T, V vocabulary.
"""

import inspect
import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import ends_with_eos
from diagnostics.adapters.trl_batches import make_batch, prompt_ids, record_rollout_step
from diagnostics.adapters.trl_watch import TrainerObserver, replace_attribute, single_call
from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput


def distillation(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe DistillationTrainer through the arguments of its chunked divergence."""
    trainer, name = observer.trainer, "_chunked_divergence_loss"
    if trainer.teacher_model is None:
        raise InvalidInput(f"{type(trainer).__name__} has no teacher_model in this process")
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
        arguments = single_call(calls, name)
        observer.add_micro_batch(lambda: _from_hidden(observer, inputs, arguments))
        return loss

    record_rollout_step(observer, stack, "_generate_and_score_completions")
    stack.enter_context(replace_attribute(trainer, "_compute_loss", compute_loss))


def server_distillation(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe ServerDistillationTrainer through the student's outputs and the server's answer."""
    trainer, name = observer.trainer, "_get_teacher_token_logprobs_from_server"
    original_compute_loss = trainer.compute_loss

    def compute_loss(
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not observer.is_measured:
            return original_compute_loss(model, inputs, return_outputs, num_items_in_batch)
        calls: list[tuple[int, dict[str, Tensor]]] = []
        original_answers = getattr(trainer, name)

        def answers_with_recording(inputs: Any, aligned_prompt_length: int) -> dict[str, Tensor]:
            answers = original_answers(inputs, aligned_prompt_length)
            calls.append((aligned_prompt_length, answers))
            return answers

        with replace_attribute(trainer, name, answers_with_recording):
            loss, outputs = original_compute_loss(model, inputs, True, num_items_in_batch)
        first, answers = single_call(calls, name)
        observer.add_micro_batch(
            lambda: _from_server(observer, inputs, outputs.logits.detach(), first, answers)
        )
        return (loss, outputs) if return_outputs else loss

    record_rollout_step(observer, stack, "_generate_and_score_completions")
    stack.enter_context(replace_attribute(trainer, "compute_loss", compute_loss))


def _from_server(
    observer: TrainerObserver,
    inputs: dict[str, Any],
    student_logits: Tensor,
    first: int,
    answers: dict[str, Tensor],
) -> ScoredRollouts:
    """Build the batch from logits (B, L, V) and answers for the positions from `first` on."""
    trainer, tokens = observer.trainer, inputs["completion_ids"]
    mask = inputs["completion_mask"].bool()
    prompt_width = inputs["prompt_ids"].shape[1]
    response_logits = student_logits[:, prompt_width - 1 : -1].flatten(0, 1)

    def response(values: Tensor) -> Tensor:
        """Align with (B, T): the answers start at `first` and end with the longest response."""
        values = values[:, prompt_width - first :]
        aligned = values.new_zeros((*tokens.shape, *values.shape[2:]))
        aligned[:, : values.shape[1]] = values[:, : tokens.shape[1]]
        return aligned

    temperature = float(trainer.temperature)
    return make_batch(
        trainer,
        inputs,
        tokens,
        mask,
        prompt=prompt_ids(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=ends_with_eos(tokens, mask, trainer.eos_token_ids),
        score_temperature=temperature,
        **observer.score_answers(
            tokens,
            mask,
            lambda positions: response_logits[positions] / temperature,
            response_logits.shape[-1],
            teacher_logp=response(answers["actual_logprobs"]),
            ids=response(answers["topk_token_ids"]),
            teacher_topk_logp=response(answers["topk_logprobs"]),
            subject=f"the server of {type(trainer).__name__} answers",
        ),
    )


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
            head_logits(arguments, f"{role}_", positions) / temperature
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


def head_logits(arguments: dict[str, Any], prefix: str, positions: Tensor) -> Tensor:
    """Compute logits as TRL's chunked divergences define them, before the temperature.

    Args:
        arguments: Of the divergence, with hidden states (B, T, H).
        prefix: Of the names of the arguments of one model.
        positions: (n,) indices into the B x T positions.

    Returns:
        (n, V).
    """
    states = arguments[f"{prefix}hidden_states"].detach().flatten(0, 1)[positions]
    weight, bias = arguments[f"{prefix}lm_head_weight"], arguments.get(f"{prefix}lm_head_bias")
    if hasattr(weight, "full_tensor"):
        weight, bias = (x if x is None else x.full_tensor() for x in (weight, bias))
    weight = weight.to(states.dtype)
    bias = None if bias is None else bias.to(states.dtype)
    logits = torch.nn.functional.linear(states, weight, bias).float()
    logits = logits * arguments.get(f"{prefix}logit_scale", 1.0)
    softcap = arguments.get(f"{prefix}final_logit_softcapping")
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
