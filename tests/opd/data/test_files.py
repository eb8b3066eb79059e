"""Data as people have it: read, or refused in one line with file, row, field, value and remedy."""

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
from opd.data.benchmarks import BOXED
from opd.data.prompts import encode_one
from opd.data.sources import Columns, Question, read_problems, read_rows
from opd.data.tasks import load_task
from opd.evaluation.evaluate import evaluate_folder
from opd.lab.build import make_tokenizer
from opd.training.train import train
from tests.opd.training.test_train import rows, settings

PLAIN: list[dict] = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(12)]


def written(path: Path, data: list[dict]) -> str:
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


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    for name, data, words in (
        ("a.json", json.dumps({"data": PLAIN}, indent=1).encode(), "is one JSON object; expected"),
        ("b.json", b'[{"prompt": "a"}, 3]', "row 1 is not a JSON object: 3"),
        ("c.json", b'[{"prompt": "a"}, {"pro', r"c\.json is not JSON"),
        ("d.jsonl", "\ufeff{}".encode("utf-16"), "is not UTF-8 text: byte 0xff at offset 0"),
        ("e.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("f.jsonl", b'{"a": 1, "a": 2}', "line 1 has the field 'a' twice"),
        (
            "g.jsonl",
            b'{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}',
            r"line 2 holds '\\ud83d', half of",
        ),
        (
            "h.csv",
            b"prompt,answer\n1+1,2\n",
            "convert it first, a table of text to one JSON object",
        ),
        ("i.jsonl.gz", b"\x1f\x8b", "unpack what is compressed"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words) as caught:
            read_rows(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_rows_of_another_kind_are_refused_with_the_file(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name, data, words in (
        (
            "chats",
            [{"messages": chat}] * 3,
            "--prompt-column.*write the messages before it as prom",
        ),
        (
            "prompts",
            [{"prompt": chat, "answer": "b"}] * 3,
            "by 'assistant', not the user; of a chat",
        ),
        ("copies", [{"prompt": "a", "answer": "b"}] * 3, "3 rows hold 1 different prompts"),
        (
            "grader",
            [{**row, "grader": ["math"]} for row in PLAIN],
            "names the grader .*'math'.*known",
        ),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        with pytest.raises(InvalidInput, match=f"{name}.jsonl.*{words}"):
            load_task(str(path), 0)


def test_tables_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pandas.DataFrame(PLAIN).to_parquet(path)
    whole = path.read_bytes()
    for data in (b"no table", whole[: len(whole) // 2], b"PAR1" + bytes(50) + whole[-40:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"p\.parquet is not a whole parquet file"):
            read_rows(str(path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(RuntimeError, match=r"folder', split 'train', cannot be read \("):
        read_rows(str(tmp_path / "folder"))


def test_what_tables_call_missing_is_missing(tmp_path: Path) -> None:
    import datasets

    values = [math.nan if i % 3 == 0 else float(i) for i in range(12)]
    holes = [{"prompt": f"q{i}", "answer": x} for i, x in enumerate(values)]
    sources = [written(tmp_path / "p.jsonl", holes)]
    pandas.DataFrame(holes).to_parquet(tmp_path / "null.parquet")
    table = pyarrow.table({"prompt": [r["prompt"] for r in holes], "answer": pyarrow.array(values)})
    pyarrow.parquet.write_table(table, tmp_path / "nan.parquet")
    datasets.Dataset.from_list(holes).save_to_disk(tmp_path / "saved")
    sources += [f"{tmp_path}/{name}" for name in ("null.parquet", "nan.parquet", "saved")]
    for source in sources:
        with pytest.raises(ValueError, match=r"rows 0, 3, 6, 9 has an empty 'answer'$"):
            read_problems(source)
    named = written(
        tmp_path / "n.jsonl", [{"problem": "a", "answer": 1}, {"problem": "b", "answer": math.nan}]
    )
    with pytest.raises(ValueError, match="row 1 has an empty answer"):
        load_task(f"math-500:{named}", 0)
    prompts = [{"prompt": x, "answer": "1", "task": math.nan} for x in ("a", math.nan, None)]
    with pytest.raises(ValueError, match=r"rows 1, 2 has an empty 'prompt'$"):
        read_problems(written(tmp_path / "q.jsonl", prompts))
    labels = read_problems(written(tmp_path / "t.jsonl", [{**prompts[0], "grader": math.nan}] * 2))
    assert labels[0] == Question("a", "1"), "no label and no grader are called nan"


def test_numbers_are_answers_without_the_decimals_of_a_table(tmp_path: Path) -> None:
    from decimal import Decimal

    numbers = [7.0, -3.0, 2.5, 1e22, 1e-7]
    source = written(tmp_path / "n.jsonl", [{"prompt": "a", "answer": x} for x in numbers])
    assert [p.answer for p in read_problems(source)] == ["7", "-3", "2.5", "1e+22", "1e-07"]
    exact = [{"prompt": "a", "answer": Decimal(x)} for x in ("7.00", "2.50")]
    pandas.DataFrame(exact).to_parquet(tmp_path / "d.parquet")
    assert [p.answer for p in read_problems(tmp_path / "d.parquet")] == ["7", "2.50"]
    endless = written(tmp_path / "i.jsonl", [{"prompt": "a", "answer": math.inf}] * 2)
    with pytest.raises(ValueError, match="has inf as 'answer', expected text or a finite number"):
        read_problems(endless)


def test_chats_come_as_lists_arrays_or_json(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    chats = [talk, json.dumps(talk)]
    source = written(tmp_path / "p.jsonl", [{"prompt": c, "answer": "1"} for c in chats])
    for problem in read_problems(source):
        assert problem.chat == (("system", "s"), ("user", "q"))  # type: ignore[attr-defined]
    from opd.data.sources import messages

    assert messages(numpy.array(talk), "prompt") == (("system", "s"), ("user", "q"))
    text = written(tmp_path / "t.jsonl", [{"prompt": str(talk), "answer": "1"}] * 2)
    with pytest.raises(
        ValueError, match="rows 0, 1 has the text of a list of messages as 'prompt'"
    ):
        read_problems(text)
    assert read_problems(written(tmp_path / "l.jsonl", [{"prompt": "[1, 2]?", "answer": "1"}] * 2))


def test_named_sets_of_chats_end_with_the_request(tmp_path: Path) -> None:
    talk = [[{"role": "user", "content": f"What is {i}+{i}?"}] for i in range(20)]
    source = written(
        tmp_path / "t.jsonl", [{"prompt": c, "solution": str(2 * i)} for i, c in enumerate(talk)]
    )
    problems = load_task(f"dapo-math:{source}", 0, test=f"dapo-math:{source}").test(20)
    assert {p.prompt for p in problems} == {f"What is {i}+{i}?{BOXED}" for i in range(20)}
    tokenizer = make_tokenizer()
    shown = tokenizer.decode(encode_one(tokenizer, problems[0]))
    assert "role'" not in shown
    assert shown.endswith(f"{BOXED}<|im_end|>\n<|im_start|>assistant\n")
    for prompt, words in ((None, "row 1 has an empty 'prompt'"), (3, "row 1 has neither text")):
        broken = [{"prompt": "a", "solution": "1"}, {"prompt": prompt, "solution": "1"}]
        with pytest.raises(ValueError, match=words):
            load_task(f"dapo-math:{written(tmp_path / 'b.jsonl', broken)}", 0)
    listed = [{"prompt": "a", "solution": "['34']"}] * 2
    with pytest.raises(ValueError, match="row 0 has the text of a list as answer"):
        load_task(f"dapo-math:{written(tmp_path / 'l.jsonl', listed)}", 0)


def worked(i: int) -> dict[str, str]:
    return {
        "question": f"{i} figs twice?",
        "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}",
    }


def test_worked_solutions_are_compared_by_their_final_answer(tmp_path: Path) -> None:
    source = written(tmp_path / "g.jsonl", [worked(i) for i in range(600, 620)])
    columns = Columns("question", "answer")
    for grader in ("", "numeric", "math"):
        with pytest.warns(UserWarning, match="worked solution that ends in '#### N'"):
            task = load_task(source, 0, columns=columns, grader=grader)
        for problem in task.test(2):
            number = str(2 * int(problem.prompt.split()[0]))
            form = "\\boxed{{{}}}" if grader == "math" else "{}"
            assert task.grade(form.format(number), problem.answer).reward == 1
            assert task.grade(form.format(number + "0"), problem.answer).reward == 0
    mixed = written(tmp_path / "m.jsonl", [worked(1), {"question": "x?", "answer": "5"}, worked(2)])
    with pytest.raises(ValueError, match=r"m\.jsonl: rows 0, 2 have worked solutions"):
        load_task(mixed, 0, columns=columns)


def test_answers_are_graded_when_they_are_read(tmp_path: Path) -> None:
    def refused(answer: str, grader: str, words: str, **more: Any) -> None:
        data = [*PLAIN[:7], {"prompt": "odd", "answer": answer}, *PLAIN[7:]]
        source = written(tmp_path / "p.jsonl", data)
        with pytest.raises(ValueError, match=words) as caught:
            load_task(source, 0, grader=grader, **more)
        assert f"{source}: row 7, answer {answer!r}" in str(caught.value)

    refused("n/a", "numeric", "is not a number; use the grader exact or math")
    refused("12 or 13", "numeric", "is not a number")
    refused(" 5 ", "lab", "is not right where a response gives it itself, by the grader lab")
    refused("a</think>b", "exact", "is not right where a response gives it itself")
    refused(r"\frac{1}{2", "math", "is not right where a response gives it itself")
    refused(r"\text{}}{", "math", "is not right")
    data = [*PLAIN, {"prompt": "odd", "answer": r"\frac{}"}]
    with pytest.warns(UserWarning, match=r"row 12, answer .*cannot be read as mathematics"):
        load_task(written(tmp_path / "w.jsonl", data), 0, grader="math")
    every = [{"prompt": x, "answer": rf"\frac{{}}{x}"} for x in "ab"]
    with pytest.raises(ValueError, match=r"rows 0, 1, answers .* No answer can be read"):
        load_task(written(tmp_path / "n.jsonl", every), 0, grader="math")
    test = written(tmp_path / "test.jsonl", [{"prompt": "odd", "answer": "n/a"}, *PLAIN])
    with pytest.raises(ValueError, match=r"test\.jsonl: row 0, answer 'n/a'"):
        load_task(written(tmp_path / "p.jsonl", PLAIN), 0, grader="numeric", test=test)


def test_prompts_alone_train_and_nothing_is_graded(tiny_pair, tmp_path: Path, capsys) -> None:
    source = written(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in PLAIN])
    more = {"task": source, "steps": 1, "eval_every": 1, "full_metrics_every": 1}
    with pytest.warns(UserWarning, match=r"has no column 'answer', .* it has \['prompt'\]"):
        folder = train(settings(tiny_pair, tmp_path / "run", **more))
    row = rows(folder)[0]
    assert math.isnan(row["response/reward"] or math.nan)
    assert row["response/graded_share"] == 0
    assert not (folder / "evals.jsonl").read_text(), "accuracy of nothing is not 0"
    with (
        pytest.warns(UserWarning, match="has no column"),
        pytest.raises(ValueError, match=r"reward_weight is 1\.0, and .* answer"),
    ):
        train(settings(tiny_pair, tmp_path / "graded", **more, reward_weight=1.0))
    how = {"device": "cpu", "problems": 2, "max_prompt": 64, "max_response": 4, "temperature": 1.0}
    with (
        pytest.warns(UserWarning, match="has no column"),
        pytest.raises(ValueError, match="nothing to evaluate"),
    ):
        evaluate_folder(str(tiny_pair[0]), source, seed=0, **how)
    with pytest.raises(ValueError, match=r"lacks \['solution'\]"):
        load_task(source, 0, columns=Columns(answer="solution"))
    tested = written(tmp_path / "t.jsonl", PLAIN)
    with pytest.warns(UserWarning, match="has no column"):
        task = load_task(source, 0, test=tested, grader="numeric")
    assert task.has_test_answers, "training prompts without answers, evaluation with them"


def test_what_no_grader_reads_is_said_in_the_first_step(tiny_pair, tmp_path: Path, capsys) -> None:
    """Every id ends a response, so that every text is empty: neither the steps, the evaluations nor
    the games may see the end itself as an answer."""
    pair = []
    for model in tiny_pair:
        pair.append(tmp_path / Path(model).name)
        shutil.copytree(model, pair[-1])
        every = list(range(len(make_tokenizer())))
        GenerationConfig(eos_token_id=every).save_pretrained(pair[-1])
    labelled = [{**row, "task": "ab"[i % 2]} for i, row in enumerate(PLAIN)]
    source = written(tmp_path / "p.jsonl", labelled)
    more = {"task": source, "grader": "exact", "steps": 2, "eval_every": 2, "eval_problems": 4}
    folder = train(settings(tuple(pair), tmp_path / "run", **more))
    assert [row["grading/readable_share"] for row in rows(folder)] == [0, 0]
    evaluations = [json.loads(x) for x in (folder / "evals.jsonl").read_text().splitlines()]
    assert [row["unparsed"] for row in evaluations] == [1, 1]
    said = capsys.readouterr().err
    words = "the grader exact could read no answer in any of the responses"
    assert said.count(f"step 0: {words}:") == 1
    assert f"step 1: {words}:" not in said
    assert said.count(f"{words} to the held-out problems") == 2
    games = {
        "task": "env:household",
        "layout": "turns",
        "max_turns": 2,
        "steps": 1,
        "eval_every": 0,
    }
    played = train(settings(tuple(pair), tmp_path / "games", **games, max_prompt=600))
    assert rows(played)[0]["episodes/invalid_share"] == 1
