"""`opd paper`: what each cell trains is what its name says, and every cell may be trained."""

from pathlib import Path

import pytest

from opd.paper import GROUPS, METHODS, SHARED, TASKS, TEACHER, settings
from opd.recipes import parse
from opd.tasks import read_tasks, settings_of
from opd.train import make_objective


@pytest.mark.parametrize("method", METHODS)
def test_every_method_may_be_trained_and_is_what_it_is_called(method: str) -> None:
    config = parse(["lab", *SHARED, *METHODS[method], "--seed", "3"])
    make_objective(config)
    assert config.updates == 2
    assert bool(config.mask) == method.removesuffix("_top_p").endswith("_mask")
    local = not method.startswith("sampled")
    assert config.objective.startswith(("teacher_topk", "student_topk") if local else "sampled_")
    whole = method in ("sampled", "sampled_mask", "lsm_whole")
    assert config.top_p == (1.0 if whole else 0.8 if method.endswith("0.8") else 0.9)
    assert config.support_k == {"lsm_k2": 2, "lsm_k4": 4}.get(method, 8)
    assert ("v2" in method or "v4" in method) == config.objective.startswith("student_topk")
    assert config.collapse_accepted == config.objective.endswith(("unnormalised", "published_tail"))


def test_two_tasks_have_a_teacher_each(tmp_path: Path) -> None:
    path = tmp_path / "tasks.toml"
    path.write_text(TASKS.format(lab="place"))
    config = parse(["lab", *SHARED, *METHODS["lsm_mask"], "--tasks", str(path)])
    chain, sort = settings_of(config)
    assert read_tasks(path) == config.tasks
    assert (chain.task, chain.teacher, chain.max_response) == ("lab", "place/teacher", 192)
    assert (sort.task, sort.teacher) == ("place/sort.jsonl", "place/sort-teacher")
    assert chain.mask == sort.mask != ()
    assert config.task_order == "alternate"
    assert set(GROUPS["multi"]) < set(GROUPS["single"])


@pytest.mark.parametrize("method", [*GROUPS["games"], TEACHER])
def test_games_are_one_recipe_but_for_the_method(method: str) -> None:
    lab = Path("place")
    config = parse([str(x) for x in settings("games", 3, method, lab, Path("none"))])
    make_objective(config)
    assert (config.task, config.teacher, config.seed) == ("env:rooms", "place/teacher", 3)
    assert config.student == ("place/teacher" if method == TEACHER else "place/student")
    assert (config.steps == 0) == (method == TEACHER)
    assert config.top_p == (0.9 if method == "lsm" else 1.0)
    assert config.objective == ("sampled_token_clipped" if method == "sampled" else "teacher_topk")
