"""Chat templates that reject messages: the error is raised before training starts."""

import json
import shutil
from pathlib import Path

import pytest

from opd.analysis.doctor import check_pair
from opd.data.prompts import encode_prompt
from opd.data.sources import DatasetProblem
from opd.lab.build import make_tokenizer
from opd.training.train import train
from tests.helpers.runs import settings

STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def pair(tiny_pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("strict")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRICT
    for name, model in zip(("student", "teacher"), tiny_pair, strict=True):
        shutil.copytree(model, folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


def write_chats(path: Path, system: bool) -> str:
    system_messages = [{"role": "system", "content": "s"}] * system
    chats = [[*system_messages, {"role": "user", "content": f"{i}+1?"}] for i in range(10)]
    rows = [{"prompt": chat, "answer": "1"} for chat in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_rejected_chat_names_the_template_the_roles_and_the_row(pair, tmp_path: Path) -> None:
    plain_source, source_with_system = (
        write_chats(tmp_path / f"{x}.jsonl", x) for x in (False, True)
    )
    expected_message = (
        "the chat template of .*student rejects messages with roles system, user: System role not"
    )
    for source, system in ((plain_source, "be brief"), (source_with_system, "")):
        changes = {"task": source, "system": system, "steps": 1, "eval_every": 0}
        with pytest.raises(ValueError, match=f"jsonl: row [0-9]: {expected_message}"):
            train(settings(pair, tmp_path / "run", **changes))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(ValueError, match="rejects messages with roles user: "):
        encode_prompt(tokenizer, DatasetProblem("a", "b"))


def test_the_doctor_reports_what_the_run_would_reject(pair, tmp_path: Path) -> None:
    plain_source, source_with_system = (
        write_chats(tmp_path / f"{x}.jsonl", x) for x in (False, True)
    )
    sample_size = {"prompts": 1, "group": 1, "max_response": 4, "device": "cpu"}
    for settings_with_system in (
        {"task": source_with_system},
        {"task": plain_source, "system": "s"},
        {"system": "s"},
    ):
        results = {
            item.item: item
            for item in check_pair(*map(str, pair), **sample_size, **settings_with_system)
        }
        assert results["prompts"].verdict == "fail"
        assert "System role not supported" in results["prompts"].found
        assert "both templates reject: system" in results["chat template"].found
    results = {
        item.item: item for item in check_pair(*map(str, pair), **sample_size, task=plain_source)
    }
    assert "prompts" not in results
    assert "sample" not in results
