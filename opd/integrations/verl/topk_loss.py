"""Losses on a teacher's top-K where verl computes them: beside the student's logits (verl 0.9).

Shapes: B responses, N packed tokens of prompts and responses, K teacher ids, R logits of a token
(all V, or a rank's shard).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.integrations.verl.vocab_parallel import Shard, log_normaliser, picked
from opd.objectives.factory import Objective
from opd.objectives.surrogates import VisitedTokens

ELEMENTS = 2**27
"""Logits in float32 at once where a log-normaliser is needed: half a gigabyte."""

TOPK: dict[str, Objective] = {}
"""Loss modes that are computed from logits, which the rebound `compute_topk_loss` looks up."""


def logit_losses(
    objective: Objective,
    logits: Tensor,
    ids: Tensor,
    teacher_logp: Tensor,
    tokens: Tensor,
    shard: Shard | None = None,
) -> dict[str, Tensor]:
    """Per packed token: the objective on the teacher's top-K, and what the panel reads.

    Args:
      logits: (N, R) of the student, with gradient; beside it, nothing R wide outlives a chunk.
      ids: (N, K) long and teacher_logp: (N, K), the teacher's top-K. tokens: (N,) long, what
        follows each token. shard: which R of the V logits these are; None for all.

    Returns:
      (N,) distillation_losses, with gradient; student_mass p(S) and log_probs of `tokens`, without.
    """
    teacher_logp = teacher_logp.float()
    ours = picked(logits, ids, shard)
    with torch.set_grad_enabled(objective.normalised and torch.is_grad_enabled()):
        normaliser = log_normaliser(logits, shard, elements=ELEMENTS)
    nothing = torch.zeros_like(normaliser)
    at = VisitedTokens(
        logp=None,
        credit=nothing,
        teacher_logp=nothing,
        support_logp=ours - normaliser[:, None] if objective.normalised else ours,
        teacher_support_logp=teacher_logp,
    )
    losses = objective.surrogate(at)
    with torch.no_grad():
        mass = (ours - normaliser[:, None]).exp().sum(-1)
        logp = picked(logits, tokens[:, None], shard)[:, 0] - normaliser
    return {"distillation_losses": losses, "student_mass": mass, "log_probs": logp}


def compute_topk_loss(
    verls: Callable[..., Any],
    config: Any,
    distillation_config: Any,
    data: Any,
    student_logits: Tensor,
    data_format: str,
) -> Any:
    """verl's function of this name for the modes in `TOPK`; for all others `verls`, its own.

    student_logits: (1, N / ranks of a sequence, R) on FSDP; of Megatron's layout there.
    """
    mode = distillation_config.distillation_loss.loss_mode
    if mode not in TOPK:
        return verls(config, distillation_config, data, student_logits, data_format)
    objective = TOPK[mode]
    if objective.normalised and not held(data, "distillation_only", False):
        raise InvalidInput(
            f"{mode} beside task rewards: verl's cross-entropy may overwrite the logits that the "
            "log-normaliser's gradient reads; set distillation_loss.use_task_rewards=False"
        )
    inputs = data["input_ids"]
    follows = inputs.values().roll(-1)
    follows = torch.nested.nested_tensor_from_jagged(follows, inputs.offsets())
    parts = (data["teacher_ids"], data["teacher_logprobs"], follows)
    shard = None
    if config.strategy == "megatron":
        shard, (ids, teacher_logp, tokens) = megatron_layout(
            parts, student_logits.shape[-1], data_format
        )
    else:
        ids, teacher_logp, tokens = fsdp_layout(parts)
    if ids.shape[:2] != student_logits.shape[:2]:
        raise InvalidInput(
            f"the teacher's tensors are laid out as {tuple(ids.shape[:2])} tokens, the logits as "
            f"{tuple(student_logits.shape[:2])}"
        )
    found = logit_losses(
        objective,
        student_logits.flatten(0, 1),
        ids.flatten(0, 1).long(),
        teacher_logp.flatten(0, 1),
        tokens.flatten().long(),
        shard,
    )
    return {name: x.reshape(student_logits.shape[:2]) for name, x in found.items()}


def fsdp_layout(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Nested (B, j, ...) tensors as (1, N, ...), of which this rank of a sequence holds a part."""
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

    packed = [x.values()[None] for x in parts]
    if get_ulysses_sequence_parallel_world_size() > 1:
        return [slice_input_tensor(x, dim=1) for x in packed]
    return packed


def megatron_layout(
    parts: tuple[Tensor, ...], held: int, data_format: str
) -> tuple[Shard | None, list[Tensor]]:
    """The same as Megatron's logits are laid out, and which `held` ids of the vocabulary are here.

    It is not known how verl's fused kernels or dynamic context parallelism lay out theirs; verl
    itself refuses those with distillation.
    """
    from megatron.core import parallel_state
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    laid = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    rank = parallel_state.get_tensor_model_parallel_rank()
    whole = parallel_state.get_tensor_model_parallel_world_size() == 1
    group = parallel_state.get_tensor_model_parallel_group()
    shard = None if whole else Shard(rank * held, group)
    return shard, [laid(x, pre_process=True)[0] for x in parts]


def held(data: Any, name: str, default: Any) -> Any:
    """A setting that verl lays beside the tensors of a batch, unwrapped."""
    if name in data:
        return data[name]
    return default
