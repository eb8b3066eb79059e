"""ALFWorld's engine on generated households; needs the extra alfworld."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd.envs.alfworld import Alfworld
from opd.envs.alfworld_games import TASKS, draw_household, goal_text
from opd.envs.base import Observation
from opd.envs.task import load_games
from opd.training.train import train as train_run
from tests.helpers.games import Script, play_games
from tests.helpers.runs import rows, settings

pytestmark = pytest.mark.alfworld


def seed_of(task: str) -> int:
    return next(seed for seed in range(200) if draw_household(seed).task == task)


@pytest.mark.parametrize("task", TASKS)
def test_the_planner_wins_every_kind_of_task(task: str) -> None:
    env = Alfworld(planned=True)
    seed = seed_of(task)
    observation = env.begin(seed)
    assert observation.goal == f"{goal_text(draw_household(seed))}."
    assert observation.text.startswith("You are in the middle of a room.")
    assert "task" not in observation.text
    for _ in range(30):
        assert not observation.won
        action = env.expert()
        assert action in observation.actions
        observation = env.act(action)
        if observation.over:
            break
    assert observation.won
    env.close()


def play_fixed_choices(envs: list[Alfworld], seeds: list[int]) -> list[list[Observation]]:
    """Play several games with fixed choices, one turn in each at a time."""
    observations = [[env.begin(seed)] for env, seed in zip(envs, seeds, strict=True)]
    for turn in range(4):
        for env, episode in zip(envs, observations, strict=True):
            actions = episode[-1].actions
            episode.append(env.act(actions[(7 * turn + 3) % len(actions)]))
    return observations


def test_games_side_by_side_do_not_disturb_each_other() -> None:
    seeds = [0, 2, 7]
    together = [Alfworld() for _ in seeds]
    together_observations = play_fixed_choices(together, seeds)
    for env in together:
        env.close()
    reused = Alfworld()
    assert any(reused.env is env.env for env in together), "closed engines are not reused"
    assert together_observations == [play_fixed_choices([reused], [seed])[0] for seed in seeds]
    with pytest.raises(ValueError, match="no plan was computed"):
        reused.expert()
    reused.close()


def test_wanted_things_are_not_where_they_shall_be() -> None:
    from alfworld.gen.constants import VAL_RECEPTACLE_OBJECTS

    for seed in range(200):
        home = draw_household(seed)
        assert home == draw_household(seed)
        kinds = [kind for _, kind in home.receptacles]
        goal_places = [kinds[place] for _, kind, place in home.things if kind == home.goal_type]
        assert len(goal_places) == (2 if "two" in home.task else 1)
        assert home.target not in goal_places
        assert (home.target == "") == ("light" in home.task)
        for _, kind, place in home.things:
            assert kind == "DeskLamp" or kind in VAL_RECEPTACLE_OBJECTS[kinds[place]]
        assert len({name for name, *_ in home.things}) == len(home.things)


def test_a_student_plays_it(tiny_pair, tmp_path: Path) -> None:
    environments: list[Any] = []

    def make() -> Alfworld:
        environments.append(Alfworld(planned=True))
        return environments[-1]

    games = load_games("env:alfworld", 0)
    seed = seed_of("look_at_obj_in_light")
    [episode] = play_games(
        Script(lambda row, call: environments[0].expert()), replace(games, make=make), [seed]
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
    [row] = rows(train_run(config).folder)
    assert row["episodes/turns"] == 2
    assert row["episodes/failed_share"] == 0
