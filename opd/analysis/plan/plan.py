"""The plan of a run: memory and time of a step from settings and configurations of models."""

from dataclasses import dataclass
from functools import cached_property

import torch

from diagnostics.errors import InvalidInput
from opd.analysis.plan.machines import Machine
from opd.analysis.plan.memory import Phase, StepCounts, plan_phases
from opd.analysis.plan.networks import MetaNetwork, make_network, quantised_bytes
from opd.analysis.plan.passes.model import Rows
from opd.analysis.plan.passes.rollout import RolloutCounts, count_rollout
from opd.analysis.plan.passes.scoring import count_forward, count_score_chunk
from opd.analysis.plan.passes.update import count_optimizer, count_update
from opd.analysis.plan.step_time import Activity, plan_activities
from opd.analysis.plan.workload import Workload, make_workload
from opd.config.prefixes import parse_prefixes
from opd.config.settings import Config
from opd.scoring.chosen_ids import STUDENT_SUPPORTS
from opd.teachers.teacher import AdapterFreeTeacher, EmaTeacher, LocalTeacher, teacher_type
from opd.training.multitask import task_configs
from opd.training.setup import objective_from_config
from opd.training.shared_pass import allows_shared_pass, shares_heads


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs on one machine."""

    config: Config
    machine: Machine
    gpus: int
    workload: Workload
    student: MetaNetwork
    teacher: MetaNetwork | None
    """The teacher whose passes were counted; None for one elsewhere."""
    phases: list[Phase]
    activities: list[Activity]

    @cached_property
    def peak_phase(self) -> Phase:
        """The phase with the most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def reserve(self) -> float:
        """Bytes that are no tensors: context, workspaces, fragmentation."""
        return self.machine.fixed_reserve + self.machine.fragmentation * self.peak_phase.bytes

    @property
    def peak_bytes(self) -> float:
        """Bytes at the peak, with the reserve."""
        return self.peak_phase.bytes + self.reserve

    @property
    def fits(self) -> bool:
        """Whether the device has that much."""
        return self.peak_bytes <= self.machine.memory

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(activity.seconds for activity in self.activities)


def make_plan(
    config: Config, machine: Machine, gpus: int = 1, prompt_tokens: int = 0, mean_response: int = 0
) -> Plan:
    """Plan a run. Reads configurations of models and no weights.

    Of several tasks the one with the longest rows is planned, with the teachers of all.

    Args:
        config: Valid settings.
        machine: The machine.
        gpus: Number of its devices, each with a process.
        prompt_tokens: Length of a prompt; 0 means `max_prompt`.
        mean_response: Mean length of a response; 0 means `max_response`.

    Returns:
        The plan.

    Raises:
        InvalidInput: A model or length is invalid, or a model cannot be counted.
    """
    configs = task_configs(config)
    task_config = max(configs, key=lambda x: x.data.max_prompt + x.rollout.max_response)
    workload = make_workload(task_config, gpus, prompt_tokens, mean_response)
    dtype = getattr(torch, config.hardware.dtype)
    trust = config.hardware.trust_remote_code
    student = make_network(config.student, dtype, config=config, trust_remote_code=trust)
    teachers = {task.teacher: teacher_network(task, student, dtype) for task in reversed(configs)}
    weights = config.hardware.teacher_weights
    teacher_bytes = sum(
        quantised_bytes(model, weights)
        for model in teachers.values()
        if model not in (None, student)
    )
    teacher = teachers[task_config.teacher]
    vocabulary = min(
        [student.head_rows, *(m.head_rows for m in teachers.values() if m is not None)]
    )
    if config.objective.support_k > vocabulary:
        raise InvalidInput(
            f"support_k is {config.objective.support_k}, but the shared vocabulary has "
            f"{vocabulary} tokens; lower support_k"
        )
    counts = count_step(task_config, workload, student, teacher, vocabulary, machine)
    needs = objective_from_config(config).requirements
    width = 0
    if teacher is not None:
        width = teacher.network.config.get_text_config().hidden_size
    common = (config, workload, student)
    return Plan(
        config=config,
        machine=machine,
        gpus=gpus,
        workload=workload,
        student=student,
        teacher=teacher,
        phases=plan_phases(*common, teacher_bytes, counts, needs, width, machine, gpus),
        activities=plan_activities(*common, counts, machine, gpus),
    )


def teacher_network(config: Config, student: MetaNetwork, dtype: torch.dtype) -> MetaNetwork | None:
    """Return the network of a teacher in this process; None for another one.

    Args:
        config: Settings of the task.
        student: The student, which teacher "base" shares its weights with.
        dtype: Precision of the models.

    Returns:
        The network.
    """
    kind = teacher_type(config.teacher)
    if kind is AdapterFreeTeacher:
        return student
    trust = config.hardware.trust_remote_code
    if kind is EmaTeacher:
        return make_network(config.student, torch.float32, trust_remote_code=trust)
    if kind is LocalTeacher:
        return make_network(config.teacher, dtype, trust_remote_code=trust)
    return None


def count_step(
    config: Config,
    workload: Workload,
    student: MetaNetwork,
    teacher: MetaNetwork | None,
    vocabulary: int,
    machine: Machine,
) -> StepCounts:
    """Count the passes of a step.

    Args:
        config: Settings of the task.
        workload: Sizes of the step.
        student: The student.
        teacher: A teacher in this process.
        vocabulary: Ids that both models share.
        machine: The machine.

    Returns:
        The counts.

    Raises:
        InvalidInput: A model runs code that depends on numbers, which cannot be counted.
    """
    objective = objective_from_config(config)
    needs, rows = objective.requirements, workload.micro_batch
    reads_head = needs.support == "full"
    reads_student_ids = teacher is None and needs.support in STUDENT_SUPPORTS
    shares_pass = not reads_student_ids and allows_shared_pass(config, objective)
    has_distributions = shares_pass and shares_heads(config, objective)
    rollout, evaluation = count_sampling(config, workload, student, teacher, vocabulary, machine)
    return StepCounts(
        rollout=rollout,
        evaluation=evaluation,
        student_forward=count_forward(student, rows, vocabulary, machine),
        teacher_forward=None
        if teacher is None
        else count_forward(teacher, workload.teacher_micro_batch, vocabulary, machine),
        score_chunks=count_score_chunk(
            student,
            teacher,
            vocabulary,
            rows.tokens,
            config,
            needs,
            machine,
            has_distributions=has_distributions,
        ),
        update=count_update(
            student,
            teacher if reads_head else None,
            objective,
            workload.update_batch,
            vocabulary,
            config,
            machine,
            has_gradients=workload.has_several_micro_batches,
        ),
        optimizer=count_optimizer(student, machine),
        shares_pass=shares_pass,
        shares_heads=has_distributions,
    )


def count_sampling(
    config: Config,
    workload: Workload,
    student: MetaNetwork,
    teacher: MetaNetwork | None,
    vocabulary: int,
    machine: Machine,
) -> tuple[RolloutCounts | None, RolloutCounts | None]:
    """Count the sampling of a step's responses, and of an evaluation where it has more rows.

    Args:
        config: Settings of the task.
        workload: Sizes of the step.
        student: The student.
        teacher: A teacher in this process.
        vocabulary: Ids that both models share.
        machine: The machine.

    Returns:
        Both counts; None where no model samples in this process, or no more rows.
    """
    if config.rollout.engine != "hf":
        return None, None
    prefixes = parse_prefixes(config.rollout.prefixes)
    has_rollouts = config.rollout.prefixes != "dataset"
    num_rows = workload.rollout_rows if has_rollouts else workload.evaluated_rows
    if not num_rows:
        return None, None
    rows = Rows(count=num_rows, prompt=workload.prompt, response=workload.longest)
    sampler = teacher if prefixes.samples_teacher and teacher is not None else student
    group_size, temperature = config.data.group_size, config.rollout.temperature
    counts = count_rollout(sampler, rows, group_size, vocabulary, temperature, machine)
    evaluation = None
    if not has_rollouts or workload.evaluated_rows > num_rows:
        evaluation = counts.with_rows(workload.evaluated_rows / num_rows)
    return (counts if has_rollouts else None), evaluation
