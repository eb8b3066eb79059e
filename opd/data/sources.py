"""Conversion of dataset rows to problems: columns, chats and answers as text.

Messages count rows from 0. Files are read by `opd.data.row_files`.
"""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from opd.data.chain_task import Problem
from opd.data.row_files import Row, read_rows

Chat = tuple[tuple[str, str], ...]
Template = tuple[tuple[str, Any], ...]
MISSING = object()
MAX_REPORTED_KINDS = 5
CHAT_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content)['\"]\s*:")
CHAT_HINT = (
    "; if a chat ends with an assistant message, store the messages before it as the prompt and "
    "the reference text as the answer"
)
WORKED_SOLUTION_END = re.compile(r"####[ \t]*([^\s#][^\n#]*?)\s*\Z")
"""The end of a worked solution in GSM8K's format: #### and the final answer."""


@dataclass(frozen=True)
class DatasetProblem(Problem):
    """A problem from a dataset; its `prompt` identifies it."""

    task: str = ""
    """Label by which results are reported separately."""
    grader: str = ""
    """Name of the grader to use, or ""."""
    chat: Chat = ()
    """(role, content) of every message before the response; empty if `prompt` is the only one."""
    template: Template = ()
    """Names and values passed to the chat template, such as ("enable_thinking", False)."""
    row: int | None = field(default=None, compare=False)
    """Row number in the dataset, for messages."""


@dataclass(frozen=True)
class Columns:
    """Column names of a dataset; a dot selects a nested field: `reward_model.ground_truth`."""

    prompt: str = "prompt"
    answer: str = "answer"
    task: str = "task"
    grader: str = "grader"


DEFAULT_COLUMNS = Columns()


def read_problems(
    source: str | Path,
    columns: Columns = DEFAULT_COLUMNS,
    system: str = "",
    template: Template = (),
) -> list[Problem]:
    """Read the problems of a source, in its order, each with its answer as text.

    A prompt is text, or a list of messages {"role", "content"} that ends with a user message, also
    as JSON text. Answers may be text or numbers; null and NaN are missing. Where no row has the
    column `answer`, the answers are "" and nothing can be graded; a warning says so.

    Args:
        source: A file, folder or `hf:NAME`; see `opd.data.row_files.read_rows`.
        columns: Names of the columns.
        system: System message before every prompt; "" for none.
        template: Settings of the chat template; see `DatasetProblem.template`.

    Returns:
        One problem per row.

    Raises:
        InvalidInput: Fewer than 2 rows, or rows with missing or unusable values; the message lists
            the rows and what is wrong.
    """
    return parse_problems(read_rows(str(source)), str(source), columns, system, template)


def parse_problems(
    rows: list[Row], source: str, columns: Columns, system: str, template: Template
) -> list[Problem]:
    """Convert the rows of a source to problems; see `read_problems`."""
    if len(rows) < 2:
        raise InvalidInput(f"{source} has {len(rows)} problems; at least 2 are needed")
    row_numbers_by_error: dict[str, list[int]] = {}
    problems: list[DatasetProblem] = []
    no_answers = has_no_answers(rows, source, columns)
    for number, row in enumerate(rows):
        try:
            problems.append(
                replace(parse_row(row, columns, system, template, no_answers), row=number)
            )
        except ValueError as error:
            row_numbers_by_error.setdefault(str(error), []).append(number)
    if row_numbers_by_error:
        parts = [
            f"{format_row_numbers(row_numbers)} {message}"
            for message, row_numbers in row_numbers_by_error.items()
        ]
        remainder = [f"and {len(parts) - MAX_REPORTED_KINDS} more kinds of errors"]
        reports = parts[:MAX_REPORTED_KINDS] + remainder * (len(parts) > MAX_REPORTED_KINDS)
        raise InvalidInput(f"{source}: {'; '.join(reports)}")
    return list(problems)


def has_no_answers(rows: list[Row], source: str, columns: Columns) -> bool:
    """Return whether no row has the default answer column; warn if so."""
    if columns.answer != DEFAULT_COLUMNS.answer or any(
        get_nested(row, columns.answer) is not MISSING or get_nested(row, columns.prompt) is MISSING
        for row in rows
    ):
        return False
    column_names = sorted({name for row in rows for name in row})
    warnings.warn(
        f"{source} has no column {columns.answer!r}, so its responses are not graded; it has "
        f"{column_names}. "
        "If one of them holds the answers, set answer_column to it",
        stacklevel=3,
    )
    return True


def final_answer(answer: str) -> str:
    """Return what follows #### at the end of a worked solution, any other answer unchanged."""
    match = WORKED_SOLUTION_END.search(answer)
    return answer if match is None else match[1]


def has_worked_solutions(problems: Sequence[Problem], source: str) -> bool:
    """Return whether all answers are worked solutions that end in #### N; warn if so.

    Args:
        problems: The problems of a source.
        source: Name of the source, for messages.

    Returns:
        True if every answer ends in #### N.

    Raises:
        InvalidInput: Some answers are worked solutions that end in a number and others are not.
    """
    matches = [WORKED_SOLUTION_END.search(problem.answer) for problem in problems]
    if matches and all(matches):
        warnings.warn(
            f"{source}: every answer is a worked solution that ends in '#### N'; responses are "
            "graded against N",
            stacklevel=3,
        )
        return True
    worked_rows = [
        row_number(problem, position)
        for position, (problem, match) in enumerate(zip(problems, matches, strict=True))
        if match is not None and match.start() > 0 and re.fullmatch(r"[-$]*[\d.,/]+", match[1])
    ]
    if worked_rows:
        raise InvalidInput(
            f"{source}: {format_row_numbers(worked_rows)} have worked solutions that end in '#### "
            f"N' as answers, "
            "the other rows do not; use the same format in every row, such as the final answer "
            "alone"
        )
    return False


def row_number(problem: Problem, position: int) -> int:
    """Return the row number of a problem, or its position where it has none."""
    row = problem.row if isinstance(problem, DatasetProblem) else None
    return position if row is None else row


def parse_row(
    row: Row, columns: Columns, system: str, template: Template, no_answers: bool = False
) -> DatasetProblem:
    """Convert one row to a problem.

    Args:
        row: The row.
        columns: Names of the columns.
        system: System message before the prompt; "" for none.
        template: Settings of the chat template.
        no_answers: Whether no row of the source has an answer; the answer is "" then.

    Returns:
        The problem.

    Raises:
        InvalidInput: A column is missing or holds an unusable value; the message continues "row N
            ...".
    """
    values = {name: get_nested(row, name) for name in (columns.prompt, columns.answer)}
    if no_answers:
        del values[columns.answer]
    if missing_columns := [name for name, value in values.items() if value is MISSING]:
        raise InvalidInput(
            f"lacks {missing_columns}; has {sorted(row)}; set the columns that hold prompt and "
            f"answer "
            f"(--prompt-column, --answer-column){CHAT_HINT * any(map(is_chat, row.values()))}"
        )
    answer = "" if no_answers else format_answer(values[columns.answer], columns.answer)
    chat = parse_messages(values[columns.prompt], columns.prompt)
    if system:
        if chat[0][0] == "system":
            raise InvalidInput("already has a system message; remove the setting system")
        chat = (("system", system), *chat)
    is_single_message = len(chat) == 1
    labels = [get_nested(row, name) for name in (columns.task, columns.grader)]
    task, grader = ["" if x is MISSING or is_missing(x) else str(x) for x in labels]
    return DatasetProblem(
        prompt=chat[0][1] if is_single_message else json.dumps(chat, ensure_ascii=False),
        answer=answer,
        task=task,
        grader=grader,
        chat=() if is_single_message else chat,
        template=template,
    )


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of objects, as messages are."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def is_missing(value: Any) -> bool:
    """Return whether a value is null, or NaN as tables write null."""
    if isinstance(value, Decimal):
        return value.is_nan()
    return value is None or (isinstance(value, float) and value != value)


def format_answer(answer: Any, column: str) -> str:
    """Convert an answer to text; an integral float such as 7.0 becomes "7".

    Args:
        answer: Text or a number.
        column: Name of the answer column, for messages.

    Returns:
        The answer as text.

    Raises:
        InvalidInput: The answer is missing, empty, infinite, or neither text nor a number.
    """
    if is_missing(answer) or (isinstance(answer, str) and not answer.strip()):
        raise InvalidInput(f"has an empty {column!r}")
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        raise InvalidInput(
            f"has a {type(answer).__name__} as {column!r}, expected text: {short_repr(answer)}"
        )
    if isinstance(answer, int):
        return str(answer)
    if abs(answer) == float("inf"):
        raise InvalidInput(f"has {answer} as {column!r}, expected text or a finite number")
    is_integer = answer == int(answer) and abs(float(answer)) < 1e15
    return str(int(answer)) if is_integer else str(answer)


def parse_messages(prompt: Any, column: str) -> Chat:
    """Convert a prompt to (role, content) pairs.

    Args:
        prompt: Text, or a list or array of messages.
        column: Name of the prompt column, for messages.

    Returns:
        The messages, the last of them by the user.

    Raises:
        InvalidInput: The prompt is missing or empty, of another type, or does not end with a user
            message.
    """
    if isinstance(prompt, str):
        prompt = parse_chat_text(prompt, column)
    if hasattr(prompt, "tolist"):  # an array, as parquet tables return
        prompt = prompt.tolist()
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    if is_missing(prompt) or prompt == []:
        raise InvalidInput(f"has an empty {column!r}")
    if not isinstance(prompt, list) or not all(
        isinstance(x, dict) and isinstance(x.get("role"), str) and isinstance(x.get("content"), str)
        for x in prompt
    ):
        problem = f"neither text nor a list of messages with role and content as {column!r}"
        raise InvalidInput(f"has {problem}: {short_repr(prompt)}")
    chat = tuple((x["role"], x["content"]) for x in prompt)
    if chat[-1][0] != "user":
        raise InvalidInput(
            f"has a {column!r} whose last message is by {chat[-1][0]!r}, not by the user{CHAT_HINT}"
        )
    if not chat[-1][1].strip():
        raise InvalidInput(f"has an empty {column!r}")
    return chat


def parse_chat_text(prompt: str, column: str) -> list[Any]:
    """Convert a text prompt to messages; the JSON of a list of messages is parsed.

    Args:
        prompt: The text.
        column: Name of the prompt column, for messages.

    Returns:
        The messages.

    Raises:
        InvalidInput: The text is a printed Python list of messages, which is not JSON.
    """
    if not CHAT_TEXT.match(prompt):
        return [{"role": "user", "content": prompt}]
    try:
        return json.loads(prompt)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"has a list of messages as text in {column!r} that is not JSON: {short_repr(prompt)}; "
            "store the list itself, or its JSON"
        ) from error


def get_nested(row: Row, name: str) -> Any:
    """Return the value of a column or of a nested field (`a.b`); MISSING if absent."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value


def format_row_numbers(rows: list[int]) -> str:
    """Format row numbers: "row 3", "rows 3, 5", or the first five and a count."""
    row_list = ", ".join(map(str, rows[:5]))
    remainder = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {row_list}{remainder}"
