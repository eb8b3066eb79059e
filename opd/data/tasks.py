"""Prompts: deterministic batches of verifiable problems, encoded for a model.

Shapes: B responses, P prompt positions.
"""

import hashlib
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short
from opd.data.benchmarks import is_named, named_rows
from opd.data.chain_task import Problem, problems
from opd.data.grading.graders import GRADERS, Grade, Grader, is_own, make_grader
from opd.data.grading.reference_answers import check_golds
from opd.data.prompts import fits
from opd.data.sources import (
    DEFAULT_COLUMNS,
    Columns,
    Question,
    final_answer,
    has_worked_solutions,
    question,
    questions,
)
from opd.data.sources import read_problems as read_problems

MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class Task:
    """Training problems by step, held-out problems, and how a response is graded.

    A problem whose answer is "" is not graded. name: of the grader.
    """

    train: Callable[[int, int], list[Problem]]
    test: Callable[[int], list[Problem]]
    grade: Grader
    name: str = "of the task"

    @property
    def has_test_answers(self) -> bool:
        """Whether the held-out problems have answers to grade with."""
        return all(problem.answer for problem in self.test(1))


def load_task(
    source: str,
    seed: int,
    *,
    test: str = "",
    grader: str = "",
    system: str = "",
    template: Mapping[str, Any] | None = None,
    columns: Columns = DEFAULT_COLUMNS,
    test_columns: Columns | None = None,
    fit: Callable[[list[Problem]], list[Problem]] = list,
) -> Task:
    """The task called "lab", problems from data (columns prompt and answer; see opd.data.sources), or
    a data set by name (opd.data.benchmarks).

    A tenth of the prompts of a source (at least one, at most 1,000) is held out, those with the
    smallest hash of their content: the order of the rows changes nothing, and all copies of a
    prompt are on one side. Training draws from the rest, reshuffled every epoch.

    Args:
      test: another source, all of whose problems are held out instead; their prompts are taken out
        of the training problems, with a warning that counts them. May be `source` itself, to
        evaluate on all of it; nothing is left to train on then.
      test_columns: of `test`, those of `source` if None.
      grader: a name that `opd.data.grading.graders.make_grader` knows; empty: the one in the column `grader`,
        else "exact". Where all answers are worked solutions that end in #### N, as in GSM8K's
        file, it compares with N, and a warning says so.
      system: a system message before every prompt.
      template: settings of the chat template, such as {"enable_thinking": False}.
      fit: what to do about long prompts: `partial(refuse_long, tokenizer, max_prompt)`, or
        `skip_long_prompts`.

    Raises:
      ValueError: rows that lack something, answers that the grader cannot compare with, an unknown
        grader or several in one source, or another test for "lab". FileNotFoundError: no such file.
    """
    settings = tuple((template or {}).items())

    def read(name: str, where: Columns) -> list[Problem]:
        if is_named(name):
            asked = questions(named_rows(name), name, DEFAULT_COLUMNS, system, settings)
        else:
            asked = read_problems(name, where, system, settings)
        try:
            return fit(asked)
        except InvalidInput as error:
            raise InvalidInput(f"{name}: {error}") from error

    if source == "lab":
        if test:
            raise InvalidInput(f'"lab" has held-out problems of its own; leave out test={test!r}')
        return lab_task(seed, grader or "lab", system, settings)
    everything = read(source, columns)
    if test:
        held = distinct(everything if test == source else read(test, test_columns or columns))
        training = without(everything, held, None if test == source else f"{source} that {test}")
    else:
        try:
            training, held = split(everything)
        except InvalidInput as error:
            raise InvalidInput(f"{source}: {error}") from error
    answered = everything if any(problem.answer for problem in everything) else held
    name = grader or named_grader(source, answered) or "exact"
    grade = make_grader(name)
    sources = [(source, everything)] + [(test, held)] * (bool(test) and test != source)
    worked = [has_worked_solutions(rows, some) for some, rows in sources]
    if any(worked):
        grade = partial(grade_final, grade)
    for some, rows in sources:
        check_golds(rows, some, name, grade)

    def draw(step: int, count: int) -> list[Problem]:
        if not training:
            raise InvalidInput(f"all of {source} is held out; nothing is left to train on")
        order = epoch_indices(len(training), step * count, count, seed)
        return [training[i] for i in order]

    return Task(train=draw, test=lambda count: held[:count], grade=grade, name=name)


def grade_final(grade: Grader, response: str, answer: str) -> Grade:
    """By a grader, with the final answer of a worked solution."""
    return grade(response, final_answer(answer))


def lab_task(seed: int, grader: str, system: str, template: tuple[tuple[str, Any], ...]) -> Task:
    """The task of opd.data.chain_task, with a system message or template settings where there are any."""

    def dressed(plain: list[Problem]) -> list[Problem]:
        if not system and not template:
            return plain
        rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in plain]
        return [question(row, DEFAULT_COLUMNS, system, template) for row in rows]

    return Task(
        train=lambda step, count: dressed(problems("train", count, seed * 1_000_003 + step)),
        test=lambda count: dressed(problems("test", count, 0)),
        grade=make_grader(grader),
        name=grader,
    )


def named_grader(source: str, rows: list[Problem]) -> str:
    """The grader that the rows name, "" if none does.

    Raises:
      ValueError: they name several, or a function: data must not choose what code runs.
    """
    names = {problem.grader for problem in rows if isinstance(problem, Question)}
    if functions := sorted(name for name in names if is_own(name)):
        raise InvalidInput(
            f"{source} names the function {functions[0]!r} as grader; data may name "
            f"{', '.join(GRADERS)} alone. If you wrote the function, name it with --grader"
        )
    if unknown := sorted(names - {"", *GRADERS}):
        raise InvalidInput(
            f"{source} names the grader {short(unknown[0])}; known: {', '.join(GRADERS)}. Mend its "
            "column grader, or choose one with --grader"
        )
    if len(names) > 1:
        raise InvalidInput(
            f"{source} names several graders, {sorted(names)}; make one file of each, or choose "
            "one with --grader"
        )
    return "".join(names)


def identity(problem: Problem) -> bytes:
    """Hash of a prompt's text, spacing aside; equal for copies."""
    return hashlib.sha256(" ".join(problem.prompt.split()).encode()).digest()


def distinct(rows: list[Problem]) -> list[Problem]:
    """One copy of each prompt, by rising hash; of several answers the first in the alphabet."""
    first: dict[bytes, Problem] = {}
    for problem in sorted(rows, key=lambda problem: problem.answer):
        first.setdefault(identity(problem), problem)
    return [first[key] for key in sorted(first)]


def split(rows: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """(training, held out): see `load_task`. The order of training rows does not matter either.

    Raises:
      ValueError: fewer than two different prompts.
    """
    prompts = distinct(rows)
    if len(prompts) < 2:
        raise InvalidInput(
            f"{len(rows)} rows hold {len(prompts)} different prompts; 2 are needed, one to train "
            "on and one to hold out"
        )
    held = prompts[: min(max(1, len(prompts) // 10), MOST_HELD_OUT)]
    return without(rows, held, None), held


def without(rows: list[Problem], held: list[Problem], who: str | None) -> list[Problem]:
    """The rows whose prompt is not held out, by rising hash; `who` makes a warning count them."""
    out = {identity(problem) for problem in held}
    kept = [problem for problem in rows if identity(problem) not in out]
    if who is not None and len(kept) < len(rows):
        warnings.warn(
            f"not trained on: {len(rows) - len(kept)} of {len(rows)} problems of {who} holds too",
            stacklevel=3,
        )
    return sorted(kept, key=lambda problem: (identity(problem), problem.answer))


def epoch_indices(size: int, first: int, count: int, seed: int) -> list[int]:
    """`count` indices from position `first` of an endless sequence of shuffled epochs."""
    order: dict[int, list[int]] = {}
    picked = []
    for position in range(first, first + count):
        epoch, place = divmod(position, size)
        if epoch not in order:
            order[epoch] = random.Random(f"{seed}-{epoch}").sample(range(size), size)
        picked.append(order[epoch][place])
    return picked


def refuse_long(tokenizer: Any, max_prompt: int, rows: list[Problem]) -> list[Problem]:
    """The rows, all of which fit.

    Raises:
      ValueError: prompts of more than `max_prompt` tokens; says how many and the longest.
    """
    fitting, longest = fits(tokenizer, max_prompt, rows)
    if len(fitting) < len(rows):
        raise InvalidInput(
            f"{len(rows) - len(fitting)} of {len(rows)} prompts are longer than max_prompt = "
            f"{max_prompt} tokens, the longest has {longest}; raise max_prompt, or drop them"
        )
    return rows


def skip_long_prompts(tokenizer: Any, max_prompt: int, rows: list[Problem]) -> list[Problem]:
    """The rows that fit; a warning counts the others.

    Raises:
      ValueError: none fits.
    """
    fitting, longest = fits(tokenizer, max_prompt, rows)
    count = f"{len(rows) - len(fitting)} of {len(rows)} prompts"
    if not fitting:
        raise InvalidInput(f"{count} are longer than max_prompt = {max_prompt} tokens; raise it")
    if len(fitting) < len(rows):
        warnings.warn(
            f"dropped {count}: longer than max_prompt = {max_prompt} tokens, up to {longest}",
            stacklevel=2,
        )
    return fitting
