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
    served = {Capability.TOP_K, Capability.CHOSEN_IDS}
    assert kind.possible_capabilities == (served if kind is ServerTeacher else set(Capability))


SERVER_LACKS = {
    "full": ({"objective": "full_reverse_kl"}, "full distribution"),
    "baseline": ({"objective": "sampled_token", "baseline": "local_kl"}, "full distribution"),
    "temperature": ({"temperature": 0.7}, "temperature 0.7"),
    "map_eos": ({"map_eos": True}, "set teacher_eos to them, or map_eos off"),
    "entropy": ({"entropy_top_fraction": 0.5}, "entropy_top_fraction 1"),
    "probe": ({"probe_every": 5}, "probe_every 0"),
}


@pytest.mark.parametrize(("changes", "message"), SERVER_LACKS.values(), ids=SERVER_LACKS)
def test_what_a_server_lacks_is_refused_without_asking_it(changes: dict, message: str) -> None:
    for teacher in (ADDRESS, "models/teacher"):
        config = with_settings(Config(student="s", teacher=teacher, out="o"), **changes)
        problems = "\n".join(validate(config))
        assert bool(re.search(message, problems)) == (teacher == ADDRESS), problems


@pytest.mark.parametrize(
    "changes",
    [
        *({"objective": name} for name in ("teacher_topk", "sampled_token", "intersection_topk")),
        # known when the server is connected
        *({"objective": name} for name in ("student_topk", "union_topk")),
        {"map_eos": True, "teacher_eos": (1, 0)},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_what_a_server_may_have_is_accepted(changes: dict) -> None:
    config = with_settings(Config(student="s", teacher=ADDRESS, out="o"), **changes)
    assert validate(config) == []


def test_the_eos_of_a_teacher_is_a_setting_of_servers_only() -> None:
    config = with_settings(Config(student="s", teacher="t", out="o"), teacher_eos=(1,))
    (problem,) = validate(config)
    assert "teacher_eos" in problem
    assert "the teacher is on a server and map_eos is set" in problem
