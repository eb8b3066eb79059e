"""`opd paper`: what each cell trains is what its name says, and every cell may be trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from opd.cli.train import parse
from opd.config.settings import Config
from opd.experiments.paper import GROUPS, METHODS, SHARED, TASKS, TEACHER, settings
from opd.training.multitask import settings_of
from opd.training.setup import make_objective


@pytest.mark.parametrize("method", METHODS)
def test_every_method_may_be_trained_and_is_what_it_is_called(method: str) -> None:
    config = parse(["lab", *SHARED, *METHODS[method], "--seed", "3"])
    make_objective(config)
    assert config.updates_per_batch == 2
    assert bool(config.mask) == method.removesuffix("_top_p").endswith("_mask")
    local = not method.startswith("sampled")
    assert config.objective.startswith(("teacher_topk", "student_topk") if local else "sampled_")
    whole = method in ("sampled", "sampled_mask", "lsm_whole")
    assert config.top_p == (1.0 if whole else 0.8 if method.endswith("0.8") else 0.9)
    assert config.support_k == {"lsm_k2": 2, "lsm_k4": 4}.get(method, 8)
    assert ("v2" in method or "v4" in method) == config.objective.startswith("student_topk")
    assert config.allow_collapse == config.objective.endswith(("unnormalised", "published_tail"))


def cell(group: str, method: str, root: Path) -> Config:
    if group in TASKS:
        (root / f"{group}.toml").write_text(TASKS[group].format(lab="place"))
    found = parse([str(x) for x in settings(group, 3, method, root, Path("place"))])
    make_objective(found)
    assert found.out == str(root / group / f"{method}-3")
    assert found.seed == 3
    return found


def test_two_tasks_have_a_teacher_each(tmp_path: Path) -> None:
    config = cell("multi", "lsm_mask", tmp_path)
    chain, sort = settings_of(config)
    assert (chain.task, chain.teacher, chain.max_response) == ("lab", "place/teacher", 192)
    assert (sort.task, sort.teacher) == ("place/sort.jsonl", "place/sort-teacher")
    assert chain.mask == sort.mask != ()
    assert config.task_order == "alternate"
    assert config.steps == 2 * cell("single", "lsm_mask", tmp_path).steps
    assert set(GROUPS["multi"]) < set(GROUPS["single"])


@pytest.mark.parametrize("method", [*GROUPS["games"], TEACHER])
def test_games_are_one_recipe_but_for_the_method(method: str, tmp_path: Path) -> None:
    config = cell("games", method, tmp_path)
    assert (config.task, config.teacher) == ("env:household", "place/teacher")
    assert config.student == ("place/teacher" if method == TEACHER else "place/student")
    assert (config.steps == 0) == (method == TEACHER)
    assert config.top_p == (0.9 if method == "lsm" else 1.0)
    assert config.objective == ("sampled_token_clipped" if method == "sampled" else "teacher_topk")


def test_an_agent_has_a_teacher_of_games_and_one_of_problems(tmp_path: Path) -> None:
    config = cell("agents", "lsm", tmp_path)
    games, problems = settings_of(config)
    alone = cell("games", "lsm", tmp_path)
    twice = {"steps": 2 * alone.steps, "eval_every": alone.steps, "save_every": alone.steps}
    assert games == replace(alone, out=config.out, **twice)
    assert (problems.task, problems.teacher) == ("place/sort.jsonl", "place/sort-teacher")
    assert config.task_order == "alternate"
