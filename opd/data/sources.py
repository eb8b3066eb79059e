"""Problems from rows of data: where a row has what, chats, answers as text (opd.data.row_files).

Rows are counted from 0 in every message.
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
from diagnostics.io.files import short
from opd.data.chain_task import Problem
from opd.data.row_files import Row, read_rows

Chat = tuple[tuple[str, str], ...]
Template = tuple[tuple[str, Any], ...]
MISSING = object()
MOST_COMPLAINTS = 5
CHAT_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content)['\"]\s*:")
WHOLE_CHATS = (
    "; of a chat that ends with the assistant's message, write the messages before it as prompt "
    "and the text to compare with as answer"
)
WORKED = re.compile(r"####[ \t]*([^\s#][^\n#]*?)\s*\Z")
"""The end of a worked solution as GSM8K has them: #### and the final answer."""


@dataclass(frozen=True)
class Question(Problem):
    """A problem from data; `prompt` identifies it.

    task: label by which results are told apart. grader: name of the one to use, or "".
    chat: (role, content) of every message before the response; empty: `prompt`, from the user.
    template: names and values handed to the chat template, such as ("enable_thinking", False).
    row: its number in the data, for messages.
    """

    task: str = ""
    grader: str = ""
    chat: Chat = ()
    template: Template = ()
    row: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Columns:
    """Where a row has what; a dot goes into a nested field: `reward_model.ground_truth`."""

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
    """Questions of `source`, in its order, each with its answer as text.

    A prompt is text, or a list of messages {"role", "content"} that ends with the user's, also as
    JSON text. Answers may be text or numbers; null and NaN are missing. Where no row has the
    column `answer`, the answers are "" and nothing can be graded, with a warning.

    Args:
      system: a system message before every prompt. template: see `Question`.

    Raises:
      ValueError: fewer than 2 rows, or rows that lack something; says which rows and what.
    """
    return questions(read_rows(str(source)), str(source), columns, system, template)


def questions(
    rows: list[Row], source: str, columns: Columns, system: str, template: Template
) -> list[Problem]:
    """The rows of a source as questions; see `read_problems`."""
    if len(rows) < 2:
        raise InvalidInput(f"{source} has {len(rows)} problems; at least 2 are needed")
    complaints: dict[str, list[int]] = {}
    made: list[Question] = []
    unanswered = has_no_answers(rows, source, columns)
    for number, row in enumerate(rows):
        try:
            made.append(replace(question(row, columns, system, template, unanswered), row=number))
        except ValueError as error:
            complaints.setdefault(str(error), []).append(number)
    if complaints:
        parts = [f"{numbered(where)} {what}" for what, where in complaints.items()]
        more = [f"and {len(parts) - MOST_COMPLAINTS} more kinds of complaints"]
        shown = parts[:MOST_COMPLAINTS] + more * (len(parts) > MOST_COMPLAINTS)
        raise InvalidInput(f"{source}: {'; '.join(shown)}")
    return list(made)


def has_no_answers(rows: list[Row], source: str, columns: Columns) -> bool:
    """Whether no row has the usual column of answers, which a warning then says."""
    if columns.answer != DEFAULT_COLUMNS.answer or any(
        nested(row, columns.answer) is not MISSING or nested(row, columns.prompt) is MISSING
        for row in rows
    ):
        return False
    names = sorted({name for row in rows for name in row})
    warnings.warn(
        f"{source} has no column {columns.answer!r}, so nothing of it is graded; it has {names}. "
        "If one of them holds the answers, name it with answer_column",
        stacklevel=3,
    )
    return True


def final_answer(answer: str) -> str:
    """What follows #### at the end of a worked solution; any other answer as it is."""
    end = WORKED.search(answer)
    return answer if end is None else end[1]


def has_worked_solutions(problems: Sequence[Problem], source: str) -> bool:
    """Whether all answers are worked solutions that end in #### N, which a warning then says.

    Raises:
      ValueError: some rows have worked solutions that end in a number, and others do not.
    """
    ends = [WORKED.search(problem.answer) for problem in problems]
    if ends and all(ends):
        warnings.warn(
            f"{source}: every answer is a worked solution that ends in '#### N'; responses are "
            "compared with N",
            stacklevel=3,
        )
        return True
    mixed = [
        row_of(problem, place)
        for place, (problem, end) in enumerate(zip(problems, ends, strict=True))
        if end is not None and end.start() > 0 and re.fullmatch(r"[-$]*[\d.,/]+", end[1])
    ]
    if mixed:
        raise InvalidInput(
            f"{source}: {numbered(mixed)} have worked solutions that end in '#### N' as answers, "
            "the other rows do not; keep the final answer alone in every row"
        )
    return False


def row_of(problem: Problem, place: int) -> int:
    """The number of a problem's row, its place where it has none."""
    row = problem.row if isinstance(problem, Question) else None
    return place if row is None else row


def question(
    row: Row, columns: Columns, system: str, template: Template, unanswered: bool = False
) -> Question:
    """One row as a question; a ValueError continues "row N ...".

    unanswered: no row has an answer; it is "" then.
    """
    wanted = {name: nested(row, name) for name in (columns.prompt, columns.answer)}
    if unanswered:
        del wanted[columns.answer]
    if lacking := [name for name, value in wanted.items() if value is MISSING]:
        raise InvalidInput(
            f"lacks {lacking}; has {sorted(row)}; name the columns that hold prompt and answer "
            f"(--prompt-column, --answer-column){WHOLE_CHATS * any(map(is_chat, row.values()))}"
        )
    answer = "" if unanswered else answer_text(wanted[columns.answer], columns.answer)
    chat = messages(wanted[columns.prompt], columns.prompt)
    if system:
        if chat[0][0] == "system":
            raise InvalidInput("has a system message of its own; leave the setting system empty")
        chat = (("system", system), *chat)
    plain = len(chat) == 1
    labels = [nested(row, name) for name in (columns.task, columns.grader)]
    task, grader = ["" if x is MISSING or is_missing(x) else str(x) for x in labels]
    return Question(
        prompt=chat[0][1] if plain else json.dumps(chat, ensure_ascii=False),
        answer=answer,
        task=task,
        grader=grader,
        chat=() if plain else chat,
        template=template,
    )


def is_chat(value: Any) -> bool:
    """Whether a column holds a list of objects, as messages are."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def is_missing(value: Any) -> bool:
    """Null, or NaN, by which tables write it."""
    if isinstance(value, Decimal):
        return value.is_nan()
    return value is None or (isinstance(value, float) and value != value)


def answer_text(answer: Any, column: str) -> str:
    """An answer as text; a whole number has no decimals, though a table made it 7.0.

    Raises:
      ValueError: missing or empty, infinite, or neither text nor a number.
    """
    if is_missing(answer) or (isinstance(answer, str) and not answer.strip()):
        raise InvalidInput(f"has an empty {column!r}")
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        raise InvalidInput(
            f"has a {type(answer).__name__} as {column!r}, expected text: {short(answer)}"
        )
    if isinstance(answer, int):
        return str(answer)
    if abs(answer) == float("inf"):
        raise InvalidInput(f"has {answer} as {column!r}, expected text or a finite number")
    whole = answer == int(answer) and abs(float(answer)) < 1e15
    return str(int(answer)) if whole else str(answer)


def messages(prompt: Any, name: str) -> Chat:
    """(role, content) pairs of a prompt that is text or a list of messages."""
    if isinstance(prompt, str):
        prompt = chat_of_text(prompt, name)
    if hasattr(prompt, "tolist"):  # an array, as tables have them
        prompt = prompt.tolist()
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    if is_missing(prompt) or prompt == []:
        raise InvalidInput(f"has an empty {name!r}")
    if not isinstance(prompt, list) or not all(
        isinstance(x, dict) and isinstance(x.get("role"), str) and isinstance(x.get("content"), str)
        for x in prompt
    ):
        what = f"neither text nor a list of messages with role and content as {name!r}"
        raise InvalidInput(f"has {what}: {short(prompt)}")
    chat = tuple((x["role"], x["content"]) for x in prompt)
    if chat[-1][0] != "user":
        raise InvalidInput(
            f"has a {name!r} whose last message is by {chat[-1][0]!r}, not the user{WHOLE_CHATS}"
        )
    if not chat[-1][1].strip():
        raise InvalidInput(f"has an empty {name!r}")
    return chat


def chat_of_text(prompt: str, name: str) -> list[Any]:
    """A prompt of text as messages; the JSON of a list of messages is that list.

    Raises:
      ValueError: the text of a list of messages that is no JSON, as Python prints one.
    """
    if not CHAT_TEXT.match(prompt):
        return [{"role": "user", "content": prompt}]
    try:
        return json.loads(prompt)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"has the text of a list of messages as {name!r}, and it is no JSON: {short(prompt)}; "
            "store the list itself, or its JSON"
        ) from error


def nested(row: Row, name: str) -> Any:
    """The value of a column, or of a field inside one (`a.b`); MISSING if it is not there."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value


def numbered(rows: list[int]) -> str:
    """ "row 3", "rows 3, 5", or the first five and how many more."""
    shown = ", ".join(map(str, rows[:5]))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
