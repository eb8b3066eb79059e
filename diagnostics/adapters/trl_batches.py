"""Building `ScoredRollouts` from the tensors of a TRL micro-batch: what all trainers share.

Shapes: B responses, T response positions, P prompt positions.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import build_scored_rollouts
from diagnostics.adapters.trl_watch import TrainerObserver, replace_attribute
from diagnostics.batch import ScoredRollouts
from diagnostics.core.partial import without_fields
from diagnostics.records.columns import integer_id

STEP, REWARD = "opdlab_step", "opdlab_reward"
"""Keys that `record_rollout_step` adds to a batch of rollouts, (B,) each."""
OLD_LOGP, TEACHER_LOGP = "opdlab_old_logp", "opdlab_teacher_logp"
"""Keys that RLOO's hook adds to a batch of rollouts, (B, T) each: log-probabilities at sampling
time under the student and under the teacher. TRL shuffles and splits every tensor of a batch by
rows.
"""


def record_rollout_step(observer: TrainerObserver, stack: ExitStack, name: str) -> None:
    """Add the current step and the reward sums to the rollouts that a trainer generates.

    A trainer shuffles rollouts, splits them into micro-batches and may use them for several steps.

    Args:
        observer: The observer of the trainer.
        stack: Restores the wrapped functions.
        name: The trainer's method that returns a batch of rollouts as a dictionary.
    """
    trainer = observer.trainer
    generate, rewards = getattr(trainer, name), list[Tensor]()

    def generate_rollouts(*args: Any, **kwargs: Any) -> Any:
        rewards.clear()
        step = trainer.state.global_step
        batch = generate(*args, **kwargs)
        size, device = len(batch["completion_ids"]), batch["completion_ids"].device
        batch[STEP] = torch.full((size,), step, device=device)
        if rewards:
            first = trainer.accelerator.process_index * size
            batch[REWARD] = _weighted_rewards(rewards[-1], trainer.reward_weights)[
                first : first + size
            ]
        return batch

    stack.enter_context(replace_attribute(trainer, name, generate_rollouts))
    if hasattr(trainer, "_calculate_rewards"):
        calculate = trainer._calculate_rewards

        def calculate_rewards(*args: Any, **kwargs: Any) -> Tensor:
            rewards.append(calculate(*args, **kwargs))
            return rewards[-1]

        stack.enter_context(replace_attribute(trainer, "_calculate_rewards", calculate_rewards))


def _weighted_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """Return (B,) weighted sums over reward functions (B, F) without NaN; NaN if all are NaN."""
    total = (rewards * weights.to(rewards.device)).nansum(1)
    return torch.where(rewards.isnan().all(1), torch.nan, total)


def make_batch(
    trainer: Any,
    inputs: dict[str, Any],
    tokens: Tensor,
    mask: Tensor,
    *,
    sampler_logp: Tensor | None = None,
    temperature: float | None = None,
    missing_names: Iterable[str] = (),
    **fields: Any,
) -> ScoredRollouts:
    """Build the `ScoredRollouts` of a micro-batch, with the fields that this trainer lacks missing.

    Args:
        trainer: The TRL trainer.
        inputs: The trainer's batch, which holds ages, rewards and earlier log-probabilities.
        tokens: (B, T) ids.
        mask: (B, T) bool.
        sampler_logp: (B, T) from the engine that sampled, if known.
        temperature: Of the sampler; `trainer.temperature` if None.
        missing_names: Further fields that are missing.
        **fields: The other fields of `ScoredRollouts`.

    Returns:
        The batch.
    """
    missing_names = set(missing_names)
    filters = _sampling_filters(trainer)
    if filters:
        # with other sampling filters top_p does not describe the distribution
        missing_names.add("top_p")
    old_logps, softmax_logp = inputs.get("old_per_token_logps", inputs.get(OLD_LOGP)), None
    if sampler_logp is None and old_logps is not None:
        # the model's own at sampling time, before top-p and other filters
        is_sampled = fields.get("sampled_mask", mask)
        softmax_logp = torch.where(is_sampled, old_logps.detach(), 0.0)
        if not filters and trainer.args.top_p == 1:
            sampler_logp = old_logps
    reward = inputs.get(REWARD)
    if reward is None:
        missing_names.add("reward")
        reward = torch.full((len(tokens),), torch.nan, device=tokens.device)
    if "completion_ids" in inputs and STEP not in inputs:  # sampled before `observe` was entered
        missing_names.add("age")
    filter_text = ", ".join(f"{name} {value}" for name, value in filters.items())
    trainer_name = type(trainer).__name__ + (f", sampling with {filter_text}," if filters else "")
    batch = build_scored_rollouts(
        tokens,
        mask,
        sampler_logp=sampler_logp,
        softmax_logp=softmax_logp,
        trainer_name=trainer_name,
        temperature=float(trainer.temperature if temperature is None else temperature),
        top_p=float(getattr(trainer.args, "top_p", 1.0)),
        reward=reward.to(tokens.device).float(),
        age=_rollout_age(trainer, inputs, tokens),
        **fields,
    )
    return without_fields(batch, missing_names, f"{trainer_name} has")


def _rollout_age(trainer: Any, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return (B,) updates between the weights that sampled and the present ones."""
    current_step = trainer.state.global_step
    if STEP in inputs:
        return current_step - inputs[STEP].to(tokens.device)
    synced_step = current_step  # sampled in this step; with vLLM, possibly from older weights
    if getattr(trainer, "use_vllm", False):
        synced_step = max(0, getattr(trainer, "_last_vllm_sync_step", current_step))
    return torch.full((len(tokens),), current_step - synced_step, device=tokens.device)


def _sampling_filters(trainer: Any) -> dict[str, Any]:
    """Return the sampling settings, besides temperature and top-p, that change the distribution."""
    neutral: dict[str, tuple[Any, ...]] = {
        "top_k": (None, 0, -1),
        "min_p": (None, 0.0),
        "repetition_penalty": (None, 1.0),
        "generation_kwargs": (None, {}),
    }
    values = {name: getattr(trainer.args, name, None) for name in neutral}
    return {name: value for name, value in values.items() if value not in neutral[name]}


def prompt_ids(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return (B,) ids, equal where the prompts (B, P) are equal, whatever their padding."""
    not_padding = mask.bool().cpu()
    ids = tokens.cpu()
    row_ids = [
        integer_id(row[row_mask].tolist()) for row, row_mask in zip(ids, not_padding, strict=True)
    ]
    return torch.tensor(row_ids, device=tokens.device)
