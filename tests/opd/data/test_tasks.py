"""Tasks from files and datasets: rows, held-out split, encoded prompts and rejected input."""

import json
import random
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from opd.data.chain_task import Problem
from opd.data.grading.graders import grade_exact, grade_math, grade_numeric
from opd.data.prompts import encode_prompt, encode_prompts
from opd.data.sources import Columns, DatasetProblem, read_problems, read_rows
from opd.data.tasks import (
    epoch_indices,
    load_task,
    reject_long_prompts,
    skip_long_prompts,
    split_held_out,
)
from opd.lab.build import make_tokenizer

ROWS = [{"prompt": f"{i}+1?", "answer": i + 1, "task": "ab"[i % 2]} for i in range(30)]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pandas

    table = pandas.DataFrame(ROWS)
    (tmp_path / "folder" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "p.parquet")
    table.to_parquet(tmp_path / "folder" / "data" / "train-00000-of-00001.parquet")
    table[:3].to_parquet(tmp_path / "folder" / "data" / "test-00000-of-00001.parquet")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    dataset_dict = datasets.DatasetDict({"train": dataset, "test": dataset.select(range(3))})
    dataset_dict.save_to_disk(tmp_path / "both")
    expected = [DatasetProblem(r["prompt"], str(r["answer"]), task=r["task"]) for r in ROWS]
    sources = [write_rows(tmp_path / "p.jsonl", ROWS), f"{tmp_path}/p.parquet"]
    for name in ("folder", "saved", "both"):
        sources += [f"{tmp_path}/{name}", f"hf:{tmp_path}/{name}"]
    sources += [f"hf:{tmp_path}/both:train", f"hf:{tmp_path}/folder:default:train"]
    for source in sources:
        assert read_problems(source) == expected, source
    for name in ("both", "folder"):
        assert len(read_rows(f"hf:{tmp_path}/{name}:test")) == 3
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has train, test"):
        read_rows(f"hf:{tmp_path}/both:dev")
    for source_name in ("hf:", "hf:a:b:c:d", "hf:a:"):
        with pytest.raises(ValueError, match="write hf:NAME"):
            read_rows(source_name)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    def refused(rows: list, message: str, **settings) -> None:
        source = write_rows(tmp_path / "bad.jsonl", rows)
        with pytest.raises(ValueError, match=message) as caught:
            read_problems(source, **settings)
        assert str(caught.value).startswith(source)

    good_row = {"prompt": "a", "answer": "b"}
    refused([good_row], "has 1 problems; at least 2")
    refused([good_row, {"prompt": "a"}], r"row 1 lacks \['answer'\]; has \['prompt'\]")
    refused([good_row, {}], r"row 1 lacks \['prompt', 'answer'\]; has \[\]")
    empty = [{"prompt": "a", "answer": x} for x in ("", None, "  ", "0", 0)]
    refused(empty, r"rows 0, 1, 2 has an empty 'answer'$")
    refused([good_row] * 2 + [{"prompt": " ", "answer": "b"}] * 7, r"rows 2, 3, 4, 5, 6 and 2 more")
    refused([good_row, {"prompt": None, "answer": ""}], "row 1 has an empty")
    refused([{"prompt": [], "answer": "b"}, good_row], "row 0 has an empty 'prompt'")
    refused([{"prompt": "a", "answer": ["b"]}, good_row], "row 0 has a list as 'answer'")
    refused([{"prompt": "a", "answer": True}, good_row], "row 0 has a bool as 'answer'")
    refused(
        [{"prompt": 3, "answer": "b"}, good_row], "row 0 has neither text nor a list of messages"
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    two_replies = [*chat, chat[1]]
    refused([{"prompt": two_replies, "answer": "b"}, good_row], "last message is by 'assistant'")
    refused([good_row, {"prompt": ["a"], "answer": "b"}], "row 1 has neither text nor a list")
    chat_with_system = [{"role": "system", "content": "s"}, *chat[:1]]
    refused(
        [good_row, {"prompt": chat_with_system, "answer": "b"}],
        "row 1 already has a system message",
        system="x",
    )
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt"\n')
    with pytest.raises(ValueError, match=r"bad.jsonl line 3 is not JSON"):
        read_problems(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 is not a JSON object: '\[1\]'"):
        read_problems(tmp_path / "bad.jsonl")
    (tmp_path / "x.csv").write_text("prompt,answer\n")
    with pytest.raises(ValueError, match=r"is not a \.jsonl, \.json or \.parquet file"):
        read_problems(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match='neither "lab" nor an existing file'):
        read_problems(tmp_path / "none.jsonl")


def test_columns_are_mapped_and_may_be_nested(tmp_path: Path) -> None:
    rows = [{"q": "a", "reward": {"truth": 3.5}, "a.b": "c", "kind": None}] * 2
    source = write_rows(tmp_path / "p.jsonl", rows)
    columns = Columns(prompt="q", answer="reward.truth", task="kind")
    assert read_problems(source, columns) == [DatasetProblem("a", "3.5")] * 2
    assert read_problems(source, Columns(prompt="q", answer="a.b"))[0].answer == "c", (
        "an existing column name with a dot is not nested"
    )
    with pytest.raises(ValueError, match=r"rows 0, 1 lacks \['reward.lies'\]"):
        read_problems(source, Columns(prompt="q", answer="reward.lies"))


def test_the_split_depends_on_content_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {i % 120}", "answer": str(i % 120)} for i in range(300)]
    rows += [{"prompt": f" what  is {i}\n", "answer": str(i)} for i in range(120)]
    shuffled = random.Random(0).sample(rows, len(rows))
    tasks = [
        load_task(write_rows(tmp_path / f"{i}.jsonl", file_rows), 0)
        for i, file_rows in enumerate((rows, shuffled))
    ]
    held_out_prompts = [[" ".join(p.prompt.split()) for p in task.test(1000)] for task in tasks]
    assert held_out_prompts[0] == held_out_prompts[1]
    by_hash = sorted(
        {f"what is {i}" for i in range(120)}, key=lambda x: sha256(x.encode()).digest()
    )
    assert held_out_prompts[0] == by_hash[:12], "a tenth of 120 prompts, one copy of each, by hash"
    training_problems = [[p for step in range(10) for p in task.train(step, 40)] for task in tasks]
    texts = [[" ".join(p.prompt.split()) for p in file_rows] for file_rows in training_problems]
    assert texts[0] == texts[1]
    assert not set(texts[0]) & set(held_out_prompts[0]), (
        "no copy of a held-out prompt is trained on"
    )
    assert len(set(texts[0])) == 108
    # copies of the other prompts remain: 420 rows without 12 prompts
    remaining_rows = [
        row for row in rows if " ".join(row["prompt"].split()) not in set(held_out_prompts[0])
    ]
    assert len(split_held_out(read_problems(tmp_path / "0.jsonl"))[0]) == len(remaining_rows)
    with pytest.raises(ValueError, match="3 rows hold 1 different prompts"):
        load_task(write_rows(tmp_path / "same.jsonl", rows[:1] * 3), 0)


def test_another_file_may_be_held_out(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    test_rows = ROWS[4:6] + [{"prompt": f"new {i}", "answer": "1"} for i in range(3)]
    test = write_rows(tmp_path / "test.jsonl", test_rows)
    with pytest.warns(
        UserWarning, match=r"excluded from training: 2 of 30 .*train.jsonl that .*test"
    ):
        task = load_task(train, 0, test=test)
    assert {p.prompt for p in task.test(100)} == {row["prompt"] for row in test_rows}
    training_prompts = {p.prompt for p in task.train(0, 28)}
    assert training_prompts == {row["prompt"] for row in ROWS} - {
        row["prompt"] for row in test_rows
    }
    same_source_task = load_task(train, 0, test=train)
    assert len(same_source_task.test(100)) == 30
    with pytest.raises(ValueError, match="no training problems remain"):
        same_source_task.train(0, 1)
    with pytest.raises(ValueError, match="has its own held-out problems"):
        load_task("lab", 0, test=test)


def test_epochs_draw_every_problem_once() -> None:
    indices = [i for step in range(6) for i in epoch_indices(10, step * 5, 5, seed=3)]
    for epoch in range(3):
        assert sorted(indices[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert indices[:10] != indices[10:20]
    assert epoch_indices(10, 7, 8, seed=3) == indices[7:15], "any part of the same sequence"


def test_a_source_may_name_its_grader(tmp_path: Path) -> None:
    plain_source = write_rows(tmp_path / "p.jsonl", ROWS)
    source_with_grader = write_rows(
        tmp_path / "n.jsonl", [{**row, "grader": "math"} for row in ROWS]
    )
    mixed_source = write_rows(tmp_path / "m.jsonl", [{**ROWS[0], "grader": "math"}, *ROWS[1:]])
    assert load_task(plain_source, 0).grade is grade_exact
    assert load_task(source_with_grader, 0).grade is grade_math
    assert load_task(source_with_grader, 0, grader="numeric").grade is grade_numeric
    assert load_task(mixed_source, 0, grader="exact").grade is grade_exact
    with pytest.raises(ValueError, match=r"names several graders, \['', 'math'\]"):
        load_task(mixed_source, 0)
    with pytest.raises(ValueError, match="unknown grader 'x'"):
        load_task(plain_source, 0, grader="x")


def render_prompt(tokenizer, problem: Problem) -> str:
    return tokenizer.decode(encode_prompt(tokenizer, problem))


def test_prompts_are_rendered_as_chats(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    chat = [("user", "a"), ("assistant", "b"), ("user", "c")]
    rows: list[dict] = [
        {"prompt": [{"role": r, "content": c, "name": None} for r, c in chat], "answer": "d"},
        {"prompt": "e", "answer": "f"},
    ]
    source = write_rows(tmp_path / "p.jsonl", rows)
    prompt_texts = [
        render_prompt(tokenizer, problem) for problem in read_problems(source, system="be good")
    ]
    system = "<|im_start|>system\nbe good<|im_end|>\n"
    user, assistant_header = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
    turns = user.format("a") + "<|im_start|>assistant\nb<|im_end|>\n" + user.format("c")
    assert prompt_texts == [
        system + turns + assistant_header,
        system + user.format("e") + assistant_header,
    ]
    assert render_prompt(tokenizer, read_problems(source)[1]) == user.format("e") + assistant_header
    assert render_prompt(tokenizer, Problem("e", "f")) == user.format("e") + assistant_header
    lab = load_task("lab", 0, system="be good").train(0, 1)[0]
    assert render_prompt(tokenizer, lab).startswith(system + "<|im_start|>user\n")
    plain = load_task("lab", 0).train(0, 1)[0]
    assert (lab.prompt, lab.answer) == (
        json.dumps([["system", "be good"], ["user", plain.prompt]]),
        plain.answer,
    )


def test_template_settings_reach_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
    source = write_rows(tmp_path / "p.jsonl", ROWS)
    thinking = load_task(source, 0).test(1)[0]
    quiet = load_task(source, 0, template={"enable_thinking": False}).test(1)[0]
    assert render_prompt(tokenizer, quiet) == render_prompt(tokenizer, thinking) + "<think></think>"
    assert not render_prompt(tokenizer, thinking).endswith("</think>")


def with_bos(template: str | None):
    """Build a tokenizer that adds BOS to plain text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.chat_template = template
    assert tokenizer.encode("a")[0] == bos
    return tokenizer, bos


def test_bos_is_never_doubled_and_never_lost() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for tokenizer, bos in (with_bos(template), with_bos(None)):
        for text in ("1+2", "<|im_start|>1+2"):
            ids = encode_prompt(tokenizer, Problem(text, "3"))
            if tokenizer.chat_template and text.startswith("<"):
                continue  # the template and the user both write BOS on purpose
            assert ids.count(bos) == 1
            assert ids[0] == bos
            assert tokenizer.decode(ids[1:]) == "1+2"
    chat = DatasetProblem("x", "3", chat=(("system", "s"), ("user", "x")))
    with pytest.raises(ValueError, match="no chat template for a system message"):
        encode_prompt(with_bos(None)[0], chat)
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(with_bos(None)[0], DatasetProblem("x", "3", template=(("a", 1),)))


def test_long_prompts_are_refused_or_dropped_by_count(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = [{"prompt": "x" * n, "answer": "y"} for n in range(1, 21)]
    source = write_rows(tmp_path / "p.jsonl", rows)
    template_length = len(encode_prompt(tokenizer, Problem("x", "y"))) - 1
    message = (
        rf"5 of 20 prompts are longer than max_prompt = {template_length + 15} tokens, "
        rf".* has {template_length + 20}"
    )
    with pytest.raises(ValueError, match=message):
        load_task(
            source,
            0,
            handle_long_prompts=partial(reject_long_prompts, tokenizer, template_length + 15),
        )
    with pytest.warns(UserWarning, match="skipped 5 of 20 prompts"):
        task = load_task(
            source,
            0,
            handle_long_prompts=partial(skip_long_prompts, tokenizer, template_length + 15),
        )
    assert {len(p.prompt) for p in task.test(9) + task.train(0, 14)} == set(range(1, 16))
    fitting_task = load_task(
        source, 0, handle_long_prompts=partial(reject_long_prompts, tokenizer, template_length + 20)
    )
    encode_prompts(
        tokenizer, fitting_task.train(0, 18) + fitting_task.test(9), 1, template_length + 20
    )
    with pytest.raises(ValueError, match="20 of 20 prompts are longer"):
        load_task(
            source, 0, handle_long_prompts=partial(skip_long_prompts, tokenizer, template_length)
        )
    with pytest.raises(ValueError, match=f"max_prompt is {template_length + 15}"):
        encode_prompts(tokenizer, load_task(source, 0).train(0, 18), 1, template_length + 15)


def test_the_test_source_has_columns_of_its_own(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(f'{{"prompt": "{i}", "solution": "{i}"}}\n' for i in range(4)))
    test.write_text('{"Problem": "2", "Answer": "2"}\n{"Problem": "9", "Answer": "9"}\n')
    with pytest.warns(UserWarning, match="1 of 4"):
        task = load_task(
            str(train),
            0,
            test=str(test),
            columns=Columns(answer="solution"),
            test_columns=Columns(prompt="Problem", answer="Answer"),
        )
    assert {p.prompt for p in task.test(9)} == {"2", "9"}
    assert {p.prompt for p in task.train(0, 3)} == {"0", "1", "3"}
