"""Where each TRL trainer is read; `diagnostics.adapters.trl` is what to call.

Shapes: B responses, T response positions, P prompt positions, V vocabulary.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.columns import number_of
from diagnostics.adapters.dense import from_first, last_is_end, measured, scored
from diagnostics.batch import Scored, concatenate
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.monitor import Monitor

Row = dict[str, float]


class Watch:
    """The micro-batches of the current step, and the rows so far."""

    def __init__(self, trainer: Any, monitor: Monitor, k: int, elements: int) -> None:
        self.trainer, self.monitor, self.k, self.elements = trainer, monitor, k, elements
        self.rows: list[Row] = []
        self.fresh = False
        self.step = 0
        self.batches: list[Scored] = []
        self.own: list[float] = []  # of each micro-batch, whether the student sampled it

    @property
    def due(self) -> bool:
        step = self.trainer.state.global_step + 1
        return self.trainer.model.training and any(
            step % n == 0 for n in self.monitor.every.values()
        )

    def take(self, batch: Scored | None) -> None:
        """A micro-batch of the step under way; None if the student did not sample it."""
        done = self.trainer.state.global_step
        self.close(done)
        self.step = done + 1
        self.own.append(float(batch is not None))
        if batch is not None:
            self.batches.append(batch.trimmed().checked())

    def close(self, done: int) -> None:
        """Read out the step if it is done."""
        if self.own and self.step <= done:
            share = sum(self.own) / len(self.own)
            together = [concatenate(self.batches)] if self.batches else []
            row = self.monitor(self.step, together, **{"trl/on_policy_share": share})
            self.rows.append({"step": self.step, **row})
            self.batches, self.own, self.fresh = [], [], True

    def measured(
        self, tokens: Tensor, mask: Tensor, logits: Any, vocabulary: int
    ) -> dict[str, Any]:
        return measured(tokens, mask, logits, vocabulary, self.k, self.elements)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """owner.name is `value` while the context is open."""
    if not hasattr(owner, name):
        raise InvalidInput(f"{type(owner).__name__} has no {name}; this TRL is not known here")
    mine, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if mine:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def distillation(watch: Watch, stack: ExitStack) -> None:
    trainer, name = watch.trainer, "_chunked_divergence_loss"
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
            found = compute(student, inputs, *args, **kwargs)
        watch.take(_from_hidden(watch, inputs, _only(seen, name)))
        return found

    stack.enter_context(replaced(trainer, "_compute_loss", compute_loss))


def _from_hidden(watch: Watch, inputs: dict[str, Any], given: dict[str, Any]) -> Scored:
    trainer = watch.trainer
    mask = given["completion_mask"].bool()
    tokens, real = (inputs[n].to(mask.device) for n in ("completion_ids", "completion_mask"))
    temperature = given["temperature"]

    def logits(places: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(_head(given, role, places) / temperature for role in ("student", "teacher"))

    rows = given["student_lm_head_weight"].shape[0]
    return scored(
        tokens,
        mask,
        prompt=prompt_numbers(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=last_is_end(tokens, real.bool(), trainer.eos_token_ids),
        sampler_logp=None,
        who="DistillationTrainer",
        temperature=float(trainer.temperature),
        top_p=float(trainer.top_p),
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
    compute, divergence = trainer.compute_loss, trainer.generalized_jsd_loss
    generate, sampled_by = trainer.generate_on_policy_outputs, []
    seen: list[dict[str, Any]] = []

    def generate_outputs(model: Any, *args: Any, **kwargs: Any) -> Any:
        sampled_by.append(model)
        return generate(model, *args, **kwargs)

    def jsd(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(divergence).bind(*args, **kwargs)
        given.apply_defaults()
        seen.append(given.arguments)
        return divergence(*args, **kwargs)

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        own = bool(sampled_by) and sampled_by[-1] is not teacher
        sampled_by.clear()
        seen.clear()
        found = compute(model, inputs, *args, **kwargs)
        if watch.due:
            given = _only(seen, "generalized_jsd_loss")
            watch.take(_from_logits(watch, inputs, given) if own else None)
        seen.clear()  # they hold the graph of the loss
        return found

    stack.enter_context(replaced(trainer, "generate_on_policy_outputs", generate_outputs))
    stack.enter_context(replaced(trainer, "generalized_jsd_loss", jsd))
    stack.enter_context(replaced(trainer, "compute_loss", compute_loss))


def _from_logits(watch: Watch, inputs: dict[str, Any], given: dict[str, Any]) -> Scored:
    trainer, labels = watch.trainer, given["labels"]
    if "prompts" not in inputs or labels is None:
        raise OperationFailed("GKDTrainer's batch has no prompts and labels; use its own collator")
    place, exists = from_first(labels != -100)
    mask = (labels != -100).gather(1, place) & exists
    tokens = labels.gather(1, place) * mask
    row = torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1]
    origin = (place + row).flatten()
    both = [given[f"{role}_logits"].detach().flatten(0, 1) for role in ("student", "teacher")]
    temperature = float(given["temperature"])

    def logits(places: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x[origin[places]] / temperature for x in both)

    ends = trainer.generation_config.eos_token_id
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    return scored(
        tokens,
        mask,
        prompt=prompt_numbers(inputs["prompts"], inputs["prompt_attention_mask"]),
        ended=last_is_end(tokens, mask, ends),
        sampler_logp=None,
        who="GKDTrainer",
        temperature=float(trainer.temperature),
        score_temperature=temperature,
        **watch.measured(tokens, mask, logits, both[0].shape[-1]),
    )


def grpo(watch: Watch, stack: ExitStack) -> None:
    trainer, name = watch.trainer, "_get_per_token_logps_and_entropies"
    if not trainer.beta:
        raise InvalidInput(
            "GRPOTrainer with beta 0 has no reference model; set beta > 0 and give the teacher as "
            "trainer.ref_model"
        )
    compute = trainer._compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not watch.due:
            return compute(model, inputs, *args, **kwargs)
        seen: list[Tensor] = []
        original = getattr(trainer, name)

        def logps(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            seen.append(found[0].detach())
            return found

        with replaced(trainer, name, logps):
            result = compute(model, inputs, *args, **kwargs)
        watch.take(_from_logps(watch, inputs, _only(seen, name)))
        return result

    stack.enter_context(replaced(trainer, "_compute_loss", compute_loss))


def _from_logps(watch: Watch, inputs: dict[str, Any], student: Tensor) -> Scored:
    trainer, real = watch.trainer, inputs["completion_mask"].bool()
    mask = real & inputs["tool_mask"].bool() if "tool_mask" in inputs else real
    sampler = inputs.get("sampling_per_token_logps")
    if sampler is not None:
        mask = mask & ~sampler.isnan()  # ids that the engine could not score
    teacher = inputs["ref_per_token_logps"]
    return scored(
        inputs["completion_ids"],
        mask,
        prompt=prompt_numbers(inputs["prompt_ids"], inputs["prompt_mask"]),
        ended=last_is_end(inputs["completion_ids"], real, trainer.eos_token_ids),
        sampler_logp=sampler,
        who="GRPOTrainer",
        student_logp=torch.where(mask, student, 0.0),
        teacher_logp=torch.where(mask, teacher.detach(), 0.0),
        temperature=float(trainer.temperature),
        top_p=float(trainer.top_p),
        score_temperature=float(trainer.temperature),
    )


def prompt_numbers(tokens: Tensor, mask: Tensor) -> Tensor:
    """(B,) numbers, equal where the prompts (B, P) are, whatever their padding."""
    kept = mask.bool().cpu()
    ids = tokens.cpu()
    numbers = [number_of(row[own].tolist()) for row, own in zip(ids, kept, strict=True)]
    return torch.tensor(numbers, device=tokens.device)


def _only(seen: list[Any], name: str) -> Any:
    if len(seen) != 1:
        raise OperationFailed(
            f"the loss called {name} {len(seen)} times, expected once: another path (a fused "
            "kernel, an override) hides what is needed; switch it off, or do not observe"
        )
    return seen[0]
