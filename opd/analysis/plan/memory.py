"""Peak memory of a device in each phase of a step, by term."""

from dataclasses import dataclass, fields

from diagnostics.batch import DistributionStats
from opd.analysis.plan.counts import Counts
from opd.analysis.plan.machines import Machine
from opd.analysis.plan.networks import MetaNetwork, gathered_bytes
from opd.analysis.plan.passes.rollout import RolloutCounts
from opd.analysis.plan.workload import Workload
from opd.config.settings import Config
from opd.objectives.requirements import Requirements

VLLM_SHARE = 0.3
"""Share of a GPU's memory that vLLM takes in the same process (`opd.rollouts.vllm_engine`)."""
TOKEN_COLUMNS = 14
"""Columns of numbers of a token besides statistics of distributions and the support."""


@dataclass(frozen=True)
class Term:
    """A part of the memory of a phase."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Phase:
    """A phase of a step and what is in memory at its peak."""

    name: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> float:
        """Sum of the terms."""
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Counted passes of a step."""

    rollout: RolloutCounts | None
    """Sampling of the step's largest batch; None where another process samples."""
    evaluation: RolloutCounts | None
    """Sampling of an evaluation, where its batches are larger."""
    student_forward: Counts
    """The student's forward pass over a micro-batch, to score it."""
    teacher_forward: Counts | None
    """The teacher's; None for a teacher elsewhere."""
    score_chunks: Counts
    """What scoring does with the logits of a micro-batch."""
    update: Counts
    """Forward pass, loss and backward pass of a micro-batch."""
    optimizer: Counts
    """Clipping and AdamW."""
    shares_pass: bool
    """Whether scores and gradient come from one pass (`opd.training.shared_pass`); `update` then
    holds the student's forward pass of both."""
    shares_heads: bool
    """Whether they also share the heads; `score_chunks` then counts statistics only."""


def batch_bytes(workload: Workload, config: Config, needs: Requirements, width: int) -> float:
    """Return the bytes of a scored batch on the device.

    Args:
        workload: Sizes of the step.
        config: Settings.
        needs: What the loss reads.
        width: Hidden size of a teacher in this process, whose states a loss on the whole
            vocabulary keeps; 0 without one.

    Returns:
        The bytes; ids have 8 bytes and numbers 4.
    """
    k = config.objective.support_k * (2 if needs.support == "union" else 1)
    columns = TOKEN_COLUMNS + len(fields(DistributionStats))
    token = k * (8 + 4 + 4) + 4 * columns
    if needs.support == "full":
        token += width * (2 if config.hardware.dtype == "bfloat16" else 4)
    return float(workload.rows * workload.longest * token)


def plan_phases(
    config: Config,
    workload: Workload,
    student: MetaNetwork,
    teacher_bytes: float,
    counts: StepCounts,
    needs: Requirements,
    teacher_width: int,
    machine: Machine,
    gpus: int,
) -> list[Phase]:
    """Return what is in memory at the peak of each phase.

    Args:
        config: Settings.
        workload: Sizes of the step.
        student: The student.
        teacher_bytes: Bytes of the weights of all teachers in this process.
        counts: Counted passes.
        needs: What the loss reads.
        teacher_width: Hidden size of the teacher.
        machine: The machine.
        gpus: Number of processes.

    Returns:
        The phases, in their order.
    """
    is_sharded = config.hardware.sharding == "full" and gpus > 1
    parts = gpus if is_sharded else 1
    trained = student.num_trainable
    student_term = Term("student", student.weight_bytes)
    states: list[Term] = []
    if is_sharded or student.dtype.itemsize < 4:
        masters = student.num_weights if is_sharded else trained
        states.append(Term("float32 master weights", 4 * masters / parts))
    states.append(Term("AdamW moments", 8 * trained / parts))
    gradients = Term("gradients", 4 * trained / parts)
    offloaded = config.hardware.offload_teacher and machine.kind == "cuda"
    teacher = [Term("teacher", teacher_bytes)] if teacher_bytes else []
    idle_teacher = [] if offloaded else teacher
    update_teacher = teacher if needs.support == "full" else idle_teacher
    layers = (
        Term("layers that are gathered at once", gathered_bytes(student))
        if is_sharded
        else student_term
    )
    kept_width = 0 if counts.shares_pass else teacher_width
    batch = Term("scored batch", batch_bytes(workload, config, needs, kept_width))
    phases = []
    for name, rollout in zip(
        ("rollout", "evaluation"), (counts.rollout, counts.evaluation), strict=True
    ):
        if rollout is None:
            continue
        cache = Term("keys and values", rollout.cache)
        temporary = Term("temporaries of sampling", rollout.peak - rollout.cache)
        parts_of_phase = (student_term, *states, gradients, *idle_teacher, cache, temporary)
        phases.append(Phase(name, parts_of_phase))
    if config.rollout.engine == "vllm":
        vllm = Term("vLLM: weights, keys and values", VLLM_SHARE * machine.memory)
        phases = [Phase("rollout", (student_term, *states, gradients, *idle_teacher, vllm))]
        idle_teacher, update_teacher = [*idle_teacher, vllm], [*update_teacher, vllm]
        teacher = [*teacher, vllm]
    kept_bytes = peak = 0.0
    if counts.teacher_forward is not None:
        kept_bytes, peak = counts.teacher_forward.kept_bytes, counts.teacher_forward.peak
    forward = counts.update if counts.shares_pass else counts.student_forward
    if not counts.shares_pass:
        peak = max(peak, kept_bytes + forward.peak)
    peak = max(peak, kept_bytes + forward.kept_bytes + counts.score_chunks.peak)
    scoring = Term("hidden states and logits of a micro-batch", peak)
    earlier_gradients = [gradients]
    if counts.shares_pass and not workload.has_several_micro_batches:
        earlier_gradients = []  # those of the step before are removed first
    phases.append(
        Phase("scoring", (student_term, *states, *earlier_gradients, *teacher, batch, scoring))
    )
    update = counts.update
    peak_gradients = Term("gradients at that time", update.gradients / parts)
    activations = Term("activations and logits of a micro-batch", update.peak - update.gradients)
    phases.append(
        Phase("update", (layers, *states, peak_gradients, *update_teacher, batch, activations))
    )
    temporary = Term("temporaries of AdamW", counts.optimizer.peak / parts)
    phases.append(Phase("optimizer", (layers, *states, gradients, *idle_teacher, batch, temporary)))
    return phases
