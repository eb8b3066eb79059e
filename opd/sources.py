"""Rows of a data set: .jsonl and .parquet files, and Hugging Face datasets, on disk or by name.

Rows are counted from 0 in every message.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile, MissingPackage
from opd.problems import Problem

Row = dict[str, Any]
Chat = tuple[tuple[str, str], ...]
Template = tuple[tuple[str, Any], ...]
MISSING = object()


@dataclass(frozen=True)
class Question(Problem):
    """A problem from data; `prompt` identifies it.

    task: label by which results are told apart. grader: name of the one to use, or "".
    chat: (role, content) of every message before the response; empty: `prompt`, from the user.
    template: names and values handed to the chat template, such as ("enable_thinking", False).
    """

    task: str = ""
    grader: str = ""
    chat: Chat = ()
    template: Template = ()


@dataclass(frozen=True)
class Columns:
    """Where a row has what; a dot goes into a nested field: `reward_model.ground_truth`."""

    prompt: str = "prompt"
    answer: str = "answer"
    task: str = "task"
    grader: str = "grader"


DEFAULT_COLUMNS = Columns()


def read_rows(source: str) -> list[Row]:
    """All rows of `source`.

    source: a .jsonl or .parquet file; a folder that datasets saved or that holds data files; or
    `hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME:CONFIG:SPLIT`, where NAME is such a folder or a dataset on
    the hub and the split is "train" if not given.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is not a JSON object, or the file is of another kind.
    """
    path = Path(source)
    if source.startswith("hf:") or path.is_dir():
        return read_dataset(source.removeprefix("hf:"))
    if not path.exists():
        raise MissingFile(
            f'task {source!r} is neither "lab" nor an existing file or folder; '
            "a dataset on the hub is written hf:NAME"
        )
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix not in (".jsonl", ".json"):
        raise InvalidInput(f"{path} is neither a .jsonl nor a .parquet file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InvalidInput(f"{path} line {number} is not a JSON object: {line[:80]!r}")
        rows.append(row)
    return rows


def read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingPackage(f"{path} needs pyarrow: pip install 'opdlab[data]'") from None
    return pyarrow.parquet.read_table(path).to_pylist()


def read_dataset(name: str) -> list[Row]:
    """Rows of `NAME[:[CONFIG:]SPLIT]` through the datasets library."""
    try:
        import datasets
    except ImportError:
        raise MissingPackage(f"{name!r} needs datasets: pip install 'opdlab[data]'") from None
    where, *rest = name.split(":")
    if not where or len(rest) > 2 or "" in rest:
        raise InvalidInput(
            f"cannot read {name!r}; write hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT"
        )
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    folder = Path(where)
    if not any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(where, config, split=split).to_list()
    saved = datasets.load_from_disk(where)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise InvalidInput(f"{where} has no split {split!r}; it has {', '.join(saved)}")
        saved = saved[split]
    return saved.to_list()


def read_problems(
    source: str | Path,
    columns: Columns = DEFAULT_COLUMNS,
    system: str = "",
    template: Template = (),
) -> list[Problem]:
    """Questions of `source`, in its order, each with its answer as text.

    A prompt is text, or a list of messages {"role", "content"} that ends with the user's. Answers
    may be text or numbers.

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
    found: list[Problem] = []
    for number, row in enumerate(rows):
        try:
            found.append(question(row, columns, system, template))
        except ValueError as error:
            complaints.setdefault(str(error), []).append(number)
    if complaints:
        text = "; ".join(f"{numbered(where)} {what}" for what, where in complaints.items())
        raise InvalidInput(f"{source}: {text}")
    return found


def question(row: Row, columns: Columns, system: str, template: Template) -> Question:
    """One row as a question; a ValueError continues "row N ..."."""
    wanted = {name: nested(row, name) for name in (columns.prompt, columns.answer)}
    if lacking := [name for name, value in wanted.items() if value is MISSING]:
        raise InvalidInput(
            f"lacks {lacking}; has {sorted(row)}; name the columns that hold prompt and answer"
        )
    prompt, answer = wanted.values()
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise InvalidInput(f"has a {type(answer).__name__} as {columns.answer!r}, expected text")
    if answer is None or not str(answer).strip():
        raise InvalidInput(f"has an empty {columns.answer!r}")
    chat = messages(prompt, columns.prompt)
    if system:
        if chat[0][0] == "system":
            raise InvalidInput("has a system message of its own; leave the setting system empty")
        chat = (("system", system), *chat)
    plain = len(chat) == 1
    labels = [nested(row, name) for name in (columns.task, columns.grader)]
    task, grader = ["" if x is MISSING or x is None else str(x) for x in labels]
    return Question(
        prompt=chat[0][1] if plain else json.dumps(chat, ensure_ascii=False),
        answer=str(answer),
        task=task,
        grader=grader,
        chat=() if plain else chat,
        template=template,
    )


def messages(prompt: Any, name: str) -> Chat:
    """(role, content) pairs of a prompt that is text or a list of messages."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None or prompt == []:
        raise InvalidInput(f"has an empty {name!r}")
    if not isinstance(prompt, list) or not all(
        isinstance(x, dict) and isinstance(x.get("role"), str) and isinstance(x.get("content"), str)
        for x in prompt
    ):
        what = f"neither text nor a list of messages with role and content as {name!r}"
        raise InvalidInput(f"has {what}")
    chat = tuple((x["role"], x["content"]) for x in prompt)
    if chat[-1][0] != "user":
        raise InvalidInput(f"has a {name!r} whose last message is by {chat[-1][0]!r}, not the user")
    if not chat[-1][1].strip():
        raise InvalidInput(f"has an empty {name!r}")
    return chat


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
