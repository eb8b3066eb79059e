"""Losses on a teacher's top-K, computed where verl has the student's logits (verl 0.9).

Shapes: B responses, N packed tokens of prompts and responses, K teacher ids, R logits of a token
(all V, or a rank's shard).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.integrations.verl.vocab_parallel import Shard, gather_logits, log_normaliser
from opd.objectives.inputs import TokenInputs
from opd.objectives.objective import Objective, weighted_losses

MAX_LOGITS = 2**27
"""Float32 logits that exist at once where a log-normaliser is needed: half a gigabyte."""

TOPK_OBJECTIVES: dict[str, Objective] = {}
"""Objectives of the loss modes computed from logits, used by the replaced `compute_topk_loss`."""


def logit_losses(
    objective: Objective,
    logits: Tensor,
    ids: Tensor,
    teacher_logp: Tensor,
    tokens: Tensor,
    shard: Shard | None = None,
) -> dict[str, Tensor]:
    """Compute the objective on the teacher's top-K and the panel's columns, per packed token.

    Apart from the logits, nothing of width R outlives a chunk.

    Args:
        objective: The objective.
        logits: (N, R) student logits, with gradient.
        ids: (N, K) long, ids of the teacher's top-K.
        teacher_logp: (N, K) log-probabilities of the teacher's top-K.
        tokens: (N,) long, the token that follows each token.
        shard: Which R of the V logits these are; None for all.

    Returns:
        (N,) distillation_losses, with gradient; student_mass p(S) and log_probs of `tokens`,
        without.
    """
    teacher_logp = teacher_logp.float()
    support_logits = gather_logits(logits, ids, shard)
    normalised = objective.requirements.normalised
    with torch.set_grad_enabled(normalised and torch.is_grad_enabled()):
        normaliser = log_normaliser(logits, shard, elements=MAX_LOGITS)
    zeros = torch.zeros_like(normaliser)
    inputs = TokenInputs(
        credit=zeros,
        weight=torch.ones_like(normaliser),
        teacher_logp=zeros,
        support_logp=support_logits - normaliser[:, None] if normalised else support_logits,
        teacher_support_logp=teacher_logp,
    )
    losses = weighted_losses(objective, inputs)
    with torch.no_grad():
        mass = (support_logits - normaliser[:, None]).exp().sum(-1)
        logp = gather_logits(logits, tokens[:, None], shard)[:, 0] - normaliser
    return {"distillation_losses": losses, "student_mass": mass, "log_probs": logp}


def compute_topk_loss(
    original: Callable[..., Any],
    config: Any,
    distillation_config: Any,
    data: Any,
    student_logits: Tensor,
    data_format: str,
) -> Any:
    """Replace verl's function of this name for the modes in `TOPK_OBJECTIVES`.

    Other modes call the original.

    Args:
        original: verl's function.
        config: verl's actor configuration.
        distillation_config: verl's distillation configuration.
        data: verl's batch.
        student_logits: (1, N / ranks of a sequence, R) on FSDP; in Megatron's layout there.
        data_format: Megatron's layout, "thd" or "bshd".

    Returns:
        Named tensors in the layout of the logits, or the original's result.

    Raises:
        InvalidInput: The log-normaliser's logits may be overwritten, or layouts differ.
    """
    mode = distillation_config.distillation_loss.loss_mode
    if mode not in TOPK_OBJECTIVES:
        return original(config, distillation_config, data, student_logits, data_format)
    objective = TOPK_OBJECTIVES[mode]
    if objective.requirements.normalised and not batch_setting(data, "distillation_only", False):
        raise InvalidInput(
            f"{mode} with task rewards: verl's cross-entropy may overwrite the logits that the "
            "log-normaliser's gradient reads; set distillation_loss.use_task_rewards=False"
        )
    input_ids = data["input_ids"]
    next_tokens = input_ids.values().roll(-1)
    next_tokens = torch.nested.nested_tensor_from_jagged(next_tokens, input_ids.offsets())
    parts = (data["teacher_ids"], data["teacher_logprobs"], next_tokens)
    shard = None
    if config.strategy == "megatron":
        shard, (ids, teacher_logp, tokens) = megatron_layout(
            parts, student_logits.shape[-1], data_format
        )
    else:
        ids, teacher_logp, tokens = fsdp_layout(parts)
    if ids.shape[:2] != student_logits.shape[:2]:
        raise InvalidInput(
            f"the teacher's tensors have the layout {tuple(ids.shape[:2])}, but the logits have "
            f"{tuple(student_logits.shape[:2])}"
        )
    outputs = logit_losses(
        objective,
        student_logits.flatten(0, 1),
        ids.flatten(0, 1).long(),
        teacher_logp.flatten(0, 1),
        tokens.flatten().long(),
        shard,
    )
    return {name: x.reshape(student_logits.shape[:2]) for name, x in outputs.items()}


def fsdp_layout(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Pack nested (B, j, ...) tensors as (1, N, ...), or this rank's slice of the sequence."""
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

    packed = [x.values()[None] for x in parts]
    if get_ulysses_sequence_parallel_world_size() > 1:
        return [slice_input_tensor(x, dim=1) for x in packed]
    return packed


def megatron_layout(
    parts: tuple[Tensor, ...], local_vocab_size: int, data_format: str
) -> tuple[Shard | None, list[Tensor]]:
    """Pack nested tensors in the layout of Megatron's logits.

    How verl's fused kernels or dynamic context parallelism lay out theirs is unknown; verl itself
    refuses those with distillation.

    Args:
        parts: Nested (B, j, ...) tensors.
        local_vocab_size: Logits per token on this rank.
        data_format: "thd" or "bshd".

    Returns:
        The rank's shard of the vocabulary (None if it has all of it), and the tensors.
    """
    from megatron.core import parallel_state
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    preprocess = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    rank = parallel_state.get_tensor_model_parallel_rank()
    single_rank = parallel_state.get_tensor_model_parallel_world_size() == 1
    group = parallel_state.get_tensor_model_parallel_group()
    shard = None if single_rank else Shard(rank * local_vocab_size, group)
    return shard, [preprocess(x, pre_process=True)[0] for x in parts]


def batch_setting(data: Any, name: str, default: Any) -> Any:
    """Return a non-tensor setting that verl stores in a batch, or the default."""
    if name in data:
        return data[name]
    return default
