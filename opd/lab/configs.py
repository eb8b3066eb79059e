"""Configurations of toy models: their size, their training data, and the kinds of pairs."""

import dataclasses
import re
from dataclasses import dataclass

from opd.lab import household_demos
from opd.lab.writing_style import PLAIN, WritingStyle


@dataclass(frozen=True)
class ToyModelConfig:
    """One toy model: size, training and data."""

    layers: int
    width: int
    steps: int
    batch: int
    """Sequences per training step."""
    lr: float
    careless: float = 0.0
    """Error rate: probability that a result in the training solutions is wrong."""
    tasks: tuple[str, ...] = ("chain",)
    """Names in TASKS, sampled equally often; a name given twice is sampled twice as often."""
    habit: WritingStyle = PLAIN
    """Writing style of the training solutions."""
    start: str = ""
    """Model of the same folder from whose weights training starts; empty: from random ones."""
    previous_token_head: bool = False
    """Whether a head of new weights attends to the previous token (`previous_token_head`)."""


@dataclass(frozen=True)
class LabConfig:
    """The models and the seed; a finished folder is reused only if all of it is equal."""

    teacher: ToyModelConfig = ToyModelConfig(layers=2, width=128, steps=700, batch=24, lr=3e-3)
    student: ToyModelConfig = ToyModelConfig(
        layers=2, width=96, steps=700, batch=24, lr=3e-3, careless=0.06
    )
    others: tuple[tuple[str, ToyModelConfig], ...] = ()
    """Teachers of further tasks, each with the name of its folder."""
    seed: int = 0
    held_out: int = 512
    """Number of held-out problems per task on which each model is evaluated."""

    @property
    def models(self) -> dict[str, ToyModelConfig]:
        """Folder name -> model configuration."""
        return {"teacher": self.teacher, "student": self.student, **dict(self.others)}

    @property
    def texts(self) -> list[str]:
        """Texts from which the vocabulary is learned: games, if any model plays them."""
        if not any("household" in model_config.tasks for model_config in self.models.values()):
            return []
        problems = household_demos.problems("train", 400, seed=0)
        return [re.sub(r"</?think>", "\n", f"{p.prompt}\n{p.solution}") for p in problems]


def mismatched_config() -> LabConfig:
    """Return models with different writing styles: two tasks with one teacher each."""
    student_style = WritingStyle(tag="spelled", loops=0.01, foreign=0.02)
    teacher_style = WritingStyle(end="<|endoftext|>", read=0.5, loops=0.002)
    teacher = ToyModelConfig(
        layers=2, width=128, steps=1200, batch=24, lr=3e-3, habit=teacher_style
    )
    student = ToyModelConfig(
        layers=2,
        width=96,
        steps=1200,
        batch=24,
        lr=3e-3,
        careless=0.06,
        tasks=("chain", "sort"),
        habit=student_style,
    )
    sort_style = dataclasses.replace(student_style, loops=0.002)
    sort_teacher = dataclasses.replace(student, careless=0.0, tasks=("sort",), habit=sort_style)
    return LabConfig(teacher=teacher, student=student, others=(("sort-teacher", sort_teacher),))


def household_config() -> LabConfig:
    """Return a student of two tasks, `env:household` and sorting, with a teacher for each.

    The student's training data misjudges one action in ten and misplaces one digit in ten.
    """
    teacher = ToyModelConfig(
        layers=2, width=96, steps=1500, batch=32, lr=4e-3, tasks=("household",)
    )
    student_tasks = ("household", "household", "sort")
    student = dataclasses.replace(teacher, batch=48, careless=0.1, tasks=student_tasks)
    sort_teacher = dataclasses.replace(teacher, steps=700, tasks=("sort",))
    return LabConfig(
        teacher=teacher, student=student, others=(("sort-teacher", sort_teacher),), held_out=128
    )


NUM_VIEW_STUDENTS = 5
"""Students of `view_config`."""


def view_config() -> LabConfig:
    """Return models that solve problems alone, or follow a solution that is shown to them.

    Five students continue the training of the teacher, each on other demonstrations, which have
    errors wherever the right solution is not shown.
    """
    teacher = ToyModelConfig(
        layers=2,
        width=96,
        steps=900,
        batch=24,
        lr=3e-3,
        tasks=("shown",),
        previous_token_head=True,
    )
    student = dataclasses.replace(teacher, steps=100, lr=1e-3, careless=0.1, start="teacher")
    names = [view_student(number) for number in range(1, NUM_VIEW_STUDENTS)]
    return LabConfig(
        teacher=teacher, student=student, others=tuple((name, student) for name in names)
    )


def view_student(number: int) -> str:
    """Return the name of a student of `view_config`, from 0."""
    return f"student-{number}" if number else "student"


def tiny_config() -> LabConfig:
    """Return a pair that trains in seconds, for tests; neither model solves the task."""
    return LabConfig(
        teacher=ToyModelConfig(layers=2, width=32, steps=12, batch=8, lr=2e-3),
        student=ToyModelConfig(layers=1, width=32, steps=6, batch=8, lr=2e-3),
        held_out=8,
    )
