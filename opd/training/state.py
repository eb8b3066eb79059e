"""State of a training run per task, and the scored batch of a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Accumulator
from diagnostics.monitor import Monitor
from opd.config.settings import Config
from opd.data.prompts import Prompts
from opd.data.tasks import Task
from opd.envs.task import GameTask
from opd.objectives.objective import Objective
from opd.rollouts.base import Engine
from opd.teachers.pair import ModelPair
from opd.tokens.masking import ResolvedMaskRules
from opd.training.optimizer import Optimizer
from opd.training.prefetch import RolloutPrefetcher


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRun:
    """What the steps of one task share.

    The tasks of a run have the same student, optimizer, engine and prefetcher.
    """

    config: Config
    """Settings of the task."""
    folder: Path
    """Run folder."""
    pair: ModelPair
    task: Task | GameTask
    engine: Engine
    prefetcher: RolloutPrefetcher
    objective: Objective
    masks: list[ResolvedMaskRules]
    optimizer: Optimizer
    monitor: Monitor
    name: str = ""
    """Name of the task; empty in a run of a single task."""
    task_index: int = 0
    """Index of the task in the run."""
    weight: float = 1.0
    """Weight of the task's loss in a mixed step."""
    teacher_sample: tuple[list[Tensor], Tensor] | None = None
    """Sampled weights of a frozen teacher with their initial values, to detect changes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredTaskBatch:
    """One task's rollouts of a step, scored by both models."""

    run: TaskRun
    prompts: Prompts
    scored: ScoredRollouts
    """Scored rollouts with the loss mask."""
    teacher_hidden: Tensor | None
    """(N, D') teacher hidden states at all N sampled tokens, for full-vocabulary objectives."""
    accumulators: Mapping[str, Accumulator]
    """Metrics of episodes, or the share of answers that the grader could parse."""
    checks: Mapping[str, Tensor] = field(default_factory=dict)
    """Health checks of the batch (`opd.training.checks.step`, `opd.training.checks.rescoring`)."""
