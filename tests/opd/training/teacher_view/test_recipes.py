"""Each command of docs/teacher-view.md trains a tiny pair as it stands on the page."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from opd.cli.train import parse_arguments
from opd.config.settings import with_settings
from opd.lab.build import TEMPLATE
from opd.training.train import train
from tests.helpers.games import ECHO
from tests.helpers.paths import ROOT
from tests.helpers.runs import rows

PAGE = (ROOT / "docs" / "teacher-view.md").read_text().replace("\\\n", " ")
COMMANDS = re.findall(r"^    opd train (.*)$", PAGE, re.M)
THINKING = TEMPLATE.replace(
    "{% if add_generation_prompt %}",
    "{% if enable_thinking %}<think>{% endif %}{% if add_generation_prompt %}",
)


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 9
    used = set(re.findall(r"examples/views/\w+\.jinja", PAGE))
    assert used == {str(x.relative_to(ROOT)) for x in (ROOT / "examples" / "views").iterdir()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_trains(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(ROOT)
    data = tmp_path / "problems.jsonl"
    problems = [
        {"prompt": f"{a}+1", "answer": str(a + 1), "solution": f"one more than {a}"}
        for a in range(12)
    ]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    config = parse_arguments(shlex.split(command)).settings
    changes: dict[str, Any] = {"student": str(tiny_pair[0]), "out": str(tmp_path / "run")}
    models = {"STUDENT": tiny_pair[0], "TEACHER": tiny_pair[1]}
    changes["teacher"] = str(models.get(config.teacher, config.teacher))
    if config.data.task == "problems.jsonl":
        changes["task"] = str(data)
    else:
        changes |= {"task": ECHO, "max_prompt": 200}
    if config.view.teacher_thinking != "same":
        (tmp_path / "thinking.jinja").write_text(THINKING)
        changes["chat_template"] = str(tmp_path / "thinking.jinja")
    small = {"steps": 1, "warmup": 0, "eval_every": 0, "eval_problems": 1, "support_k": 4}
    sizes = {"prompts_per_step": 2, "group_size": 2, "max_response": 8, "device": "cpu"}
    folder = train(with_settings(config, **changes, **small, **sizes)).folder
    (row,) = rows(folder)
    assert math.isfinite(row["loss"])
    assert row["grad_norm"] > 0
    file = folder / "batches" / "step_000000.prompts.json"
    texts, shown_texts = (
        json.loads(file.with_name(f"step_000000.{name}.json").read_text())
        for name in ("prompts", "teacher_prompts")
    )
    is_own_template = config.view.teacher_template == "own"  # of the same text, in this pair
    for text, shown_text in zip(texts, shown_texts, strict=True):
        assert (text == shown_text) == is_own_template
    assert (row["view/kl"] > 0) != is_own_template
    if "solution.jinja" in command:
        assert all("one more than" in text for text in shown_texts)
    if "feedback.jinja" in command or "turns.jinja" in command:
        assert all(re.search(r"answer|game was", text) for text in shown_texts)
