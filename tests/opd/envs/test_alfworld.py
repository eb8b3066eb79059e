"""ALFWorld's engine on drawn households; needs the extra alfworld."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd.envs.alfworld import Alfworld
from opd.envs.alfworld_games import TASKS, goal_of, household
from opd.envs.base import Observation
from opd.envs.task import load_games
from tests.opd.envs.test_rollout import Script, played, rows, settings
from tests.opd.envs.test_rollout import train as train_run

pytestmark = pytest.mark.alfworld


def seed_of(task: str) -> int:
    return next(seed for seed in range(200) if household(seed).task == task)


@pytest.mark.parametrize("task", TASKS)
def test_the_planner_wins_every_kind_of_task(task: str) -> None:
    env = Alfworld(planned=True)
    seed = seed_of(task)
    scene = env.begin(seed)
    assert scene.goal == f"{goal_of(household(seed))}."
    assert scene.text.startswith("You are in the middle of a room.")
    assert "task" not in scene.text
    for _ in range(30):
        assert not scene.won
        action = env.expert()
        assert action in scene.actions
        scene = env.act(action)
        if scene.over:
            break
    assert scene.won
    env.close()


def wandering(envs: list[Alfworld], seeds: list[int]) -> list[list[Observation]]:
    """The same choices in several games, a turn in each by turns."""
    seen = [[env.begin(seed)] for env, seed in zip(envs, seeds, strict=True)]
    for turn in range(4):
        for env, scenes in zip(envs, seen, strict=True):
            actions = scenes[-1].actions
            scenes.append(env.act(actions[(7 * turn + 3) % len(actions)]))
    return seen


def test_games_side_by_side_do_not_disturb_each_other() -> None:
    seeds = [0, 2, 7]
    together = [Alfworld() for _ in seeds]
    found = wandering(together, seeds)
    for env in together:
        env.close()
    again = Alfworld()
    assert any(again.env is env.env for env in together), "closed engines are used again"
    assert found == [wandering([again], [seed])[0] for seed in seeds]
    with pytest.raises(ValueError, match="no plan is made"):
        again.expert()
    again.close()


def test_wanted_things_are_not_where_they_shall_be() -> None:
    from alfworld.gen.constants import VAL_RECEPTACLE_OBJECTS

    for seed in range(200):
        home = household(seed)
        assert home == household(seed)
        kinds = [kind for _, kind in home.receptacles]
        wanted = [kinds[at] for _, kind, at in home.things if kind == home.wanted]
        assert len(wanted) == (2 if "two" in home.task else 1)
        assert home.target not in wanted
        assert (home.target == "") == ("light" in home.task)
        for _, kind, at in home.things:
            assert kind == "DeskLamp" or kind in VAL_RECEPTACLE_OBJECTS[kinds[at]]
        assert len({name for name, *_ in home.things}) == len(home.things)


def test_a_student_plays_it(tiny_pair, tmp_path: Path) -> None:
    made: list[Any] = []

    def make() -> Alfworld:
        made.append(Alfworld(planned=True))
        return made[-1]

    games = load_games("env:alfworld", 0)
    seed = seed_of("look_at_obj_in_light")
    [episode] = played(
        Script(lambda row, call: made[0].expert()), replace(games, make=make), [seed]
    )
    assert episode.outcome == "won"
    config = settings(
        tiny_pair,
        tmp_path / "run",
        task="env:alfworld",
        max_turns=2,
        max_prompt=2048,
        steps=1,
        prompts_per_step=2,
        eval_every=0,
        eval_problems=1,
    )
    [row] = rows(train_run(config))
    assert row["episodes/turns"] == 2
    assert row["episodes/failed_share"] == 0
