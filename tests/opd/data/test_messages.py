"""Columns of chats with the assistant's reply, prompts of several columns, and rows in memory."""

import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from diagnostics.errors import InvalidInput
from opd.data.row_files import rows_of_object
from opd.data.sources import Columns, DatasetProblem, read_problems
from opd.data.tasks import load_task


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHATS = [[user(f"{i}+1?"), assistant(str(i + 1))] for i in range(4)]
TURNS = [[user("Hi."), assistant("Hello."), *chat] for chat in CHATS]


def write(path: Path, data: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def test_a_reply_is_the_answer_where_there_is_no_other(tmp_path: Path) -> None:
    source = write(tmp_path / "m.jsonl", [{"messages": chat} for chat in CHATS])
    with pytest.warns(UserWarning, match="reply at the end of 4 of 4 chats is the reference answ"):
        problems = read_problems(source)
    assert problems == [DatasetProblem(f"{i}+1?", str(i + 1)) for i in range(4)]
    earlier = write(tmp_path / "t.jsonl", [{"messages": chat} for chat in TURNS])
    with pytest.warns(UserWarning, match="is the reference answer"):
        problems = read_problems(earlier)
    assert problems[1].answer == "2"
    assert isinstance(problems[1], DatasetProblem)
    assert problems[1].chat == (("user", "Hi."), ("assistant", "Hello."), ("user", "1+1?"))


def test_a_reply_is_cut_where_the_answers_are_elsewhere(tmp_path: Path) -> None:
    rows = [{"messages": chat, "answer": f"a{i}"} for i, chat in enumerate(CHATS)]
    source = write(tmp_path / "m.jsonl", rows)
    with pytest.warns(UserWarning, match="of 4 of 4 chats is cut, since 'answer' has the answers"):
        problems = read_problems(source)
    assert [(p.prompt, p.answer) for p in problems] == [(f"{i}+1?", f"a{i}") for i in range(4)]
    with pytest.warns(UserWarning, match="is cut, since answer_column is empty"):
        problems = read_problems(source, Columns(answer=""))
    assert {p.answer for p in problems} == {""}


def test_chats_with_and_without_a_reply_do_not_mix(tmp_path: Path) -> None:
    mixed = [{"messages": CHATS[0]}, {"messages": CHATS[1][:1]}]
    source = write(tmp_path / "m.jsonl", mixed)
    with (
        pytest.warns(UserWarning, match="of 1 of 2 chats"),
        pytest.raises(InvalidInput, match="row 1 has a 'messages' that ends with the user's mess"),
    ):
        read_problems(source)
    with pytest.warns(UserWarning, match="of 1 of 2 chats is cut"):
        assert len(read_problems(source, Columns(answer=""))) == 2
    questions = write(tmp_path / "q.jsonl", [{"messages": chat[:1]} for chat in CHATS])
    with pytest.warns(UserWarning, match="not graded"):
        assert {p.answer for p in read_problems(questions)} == {""}


def test_a_prompt_is_made_of_several_columns(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "meta": {"hint": i}, "answer": "1"} for i in range(3)]
    source = write(tmp_path / "c.jsonl", rows)
    columns = Columns(prompt="{q}\nHint: {meta.hint}.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problems = read_problems(source, columns)
    assert [p.prompt for p in problems] == [f"q{i}\nHint: {i}." for i in range(3)]
    with pytest.raises(InvalidInput, match=r"rows 0, 1, 2 lacks \['nothing'\]; has \['answer', 'm"):
        read_problems(source, Columns(prompt="{q} {nothing}"))
    empty = write(tmp_path / "e.jsonl", [*rows, {"q": "", "meta": {"hint": 1}, "answer": "1"}])
    with pytest.raises(InvalidInput, match="row 3 has an empty 'q'"):
        read_problems(empty, columns)


def test_rows_in_memory_are_read_as_rows_of_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(30)]
    source = write(tmp_path / "r.jsonl", rows)
    name, from_dataset = rows_of_object(datasets.Dataset.from_list(rows))
    assert rows_of_object(rows) == (name, rows)
    assert from_dataset == rows
    assert rows_of_object([*rows[1:], rows[0]])[0] != name, "the order is part of the identity"
    from_file, from_rows = load_task(source, 3), load_task(name, 3, rows={name: rows})
    assert from_rows.train(5, 8) == from_file.train(5, 8)
    assert from_rows.test(9) == from_file.test(9)
    with pytest.raises(InvalidInput, match=f"task {name} is a data set that was passed to opd.tra"):
        load_task(name, 3)


def test_objects_that_are_no_rows_are_refused() -> None:
    rows = [{"prompt": "a", "answer": "b"}] * 2
    for data, message in (
        (datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), r"dataset\['train'\]"),
        (pandas.DataFrame(rows), r"frame.to_dict\('records'\)"),
        (datasets.Dataset.from_list(rows).to_iterable_dataset(), "has no length"),
        (["a", "b"], "row 0 of the data set, a list, is 'a', not a mapping"),
        (3, "the data set is a int"),
    ):
        with pytest.raises(InvalidInput, match=message):
            rows_of_object(data)  # type: ignore[arg-type]
