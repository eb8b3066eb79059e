"""`opd paper`: the settings of every cell match its name."""

from pathlib import Path

import pytest

from opd.cli.train import parse_arguments
from opd.config.settings import Config, with_settings
from opd.experiments.paper import (
    GROUPS,
    METHODS,
    SHARED_SETTINGS,
    TASK_FILES,
    TEACHER,
    cell_arguments,
)
from opd.training.multitask import task_configs
from opd.training.validation import validate


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_settings_of_its_name(method: str) -> None:
    config = parse_arguments(["lab", *SHARED_SETTINGS, *METHODS[method], "--seed", "3"]).settings
    assert validate(config) == []
    assert config.optimizer.updates_per_batch == 2
    assert bool(config.objective.mask) == method.removesuffix("_top_p").endswith("_mask")
    is_top_k = not method.startswith("sampled")
    assert config.objective.objective.startswith(
        ("teacher_topk", "student_topk") if is_top_k else "sampled_"
    )
    samples_full_softmax = method in ("sampled", "sampled_mask", "lsm_whole")
    assert config.rollout.top_p == (
        1.0 if samples_full_softmax else 0.8 if method.endswith("0.8") else 0.9
    )
    assert config.objective.support_k == {"lsm_k2": 2, "lsm_k4": 4}.get(method, 8)
    assert ("v2" in method or "v4" in method) == config.objective.objective.startswith(
        "student_topk"
    )
    assert config.objective.allow_collapse == config.objective.objective.endswith(
        ("unnormalised", "published_tail")
    )


def cell_config(group: str, method: str, root: Path) -> Config:
    if group in TASK_FILES:
        (root / f"{group}.toml").write_text(TASK_FILES[group].format(lab="place"))
    config = parse_arguments(
        [str(x) for x in cell_arguments(group, 3, method, root, Path("place"))]
    ).settings
    assert validate(config) == []
    assert config.out == str(root / group / f"{method}-3")
    assert config.seed == 3
    return config


def test_two_tasks_have_a_teacher_each(tmp_path: Path) -> None:
    config = cell_config("multi", "lsm_mask", tmp_path)
    chain, sort = task_configs(config)
    assert (chain.data.task, chain.teacher, chain.rollout.max_response) == (
        "lab",
        "place/teacher",
        192,
    )
    assert (sort.data.task, sort.teacher) == ("place/sort.jsonl", "place/sort-teacher")
    assert chain.objective.mask == sort.objective.mask != ()
    assert config.data.task_order == "alternate"
    assert config.steps == 2 * cell_config("single", "lsm_mask", tmp_path).steps
    assert set(GROUPS["multi"]) < set(GROUPS["single"])


@pytest.mark.parametrize("method", [*GROUPS["games"], TEACHER])
def test_games_differ_only_in_the_method(method: str, tmp_path: Path) -> None:
    config = cell_config("games", method, tmp_path)
    assert (config.data.task, config.teacher) == ("env:household", "place/teacher")
    assert config.student == ("place/teacher" if method == TEACHER else "place/student")
    assert (config.steps == 0) == (method == TEACHER)
    assert config.rollout.top_p == (0.9 if method == "lsm" else 1.0)
    assert config.objective.objective == (
        "sampled_token_clipped" if method == "sampled" else "teacher_topk"
    )


def test_agents_have_a_teacher_per_task(tmp_path: Path) -> None:
    config = cell_config("agents", "lsm", tmp_path)
    games, problems = task_configs(config)
    games_only = cell_config("games", "lsm", tmp_path)
    doubled_steps = {
        "steps": 2 * games_only.steps,
        "eval_every": games_only.steps,
        "save_every": games_only.steps,
    }
    assert games == with_settings(games_only, out=config.out, **doubled_steps)
    assert (problems.data.task, problems.teacher) == ("place/sort.jsonl", "place/sort-teacher")
    assert config.data.task_order == "alternate"
