"""One validation reports every problem of a configuration before anything is loaded."""

import math
import re
from typing import Any

import pytest

from diagnostics.errors import InvalidInput
from opd.config.files import read_config, to_toml
from opd.config.recipes import RECIPES
from opd.config.settings import Config, TaskSettings, with_settings
from opd.training.train import train
from opd.training.validation import validate
from tests.opd.training.checks.test_settings import EFFECTIVE, REFUSED

URL = "http://h:1/v1"
REMOTE: dict[str, Any] = {"teacher": URL, "objective": "teacher_topk"}
GAMES: dict[str, Any] = {"task": "env:household"}


def two_tasks(**changes: Any) -> tuple[TaskSettings, ...]:
    return (
        TaskSettings(name="a", task="lab", **changes),
        TaskSettings(name="b", task="lab", teacher="other"),
    )


ALONE: list[tuple[dict[str, Any], str]] = [
    # values
    ({"student": 3}, "student is 3; it must be text"),
    ({"out": " "}, "out is ' '; it must not be empty"),
    ({"out": ""}, "out is ''; it must not be empty"),
    ({"out": "a\0b"}, "out is .*; it must be text without NUL or half characters"),
    ({"system": "\ud800"}, "system is .*; it must be text without NUL or half characters"),
    ({"mask": ("paper", "id:\0")}, r"mask\[1\] is .*; it must be text without NUL"),
    ({"lr": math.nan}, "lr is nan; it must be a finite number"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; it must be in \[0, 1\)"),
    ({"teacher": "http://me:secret@h:1/v1"}, "the address of h contains a user"),
    ({"tasks": two_tasks(teacher="http://h:1/v1?key=secret")}, "task 'a': the address of h"),
    ({"tasks": two_tasks(max_turns=0)}, "task 'a': max_turns is 0; it must be at least 1"),
    ({"tasks": (TaskSettings(name="", task="lab"),)}, "name is ''; it must not be empty"),
    # combinations
    ({"rollout_servers": (URL,)}, "rollout_servers is .*; it must be addresses if"),
    ({"engine": "servers"}, r"rollout_servers is \(\); it must be addresses if"),
    ({"rollout_lag": 1}, "rollout_lag is 1; it must be 0 unless"),
    ({"teacher_weights": "nf4", "offload_teacher": True}, "teacher_weights is 'nf4'.*offload"),
    (
        {"teacher": "ema", "teacher_weights": "nf4", "reward_weight": 1.0},
        "teacher_weights is 'nf4'.*derived",
    ),
    ({"probe_blocks": ("*norm",)}, r"probe_blocks is .*; it must be \(\) if"),
    ({"updates_per_batch": 3}, "updates_per_batch is 3; it must be a divisor"),
    (
        {"mask_scope": "loss", "objective": "sampled_token", "gamma": 0.5},
        "mask_scope is 'loss'; it must be 'cost'",
    ),
    ({"mask": ("nonsense",)}, "unknown mask rule 'nonsense'"),
    ({"tasks": (*two_tasks()[:1], *two_tasks()[:1])}, "the names of the tasks are"),
    # objective
    ({"objective": "nothing"}, "unknown objective 'nothing'"),
    ({"denominator": "nothing"}, "unknown denominator 'nothing'"),
    ({"objective": "sampled_token", "baseline": "nothing"}, "unknown baseline 'nothing'"),
    ({"objective": "teacher_topk_unnormalised"}, "collapse"),
    (
        {"updates_per_batch": 2, "objective": "sampled_token"},
        "updates_per_batch is 2: from the sec",
    ),
    (
        {
            "engine": "servers",
            "rollout_servers": (URL,),
            "rollout_lag": 1,
            "objective": "sampled_token_weighted",
        },
        "rollout_lag is 1: sampled_token_weighted would",
    ),
    ({"teacher": "ema"}, 'teacher "ema" starts as a copy of the student'),
    # teachers
    ({**REMOTE, "objective": "full_reverse_kl"}, "does not support objective full_reverse_kl"),
    ({**REMOTE, "temperature": 0.5}, "does not support temperature 0.5"),
    ({**REMOTE, "map_eos": True}, f"map_eos needs the EOS ids of the teacher {URL}"),
    ({**REMOTE, "entropy_top_fraction": 0.5}, "does not support entropy_top_fraction"),
    ({**REMOTE, "probe_every": 1}, "does not support probe_every"),
    (
        {**REMOTE, "engine": "servers", "rollout_servers": ("http://g:1/v1", URL + "/")},
        f"teacher {URL} is also one of rollout_servers, which load the student's weights",
    ),
    ({**REMOTE, "teacher_weights": "nf4"}, "teacher_weights is nf4, but no teacher runs in this"),
    (
        {"teacher": "base", "reward_weight": 1.0},
        'teacher "base" is the student without its LoRA adapters, but lora_rank is 0',
    ),
    (
        {"tasks": two_tasks(teacher="ema")},
        "teacher 'ema' is derived from the student and cannot be used beside another",
    ),
    # the teacher's prompts
    ({"teacher_thinking": "perhaps"}, "teacher_thinking is 'perhaps'"),
    (
        {"teacher": "http://h:1/v1", "objective": "teacher_topk", "teacher_template": "own"},
        "teacher_template is own, but the teacher http://h:1/v1 has no chat template",
    ),
    (
        {**GAMES, "layout": "trajectory", "teacher_template": "other.jinja"},
        "teacher_template is other.jinja, but with layout trajectory",
    ),
    (
        {
            "teacher": "none",
            "objective": "reward_only",
            "reward_weight": 1.0,
            "teacher_system": "Know all.",
        },
        "teacher is none, but settings of the teacher's prompts are given",
    ),
    # games
    ({**GAMES, "grader": "exact"}, "remove grader='exact'"),
    ({**GAMES, "eval_task": "aime24"}, "remove eval_task='aime24'"),
    ({**GAMES, "reward_weight": 1.0}, "reward_weight 1.0 compares .* layout to trajectory"),
    (
        {**GAMES, "objective": "sampled_token", "baseline": "leave_one_out"},
        "baseline leave_one_out compares .* layout to trajectory",
    ),
    # tasks and processes
    (
        {"tasks": two_tasks(), "task_order": "mixed", "prompts_per_step": 1},
        "prompts_per_step is 1, but every step mixes 2 tasks",
    ),
    (
        {
            "tasks": two_tasks(weight=3.0),
            "task_order": "mixed",
            "prompts_per_step": 8,
            "updates_per_batch": 4,
        },
        "updates_per_batch is 4, but the tasks have",
    ),
    ({"sharding": "full"}, "sharding full .* needs several processes"),
    *REFUSED,
]


def make_config(**changes: Any) -> Config:
    """A config with models and files that do not exist, so that nothing can be loaded."""
    config = Config(student="absent", teacher="absent-too", out="absent")
    return with_settings(config, **changes)


@pytest.mark.parametrize(("changes", "words"), ALONE)
def test_each_rule_is_broken_alone(changes: dict[str, Any], words: str) -> None:
    problems = validate(make_config(**changes))
    assert len(problems) == 1, problems
    assert re.search(words, problems[0])
    assert "secret" not in problems[0]


def test_problems_of_all_kinds_are_reported_at_once(tmp_path) -> None:
    changes: dict[str, Any] = {
        "lr": -1.0,  # a value
        "teacher": "http://me:secret@h:1/v1",  # an address with a password
        "probe_blocks": ("*",),  # a combination
        "denominator": "nothing",  # the objective
        "prompt_column": "question",  # without effect
        "sharding": "full",  # processes
        "tasks": (
            TaskSettings(name="a", task="lab", max_turns=4),
            TaskSettings(name="b", task="env:household", grader="exact"),
        ),
    }
    expected = (
        "lr is -1.0",
        "the address of h contains",
        "probe_blocks is",
        "unknown denominator",
        "prompt_column is",
        "sharding full",
        "task 'a': max_turns is 4",
        "remove grader='exact'",
    )
    problems = validate(make_config(out=str(tmp_path / "run"), **changes))
    assert len(problems) == len(expected), problems
    for words in expected:
        assert sum(words in problem for problem in problems) == 1, words
    with pytest.raises(InvalidInput, match="8 settings are invalid") as raised:
        train(make_config(out=str(tmp_path / "run"), **changes))
    assert "secret" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, *EFFECTIVE])
def test_what_is_allowed_passes(changes: dict[str, Any]) -> None:
    reward = {"reward_weight": 1.0} if changes.get("teacher") == "ema" else {}
    assert validate(make_config(**changes | reward)) == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name: str, tmp_path) -> None:
    assert validate(RECIPES[name]()) == []
    (tmp_path / "c.toml").write_text(to_toml(RECIPES[name]()))
    assert validate(read_config(tmp_path / "c.toml")) == []


def test_an_invalid_value_hides_no_other_rule_and_causes_none() -> None:
    """The rules see a default in its place, and say nothing about that."""
    assert validate(make_config(engine="none", rollout_servers=(URL,))) == [
        "engine is 'none'; it must be one of hf, vllm, servers",
        f"rollout_servers is ('{URL}',); it must be addresses if engine is servers, otherwise ()",
    ]
    assert validate(make_config(rollout_servers=3, engine="servers")) == [
        "rollout_servers is 3; it must be a list of values, each text"
    ]
