"""From the tensors of a TRL micro-batch to a `ScoredRollouts`: what every trainer has in common.

Shapes: B responses, T response positions, P prompt positions.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import scored
from diagnostics.adapters.trl_watch import Watch, replaced
from diagnostics.batch import ScoredRollouts
from diagnostics.core.partial import lacking
from diagnostics.records.columns import number_of

STEP, REWARD = "opdlab_step", "opdlab_reward"
"""What `stamp_rollouts` adds to a batch of rollouts, (B,) each."""


def stamp_rollouts(watch: Watch, stack: ExitStack, name: str) -> None:
    """Let rollouts carry the step before which they were made and what their rewards sum to.

    A trainer shuffles them, cuts them into micro-batches and may use them for several steps.
    name: the trainer's method that returns a batch of rollouts as a dictionary.
    """
    trainer = watch.trainer
    generate, rewards = getattr(trainer, name), list[Tensor]()

    def generate_rollouts(*args: Any, **kwargs: Any) -> Any:
        rewards.clear()
        step = trainer.state.global_step
        batch = generate(*args, **kwargs)
        size, device = len(batch["completion_ids"]), batch["completion_ids"].device
        batch[STEP] = torch.full((size,), step, device=device)
        if rewards:
            first = trainer.accelerator.process_index * size
            batch[REWARD] = _weighted(rewards[-1], trainer.reward_weights)[first : first + size]
        return batch

    stack.enter_context(replaced(trainer, name, generate_rollouts))
    if hasattr(trainer, "_calculate_rewards"):
        calculate = trainer._calculate_rewards

        def calculate_rewards(*args: Any, **kwargs: Any) -> Tensor:
            rewards.append(calculate(*args, **kwargs))
            return rewards[-1]

        stack.enter_context(replaced(trainer, "_calculate_rewards", calculate_rewards))


def _weighted(rewards: Tensor, weights: Tensor) -> Tensor:
    """(B,) weighted sum over reward functions (B, F) without the NaNs; NaN where all are."""
    total = (rewards * weights.to(rewards.device)).nansum(1)
    return torch.where(rewards.isnan().all(1), torch.nan, total)


def make_batch(
    trainer: Any,
    inputs: dict[str, Any],
    tokens: Tensor,
    mask: Tensor,
    *,
    sampler_logp: Tensor | None = None,
    lost: Iterable[str] = (),
    **parts: Any,
) -> ScoredRollouts:
    """The `ScoredRollouts` of a micro-batch; what this trainer does not know raises `MissingField` when read.

    Args:
      inputs: the trainer's batch, from which ages, rewards and earlier log-probabilities are read.
      sampler_logp: (B, T) from the engine that sampled, if it tells.
      lost: further fields that are unknown. parts: the others of `ScoredRollouts`.
    """
    lost = set(lost)
    filters = _filters(trainer)
    if filters:
        lost.add("top_p")  # no number describes the distribution
    earlier, softmax = inputs.get("old_per_token_logps"), None
    if sampler_logp is None and earlier is not None:
        # The model's own at the time of sampling: before top-p and the like.
        known = parts.get("sampled_mask", mask)
        softmax = torch.where(known, earlier.detach(), 0.0)
        if not filters and trainer.args.top_p == 1:
            sampler_logp = earlier
    reward = inputs.get(REWARD)
    if reward is None:
        lost.add("reward")
        reward = torch.full((len(tokens),), torch.nan, device=tokens.device)
    if "completion_ids" in inputs and STEP not in inputs:  # sampled before the context was opened
        lost.add("age")
    told = ", ".join(f"{name} {value}" for name, value in filters.items())
    who = type(trainer).__name__ + (f", sampling with {told}," if told else "") + " has"
    batch = scored(
        tokens,
        mask,
        sampler_logp=sampler_logp,
        softmax_logp=softmax,
        who=who,
        temperature=float(trainer.temperature),
        top_p=float(getattr(trainer.args, "top_p", 1.0)),
        reward=reward.to(tokens.device).float(),
        age=_age(trainer, inputs, tokens),
        **parts,
    )
    return lacking(batch, lost, who)


def _age(trainer: Any, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """(B,) updates between the weights that sampled and those of now."""
    now = trainer.state.global_step
    if STEP in inputs:
        return now - inputs[STEP].to(tokens.device)
    synced = now  # these sample within the step, with vLLM from weights that may be older
    if getattr(trainer, "use_vllm", False):
        synced = max(0, getattr(trainer, "_last_vllm_sync_step", now))
    return torch.full((len(tokens),), now - synced, device=tokens.device)


def _filters(trainer: Any) -> dict[str, Any]:
    """Settings of sampling, besides temperature and top-p, that change the distribution."""
    neutral: dict[str, tuple[Any, ...]] = {
        "top_k": (None, 0, -1),
        "min_p": (None, 0.0),
        "repetition_penalty": (None, 1.0),
        "generation_kwargs": (None, {}),
    }
    values = {name: getattr(trainer.args, name, None) for name in neutral}
    return {name: value for name, value in values.items() if value not in neutral[name]}


def prompt_numbers(tokens: Tensor, mask: Tensor) -> Tensor:
    """(B,) numbers, equal where the prompts (B, P) are, whatever their padding."""
    kept = mask.bool().cpu()
    ids = tokens.cpu()
    numbers = [number_of(row[own].tolist()) for row, own in zip(ids, kept, strict=True)]
    return torch.tensor(numbers, device=tokens.device)
