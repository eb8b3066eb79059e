"""Text environments: the household's rules, Gymnasium's interface, sources, actions in text."""

import random
from collections import deque
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import pytest

from opd.environments.foreign import Gymnasium
from opd.environments.rooms import OPEN, SHUT, THINGS, Rooms
from opd.environments.scene import Scene
from opd.games import action_of, load_games, now, told


def begun(seed: int) -> tuple[Rooms, Scene]:
    rooms = Rooms()
    return rooms, rooms.begin(seed)


def state(rooms: Rooms) -> tuple[object, ...]:
    return rooms.at, rooms.held, frozenset(rooms.shut), frozenset(rooms.where.items())


def experts_way(seed: int) -> int:
    rooms, scene = begun(seed)
    for length in range(20):
        if scene.over:
            return length
        action = rooms.expert()
        assert action in scene.actions
        scene = rooms.act(action)
    raise AssertionError(f"seed {seed} is not solved")


def test_every_household_is_solved_by_its_expert() -> None:
    lengths = [experts_way(seed) for seed in range(300)]
    assert min(lengths) == 4, "go, take, go, put at least: nothing lies where it is wanted"
    assert max(lengths) <= 12


def test_the_expert_goes_a_shortest_way() -> None:
    checked = 0
    for seed in range(200):
        length = experts_way(seed)
        if length > 6:
            continue
        rooms, scene = begun(seed)
        seen, queue = {state(rooms)}, deque([(rooms, scene, 0)])
        while queue:
            rooms, scene, steps = queue.popleft()
            if scene.over:
                assert steps == length, f"seed {seed}"
                break
            for action in scene.actions:
                after = deepcopy(rooms)
                next_scene = after.act(action)
                if state(after) not in seen:
                    seen.add(state(after))
                    queue.append((after, next_scene, steps + 1))
        checked += 1
        if checked == 12:
            return
    raise AssertionError(f"{checked} short games only")


def test_rules_hold_in_random_play() -> None:
    generator = random.Random(0)
    won = 0
    for seed in range(150):
        rooms, scene = begun(seed)
        assert scene.goal.startswith("put the ")
        for _ in range(30):
            if scene.over:
                break
            action = generator.choice(scene.actions)
            before = state(rooms)
            assert rooms.act("sing a song").text == "Nothing happens."
            assert state(rooms) == before
            scene = rooms.act(action)
            things = [*rooms.where, *filter(None, [rooms.held])]
            assert len(things) == len(set(things)) >= 3
            at_target = [thing for thing, place in rooms.where.items() if place == rooms.target]
            assert scene.won == scene.over == (set(rooms.wanted) <= set(at_target))
            here = {t for t, place in rooms.where.items() if place == rooms.at}
            visible = set() if rooms.at in rooms.shut else here
            named = {thing for thing in THINGS if thing in scene.text.replace(".", "").split()}
            acted_on = {thing for thing in THINGS if thing in action.split()}
            assert named <= visible | acted_on, "what lies elsewhere, or is shut in, is not seen"
            takes = {a.split()[1] for a in scene.actions if a.startswith("take")}
            assert takes == (set() if rooms.held else visible)
            assert set(rooms.places) <= {*SHUT, *OPEN}
        won += scene.won
    assert 0 < won < 150


def test_a_seed_is_a_game_and_held_out_games_are_not_trained_on() -> None:
    def content(seed: int) -> tuple[object, ...]:
        rooms, scene = begun(seed)
        return scene, tuple(sorted(rooms.where.items())), tuple(rooms.places)

    assert content(7) == content(7)
    games = load_games("env:rooms", seed=3)
    trained = {seed for step in range(200) for seed in games.train(step, 16)}
    held = games.test(500)
    assert len(trained) == 3200
    assert {seed % 2 for seed in trained} == {1}
    assert {seed % 2 for seed in held} == {0}
    assert not {content(seed) for seed in trained} & {content(seed) for seed in held}
    assert games.train(4, 3) == load_games("env:rooms", seed=3).train(4, 3)
    assert games.train(4, 3) != load_games("env:rooms", seed=4).train(4, 3)


class Lift:
    """A lift with Gymnasium's interface: from a floor of the seed's to the third one."""

    closed = False

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        self.floor, self.taken = (seed or 0) % 3, 0
        return self.told(), {"admissible_commands": self.commands(), "goal": "go to floor 3"}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.floor += {"up": 1, "down": -1}[action]
        self.taken += 1
        there = self.floor in (-1, 3)
        info = {"admissible_commands": self.commands()}
        return self.told(), float(self.floor > 1), there, self.taken >= 5, info

    def told(self) -> Any:
        return f"Floor {self.floor}."

    def commands(self) -> list[str]:
        return ["up", "down"] if self.floor else ["up"]

    def close(self) -> None:
        self.closed = True


class Numbered(Lift):
    """The same with numbers for actions and observations, and an info that says who won."""

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # type: ignore[override]
        observation, reward, terminated, truncated, info = super().step(["up", "down"][action])
        return observation, reward, terminated, truncated, info | {"won": self.taken < 3}

    def told(self) -> Any:
        return self.floor


def test_an_environment_with_gymnasiums_interface_is_played() -> None:
    lift = Gymnasium(Lift())
    assert lift.begin(2) == Scene("Floor 2.", goal="go to floor 3", actions=("up", "down"))
    assert lift.act("down") == Scene("Floor 1.", actions=("up", "down"))
    assert lift.act("up") == Scene("Floor 2.", actions=("up", "down"))
    assert lift.act("up") == Scene("Floor 3.", actions=("up", "down"), over=True, won=True)
    assert lift.begin(0).actions == ("up",)
    for action in ("up", "down", "up", "down"):
        assert not lift.act(action).over
    assert lift.act("up") == Scene("Floor 1.", actions=("up", "down"), over=True, won=False)
    for seed, actions, ending in (
        (0, ["down"], "fallen below, which ends it without a reward"),
        (1, ["up", "down", "up", "down", "up"], "rewarded on floor 2, but cut there"),
    ):
        lift.begin(seed)
        last = [lift.act(action) for action in actions][-1]
        assert (last.over, last.won) == (True, False), ending
    lift.close()
    assert lift.env.closed


def test_numbered_actions_and_observations_get_words() -> None:
    with pytest.raises(TypeError, match="the observation is a int, not text"):
        Gymnasium(Numbered()).begin(1)
    lift = Gymnasium(
        Numbered(), text=lambda floor, info: f"It is {floor}.", goal="3", names=("up", "down")
    )
    assert lift.begin(1) == Scene("It is 1.", goal="3", actions=("up", "down"))
    assert lift.act("up").text == "It is 2."
    assert lift.act("down").text == "It is 1."
    assert lift.act("up").text == "It is 2."
    end = lift.act("up")
    assert (end.over, end.won) == (True, False), "info says lost, whatever the reward is"
    with pytest.raises(ValueError, match="'jump' is no action; they are up, down"):
        lift.act("jump")


@pytest.mark.parametrize(
    ("response", "action", "admitted"),
    [
        ("go to shelf", "go to shelf", True),
        ("  Go  to SHELF \n", "go to shelf", True),
        ("<think>open fridge</think>go to shelf", "go to shelf", True),
        ("I will look.\n\ngo to shelf\n\n", "go to shelf", True),
        ("<action>go to shelf</action> and more", "go to shelf", True),
        ("<action>open fridge</action><action> go to\nshelf </action>", "go to shelf", True),
        ("<think><action>go to shelf</action></think>open fridge", "open fridge", True),
        ("go to shelf.", "go to shelf.", False),
        ("fly", "fly", False),
        ("", "", False),
        ("<think>go to shelf", "<think>go to shelf", False),
    ],
)
def test_an_action_is_read_from_a_response(response: str, action: str, admitted: bool) -> None:
    scene = Scene("A room.", actions=("go to shelf", "open fridge"))
    assert action_of(response, scene) == (action, admitted)


def test_any_text_is_an_action_where_none_are_listed() -> None:
    assert action_of(" say  Hello\n", Scene("x")) == ("say Hello", True)
    assert action_of(" \n ", Scene("x")) == ("", False)


def test_a_prompt_tells_goal_history_scene_and_actions() -> None:
    scene = Scene("You see 3.", actions=("left", "right"))
    past = (("You see 1.", "right"), ("You see 2.", "left"), ("You see 1.", "right"))
    assert now(scene) == "You see 3.\nActions: left, right"
    assert told("reach 5.", past, scene, 2) == (
        "Task: reach 5.\n2. You see 2.\n> left\n3. You see 1.\n> right\n"
        "You see 3.\nActions: left, right"
    )
    assert told("", past, Scene("End."), 0) == "End."
    assert told("", past, Scene("End."), 9).startswith("1. You see 1.\n> right\n2. ")


@pytest.mark.parametrize(
    ("source", "settings", "wrong"),
    [
        ("env:castle", {}, "unknown environment 'castle'; known: env:rooms, env:alf"),
        ("env:no.such.module:make", {}, "No module named 'no'"),
        ("env:tests.test_environments:nothing", {}, "no function 'nothing'"),
        ("env:rooms", {"layout": "both"}, "layout is 'both'; it must be one of turns, trajectory"),
        ("env:rooms", {"max_turns": 0}, "max_turns is 0"),
    ],
)
def test_bad_sources_are_refused(source: str, settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        load_games(source, 0, **settings)


@pytest.mark.skipif(find_spec("alfworld") is not None, reason="alfworld is installed")
def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(ImportError, match=r"needs alfworld, .*pip install 'opdlab\[alfworld\]'"):
        load_games("env:alfworld", 0)
