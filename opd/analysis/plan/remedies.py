"""What to change where a run does not fit, tried out by planning it again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from opd.analysis.plan.plan import Plan
from opd.config.settings import Config, with_settings

FEW_ROWS = 8
"""Fewest rows of a batch of rollouts that is proposed."""
LORA_RANK = 32
"""Rank of adapters that are proposed."""
SHORTEST_RESPONSE = 256
"""Shortest longest response that is proposed."""


@dataclass(frozen=True)
class Remedy:
    """A change of settings, with the plan of the run after it and all changes before it."""

    settings: dict[str, Any]
    """Name of a setting to its new value."""
    plan: Plan


def find_remedies(plan: Plan, replan: Callable[[Config], Plan], most: int = 8) -> list[Remedy]:
    """Change settings one after another until the run fits.

    Each change is for the phase that is the largest then: first settings that change no result,
    then sharding, then what changes the training. A change that lowers nothing is not kept.

    Args:
        plan: The plan of a run that does not fit.
        replan: Plans other settings on the same machine.
        most: Largest number of plans.

    Returns:
        The changes, in order; the run fits after the last one, or nothing else is left.
    """
    remedies: list[Remedy] = []
    refused: set[str] = set()
    for _ in range(most):
        if plan.fits:
            break
        options = [x for x in candidates(plan) if not refused & set(x)]
        if not options:
            break
        settings = options[0]
        new_plan = replan(with_settings(plan.config, **settings))
        if new_plan.peak_bytes < plan.peak_bytes:
            plan = new_plan
            remedies.append(Remedy(settings, new_plan))
        else:
            refused |= set(settings)
    return remedies


def candidates(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield changes of settings that may lower the largest phase, the mildest first."""
    config, workload, phase = plan.config, plan.workload, plan.peak_phase.name
    hardware, rollout = config.hardware, config.rollout
    if phase in ("rollout", "evaluation"):
        rows = max(workload.rollout_rows, workload.evaluated_rows)
        if rollout.engine == "hf" and rows > FEW_ROWS:
            yield {"generation_batch_size": max(FEW_ROWS, rows // 4)}
    if phase == "update" and not hardware.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if phase in ("scoring", "update"):
        rows = workload.micro_rows if phase == "scoring" else workload.update_rows
        if rows > 1:
            length = workload.prompt + workload.longest
            yield {"max_tokens_per_microbatch": length * max(1, rows // 4)}
        if hardware.max_logits_per_chunk > 1 << 24:
            yield {"max_logits_per_chunk": 1 << 24}
    has_own_teacher = plan.teacher is not None and plan.teacher is not plan.student
    is_saved = hardware.teacher_weights == "saved"
    is_idle = phase != "scoring" and not hardware.offload_teacher
    if has_own_teacher and plan.machine.kind == "cuda" and is_saved and is_idle:
        yield {"offload_teacher": True}
    if plan.gpus > 1 and hardware.sharding == "none":
        yield {"sharding": "full"}
    if has_own_teacher and phase == "scoring" and is_saved and config.teacher != "ema":
        yield {"teacher_weights": "int8", "offload_teacher": False}
    if not config.optimizer.lora_rank:
        yield {"lora_rank": LORA_RANK}
    if hardware.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if rollout.max_response > SHORTEST_RESPONSE and not config.tasks:
        yield {"max_response": max(SHORTEST_RESPONSE, rollout.max_response // 2)}
