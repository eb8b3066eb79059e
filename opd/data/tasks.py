"""Tasks: training and held-out problems of a source, and their grader.

Shapes: B responses, P prompt positions.
"""

import hashlib
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from diagnostics.io.user_functions import is_function_name
from opd.data.benchmarks import is_benchmark, read_benchmark_rows
from opd.data.chain_task import Problem, problems
from opd.data.chain_task import all_problems as all_chain_problems
from opd.data.grading.graders import GRADERS, Grade, Grader, make_grader
from opd.data.grading.reference_answers import check_reference_answers
from opd.data.prompts import filter_by_length
from opd.data.row_files import Row
from opd.data.sources import (
    DEFAULT_COLUMNS,
    Columns,
    DatasetProblem,
    final_answer,
    has_worked_solutions,
    parse_problems,
    parse_row,
)
from opd.data.sources import read_problems as read_problems

MAX_HELD_OUT = 1000


@dataclass(frozen=True)
class Task:
    """Training problems by step, held-out problems, and the grader.

    A problem whose answer is "" is not graded.
    """

    train: Callable[[int, int], list[Problem]]
    """(step, count) -> training problems of that step."""
    test: Callable[[int], list[Problem]]
    """count -> the first held-out problems."""
    grade: Grader
    name: str = "of the task"
    """Name of the grader."""
    training: Callable[[], Sequence[Problem]] = tuple
    """Returns all training problems."""

    @property
    def has_test_answers(self) -> bool:
        """Whether the held-out problems have answers to grade against."""
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
    handle_long_prompts: Callable[[list[Problem]], list[Problem]] = list,
    rows: Mapping[str, list[Row]] | None = None,
) -> Task:
    """Load the built-in task "lab", a dataset, or a benchmark by name.

    Datasets are described in `opd.data.sources`, benchmarks in `opd.data.benchmarks`. A tenth of
    the prompts of a source (at least one, at most 1,000) is held out: those with the smallest hash
    of their content. The order of the rows has no effect, and all copies of a prompt are on the
    same side. Training draws from the rest, reshuffled every epoch.

    Args:
        source: "lab", a file, a folder, `hf:NAME`, or the name of a benchmark.
        seed: Seed of the training order.
        test: Another source, all of whose problems are held out instead; their prompts are removed
            from the training problems, with a warning that counts them. May be `source` itself, to
            evaluate on all of it; no training problems remain then.
        grader: A name that `opd.data.grading.graders.make_grader` accepts; if empty, the one in the
            column `grader`, else "exact". Where all answers are worked solutions that end in ####
            N, as in GSM8K's file, responses are graded against N, and a warning says so.
        system: System message before every prompt; "" for none.
        template: Settings of the chat template, such as {"enable_thinking": False}.
        columns: Names of the columns of `source`.
        test_columns: Names of the columns of `test`; those of `source` if None.
        handle_long_prompts: `partial(reject_long_prompts, tokenizer, max_prompt)`, or the same with
            `skip_long_prompts`.
        rows: Rows of sources that are objects, by name (`opd.data.row_files.rows_of_object`).

    Returns:
        The task.

    Raises:
        InvalidInput: Rows with missing values, answers that the grader cannot compare with, an
            unknown grader or several graders in one source, or `test` together with "lab".
        MissingFile: A file does not exist.
    """
    settings = tuple((template or {}).items())

    def read(name: str, columns_of_source: Columns) -> list[Problem]:
        if rows is not None and name in rows:
            problems_read = parse_problems(rows[name], name, columns_of_source, system, settings)
        elif is_benchmark(name):
            benchmark_columns = replace(
                DEFAULT_COLUMNS,
                kept=columns_of_source.kept,
                kept_where_present=columns_of_source.kept_where_present,
            )
            problems_read = parse_problems(
                read_benchmark_rows(name), name, benchmark_columns, system, settings
            )
        else:
            problems_read = read_problems(name, columns_of_source, system, settings)
        try:
            return handle_long_prompts(problems_read)
        except InvalidInput as error:
            raise InvalidInput(f"{name}: {error}") from error

    if source == "lab":
        if test:
            raise InvalidInput(f'"lab" has its own held-out problems; remove test={test!r}')
        return toy_task(seed, grader or "lab", system, settings)
    all_problems = read(source, columns)
    if test:
        held_out_problems = deduplicate(
            all_problems if test == source else read(test, test_columns or columns)
        )
        training = exclude_held_out(
            all_problems, held_out_problems, None if test == source else f"{source} that {test}"
        )
    else:
        try:
            training, held_out_problems = split_held_out(all_problems)
        except InvalidInput as error:
            raise InvalidInput(f"{source}: {error}") from error
    graded_problems = (
        all_problems if any(problem.answer for problem in all_problems) else held_out_problems
    )
    name = grader or grader_of_rows(source, graded_problems) or "exact"
    grade = make_grader(name)
    sources = [(source, all_problems)] + [(test, held_out_problems)] * (
        bool(test) and test != source
    )
    has_worked = [
        has_worked_solutions(source_problems, dataset_name)
        for dataset_name, source_problems in sources
    ]
    if any(has_worked):
        grade = partial(grade_final_answer, grade)
    for dataset_name, source_problems in sources:
        check_reference_answers(source_problems, dataset_name, name, grade)

    def draw(step: int, count: int) -> list[Problem]:
        if not training:
            raise InvalidInput(f"all of {source} is held out; no training problems remain")
        order = epoch_indices(len(training), step * count, count, seed)
        return [training[i] for i in order]

    return Task(
        train=draw,
        test=lambda count: held_out_problems[:count],
        grade=grade,
        name=name,
        training=lambda: training,
    )


def grade_final_answer(grade: Grader, response: str, answer: str) -> Grade:
    """Grade a response against the final answer of a worked solution."""
    return grade(response, final_answer(answer))


def toy_task(seed: int, grader: str, system: str, template: tuple[tuple[str, Any], ...]) -> Task:
    """Build the chain task, with a system message or template settings where given."""

    def add_settings(bare_problems: list[Problem]) -> list[Problem]:
        if not system and not template:
            return bare_problems
        rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in bare_problems]
        return [
            replace(parse_row(row, DEFAULT_COLUMNS, system, template), solution=problem.solution)
            for row, problem in zip(rows, bare_problems, strict=True)
        ]

    return Task(
        train=lambda step, count: add_settings(problems("train", count, seed * 1_000_003 + step)),
        test=lambda count: add_settings(problems("test", count, 0)),
        grade=make_grader(grader),
        name=grader,
        training=lambda: add_settings(all_chain_problems("train")),
    )


def grader_of_rows(source: str, problems: list[Problem]) -> str:
    """Return the grader that the rows name, "" if none does.

    Args:
        source: Name of the source, for messages.
        problems: The problems of the source.

    Returns:
        The name of the grader.

    Raises:
        InvalidInput: The rows name several graders, an unknown one, or a function: data must not
            choose what code runs.
    """
    names = {problem.grader for problem in problems if isinstance(problem, DatasetProblem)}
    if functions := sorted(name for name in names if is_function_name(name)):
        raise InvalidInput(
            f"{source} names the function {functions[0]!r} as grader; data may only name "
            f"{', '.join(GRADERS)}. If you wrote the function, set it with --grader"
        )
    if unknown := sorted(names - {"", *GRADERS}):
        raise InvalidInput(
            f"{source} names the grader {short_repr(unknown[0])}; known: {', '.join(GRADERS)}. "
            f"Correct its "
            "column grader, or choose one with --grader"
        )
    if len(names) > 1:
        raise InvalidInput(
            f"{source} names several graders, {sorted(names)}; split it into one file per grader, "
            "or choose one with --grader"
        )
    return "".join(names)


def prompt_hash(problem: Problem) -> bytes:
    """Return a hash of a prompt's text that ignores spacing; copies have the same hash."""
    return hashlib.sha256(" ".join(problem.prompt.split()).encode()).digest()


def deduplicate(problems: list[Problem]) -> list[Problem]:
    """Keep one copy of each prompt, by rising hash; of several answers the first alphabetically."""
    first_by_key: dict[bytes, Problem] = {}
    for problem in sorted(problems, key=lambda problem: problem.answer):
        first_by_key.setdefault(prompt_hash(problem), problem)
    return [first_by_key[key] for key in sorted(first_by_key)]


def split_held_out(problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Split the problems of a source; see `load_task`.

    Args:
        problems: The problems of the source, in any order.

    Returns:
        The training problems and the held-out problems.

    Raises:
        InvalidInput: Fewer than two distinct prompts.
    """
    prompts = deduplicate(problems)
    if len(prompts) < 2:
        raise InvalidInput(
            f"{len(problems)} rows hold {len(prompts)} different prompts; at least 2 are needed, "
            f"one "
            "for training and one held out"
        )
    held_out_problems = prompts[: min(max(1, len(prompts) // 10), MAX_HELD_OUT)]
    return exclude_held_out(problems, held_out_problems, None), held_out_problems


def exclude_held_out(
    problems: list[Problem], held_out_problems: list[Problem], description: str | None
) -> list[Problem]:
    """Return the problems whose prompt is not held out, by rising hash.

    Args:
        problems: The problems of a source.
        held_out_problems: The problems to exclude.
        description: What to name in a warning that counts the excluded problems; None for no
            warning.

    Returns:
        The remaining problems.
    """
    held_out_keys = {prompt_hash(problem) for problem in held_out_problems}
    remaining = [problem for problem in problems if prompt_hash(problem) not in held_out_keys]
    if description is not None and len(remaining) < len(problems):
        warnings.warn(
            f"excluded from training: {len(problems) - len(remaining)} of {len(problems)} problems "
            "of "
            f"{description} contains too",
            stacklevel=3,
        )
    return sorted(remaining, key=lambda problem: (prompt_hash(problem), problem.answer))


def epoch_indices(size: int, start: int, count: int, seed: int) -> list[int]:
    """Return indices of an endless sequence of shuffled epochs.

    Args:
        size: Number of items of an epoch.
        start: First position in the sequence.
        count: Number of indices.
        seed: Seed of the shuffles.

    Returns:
        `count` indices below `size`.
    """
    order: dict[int, list[int]] = {}
    indices = []
    for position in range(start, start + count):
        epoch, offset = divmod(position, size)
        if epoch not in order:
            order[epoch] = random.Random(f"{seed}-{epoch}").sample(range(size), size)
        indices.append(order[epoch][offset])
    return indices


def reject_long_prompts(tokenizer: Any, max_prompt: int, problems: list[Problem]) -> list[Problem]:
    """Return the problems unchanged if all prompts are short enough.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_prompt: Largest allowed number of prompt tokens.
        problems: The problems.

    Returns:
        The problems.

    Raises:
        InvalidInput: Some prompts are longer; the message contains their number and the longest
            length.
    """
    short_enough, longest = filter_by_length(tokenizer, max_prompt, problems)
    if len(short_enough) < len(problems):
        raise InvalidInput(
            f"{len(problems) - len(short_enough)} of {len(problems)} prompts are longer than "
            f"max_prompt = "
            f"{max_prompt} tokens, the longest has {longest}; raise max_prompt, or set "
            "skip_long_prompts"
        )
    return problems


def skip_long_prompts(tokenizer: Any, max_prompt: int, problems: list[Problem]) -> list[Problem]:
    """Return the problems whose prompt is short enough, with a warning that counts the others.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_prompt: Largest allowed number of prompt tokens.
        problems: The problems.

    Returns:
        The remaining problems.

    Raises:
        InvalidInput: All prompts are longer.
    """
    short_enough, longest = filter_by_length(tokenizer, max_prompt, problems)
    count = f"{len(problems) - len(short_enough)} of {len(problems)} prompts"
    if not short_enough:
        raise InvalidInput(f"{count} are longer than max_prompt = {max_prompt} tokens; raise it")
    if len(short_enough) < len(problems):
        warnings.warn(
            f"skipped {count}: longer than max_prompt = {max_prompt} tokens, up to {longest}",
            stacklevel=2,
        )
    return short_enough
