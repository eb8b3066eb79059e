"""Chat templates that refuse messages: said in words before anything is trained."""

import json
import shutil
from pathlib import Path

import pytest

from opd.analysis.doctor import examine
from opd.data.prompts import encode_one
from opd.data.sources import Question
from opd.lab.build import make_tokenizer
from opd.training.train import train
from tests.opd.training.test_train import settings

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


def written(path: Path, system: bool) -> str:
    told = [{"role": "system", "content": "s"}] * system
    chats = [[*told, {"role": "user", "content": f"{i}+1?"}] for i in range(10)]
    rows = [{"prompt": chat, "answer": "1"} for chat in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_refusal_names_the_template_the_roles_and_the_row(pair, tmp_path: Path) -> None:
    plain, told = (written(tmp_path / f"{x}.jsonl", x) for x in (False, True))
    words = "the chat template of .*student refuses messages by system, user: System role not"
    for source, system in ((plain, "be brief"), (told, "")):
        more = {"task": source, "system": system, "steps": 1, "eval_every": 0}
        with pytest.raises(ValueError, match=f"jsonl: row [0-9]: {words}"):
            train(settings(pair, tmp_path / "run", **more))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(ValueError, match="refuses messages by user: "):
        encode_one(tokenizer, Question("a", "b"))


def test_the_doctor_fails_what_the_run_would_refuse(pair, tmp_path: Path) -> None:
    plain, told = (written(tmp_path / f"{x}.jsonl", x) for x in (False, True))
    how = {"prompts": 1, "group": 1, "max_response": 4, "device": "cpu"}
    for more in ({"task": told}, {"task": plain, "system": "s"}, {"system": "s"}):
        found = {item.item: item for item in examine(*map(str, pair), **how, **more)}
        assert found["prompts"].verdict == "fail"
        assert "System role not supported" in found["prompts"].found
        assert "both templates refuse: system" in found["chat template"].found
    found = {item.item: item for item in examine(*map(str, pair), **how, task=plain)}
    assert "prompts" not in found
    assert "sample" not in found
