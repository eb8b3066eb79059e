"""Text environments: the household's rules, Gymnasium's interface, sources, actions in text."""

import random
import re
import sys
from collections import deque
from copy import deepcopy
from typing import Any

import pytest

from opd.envs.base import Observation
from opd.envs.gymnasium_wrapper import Gymnasium
from opd.envs.household import OPEN, SHUT, THINGS, Household
from opd.envs.task import action_of, load_games, now, told
from opd.lab import household_demos


def begun(seed: int) -> tuple[Household, Observation]:
    rooms = Household()
    return rooms, rooms.begin(seed)


def state(rooms: Household) -> tuple[object, ...]:
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
            words = re.findall(r"\w+", scene.text)
            named = {thing for thing in words if thing.lower() in THINGS}
            acted_on = {thing for thing in action.split() if thing.lower() in THINGS}
            assert named <= visible | acted_on, "what lies elsewhere, or is shut in, is not seen"
            takes = {a.split()[1] for a in scene.actions if a.startswith("take")}
            assert takes == (set() if rooms.held else visible)
            assert {place.lower() for place in rooms.places} <= {*SHUT, *OPEN}
            loud = {word for word in {*words, *action.split()} if word.isupper()}
            assert loud <= {*rooms.wanted, rooms.target}, "capitals are for what the goal names"
        won += scene.won
    assert 0 < won < 150


def test_a_seed_is_a_game_and_held_out_games_are_not_trained_on() -> None:
    def content(seed: int) -> tuple[object, ...]:
        rooms, scene = begun(seed)
        return scene, tuple(sorted(rooms.where.items())), tuple(rooms.places)

    assert content(7) == content(7)
    games = load_games("env:household", seed=3)
    trained = {seed for step in range(200) for seed in games.train(step, 16)}
    held = games.test(500)
    assert len(trained) == 3200
    assert {seed % 2 for seed in trained} == {1}
    assert {seed % 2 for seed in held} == {0}
    assert not {content(seed) for seed in trained} & {content(seed) for seed in held}
    assert games.train(4, 3) == load_games("env:household", seed=3).train(4, 3)
    assert games.train(4, 3) != load_games("env:household", seed=4).train(4, 3)


def won_by(rate: float, count: int = 150) -> tuple[float, list[int]]:
    """Share of held-out games won in MAX_TURNS by a player of that carelessness, and lengths."""
    generator, won, lengths = random.Random(0), 0, []
    for seed in range(0, 2 * count, 2):
        rooms, scene = begun(seed)
        goal, past = scene.goal, list[tuple[str, str]]()
        while not scene.over and len(past) < household_demos.MAX_TURNS:
            prompt = told(goal, tuple(past), scene, household_demos.HISTORY)
            action, admitted = action_of(household_demos.careless(prompt, rate, generator), scene)
            assert admitted
            past.append((scene.text, action))
            scene = rooms.act(action)
        won += scene.won
        lengths.append(len(past))
        assert not scene.won or len(past) >= experts_way(seed), "who knows all is never slower"
    return won / count, lengths


def test_a_player_who_knows_its_prompts_only_wins_and_a_careless_one_seldom() -> None:
    share, lengths = won_by(0.0)
    assert share > 0.95
    assert sum(lengths) / len(lengths) < 10
    assert 0.2 < won_by(0.25)[0] < 0.5


JUDGED = [
    # bring what is wanted: open the target, put it there; else go there
    ("put CUP in bed, go to BOX", "", "hold CUP, put CUP in bed no, go to BOX yes"),
    ("put CUP in BOX, go to bed", "", "hold CUP, put CUP in BOX yes"),
    ("open BOX, go to bed", "take CUP from bed", "hold CUP, open BOX yes"),
    ("open oven, go to BOX", "take CUP from bed", "hold CUP, open oven no, go to BOX yes"),
    # put down what is not wanted, not in the target; take what is, but not out of the target
    ("put pen in bed, go to BOX", "", "hold pen, put pen in bed yes"),
    ("put pen in BOX, go to bed", "", "hold pen, put pen in BOX no, go to bed yes"),
    (
        "take pen from bed, take CUP from bed, go to BOX",
        "put CUP in bed",
        "hold nothing, take pen from bed no, take CUP from bed yes",
    ),
    ("take CUP from BOX, go to bed", "", "hold nothing, take CUP from BOX no, go to bed yes"),
    ("open BOX, go to bed", "put CUP in bed", "hold nothing, open BOX no, go to bed yes"),
]


@pytest.mark.parametrize(("actions", "done", "thought"), JUDGED)
def test_a_player_says_what_it_does(actions: str, done: str, thought: str) -> None:
    scene = Observation("You see.", actions=tuple(actions.split(", ")))
    past = (("You see a bed.", done),) if done else ()
    prompt = told("put the CUP and the MUG in the BOX.", past, scene, household_demos.HISTORY)
    action = thought.rsplit(", ", 1)[1].removesuffix(" yes")
    said = household_demos.careless(prompt, 0.0, random.Random(0))
    assert said == f"<think>{thought}</think>{action}"


def test_a_player_does_not_go_back_and_misjudges_at_its_rate() -> None:
    scene = Observation(
        "Here.", actions=tuple(f"go to {x}" for x in ("bed", "BOX", "desk", "sink"))
    )
    past = (("", "go to bed"), ("", "go to shelf"))
    prompt, generator = told("put the CUP in the BOX.", past, scene, 2), random.Random(0)
    taken = [
        household_demos.careless(prompt, 0.0, generator).split("</think>")[1] for _ in range(400)
    ]
    assert set(taken) == {"go to desk", "go to sink"}
    assert abs(taken.count("go to desk") - 200) < 50
    scene = Observation("", actions=("put CUP in SINK", "go to bed"))
    sure = told("put the CUP in the SINK.", (), scene, 2)
    said = [household_demos.careless(sure, 0.2, generator) for _ in range(2000)]
    assert abs(sum("SINK no" in x for x in said) - 400) < 90
    misled = [x for x in said if "SINK no" in x]
    assert {x.split("</think>")[1] for x in misled} == {"go to bed"}
    share = sum("bed yes" in x for x in misled) / len(misled)
    assert abs(share - 0.2) < 0.09, "who approves of none takes the last one"


def test_turns_of_games_are_problems_for_the_lab() -> None:
    some = household_demos.problems("train", 200, 4)
    assert (
        some
        == household_demos.problems("train", 200, 4)
        != household_demos.problems("train", 200, 5)
    )
    mistaken = 0
    for problem in some:
        listed = problem.prompt.rsplit("Actions: ", 1)[1].split(", ")
        assert problem.answer in listed
        assert problem.solution.endswith(f"{problem.answer} yes</think>{problem.answer}")
        mistaken += "Nothing happens." in problem.prompt
    assert 5 < mistaken < 80, "inadmissible actions are met too"
    with pytest.raises(ValueError, match="split is 'dev'"):
        household_demos.problems("dev", 1, 0)


def test_the_labs_games_are_not_those_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {"train": set(), "test": set()}
    begin = Household.begin

    def noted(rooms: Household, seed: int) -> Observation:
        seen[split].add(seed)
        return begin(rooms, seed)

    monkeypatch.setattr(Household, "begin", noted)
    for split in seen:
        household_demos.problems(split, 50, 0)
    assert {seed % 2 for seed in seen["train"]} == {1}
    assert {seed % 2 for seed in seen["test"]} == {0}


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
    assert lift.begin(2) == Observation("Floor 2.", goal="go to floor 3", actions=("up", "down"))
    assert lift.act("down") == Observation("Floor 1.", actions=("up", "down"))
    assert lift.act("up") == Observation("Floor 2.", actions=("up", "down"))
    assert lift.act("up") == Observation("Floor 3.", actions=("up", "down"), over=True, won=True)
    assert lift.begin(0).actions == ("up",)
    for action in ("up", "down", "up", "down"):
        assert not lift.act(action).over
    assert lift.act("up") == Observation("Floor 1.", actions=("up", "down"), over=True, won=False)
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
    assert lift.begin(1) == Observation("It is 1.", goal="3", actions=("up", "down"))
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
    scene = Observation("A room.", actions=("go to shelf", "open fridge"))
    assert action_of(response, scene) == (action, admitted)


def test_any_text_is_an_action_where_none_are_listed() -> None:
    assert action_of(" say  Hello\n", Observation("x")) == ("say Hello", True)
    assert action_of(" \n ", Observation("x")) == ("", False)


def test_a_prompt_tells_goal_history_scene_and_actions() -> None:
    scene = Observation("You see 3.", actions=("left", "right"))
    past = (("You see 1.", "right"), ("You see 2.", "left"), ("You see 1.", "right"))
    assert now(scene) == "You see 3.\nActions: left, right"
    assert told("reach 5.", past, scene, 2) == (
        "Task: reach 5.\n2. You see 2.\n> left\n3. You see 1.\n> right\n"
        "You see 3.\nActions: left, right"
    )
    assert told("", past, Observation("End."), 0) == "End."
    assert told("", past, Observation("End."), 9).startswith("1. You see 1.\n> right\n2. ")


@pytest.mark.parametrize(
    ("source", "settings", "wrong"),
    [
        ("env:castle", {}, "unknown environment 'castle'; known: env:household, env:alf"),
        ("env:no.such.module:make", {}, "No module named 'no'"),
        ("env:tests.opd.envs.test_envs:nothing", {}, "no function 'nothing'"),
        (
            "env:household",
            {"layout": "both"},
            "layout is 'both'; it must be one of turns, trajectory",
        ),
        ("env:household", {"max_turns": 0}, "max_turns is 0"),
    ],
)
def test_bad_sources_are_refused(source: str, settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        load_games(source, 0, **settings)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(ImportError, match=r"needs .*textworld.*: pip install 'opdlab\[alfworld\]'"):
        load_games("env:alfworld", 0)
