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
from typing import Any, Literal

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from opd.data.chain_task import Problem
from opd.data.messages import MESSAGES_COLUMN, Chat, PromptAndReply, split_reply
from opd.data.row_files import Row, read_rows

Template = tuple[tuple[str, Any], ...]
AnswerSource = Literal["column", "reply", "none"]
"""Where the answers of a source are: in their column, the last message of each chat, or nowhere."""
MISSING = object()
RESPONSE_COLUMN = "response"
"""Default column of responses that data give."""
MAX_REPORTED_KINDS = 5
COLUMN_IN_TEXT = re.compile(r"\{([^{}]+)\}")
"""A column's name in braces, in a prompt column that is a text."""
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
    response: str = ""
    """The response that the data give; "" where none is read."""
    row: int | None = field(default=None, compare=False)
    """Row number in the dataset, for messages."""
    columns: Template = field(default=(), compare=False)
    """Names and values of further columns that were kept (`Columns.kept`)."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Column names of a dataset; a dot selects a nested field: `reward_model.ground_truth`."""

    prompt: str = "prompt"
    """Column of the prompt, or a text with the names of columns in braces."""
    answer: str = "answer"
    """Column of the reference answer; empty: responses are not graded."""
    response: str = ""
    """Column of a response to train on; "" to read none."""
    task: str = "task"
    grader: str = "grader"
    kept: tuple[str, ...] = ()
    """Further columns whose values the problems keep; rows without one of them are an error."""
    kept_where_present: tuple[str, ...] = ()
    """Further columns that are kept in the rows that have them."""


DEFAULT_COLUMNS = Columns()


def read_problems(
    source: str | Path,
    columns: Columns = DEFAULT_COLUMNS,
    system: str = "",
    template: Template = (),
) -> list[Problem]:
    """Read the problems of a source, in its order, each with its answer as text.

    A prompt is text, or a list of messages {"role", "content"}, also as JSON text, in the column
    `prompt`, or in `messages` where no row has the former. Where the assistant's reply ends a chat,
    it is the answer if no row has the answer column, and is cut otherwise; a warning says which.
    Answers may be text or numbers; null and NaN are missing. Without answers, they are "" and
    nothing can be graded; a warning says so.

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
    columns = with_messages_column(rows, columns)
    answers = find_answers(rows, source, columns)
    for number, row in enumerate(rows):
        try:
            problem = parse_row(row, columns, system, template, answers)
            problems.append(replace(problem, row=number))
        except ValueError as error:
            row_numbers_by_error.setdefault(str(error), []).append(number)
    if row_numbers_by_error:
        parts = [
            f"{'each of ' * (len(row_numbers) > 1)}{format_row_numbers(row_numbers)} {message}"
            for message, row_numbers in row_numbers_by_error.items()
        ]
        remainder = [f"and {len(parts) - MAX_REPORTED_KINDS} more kinds of errors"]
        reports = parts[:MAX_REPORTED_KINDS] + remainder * (len(parts) > MAX_REPORTED_KINDS)
        raise InvalidInput(f"{source}: {'; '.join(reports)}")
    return list(problems)


def with_messages_column(rows: list[Row], columns: Columns) -> Columns:
    """Return columns whose prompt is `messages`, if that is in the place of the default column."""
    if columns.prompt == DEFAULT_COLUMNS.prompt and not any(
        columns.prompt in row or MESSAGES_COLUMN not in row for row in rows
    ):
        return replace(columns, prompt=MESSAGES_COLUMN)
    return columns


def find_answers(rows: list[Row], source: str, columns: Columns) -> AnswerSource:
    """Find where the answers of a source are; warn if there are none, and about replies in prompts.

    Args:
        rows: The rows.
        source: Name of the source, for messages.
        columns: Names of the columns.

    Returns:
        "column", "reply" or "none".
    """
    num_replies = sum(has_reply(row, columns) for row in rows)
    replies = f"the assistant's reply at the end of {num_replies} of {len(rows)} chats"
    in_column = bool(columns.answer) and any(
        get_nested(row, columns.answer) is not MISSING for row in rows
    )
    if in_column or not columns.answer:
        reason = f"{columns.answer!r} has the answers" if in_column else "answer_column is empty"
        if num_replies:
            warnings.warn(f"{source}: {replies} is cut, since {reason}", stacklevel=3)
        return "column" if in_column else "none"
    if columns.answer != DEFAULT_COLUMNS.answer:
        return "column"  # every row lacks it: an error
    if num_replies:
        warnings.warn(
            f"{source}: {replies} is the reference answer, which the grader compares with "
            "responses; to cut it and train without grading, set answer_column to ''",
            stacklevel=3,
        )
        return "reply"
    if not any(has_prompt(row, columns.prompt) for row in rows):
        return "column"
    column_names = sorted({name for row in rows for name in row})
    warnings.warn(
        f"{source} has no column {columns.answer!r}, so its responses are not graded; it has "
        f"{column_names}. "
        "If one of them holds the answers, set answer_column to it",
        stacklevel=3,
    )
    return "none"


def has_prompt(row: Row, column: str) -> bool:
    """Return whether a row has all columns of a prompt."""
    return not any(get_nested(row, name) is MISSING for name in prompt_columns(column))


def has_reply(row: Row, columns: Columns) -> bool:
    """Return whether an assistant's message ends the row's prompt."""
    try:
        return read_prompt(row, columns.prompt).reply is not None
    except InvalidInput:
        return False


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
    row: Row,
    columns: Columns,
    system: str,
    template: Template,
    answers: AnswerSource = "column",
) -> DatasetProblem:
    """Convert one row to a problem.

    Args:
        row: The row.
        columns: Names of the columns.
        system: System message before the prompt; "" for none.
        template: Settings of the chat template.
        answers: Where the answer is; with "none" it is "".

    Returns:
        The problem.

    Raises:
        InvalidInput: A column is missing or holds an unusable value; the message continues "row N
            ...".
    """
    names = [*prompt_columns(columns.prompt), *([columns.answer] if answers == "column" else [])]
    if unknown := [name for name in columns.kept if get_nested(row, name) is MISSING]:
        raise InvalidInput(
            f"lacks {unknown}, which teacher_view uses; has {sorted(row)}; correct the names in "
            "the template, or add the columns"
        )
    if missing_columns := [name for name in names if get_nested(row, name) is MISSING]:
        raise InvalidInput(
            f"lacks {missing_columns}; has {sorted(row)}; set the columns that hold prompt and "
            "answer (--prompt-column, --answer-column)"
        )
    prompt = read_prompt(row, columns.prompt)
    answer = ""
    if answers == "column":
        answer = format_answer(get_nested(row, columns.answer), columns.answer)
    elif answers == "reply":
        if prompt.reply is None:
            raise InvalidInput(
                f"has a {columns.prompt!r} that ends with the user's message, but the replies of "
                "other rows are the answers; give all rows a reply, or set answer_column to ''"
            )
        answer = format_answer(prompt.reply, columns.prompt)
    response = read_response(row, columns, prompt) if columns.response else ""
    chat = prompt.chat
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
        columns=tuple(
            (name, value)
            for name in (*columns.kept, *columns.kept_where_present)
            if (value := get_nested(row, name)) is not MISSING and not is_missing(value)
        ),
        response=response,
    )


def read_response(row: Row, columns: Columns, prompt: PromptAndReply) -> str:
    """Read the response that a row gives.

    Args:
        row: The row.
        columns: Names of the columns.
        prompt: The row's prompt, with the reply that ends its chat.

    Returns:
        The text in the response column or, where the row has no column of the default name, the
        reply.

    Raises:
        InvalidInput: There is neither, or the value is empty or no text; the message continues "row
            N ...".
    """
    value = get_nested(row, columns.response)
    if value is MISSING and columns.response == RESPONSE_COLUMN and prompt.reply is not None:
        return format_answer(prompt.reply, columns.prompt)
    if value is MISSING:
        raise InvalidInput(
            f"lacks the response {columns.response!r}; has {sorted(row)}; set response_column to "
            "the column that holds the responses, or end each chat with the assistant's reply"
        )
    return format_answer(value, columns.response)


def prompt_columns(column: str) -> list[str]:
    """Return the columns that a prompt is made of: those in braces, or the column itself."""
    return COLUMN_IN_TEXT.findall(column) or [column]


def read_prompt(row: Row, column: str) -> PromptAndReply:
    """Read the prompt of a row, whose columns are present.

    Args:
        row: The row.
        column: The prompt column, or a text with the names of columns in braces.

    Returns:
        The prompt, with the reply at its end.

    Raises:
        InvalidInput: A value is missing, empty or of another type.
    """
    if not COLUMN_IN_TEXT.search(column):
        return split_reply(get_nested(row, column), column)
    values = {name: format_answer(get_nested(row, name), name) for name in prompt_columns(column)}
    text = COLUMN_IN_TEXT.sub(lambda match: values[match[1]], column)
    return PromptAndReply((("user", text),), None)


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
