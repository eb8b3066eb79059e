"""Kinds of teachers: what each provides, and settings that need more, before it is connected."""

import re

import pytest

from opd.config.settings import Config, with_settings
from opd.teachers.teacher import (
    AdapterFreeTeacher,
    Capability,
    EmaTeacher,
    LocalTeacher,
    ServerTeacher,
    teacher_type,
)
from opd.training.validation import validate

ADDRESS = "http://127.0.0.1:9/v1"  # nothing listens there


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("models/teacher", LocalTeacher),
        ("base", AdapterFreeTeacher),
        ("ema", EmaTeacher),
        (ADDRESS, ServerTeacher),
    ],
)
def test_the_kind_follows_from_the_name_alone(name: str, kind: type) -> None:
    assert teacher_type(name) is kind
    assert kind.is_separate == (kind is LocalTeacher)
    assert kind.follows_student == (kind is EmaTeacher)
    assert kind.capabilities == ({Capability.TOP_K} if kind is ServerTeacher else set(Capability))


SERVER_LACKS = {
    "student_topk": ({"objective": "student_topk"}, "log-probabilities of the student's ids"),
    "union_topk": ({"objective": "union_topk"}, "log-probabilities of the student's ids"),
    "full": ({"objective": "full_reverse_kl"}, "full distribution"),
    "baseline": ({"objective": "sampled_token", "baseline": "local_kl"}, "full distribution"),
    "temperature": ({"temperature": 0.7}, "temperature 0.7"),
    "map_eos": ({"map_eos": True}, "map_eos off"),
    "entropy": ({"entropy_top_fraction": 0.5}, "entropy_top_fraction 1"),
    "probe": ({"probe_every": 5}, "probe_every 0"),
}


@pytest.mark.parametrize(("changes", "message"), SERVER_LACKS.values(), ids=SERVER_LACKS)
def test_what_a_server_lacks_is_refused_without_asking_it(changes: dict, message: str) -> None:
    for teacher in (ADDRESS, "models/teacher"):
        config = with_settings(Config(student="s", teacher=teacher, out="o"), **changes)
        problems = "\n".join(validate(config))
        assert bool(re.search(message, problems)) == (teacher == ADDRESS), problems


@pytest.mark.parametrize("objective", ["teacher_topk", "sampled_token", "intersection_topk"])
def test_what_a_server_has_is_accepted(objective: str) -> None:
    config = with_settings(Config(student="s", teacher=ADDRESS, out="o"), objective=objective)
    assert validate(config) == []
