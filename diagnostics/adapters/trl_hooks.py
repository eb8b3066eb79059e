"""Where each TRL trainer is read; `diagnostics.adapters.trl` is what to call.

Shapes: B responses, T response positions, P prompt positions, V vocabulary.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import from_first, last_is_end
from diagnostics.adapters.trl_batches import make_batch, prompt_numbers, stamp_rollouts
from diagnostics.adapters.trl_watch import Watch, replaced
from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, OperationFailed


def distillation(watch: Watch, stack: ExitStack) -> None:
    trainer, name = watch.trainer, "_chunked_divergence_loss"
    if trainer.teacher_model is None:
        raise InvalidInput(
            f"{type(trainer).__name__} has no teacher_model in this process; a teacher on a server "
            "does not give the whole distributions that are read here"
        )
    kinds = [k for k in type(trainer).__mro__ if "_compute_loss" in vars(k)]
    module = sys.modules[kinds[0].__module__] if kinds else None
    original = getattr(module, name, None)
    if original is None:
        raise InvalidInput(f"{type(trainer).__name__} has no {name} that its loss would call")
    signature, compute = inspect.signature(original), trainer._compute_loss
    needed = {"student_hidden_states", "teacher_hidden_states", "completion_mask", "temperature"}
    if not needed <= signature.parameters.keys():
        raise InvalidInput(
            f"{name} of this TRL takes {[*signature.parameters]}; {needed} are needed"
        )

    def compute_loss(student: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not watch.due:
            return compute(student, inputs, *args, **kwargs)
        seen: list[dict[str, Any]] = []

        def divergence(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            seen.append(given.arguments)
            return original(*args, **kwargs)

        with replaced(module, name, divergence):
            loss = compute(student, inputs, *args, **kwargs)
        given = _only(seen, name)
        watch.take(lambda: _from_hidden(watch, inputs, given))
        return loss

    stamp_rollouts(watch, stack, "_generate_and_score_completions")
    stack.enter_context(replaced(trainer, "_compute_loss", compute_loss))


def _from_hidden(watch: Watch, inputs: dict[str, Any], given: dict[str, Any]) -> ScoredRollouts:
    trainer = watch.trainer
    mask = given["completion_mask"].bool()
    tokens, real = (inputs[n].to(mask.device) for n in ("completion_ids", "completion_mask"))
    temperature = given["temperature"]

    def logits(places: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(_head(given, role, places) / temperature for role in ("student", "teacher"))

    rows = given["student_lm_head_weight"].shape[0]
    return make_batch(
        trainer,
        inputs,
        tokens,
        mask,
        prompt=prompt_numbers(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=last_is_end(tokens, real.bool(), trainer.eos_token_ids),
        score_temperature=float(temperature),
        **watch.measured(tokens, mask, logits, rows),
    )


def _head(given: dict[str, Any], role: str, places: Tensor) -> Tensor:
    """Logits (n, V) as the chunked divergence defines them, before the temperature."""
    states = given[f"{role}_hidden_states"].detach().flatten(0, 1)[places]
    weight, bias = given[f"{role}_lm_head_weight"], given.get(f"{role}_lm_head_bias")
    if hasattr(weight, "full_tensor"):
        weight, bias = (x if x is None else x.full_tensor() for x in (weight, bias))
    weight = weight.to(states.dtype)
    bias = None if bias is None else bias.to(states.dtype)
    z = torch.nn.functional.linear(states, weight, bias).float()
    z = z * given.get(f"{role}_logit_scale", 1.0)
    cap = given.get(f"{role}_final_logit_softcapping")
    return z if cap is None else cap * torch.tanh(z / cap)


def gkd(watch: Watch, stack: ExitStack) -> None:
    trainer = watch.trainer
    compute, generate = trainer.compute_loss, trainer.generate_on_policy_outputs
    sampled_by: list[Any] = []

    def generate_outputs(model: Any, *args: Any, **kwargs: Any) -> Any:
        sampled_by.append(model)
        return generate(model, *args, **kwargs)

    def on_policy() -> bool:
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        return bool(sampled_by) and sampled_by[-1] is not teacher

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        try:
            return compute(*args, **kwargs)
        finally:
            sampled_by.clear()

    stack.enter_context(replaced(trainer, "compute_loss", compute_loss))
    _jsd(watch, stack, on_policy)
    stack.enter_context(replaced(trainer, "generate_on_policy_outputs", generate_outputs))


def gold(watch: Watch, stack: ExitStack) -> None:
    trainer = watch.trainer
    if trainer.use_uld_loss and trainer.teacher_tokenizer is not None:
        raise InvalidInput(
            "GOLDTrainer.use_uld_loss compares spans of two tokenizers, which have no teacher "
            "log-probability of the student's token; with one tokenizer set use_uld_loss=False"
        )
    _jsd(watch, stack, lambda: _buffered(trainer, trainer._buffered_on_policy, trainer._step))


def _jsd(watch: Watch, stack: ExitStack, on_policy: Callable[[], bool]) -> None:
    """Read both logits where `compute_loss` hands them to `generalized_jsd_loss`."""
    trainer = watch.trainer
    compute, divergence = trainer.compute_loss, trainer.generalized_jsd_loss
    seen: list[dict[str, Any]] = []

    def jsd(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(divergence).bind(*args, **kwargs)
        given.apply_defaults()
        seen.append(given.arguments)
        return divergence(*args, **kwargs)

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not watch.due:
            return compute(model, inputs, *args, **kwargs)
        sampled_by_student = on_policy()  # before the loss, which may forget it
        with replaced(trainer, "generalized_jsd_loss", jsd):
            loss = compute(model, inputs, *args, **kwargs)
        given = _only(seen, "generalized_jsd_loss")
        seen.clear()  # it holds the graph of the loss
        watch.take((lambda: _from_logits(watch, inputs, given)) if sampled_by_student else None)
        return loss

    stack.enter_context(replaced(trainer, "compute_loss", compute_loss))


def iw_opd(watch: Watch, stack: ExitStack) -> None:
    trainer = watch.trainer
    if trainer.teacher_model is None:
        raise InvalidInput(
            f"{type(trainer).__name__} has its teacher on a server (use_teacher_server), which "
            "does not give the whole distributions that are read here; load it as teacher_model"
        )
    compute, teach, name = trainer.compute_loss, trainer._get_teacher_logits, "_get_teacher_logits"
    seen: list[Tensor] = []

    def teacher_logits(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(teach(*args, **kwargs))
        return seen[-1]

    def compute_loss(
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not watch.due:
            return compute(model, inputs, return_outputs, num_items_in_batch)
        with replaced(trainer, name, teacher_logits):
            loss, outputs = compute(model, inputs, True, num_items_in_batch)
        given = {
            "student_logits": outputs.logits[:, :-1],
            "teacher_logits": _only(seen, name)[:, :-1],
            "labels": inputs["labels"][:, 1:],
            "temperature": trainer.temperature,
        }
        seen.clear()
        flags, step = trainer._buffered_on_policy_flags, trainer._buffer_step
        own = _buffered(trainer, flags, step)
        watch.take((lambda: _from_logits(watch, inputs, given)) if own else None)
        return (loss, outputs) if return_outputs else loss

    stack.enter_context(replaced(trainer, "compute_loss", compute_loss))


def _buffered(trainer: Any, flags: list[bool] | None, following: int) -> bool:
    """The flag of the micro-batch that was taken from the buffer last."""
    return flags is not None and flags[(following - 1) % trainer.args.gradient_accumulation_steps]


def _from_logits(watch: Watch, inputs: dict[str, Any], given: dict[str, Any]) -> ScoredRollouts:
    trainer, labels = watch.trainer, given["labels"]
    if "prompts" not in inputs or labels is None:
        raise OperationFailed(
            f"{type(trainer).__name__}'s batch has no prompts and labels; use its own collator"
        )
    place, exists = from_first(labels != -100)
    mask = (labels != -100).gather(1, place) & exists
    tokens = labels.gather(1, place) * mask
    row = torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1]
    origin = (place + row).flatten()
    both = [given[f"{role}_logits"].detach().flatten(0, 1) for role in ("student", "teacher")]
    temperature = float(given["temperature"])

    def logits(places: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x[origin[places]] / temperature for x in both)

    sampler = inputs.get("rollout_logprobs")
    ends = trainer.generation_config.eos_token_id
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    return make_batch(
        trainer,
        inputs,
        tokens,
        mask,
        prompt=prompt_numbers(inputs["prompts"], inputs["prompt_attention_mask"]),
        ended=last_is_end(tokens, mask, ends),
        sampler_logp=None if sampler is None else sampler[:, 1:].gather(1, place),
        score_temperature=temperature,
        **watch.measured(tokens, mask, logits, both[0].shape[-1]),
    )


def grpo(watch: Watch, stack: ExitStack) -> None:
    trainer, name = watch.trainer, "_get_per_token_logps_and_entropies"
    _prepare_reference(trainer)
    compute = trainer._compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not watch.due:
            return compute(model, inputs, *args, **kwargs)
        seen: list[Tensor] = []
        original = getattr(trainer, name)

        def logps(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            seen.append(result[0].detach())
            return result

        with replaced(trainer, name, logps):
            loss = compute(model, inputs, *args, **kwargs)
        student = _only(seen, name)
        watch.take(lambda: _from_logps(watch, inputs, student))
        return loss

    stamp_rollouts(watch, stack, "_generate_and_score_completions")
    stack.enter_context(replaced(trainer, "_compute_loss", compute_loss))


def _prepare_reference(trainer: Any) -> None:
    """Give `trainer.ref_model`, the teacher, the head through which TRL reads log-probabilities.

    TRL puts it on the model that it loads itself, a copy of the student; a model that was assigned
    afterwards has none, and the training would die of it. A model with the head is left alone.
    """
    if not trainer.beta:
        raise InvalidInput(
            "GRPOTrainer with beta 0 has no reference model, which is read as the teacher here; "
            "make it with GRPOConfig(beta=...) above 0 and set trainer.ref_model = teacher, a "
            "causal language model with the student's vocabulary, before observing"
        )
    if trainer.ref_model is None:  # an adapter: its reference is the model without it
        if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
            return
        raise InvalidInput("GRPOTrainer.ref_model is None; set it to the teacher before observing")
    model = trainer.accelerator.unwrap_model(trainer.ref_model)
    add_head = getattr(sys.modules.get("trl.trainer.utils"), "add_fused_lm_head", None)
    if add_head is None or _takes(model.forward, "fused_lm_head"):  # an earlier TRL reads any model
        return
    students = trainer.model.config.get_text_config().vocab_size
    teachers = model.config.get_text_config().vocab_size
    if teachers < students:
        raise InvalidInput(
            f"trainer.ref_model has {teachers} vocabulary ids and the student {students}; the "
            "teacher needs the student's vocabulary"
        )
    add_head(model.eval(), temperature=trainer.temperature)
    prepare = trainer.accelerator.prepare_model
    trainer.ref_model = prepare(trainer.ref_model, evaluation_mode=True)


def _takes(function: Any, name: str) -> bool:
    """A function, or one that it wraps, has an argument or a variable of this name."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and name in code.co_varnames:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _from_logps(watch: Watch, inputs: dict[str, Any], student: Tensor) -> ScoredRollouts:
    trainer, tokens = watch.trainer, inputs["completion_ids"]
    real = inputs["completion_mask"].bool()
    mask = real & inputs["tool_mask"].bool() if "tool_mask" in inputs else real
    lengths, lost = mask.sum(1), []
    if trainer.mask_truncated_completions:
        if "tool_mask" in inputs:  # of responses that were cut it is gone
            lost = ["generated_lengths"]
        cut = ~real.any(1)
        lengths = torch.where(cut, _length_of_cut(tokens, trainer._tokenizer.pad_token_id), lengths)
    sampler = inputs.get("sampling_per_token_logps")
    if sampler is not None:
        mask = mask & ~sampler.isnan()  # ids that the engine could not score
    return make_batch(
        trainer,
        inputs,
        tokens,
        mask,
        prompt=prompt_numbers(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=last_is_end(tokens, real, trainer.eos_token_ids),
        sampler_logp=sampler,
        student_logp=torch.where(mask, student, 0.0),
        teacher_logp=torch.where(mask, inputs["ref_per_token_logps"].detach(), 0.0),
        score_temperature=float(trainer.temperature),
        generated_lengths=lengths,
        lost=lost,
    )


def _length_of_cut(tokens: Tensor, pad: int) -> Tensor:
    """(B,) length of responses that were cut, whose last token is no padding by definition."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return (places * (tokens != pad)).amax(1)


def self_distillation(watch: Watch, stack: ExitStack) -> None:
    """SDPO and SDFT: the teacher is the student, or an older one, under a fuller prompt."""
    trainer, name = watch.trainer, "_compute_teacher_student_logits"
    if trainer.use_teacher_server:
        raise InvalidInput(
            f"{type(trainer).__name__}.use_teacher_server is set: the server does not give the "
            "whole distributions that are read here; switch it off to observe this run"
        )
    if getattr(trainer.args, "distillation_weight", 1.0) == 0:
        raise InvalidInput(
            f"{type(trainer).__name__} with distillation_weight 0 asks no teacher; set it above 0"
        )
    compute, score = trainer.compute_loss, getattr(trainer, name)
    seen: list[Any] = []

    def logits(*args: Any, **kwargs: Any) -> Any:
        seen.append(score(*args, **kwargs))
        return seen[-1]

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not watch.due:
            return compute(model, inputs, *args, **kwargs)
        with replaced(trainer, name, logits):
            loss = compute(model, inputs, *args, **kwargs)
        given = _only(seen, name)
        seen.clear()
        own = not getattr(trainer, "generate_from_teacher", False)
        watch.take((lambda: _from_context(watch, inputs, given)) if own else None)
        return loss

    stamp_rollouts(watch, stack, "_prepare_training_batch")
    stack.enter_context(replaced(trainer, "compute_loss", compute_loss))


def _from_context(watch: Watch, inputs: dict[str, Any], given: Any) -> ScoredRollouts:
    trainer, tokens = watch.trainer, inputs["completion_ids"]
    attended = inputs["completion_mask"].bool()  # of responses that were cut, perhaps nothing
    lengths = inputs["raw_completion_lengths"]
    sampled = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    both = [x.detach().flatten(0, 1) for x in (given.student_logits, given.teacher_logits)]

    def logits(places: Tensor) -> tuple[Tensor, Tensor]:
        return both[0][places], both[1][places]

    return make_batch(
        trainer,
        inputs,
        tokens,
        given.loss_mask.bool(),
        prompt=prompt_numbers(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=last_is_end(tokens, sampled, trainer.eos_token_ids),
        sampled_mask=attended,
        generated_lengths=lengths,
        score_temperature=float(trainer.temperature),
        **watch.measured(tokens, attended, logits, both[0].shape[-1]),
    )


def _only(seen: list[Any], name: str) -> Any:
    if len(seen) != 1:
        raise OperationFailed(
            f"the loss called {name} {len(seen)} times, expected once: another path (a fused "
            "kernel, an override) hides what is needed; switch it off, or do not observe"
        )
    return seen[0]
