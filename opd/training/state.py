"""What the steps of a training run share: models, optimizer, engine, and the state of each task."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from diagnostics.monitor import Monitor
from opd.config.settings import Config
from opd.data.tasks import Task
from opd.data.teacher_view.view import TeacherView
from opd.envs.task import GameTask
from opd.models.model import CausalLM
from opd.objectives.objective import Objective
from opd.rollouts.base import Engine
from opd.scoring.request import ScoreRequest
from opd.teachers.pair import ModelPair
from opd.tokens.masking import ResolvedMaskRules
from opd.training.multitask import tasks_of_step
from opd.training.optimizer import Optimizer
from opd.training.prefetch import RolloutPrefetcher


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskState:
    """What the steps of one task share; a run of a single task has one."""

    config: Config
    """Settings of the task."""
    pair: ModelPair
    """The run's student with the task's teacher."""
    problems: Task | GameTask
    """Problems or games."""
    objective: Objective
    """The objective."""
    request: ScoreRequest
    """What a step with full statistics is scored for."""
    masks: list[ResolvedMaskRules]
    """Rules for tokens that are excluded from the loss."""
    monitor: Monitor
    """Metrics and alarms of the task's rows."""
    name: str = ""
    """Name of the task; empty in a run of a single task."""
    index: int = 0
    """Index of the task in the run."""
    weight: float = 1.0
    """Weight of the task's loss in a mixed step."""
    view: TeacherView | None = None
    """What the teacher reads in the place of the student's prompts; None: the same."""
    teacher_sample: tuple[list[Tensor], Tensor] | None = None
    """Sampled weights of a frozen teacher with their initial values, to detect changes."""

    def request_of_step(self, task_step: int) -> ScoreRequest:
        """Return what a step is scored for.

        Args:
            task_step: Number of the task's previous steps.

        Returns:
            The request, with full statistics where metrics, probe or token selection need them.
        """
        config = self.config
        due = is_due(task_step, config.record.full_metrics_every) or is_due(
            task_step, config.record.probe_every
        )
        return replace(
            self.request, full_statistics=due or config.objective.entropy_top_fraction < 1
        )

    def columns(self, row: Mapping[str, float], several: bool) -> dict[str, float]:
        """Return a task's columns of a row, named after the task where a step has several."""
        return {f"task={self.name}/{name}" if several else name: x for name, x in row.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainState:
    """What the steps of a run share."""

    config: Config
    """Settings of the run."""
    folder: Path
    """Run folder."""
    student: CausalLM
    """The model that is trained."""
    optimizer: Optimizer
    """Its optimizer."""
    engine: Engine
    """Rollout engine."""
    prefetcher: RolloutPrefetcher
    """Rollouts of this and of future steps."""
    tasks: list[TaskState]
    """State of each task."""
    first_step: int = 0
    """First step to take."""
    unchecked_graders: dict[str, str] = field(default_factory=dict)
    """Name of each task whose grader no step of this process has used yet, with its problems."""

    def tasks_of_step(self, step: int) -> list[tuple[TaskState, int]]:
        """Return the tasks that a step trains on, each with its number of previous steps."""
        return [(self.tasks[i], task_step) for i, task_step in tasks_of_step(self.config, step)]


def is_due(step: int, interval: int) -> bool:
    """Return whether a periodic action is due at a step; an interval of 0 means never."""
    return interval > 0 and step % interval == 0
