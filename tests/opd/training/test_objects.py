"""Training on models and data in memory, and with a chat template of one's own."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diagnostics.errors import InvalidInput
from opd.config.settings import with_settings
from opd.data.prompts import encode_prompt
from opd.teachers.factory import make_pairs
from opd.training.setup import load_problem_task
from opd.training.train import train
from tests.helpers.runs import rows, settings

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(30)]
SHORT = {"steps": 2, "eval_every": 0, "prompts_per_step": 2}


def load(folder: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_objects_train_as_their_files_do(tiny_pair, tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    from_files = train(settings(tiny_pair, tmp_path / "files", **SHORT, task=str(source)))
    student, teacher = (load(folder) for folder in tiny_pair)
    objects = {
        "student": student,
        "teacher": teacher,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_pair[0]),
        "dataset": datasets.Dataset.from_list(ROWS),
    }
    config = settings(("", ""), tmp_path / "objects", **SHORT)
    result = train(config, **objects)
    assert rows(result.folder) == rows(from_files.folder)
    assert result.student.network is student, "the student is trained in place"
    recorded = json.loads((result.folder / "config.json").read_text())
    assert recorded["student"] == f"object:{tiny_pair[0]}"
    assert recorded["data"]["task"].startswith("dataset:")
    saved = load(result.folder / "final").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in student.state_dict().items())
    objects["dataset"] = ROWS[1:]
    with pytest.raises(InvalidInput, match=r"holds a run with other settings .task: 'dataset:"):
        train(config, **objects)


def test_objects_that_do_not_fit_are_refused(tiny_pair, tmp_path: Path) -> None:
    student, tokenizer = load(tiny_pair[0]), AutoTokenizer.from_pretrained(tiny_pair[0])
    config = settings(tiny_pair, tmp_path / "run", **SHORT)
    for changes, objects, message in (
        ({}, {"student": student}, "is a model without its tokenizer; pass tokenizer= too"),
        ({}, {"student": {"a": 1}, "tokenizer": tokenizer}, "the model is a dict; give"),
        (
            {"dtype": "bfloat16"},
            {"student": student, "tokenizer": tokenizer},
            "has weights in float32, but dtype is bfloat16; set dtype to float32",
        ),
        (
            {"teacher_weights": "int8"},
            {"teacher": student, "tokenizer": tokenizer},
            "teacher_weights is int8, but object:.* is in memory",
        ),
        (
            {},
            {"student": student, "teacher": student, "tokenizer": tokenizer},
            "the divergence is zero",
        ),
    ):
        with pytest.raises(InvalidInput, match=message):
            train(with_settings(config, **changes), **objects)


def test_a_chat_template_and_its_arguments_are_settings(tiny_pair, tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[-1].content }}{% if think %}<think>{% else %}>{% endif %}")
    own = settings(tiny_pair, tmp_path / "run", task=str(source), **SHORT)
    for text, end in (('{"think": true}', "<think>"), ('{"think": false}', ">")):
        config = with_settings(own, chat_template=str(template), template=text)
        [pair] = make_pairs([config])
        problem = load_problem_task(config, pair).train(0, 1)[0]
        ids = encode_prompt(pair.tokenizer, problem)
        assert pair.tokenizer.decode(ids) == problem.prompt + end
    folder = train(config).folder
    assert AutoTokenizer.from_pretrained(folder / "final").chat_template == template.read_text()
    for path, message in (
        (tmp_path / "no.jinja", "does not exist; give the path of a Jinja file"),
        (tmp_path / "empty.jinja", "is empty; give the text of a template"),
    ):
        if path.name.startswith("empty"):
            path.write_text("\n")
        with pytest.raises((InvalidInput, FileNotFoundError), match=message):
            make_pairs([with_settings(own, chat_template=str(path))])
