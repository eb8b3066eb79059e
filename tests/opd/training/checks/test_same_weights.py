"""A teacher with the student's weights is refused, wherever and however it was saved."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.config.settings import Config
from opd.teachers.factory import make_pair
from opd.teachers.teacher import teacher_type
from opd.training.checks.same_weights import refuse_same_weights
from opd.training.train import train
from tests.helpers.runs import settings


def copies(student: Path, folder: Path) -> dict[str, Path]:
    """The student itself, a link to it, a copy, and a copy saved in bfloat16."""
    link, copy, rounded = (folder / name for name in ("link", "copy", "rounded"))
    link.symlink_to(student)
    shutil.copytree(student, copy)
    shutil.copytree(student, rounded)
    network = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16)
    network.save_pretrained(rounded)
    return {"itself": student, "link": link, "copy": copy, "rounded": rounded}


def refused(config: Config) -> bool:
    try:
        refuse_same_weights([config], [make_pair(config)])
    except ValueError as error:
        return f"the teacher {config.teacher} has the weights of the student" in str(error)
    return False


def test_copies_of_the_student_are_refused(tiny_pair, tmp_path: Path) -> None:
    student = tiny_pair[0]
    for name, teacher in copies(student, tmp_path).items():
        config = settings((student, teacher), tmp_path / "run", objective="sampled_token")
        assert refused(config), name
    with pytest.raises(ValueError, match="another teacher, or set reward_weight"):
        train(settings((student, tmp_path / "copy"), tmp_path / "run"))
    assert not (tmp_path / "run" / "rows.jsonl").exists()


def test_a_student_with_adapters_is_compared_without_them(tiny_pair, tmp_path: Path) -> None:
    student = tiny_pair[0]
    shutil.copytree(student, tmp_path / "copy")
    assert refused(settings((student, tmp_path / "copy"), tmp_path / "run", lora_rank=2))
    assert not refused(settings(tiny_pair, tmp_path / "run", lora_rank=2))


def test_others_pass(tiny_pair, tmp_path: Path) -> None:
    """Another model, one that differs in a single weight, a reward, and a run without steps."""
    student = tiny_pair[0]
    assert not refused(settings(tiny_pair, tmp_path / "run"))
    changed_copy = tmp_path / "other"
    shutil.copytree(student, changed_copy)
    network = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        network.get_output_embeddings().weight[3, 4] += 0.1
    network.save_pretrained(changed_copy)
    assert not refused(settings((student, changed_copy), tmp_path / "run"))
    identical_pair = (student, student)
    assert not refused(
        settings(identical_pair, tmp_path / "run", reward_weight=1.0, objective="sampled_token")
    )
    assert not refused(settings(identical_pair, tmp_path / "run", steps=0))


def test_one_of_several_tasks_may_hold_the_student_where_it_began(tiny_pair, tmp_path) -> None:
    student = tiny_pair[0]
    task_settings = [settings((student, teacher), tmp_path / "run") for teacher in tiny_pair]
    pairs = [make_pair(config) for config in task_settings]
    refuse_same_weights(task_settings, pairs)
    with pytest.raises(ValueError, match="has the weights of the student"):
        refuse_same_weights([task_settings[0]] * 2, [pairs[0]] * 2)


def test_teachers_made_of_the_student_and_servers_have_rules_of_their_own(tiny_pair) -> None:
    for teacher in ("base", "ema", "http://localhost:1/v1"):
        config = Config(student=str(tiny_pair[0]), teacher=teacher, out="o")
        # looks at no weights
        refuse_same_weights([config], [SimpleNamespace(teacher=teacher_type(teacher))])
