"""Reading of data files: accepted formats, and error messages with file, row, field and value."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from transformers import GenerationConfig

from diagnostics.errors import InvalidInput
from opd.config.groups import EvalConfig
from opd.data.benchmarks import BOXED_INSTRUCTION
from opd.data.prompts import encode_prompt
from opd.data.sources import Columns, DatasetProblem, read_problems, read_rows
from opd.data.tasks import load_task
from opd.evaluation.folder import evaluate_folder
from opd.lab.build import make_tokenizer
from opd.training.train import train
from tests.helpers.runs import rows, settings

PLAIN: list[dict] = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(12)]


def write_rows(path: Path, data: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def test_json_in_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, PLAIN))
    for name, text, encoding in (
        ("a.json", json.dumps(PLAIN), "utf-8"),
        ("b.json", json.dumps(PLAIN, indent=2), "utf-8"),
        ("c.jsonl", json.dumps(PLAIN, indent=2), "utf-8-sig"),
        ("d.jsonl", lines, "utf-8-sig"),
        ("e.json", lines.replace("\n", "\r\n\n"), "utf-8"),
    ):
        (tmp_path / name).write_text(text, encoding=encoding)
        assert read_rows(str(tmp_path / name)) == PLAIN, name


def test_unreadable_files_are_explained(tmp_path: Path) -> None:
    for name, data, message in (
        ("a.json", json.dumps({"data": PLAIN}, indent=1).encode(), "is one JSON object; expected"),
        ("b.json", b'[{"prompt": "a"}, 3]', "row 1 is not a JSON object: 3"),
        ("c.json", b'[{"prompt": "a"}, {"pro', r"c\.json is not JSON"),
        ("d.jsonl", "\ufeff{}".encode("utf-16"), "is not UTF-8 text: byte 0xff at offset 0"),
        ("e.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("f.jsonl", b'{"a": 1, "a": 2}', "line 1 has the duplicate field 'a'"),
        (
            "g.jsonl",
            b'{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}',
            r"line 2 holds '\\ud83d', an unpaired",
        ),
        (
            "h.csv",
            b"prompt,answer\n1+1,2\n",
            "convert other formats to one JSON object per line",
        ),
        ("i.jsonl.gz", b"\x1f\x8b", "decompress it if it is compressed"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            read_rows(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_rows_of_another_kind_are_refused_with_the_file(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "b"}
    for name, data, message in (
        (
            "chats",
            [{"messages": [reply]}] * 3,
            "rows 0, 1, 2 has a 'messages' whose last message is by 'assistant', not by the user",
        ),
        (
            "prompts",
            [{"prompt": [reply, reply], "answer": "b"}] * 3,
            "by 'assistant', not by the user; end the chat with a user message",
        ),
        ("texts", [{"text": "a"}] * 3, "lacks .*'prompt'.*--prompt-column"),
        ("copies", [{"prompt": "a", "answer": "b"}] * 3, "3 rows hold 1 different prompts"),
        (
            "grader",
            [{**row, "grader": ["math"]} for row in PLAIN],
            "names the grader .*'math'.*known",
        ),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        with pytest.raises(InvalidInput, match=f"{name}.jsonl.*{message}"):
            load_task(str(path), 0)


def test_unreadable_tables_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pandas.DataFrame(PLAIN).to_parquet(path)
    table_bytes = path.read_bytes()
    for data in (
        b"no table",
        table_bytes[: len(table_bytes) // 2],
        b"PAR1" + bytes(50) + table_bytes[-40:],
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"p\.parquet is not a complete parquet file"):
            read_rows(str(path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(RuntimeError, match=r"folder', split 'train', cannot be read \("):
        read_rows(str(tmp_path / "folder"))


def test_null_and_nan_are_missing(tmp_path: Path) -> None:
    import datasets

    values = [math.nan if i % 3 == 0 else float(i) for i in range(12)]
    rows_with_gaps = [{"prompt": f"q{i}", "answer": x} for i, x in enumerate(values)]
    sources = [write_rows(tmp_path / "p.jsonl", rows_with_gaps)]
    pandas.DataFrame(rows_with_gaps).to_parquet(tmp_path / "null.parquet")
    table = pyarrow.table(
        {"prompt": [r["prompt"] for r in rows_with_gaps], "answer": pyarrow.array(values)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "nan.parquet")
    datasets.Dataset.from_list(rows_with_gaps).save_to_disk(tmp_path / "saved")
    sources += [f"{tmp_path}/{name}" for name in ("null.parquet", "nan.parquet", "saved")]
    for source in sources:
        with pytest.raises(ValueError, match=r"each of rows 0, 3, 6, 9 has an empty 'answer'$"):
            read_problems(source)
    benchmark_file = write_rows(
        tmp_path / "n.jsonl", [{"problem": "a", "answer": 1}, {"problem": "b", "answer": math.nan}]
    )
    with pytest.raises(ValueError, match="row 1 has an empty answer"):
        load_task(f"math-500:{benchmark_file}", 0)
    prompts = [{"prompt": x, "answer": "1", "task": math.nan} for x in ("a", math.nan, None)]
    with pytest.raises(ValueError, match=r"rows 1, 2 has an empty 'prompt'$"):
        read_problems(write_rows(tmp_path / "q.jsonl", prompts))
    labels = read_problems(
        write_rows(tmp_path / "t.jsonl", [{**prompts[0], "grader": math.nan}] * 2)
    )
    assert labels[0] == DatasetProblem("a", "1"), "a NaN label or grader is missing"


def test_numbers_are_answers_without_the_decimals_of_a_table(tmp_path: Path) -> None:
    from decimal import Decimal

    numbers = [7.0, -3.0, 2.5, 1e22, 1e-7]
    source = write_rows(tmp_path / "n.jsonl", [{"prompt": "a", "answer": x} for x in numbers])
    assert [p.answer for p in read_problems(source)] == ["7", "-3", "2.5", "1e+22", "1e-07"]
    exact = [{"prompt": "a", "answer": Decimal(x)} for x in ("7.00", "2.50")]
    pandas.DataFrame(exact).to_parquet(tmp_path / "d.parquet")
    assert [p.answer for p in read_problems(tmp_path / "d.parquet")] == ["7", "2.50"]
    infinite_source = write_rows(tmp_path / "i.jsonl", [{"prompt": "a", "answer": math.inf}] * 2)
    with pytest.raises(ValueError, match="has inf as 'answer', expected text or a finite number"):
        read_problems(infinite_source)


def test_chats_come_as_lists_arrays_or_json(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    chats = [chat, json.dumps(chat)]
    source = write_rows(tmp_path / "p.jsonl", [{"prompt": c, "answer": "1"} for c in chats])
    for problem in read_problems(source):
        assert problem.chat == (("system", "s"), ("user", "q"))  # type: ignore[attr-defined]
    from opd.data.messages import parse_messages

    assert parse_messages(numpy.array(chat), "prompt") == (("system", "s"), ("user", "q"))
    text = write_rows(tmp_path / "t.jsonl", [{"prompt": str(chat), "answer": "1"}] * 2)
    with pytest.raises(
        ValueError, match="rows 0, 1 has a list of messages as text in 'prompt' that is not JSON"
    ):
        read_problems(text)
    assert read_problems(
        write_rows(tmp_path / "l.jsonl", [{"prompt": "[1, 2]?", "answer": "1"}] * 2)
    )


def test_named_sets_of_chats_end_with_the_request(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"What is {i}+{i}?"}] for i in range(20)]
    source = write_rows(
        tmp_path / "t.jsonl", [{"prompt": c, "solution": str(2 * i)} for i, c in enumerate(chats)]
    )
    problems = load_task(f"dapo-math:{source}", 0, test=f"dapo-math:{source}").test(20)
    assert {p.prompt for p in problems} == {
        f"What is {i}+{i}?{BOXED_INSTRUCTION}" for i in range(20)
    }
    tokenizer = make_tokenizer()
    prompt_text = tokenizer.decode(encode_prompt(tokenizer, problems[0]))
    assert "role'" not in prompt_text
    assert prompt_text.endswith(f"{BOXED_INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
    for prompt, message in ((None, "row 1 has an empty 'prompt'"), (3, "row 1 has neither text")):
        broken = [{"prompt": "a", "solution": "1"}, {"prompt": prompt, "solution": "1"}]
        with pytest.raises(ValueError, match=message):
            load_task(f"dapo-math:{write_rows(tmp_path / 'b.jsonl', broken)}", 0)
    list_answers = [{"prompt": "a", "solution": "['34']"}] * 2
    with pytest.raises(ValueError, match="row 0 has a list stored as text as answer"):
        load_task(f"dapo-math:{write_rows(tmp_path / 'l.jsonl', list_answers)}", 0)


def worked_row(i: int) -> dict[str, str]:
    return {
        "question": f"{i} figs twice?",
        "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}",
    }


def test_worked_solutions_are_compared_by_their_final_answer(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "g.jsonl", [worked_row(i) for i in range(600, 620)])
    columns = Columns(prompt="question", answer="answer")
    for grader in ("", "numeric", "math"):
        with pytest.warns(UserWarning, match="worked solution that ends in '#### N'"):
            task = load_task(source, 0, columns=columns, grader=grader)
        for problem in task.test(2):
            number = str(2 * int(problem.prompt.split()[0]))
            form = "\\boxed{{{}}}" if grader == "math" else "{}"
            assert task.grade(form.format(number), problem.answer).reward == 1
            assert task.grade(form.format(number + "0"), problem.answer).reward == 0
    mixed = write_rows(
        tmp_path / "m.jsonl", [worked_row(1), {"question": "x?", "answer": "5"}, worked_row(2)]
    )
    with pytest.raises(ValueError, match=r"m\.jsonl: rows 0, 2 have worked solutions"):
        load_task(mixed, 0, columns=columns)


def test_answers_are_graded_when_they_are_read(tmp_path: Path) -> None:
    def refused(answer: str, grader: str, message: str, **options: Any) -> None:
        data = [*PLAIN[:7], {"prompt": "odd", "answer": answer}, *PLAIN[7:]]
        source = write_rows(tmp_path / "p.jsonl", data)
        with pytest.raises(ValueError, match=message) as caught:
            load_task(source, 0, grader=grader, **options)
        assert f"{source}: row 7, answer {answer!r}" in str(caught.value)

    refused("n/a", "numeric", "is not a number; use the grader exact or math")
    refused("12 or 13", "numeric", "is not a number")
    refused(" 5 ", "lab", "is graded as wrong when a response states it itself, by the grader lab")
    refused("a</think>b", "exact", "is graded as wrong when a response states it itself")
    refused(r"\frac{1}{2", "math", "is graded as wrong when a response states it itself")
    refused(r"\text{}}{", "math", "is graded as wrong")
    data = [*PLAIN, {"prompt": "odd", "answer": r"\frac{}"}]
    with pytest.warns(UserWarning, match=r"row 12, answer .*cannot be read as mathematics"):
        load_task(write_rows(tmp_path / "w.jsonl", data), 0, grader="math")
    unreadable_rows = [{"prompt": x, "answer": rf"\frac{{}}{x}"} for x in "ab"]
    with pytest.raises(ValueError, match=r"rows 0, 1, answers .* No answer can be read"):
        load_task(write_rows(tmp_path / "n.jsonl", unreadable_rows), 0, grader="math")
    test_source = write_rows(tmp_path / "test.jsonl", [{"prompt": "odd", "answer": "n/a"}, *PLAIN])
    with pytest.raises(ValueError, match=r"test\.jsonl: row 0, answer 'n/a'"):
        load_task(write_rows(tmp_path / "p.jsonl", PLAIN), 0, grader="numeric", test=test_source)


def test_prompts_alone_train_and_nothing_is_graded(tiny_pair, tmp_path: Path, capsys) -> None:
    source = write_rows(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in PLAIN])
    changes = {"task": source, "steps": 1, "eval_every": 1, "full_metrics_every": 1}
    with pytest.warns(UserWarning, match=r"has no column 'answer', .* it has \['prompt'\]"):
        folder = train(settings(tiny_pair, tmp_path / "run", **changes)).folder
    row = rows(folder)[0]
    assert math.isnan(row["response/reward"] or math.nan)
    assert row["response/graded_share"] == 0
    assert not (folder / "evals.jsonl").read_text(), "no evaluation is recorded without answers"
    with (
        pytest.warns(UserWarning, match="has no column"),
        pytest.raises(ValueError, match=r"reward_weight is 1\.0, but .* has no answers"),
    ):
        train(settings(tiny_pair, tmp_path / "graded", **changes, reward_weight=1.0))
    evaluation = {
        "device": "cpu",
        "evaluation": EvalConfig(eval_problems=2),
        "max_prompt": 64,
        "max_response": 4,
    }
    with (
        pytest.warns(UserWarning, match="has no column"),
        pytest.raises(ValueError, match="cannot be graded"),
    ):
        evaluate_folder(str(tiny_pair[0]), source, seed=0, **evaluation)
    with pytest.raises(ValueError, match=r"lacks \['solution'\]"):
        load_task(source, 0, columns=Columns(answer="solution"))
    test_source = write_rows(tmp_path / "t.jsonl", PLAIN)
    with pytest.warns(UserWarning, match="has no column"):
        task = load_task(source, 0, test=test_source, grader="numeric")
    assert task.has_test_answers, "only the training prompts have no answers"


def test_unreadable_responses_cause_a_message_in_the_first_step(
    tiny_pair, tmp_path: Path, capsys
) -> None:
    """Every id ends a response: all texts are empty, and no end token is read as an answer."""
    pair = []
    for model in tiny_pair:
        pair.append(tmp_path / Path(model).name)
        shutil.copytree(model, pair[-1])
        all_ids = list(range(len(make_tokenizer())))
        GenerationConfig(eos_token_id=all_ids).save_pretrained(pair[-1])
    labelled_rows = [{**row, "task": "ab"[i % 2]} for i, row in enumerate(PLAIN)]
    source = write_rows(tmp_path / "p.jsonl", labelled_rows)
    changes = {"task": source, "grader": "exact", "steps": 2, "eval_every": 2, "eval_problems": 4}
    folder = train(settings(tuple(pair), tmp_path / "run", **changes)).folder
    assert [row["grading/readable_share"] for row in rows(folder)] == [0, 0]
    evaluations = [json.loads(x) for x in (folder / "evals.jsonl").read_text().splitlines()]
    assert [row["unparsed"] for row in evaluations] == [1, 1]
    stderr = capsys.readouterr().err
    message = "the grader exact could read no answer in any of the responses"
    assert stderr.count(f"step 0: {message}:") == 1
    assert f"step 1: {message}:" not in stderr
    assert stderr.count(f"{message} to the held-out problems") == 2
    games = {
        "task": "env:household",
        "layout": "turns",
        "max_turns": 2,
        "steps": 1,
        "eval_every": 0,
    }
    game_run = train(settings(tuple(pair), tmp_path / "games", **games, max_prompt=600)).folder
    assert rows(game_run)[0]["episodes/invalid_share"] == 1
