"""Seconds of a step, by activity."""

from dataclasses import dataclass

from opd.analysis.plan.machines import Machine
from opd.analysis.plan.memory import StepCounts
from opd.analysis.plan.networks import MetaNetwork
from opd.analysis.plan.workload import Workload
from opd.config.settings import Config


@dataclass(frozen=True)
class Activity:
    """A part of a step."""

    name: str
    seconds: float
    flops: float
    """Floating-point operations of products."""


def plan_activities(
    config: Config,
    workload: Workload,
    student: MetaNetwork,
    counts: StepCounts,
    machine: Machine,
    gpus: int,
) -> list[Activity]:
    """Return the seconds of a step on every device, by activity.

    Args:
        config: Settings.
        workload: Sizes of the step.
        student: The student.
        counts: Counted passes.
        machine: The machine.
        gpus: Number of processes, which work at the same time.

    Returns:
        The activities, in their order.
    """
    activities = []
    if counts.rollout is not None:
        batches = workload.rows / workload.rollout_rows
        for name, part in (
            ("rollout: reading prompts", counts.rollout.prefill),
            ("rollout: decoding until the longest response ends", counts.rollout.decode),
        ):
            activities.append(Activity(name, batches * part.seconds, batches * part.flops))
    repeats = workload.num_passes(workload.micro_batch)
    forward = [] if counts.shares_pass else [("scoring: student", counts.student_forward)]
    if counts.teacher_forward is not None:
        forward.append(("scoring: teacher", counts.teacher_forward))
    phase = "update" if counts.shares_heads else "scoring"  # where the trainer's clock counts it
    forward.append((f"{phase}: logits and statistics", counts.score_chunks))
    activities += [
        Activity(name, repeats * part.seconds, repeats * part.flops) for name, part in forward
    ]
    updated = counts.update.scaled(workload.num_passes(workload.update_batch))
    activities.append(Activity("update: forward, loss, backward", updated.seconds, updated.flops))
    updates, optimizer = config.optimizer.updates_per_batch, counts.optimizer
    parts = gpus if config.hardware.sharding == "full" else 1
    activities.append(
        Activity("update: AdamW", updates * optimizer.seconds / parts, updates * optimizer.flops)
    )
    if gpus > 1:
        seconds = link_bytes(config, workload, student, gpus) / (
            machine.link * machine.bandwidth_share
        )
        activities.append(Activity("weights and gradients over the links", seconds, 0.0))
    return activities


def link_bytes(config: Config, workload: Workload, student: MetaNetwork, gpus: int) -> float:
    """Return the bytes that each device sends in a step.

    Unsharded, the float32 gradients are summed once an update, by a ring. Sharded, every
    micro-batch gathers the weights twice and scatters float32 gradients.

    Args:
        config: Settings.
        workload: Sizes of the step.
        student: The student.
        gpus: Number of devices.

    Returns:
        The bytes.
    """
    others_share = (gpus - 1) / gpus
    if config.hardware.sharding == "full":
        passes = max(workload.num_passes(workload.update_batch), config.optimizer.updates_per_batch)
        item_bytes = 2 * student.dtype.itemsize + 4
        return passes * item_bytes * student.num_weights * others_share
    return config.optimizer.updates_per_batch * 2 * 4 * student.num_trainable * others_share
