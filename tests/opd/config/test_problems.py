"""Settings with wrong types or out of range are rejected, all in one error."""

import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from diagnostics.errors import InvalidInput
from opd.config.field_checks import annotations
from opd.config.files import read_config, read_tasks, to_flat
from opd.config.problems import check_settings
from opd.config.settings import Config, TaskSettings, setting_fields, setting_values, with_settings

SETTINGS = {name: annotations(x.owner)[name] for name, x in setting_fields().items()}
NUMBERS = [name for name, kind in SETTINGS.items() if {int, float} & {kind, *typing.get_args(kind)}]
EXAMPLES = {"betas": [0.5, 0.5], "ppo_clip": [0.2, 0.2, 3.0], "teacher_eos": [2]}
"""Valid values of settings that are several numbers."""
OUTSIDE = {
    "at least 1": (0, -1),
    "not negative": (-1,),
    "positive": (0, -0.5),
    "in [0, 1]": (-0.1, 1.1),
    "in (0, 1]": (0, 1.1),
    "in [0, 1)": (-0.1, 1),
    "above 1": (1, 0.5),
}


def make_config(**changes: Any) -> Config:
    """A configuration whose values have been checked."""
    return check_settings(with_settings(Config(student="s", teacher="t", out="o"), **changes))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_refuses_values_of_other_types(name: str) -> None:
    default = setting_values(make_config())[name]
    wrong_values: list[Any] = [{"a": 1}, b"x"]
    if not isinstance(default, bool):
        wrong_values += [True, False]
    if not isinstance(default, str):
        wrong_values.append("a word")
    if isinstance(default, str | bool):
        wrong_values += [1, 1.5]
    if isinstance(default, tuple):
        wrong_values += [(None,), (object(),), [default], 3]
    if default is not None:
        wrong_values.append(None)
    if isinstance(default, int) and not isinstance(default, bool):
        wrong_values += [1.5, 1.0]
    if name in NUMBERS and not isinstance(default, int):
        wrong_values += [math.nan, math.inf, -math.inf]
    for value in wrong_values:
        with pytest.raises(InvalidInput, match=rf"\b{name} is .*; it must be "):
            make_config(**{name: value})


def test_every_number_has_a_range_and_keeps_to_it() -> None:
    ranges = {name: x.rules.within for name, x in setting_fields().items() if x.rules.within}
    assert set(NUMBERS) | {"betas", "ppo_clip"} == ranges.keys()
    for name, within in ranges.items():
        examples = EXAMPLES.get(name, [1])
        words_by_index = [within] * len(examples) if isinstance(within, str) else within
        for i, words in enumerate(words_by_index):
            for value in OUTSIDE[words]:
                parts = [*examples[:i], value, *examples[i + 1 :]]
                with pytest.raises(InvalidInput) as raised:
                    make_config(**{name: tuple(parts) if name in EXAMPLES else value})
                assert f" is {value}; it must be {words}" in str(raised.value), name
    for value in OUTSIDE["positive"]:
        with pytest.raises(InvalidInput, match=f"weight is {value}; it must be positive"):
            make_config(tasks=(TaskSettings(name="a", task="b", weight=value),))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_response": 1.5}, "max_response is 1.5; it must be an integer"),
        ({"betas": [2, 3]}, "betas is [2, 3]; it must be a list of 2, each a number"),
        ({"lr": 10**400}, "lr is 1000"),
        ({"layout": "both"}, "layout is 'both'; it must be one of turns, trajectory"),
        ({"dtype": "half"}, "dtype is 'half'; it must be one of float32, bfloat16"),
        ({"mask": ("paper", "x")}, "unknown mask rule 'x'"),
        ({"ppo_clip": (0.2, 0.2)}, "ppo_clip is (0.2, 0.2); it must be a list of 3, each a number"),
        ({"tasks": ("math",)}, "tasks is ('math',); it must be a list of values, each a Task"),
    ],
)
def test_a_wrong_setting_is_told_with_what_is_expected(changes: dict, words: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        make_config(**changes)
    assert str(raised.value).startswith(words)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(InvalidInput) as raised:
        make_config(lr=math.nan, steps=-1, gamma=True, betas=(0.9, 1.0))
    text = str(raised.value)
    assert text.startswith("4 settings are invalid: ")
    for words in ("lr is nan", "steps is -1", "gamma is True", "betas[1] is 1.0"):
        assert words in text
    with pytest.raises(
        InvalidInput, match=r"2 settings are invalid: .*rollout_lag is 1.*updates_per_batch is 3"
    ):
        make_config(rollout_lag=1, updates_per_batch=3)


def test_whole_numbers_are_numbers_and_settings_survive_the_disk(tmp_path: Path) -> None:
    task = TaskSettings(name="a", task="b", mask=("role:eos",))
    config = make_config(
        lr=1, betas=(0, 0.5), ppo_clip=(0.2, 0.3, 3), tasks=(task,), mask=("paper",)
    )
    (tmp_path / "config.json").write_text(json.dumps(to_flat(config)))
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"student": "s", "teacher": "t"}', "the field 'out' (text) is missing"),
        ('{"student": 3, "teacher": "t", "out": "o"}', "field student: 3 is not text"),
        ('{"student": "s", "teacher": "t", "out": "o", "lr": NaN}', "lr is nan; it must be a fin"),
        ('{"student": "s", "teacher": "t", "out": "o", "lr": 1e400}', "lr is inf; it must be a f"),
        (
            '{"student": "s", "teacher": "t", "out": "o", "lr": 1, "lr": 2}',
            "has the duplicate field 'lr'",
        ),
        ('{"student": "s", "teacher": "t", "out": "o", "steps": "4"}', "steps is '4'; it must be"),
        ('{"student": "s", "teacher": "t", "out": "o", "tasks": {"a": 1}}', "it must be a list of"),
        ('{"student": "s", "teacher": "t", "out": "o", "tasks": [1]}', "a task is 1; it must be"),
        ('{"student": "s"', "is not JSON"),
        ("[1, 2]", r"holds [1, 2], expected a JSON object"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"student": ' + "9" * 5000 + "}", "is not JSON"),
        ("\udcff", "is not UTF-8 text: byte 0xff at offset 0"),
    ],
)
def test_a_config_file_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidInput) as raised:
        read_config(path)
    assert str(raised.value).startswith(str(path))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks = 3", "must contain [[tasks]] tables only"),
        ("tasks = [3]", "a task is 3; it must be a table of settings, [[tasks]]"),
        ('[[tasks]]\nname = "a"\ntask = "b"\nweight = "2"', "task 'a': weight is '2'; it must be"),
        ('[[tasks]]\nname = "a"\ntask = "b"\nweight = inf', "weight is inf; it must be a finite"),
        (
            '[[tasks]]\nname = 1\ntask = "b"\nmax_turns = true',
            "2 settings are invalid: task 1: name",
        ),
        ('[[tasks]]\nname = "a"\ntask = "b"\nlayout = "c"', "layout is 'c'; it must be one of tu"),
        ('[[tasks]]\nname = "a"\ntask = "b"\nmask = "paper"', "mask is 'paper'; it must be a list"),
        ("[[tasks", "is not valid TOML"),
        ("\udcff", "is not UTF-8 text"),
    ],
)
def test_a_file_of_tasks_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tasks.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidInput) as raised:
        read_tasks(path)
    assert str(raised.value).startswith(str(path))
    assert words in str(raised.value)
