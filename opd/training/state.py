"""What the steps of a run share, and what one of them rolled out."""

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
from opd.objectives.factory import Objective
from opd.rollouts.base import Engine
from opd.teachers.pair import ModelPair
from opd.tokens.masking import ResolvedMaskRules
from opd.training.optimizer import Optimizer
from opd.training.prefetch import RolloutPrefetcher


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRun:
    """What the steps of a run share; of a run of several tasks, what the steps of one task share.

    The tasks of a run have one student, optimizer, engine and what it samples ahead between them.
    name, place, weight: of the task among several; its loss counts by weight where they share a
    step. frozen: some weights of the teacher and their numbers as they were, if it must not move.
    """

    config: Config
    folder: Path
    pair: ModelPair
    task: Task | GameTask
    engine: Engine
    ahead: RolloutPrefetcher
    objective: Objective
    masks: list[ResolvedMaskRules]
    optimizer: Optimizer
    monitor: Monitor
    name: str = ""
    place: int = 0
    weight: float = 1.0
    frozen: tuple[list[Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredTaskBatch:
    """One task's rollouts of a step, scored.

    scored: with the mask of the loss; teacher_hidden (N, D'): the teacher's states at all N sampled
    tokens, for objectives on the whole vocabulary; played: what became of episodes, nothing where
    prompts are answered once; checks: what the rows say of the run's health (opd.training.checks.step,
    opd.training.checks.rescoring).
    """

    run: TaskRun
    prompts: Prompts
    scored: ScoredRollouts
    teacher_hidden: Tensor | None
    played: Mapping[str, Accumulator]
    checks: Mapping[str, Tensor] = field(default_factory=dict)
