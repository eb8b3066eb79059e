"""Data files of toy models: problems, worked solutions, and responses that a teacher writes."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diagnostics.io.atomic import write_text
from opd.data import sort_task
from opd.data.chain_task import Problem
from opd.lab import household_demos, shown_solutions
from opd.lab.shown_solutions import another_problem, plain_problems

NUM_TRAINING = 3000
MAX_PROMPT, MAX_RESPONSE = 64, 48
"""Limits in tokens of a problem alone and of a response."""
MAX_MESSAGE = 96
"""Limit in tokens of a message that shows a solution."""
MESSAGE_COLUMNS = {
    "alone": "{prompt}",
    "no solution shown": "{prompt} | ",
    "solution shown": "{prompt} | {solution}",
    "another solution shown": "{prompt} | {another_solution}",
}
"""Kind of message to its prompt column in the held-out files."""


@dataclass(frozen=True)
class HeldOutSource:
    """Held-out problems on which a toy model is evaluated."""

    name: str
    """Name of the result."""
    task: str = "lab"
    """Source of which a part is held out."""
    eval_task: str = ""
    """Source whose problems are all held out, in the place of `task`."""
    prompt_column: str = "prompt"
    """Column of eval_task with the prompt."""
    max_prompt: int = 64
    """Limit of prompts in tokens."""
    max_response: int = 208
    """Limit of responses in tokens."""


HOUSEHOLD_SOURCE = HeldOutSource(
    "household", "env:household", max_prompt=144, max_response=household_demos.MAX_RESPONSE
)


def sorting_source(folder: Path) -> list[HeldOutSource]:
    """Return the held-out problems of the sorting task, from a file in `folder`."""
    path = folder / "sort.jsonl"
    write_sorting_problems(path)
    return [HeldOutSource("sort", str(path))]


def message_sources(folder: Path) -> list[HeldOutSource]:
    """Return the held-out problems with each kind of message, from a file in `folder`."""
    write_held_out_problems(folder)
    return [
        HeldOutSource(
            name,
            eval_task=str(folder / "validation.jsonl"),
            prompt_column=column,
            max_prompt=MAX_MESSAGE,
            max_response=MAX_RESPONSE,
        )
        for name, column in MESSAGE_COLUMNS.items()
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows as a JSONL file that the grader "lab" grades."""
    lines = [json.dumps({**row, "grader": "lab"}) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def write_sorting_problems(path: Path, count: int = 6000) -> None:
    """Write problems of the sorting task as a data file; training splits them by content."""
    problems = sort_task.problems("train", count, seed=0)
    write_rows(path, ({"prompt": p.prompt, "answer": p.answer} for p in problems))


def write_held_out_problems(folder: Path) -> None:
    """Write the two halves of the test split as test.jsonl and validation.jsonl.

    Settings are chosen on validation.jsonl and reported on test.jsonl. Every row has a problem, its
    answer and solution, and the solution of another problem.

    Args:
        folder: Folder of the files; also gets the message of a teacher that reads the solution,
            view.jinja.
    """
    generator = random.Random("shown solutions")
    pool = plain_problems("test")
    rows = [
        problem_columns(problem)
        | {"another_solution": another_problem(problem, pool, generator).solution}
        for problem in generator.sample(pool, len(pool))
    ]
    half = len(rows) // 2
    write_rows(folder / "test.jsonl", rows[:half])
    write_rows(folder / "validation.jsonl", rows[half:])
    write_text(folder / "view.jinja", shown_solutions.TEMPLATE)


def write_training_problems(folder: Path, seed: int) -> None:
    """Write training problems with a response of the teacher to each as train.jsonl.

    Args:
        folder: Folder of the models.
        seed: Seed of the teacher's sampling.
    """
    from opd.config.groups import EvalConfig
    from opd.evaluation.folder import respond_folder

    sample = random.Random("training problems").sample(plain_problems("train"), NUM_TRAINING)
    path = folder / "train.jsonl"
    write_rows(path, map(problem_columns, sample))
    graded = respond_folder(
        str(folder / "teacher"),
        "lab",
        device="cpu",
        evaluation=EvalConfig(eval_task=str(path), eval_problems=NUM_TRAINING),
        max_prompt=MAX_PROMPT,
        max_response=MAX_RESPONSE,
        seed=seed,
    )
    responses = {
        problem.prompt: texts[0]
        for problem, texts in zip(graded.problems, graded.texts, strict=True)
    }
    write_rows(path, (problem_columns(p) | {"response": responses[p.prompt]} for p in sample))


def problem_columns(problem: Problem) -> dict[str, str]:
    """Return a problem as the columns of a row."""
    return {"prompt": problem.prompt, "answer": problem.answer, "solution": problem.solution}
