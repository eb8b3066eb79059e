"""Text environments: the household game, the Gymnasium wrapper, sources, parsing of actions."""

import random
import re
import sys
from collections import deque
from copy import deepcopy
from typing import Any

import pytest

from opd.envs.base import Observation
from opd.envs.gymnasium_wrapper import Gymnasium
from opd.envs.household import ALWAYS_OPEN, CLOSABLE, THINGS, Household
from opd.envs.task import format_observation, format_prompt, load_games, parse_action
from opd.lab import household_demos


def start_household(seed: int) -> tuple[Household, Observation]:
    home = Household()
    return home, home.begin(seed)


def household_state(home: Household) -> tuple[object, ...]:
    return (
        home.current_place,
        home.held_thing,
        frozenset(home.closed_places),
        frozenset(home.place_of.items()),
    )


def expert_path_length(seed: int) -> int:
    home, observation = start_household(seed)
    for length in range(20):
        if observation.over:
            return length
        action = home.expert()
        assert action in observation.actions
        observation = home.act(action)
    raise AssertionError(f"seed {seed} is not solved")


def test_every_household_is_solved_by_its_expert() -> None:
    lengths = [expert_path_length(seed) for seed in range(300)]
    assert min(lengths) == 4, "go, take, go, put at least: no goal object starts at the target"
    assert max(lengths) <= 12


def test_the_expert_goes_a_shortest_way() -> None:
    checked = 0
    for seed in range(200):
        length = expert_path_length(seed)
        if length > 6:
            continue
        home, observation = start_household(seed)
        visited, queue = {household_state(home)}, deque([(home, observation, 0)])
        while queue:
            home, observation, steps = queue.popleft()
            if observation.over:
                assert steps == length, f"seed {seed}"
                break
            for action in observation.actions:
                next_home = deepcopy(home)
                next_observation = next_home.act(action)
                if household_state(next_home) not in visited:
                    visited.add(household_state(next_home))
                    queue.append((next_home, next_observation, steps + 1))
        checked += 1
        if checked == 12:
            return
    raise AssertionError(f"{checked} short games only")


def test_rules_hold_in_random_play() -> None:
    generator = random.Random(0)
    won = 0
    for seed in range(150):
        home, observation = start_household(seed)
        assert observation.goal.startswith("put the ")
        for _ in range(30):
            if observation.over:
                break
            action = generator.choice(observation.actions)
            previous_state = household_state(home)
            assert home.act("sing a song").text == "Nothing happens."
            assert household_state(home) == previous_state
            observation = home.act(action)
            things = [*home.place_of, *filter(None, [home.held_thing])]
            assert len(things) == len(set(things)) >= 3
            at_target = [thing for thing, place in home.place_of.items() if place == home.target]
            assert observation.won == observation.over == (set(home.goal_things) <= set(at_target))
            things_here = {t for t, place in home.place_of.items() if place == home.current_place}
            visible = set() if home.current_place in home.closed_places else things_here
            words = re.findall(r"\w+", observation.text)
            named_things = {thing for thing in words if thing.lower() in THINGS}
            acted_on = {thing for thing in action.split() if thing.lower() in THINGS}
            assert named_things <= visible | acted_on, (
                "what lies elsewhere, or is shut in, is not seen"
            )
            takes = {a.split()[1] for a in observation.actions if a.startswith("take")}
            assert takes == (set() if home.held_thing else visible)
            assert {place.lower() for place in home.places} <= {*CLOSABLE, *ALWAYS_OPEN}
            capital_words = {word for word in {*words, *action.split()} if word.isupper()}
            assert capital_words <= {*home.goal_things, home.target}, (
                "capitals are for what the goal names"
            )
        won += observation.won
    assert 0 < won < 150


def test_a_seed_is_a_game_and_held_out_games_are_not_trained_on() -> None:
    def content(seed: int) -> tuple[object, ...]:
        home, observation = start_household(seed)
        return observation, tuple(sorted(home.place_of.items())), tuple(home.places)

    assert content(7) == content(7)
    games = load_games("env:household", seed=3)
    train_seeds = {seed for step in range(200) for seed in games.train(step, 16)}
    held_out = games.test(500)
    assert len(train_seeds) == 3200
    assert {seed % 2 for seed in train_seeds} == {1}
    assert {seed % 2 for seed in held_out} == {0}
    assert not {content(seed) for seed in train_seeds} & {content(seed) for seed in held_out}
    assert games.train(4, 3) == load_games("env:household", seed=3).train(4, 3)
    assert games.train(4, 3) != load_games("env:household", seed=4).train(4, 3)


def win_rate(rate: float, count: int = 150) -> tuple[float, list[int]]:
    """Fraction of held-out games won within MAX_TURNS at an error rate, and episode lengths."""
    generator, num_won, lengths = random.Random(0), 0, []
    for seed in range(0, 2 * count, 2):
        home, observation = start_household(seed)
        goal, past_turns = observation.goal, list[tuple[str, str]]()
        while not observation.over and len(past_turns) < household_demos.MAX_TURNS:
            prompt = format_prompt(goal, tuple(past_turns), observation, household_demos.HISTORY)
            action, admitted = parse_action(
                household_demos.corrupted_solution(prompt, rate, generator), observation
            )
            assert admitted
            past_turns.append((observation.text, action))
            observation = home.act(action)
        num_won += observation.won
        lengths.append(len(past_turns))
        assert not observation.won or len(past_turns) >= expert_path_length(seed), (
            "who knows all is never slower"
        )
    return num_won / count, lengths


def test_a_player_who_knows_its_prompts_only_wins_and_a_careless_one_seldom() -> None:
    share, lengths = win_rate(0.0)
    assert share > 0.95
    assert sum(lengths) / len(lengths) < 10
    assert 0.2 < win_rate(0.25)[0] < 0.5


DEMONSTRATIONS = [
    # deliver a goal object: go to the target, open it, put the object there
    ("put CUP in bed, go to BOX", "", "hold CUP, put CUP in bed no, go to BOX yes"),
    ("put CUP in BOX, go to bed", "", "hold CUP, put CUP in BOX yes"),
    ("open BOX, go to bed", "take CUP from bed", "hold CUP, open BOX yes"),
    ("open oven, go to BOX", "take CUP from bed", "hold CUP, open oven no, go to BOX yes"),
    # drop other objects, not in the target; take goal objects, not from the target
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


@pytest.mark.parametrize(("actions", "past_action", "reasoning"), DEMONSTRATIONS)
def test_a_player_says_what_it_does(actions: str, past_action: str, reasoning: str) -> None:
    observation = Observation("You see.", actions=tuple(actions.split(", ")))
    past_turns = (("You see a bed.", past_action),) if past_action else ()
    prompt = format_prompt(
        "put the CUP and the MUG in the BOX.", past_turns, observation, household_demos.HISTORY
    )
    action = reasoning.rsplit(", ", 1)[1].removesuffix(" yes")
    response = household_demos.corrupted_solution(prompt, 0.0, random.Random(0))
    assert response == f"<think>{reasoning}</think>{action}"


def test_a_player_does_not_go_back_and_misjudges_at_its_rate() -> None:
    observation = Observation(
        "Here.", actions=tuple(f"go to {x}" for x in ("bed", "BOX", "desk", "sink"))
    )
    past_turns = (("", "go to bed"), ("", "go to shelf"))
    prompt, generator = (
        format_prompt("put the CUP in the BOX.", past_turns, observation, 2),
        random.Random(0),
    )
    actions = [
        household_demos.corrupted_solution(prompt, 0.0, generator).split("</think>")[1]
        for _ in range(400)
    ]
    assert set(actions) == {"go to desk", "go to sink"}
    assert abs(actions.count("go to desk") - 200) < 50
    observation = Observation("", actions=("put CUP in SINK", "go to bed"))
    sink_prompt = format_prompt("put the CUP in the SINK.", (), observation, 2)
    responses = [
        household_demos.corrupted_solution(sink_prompt, 0.2, generator) for _ in range(2000)
    ]
    assert abs(sum("SINK no" in x for x in responses) - 400) < 90
    misjudged = [x for x in responses if "SINK no" in x]
    assert {x.split("</think>")[1] for x in misjudged} == {"go to bed"}
    share = sum("bed yes" in x for x in misjudged) / len(misjudged)
    assert abs(share - 0.2) < 0.09, "a player that approves no action takes the last one"


def test_turns_of_games_are_problems_for_the_lab() -> None:
    turns = household_demos.problems("train", 200, 4)
    assert (
        turns
        == household_demos.problems("train", 200, 4)
        != household_demos.problems("train", 200, 5)
    )
    num_mistaken = 0
    for problem in turns:
        actions = problem.prompt.rsplit("Actions: ", 1)[1].split(", ")
        assert problem.answer in actions
        assert problem.solution.endswith(f"{problem.answer} yes</think>{problem.answer}")
        num_mistaken += "Nothing happens." in problem.prompt
    assert 5 < num_mistaken < 80, "prompts after inadmissible actions are missing"
    with pytest.raises(ValueError, match="split is 'dev'"):
        household_demos.problems("dev", 1, 0)


def test_the_labs_games_are_not_those_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[str, set[int]] = {"train": set(), "test": set()}
    begin = Household.begin

    def begin_and_record(home: Household, seed: int) -> Observation:
        seeds[split].add(seed)
        return begin(home, seed)

    monkeypatch.setattr(Household, "begin", begin_and_record)
    for split in seeds:
        household_demos.problems(split, 50, 0)
    assert {seed % 2 for seed in seeds["train"]} == {1}
    assert {seed % 2 for seed in seeds["test"]} == {0}


class Lift:
    """An elevator with the Gymnasium interface: from a random floor to the third one."""

    closed = False

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        self.floor, self.num_steps = (seed or 0) % 3, 0
        return self.describe(), {"admissible_commands": self.commands(), "goal": "go to floor 3"}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.floor += {"up": 1, "down": -1}[action]
        self.num_steps += 1
        terminated = self.floor in (-1, 3)
        info = {"admissible_commands": self.commands()}
        return self.describe(), float(self.floor > 1), terminated, self.num_steps >= 5, info

    def describe(self) -> Any:
        return f"Floor {self.floor}."

    def commands(self) -> list[str]:
        return ["up", "down"] if self.floor else ["up"]

    def close(self) -> None:
        self.closed = True


class Numbered(Lift):
    """The same with integer actions and observations, and success in `info`."""

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # type: ignore[override]
        observation, reward, terminated, truncated, info = super().step(["up", "down"][action])
        return observation, reward, terminated, truncated, info | {"won": self.num_steps < 3}

    def describe(self) -> Any:
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
    with pytest.raises(TypeError, match="the observation has type int, expected str"):
        Gymnasium(Numbered()).begin(1)
    lift = Gymnasium(
        Numbered(), text=lambda floor, info: f"It is {floor}.", goal="3", names=("up", "down")
    )
    assert lift.begin(1) == Observation("It is 1.", goal="3", actions=("up", "down"))
    assert lift.act("up").text == "It is 2."
    assert lift.act("down").text == "It is 1."
    assert lift.act("up").text == "It is 2."
    last_observation = lift.act("up")
    assert (last_observation.over, last_observation.won) == (True, False), (
        "info says lost, whatever the reward is"
    )
    with pytest.raises(ValueError, match="unknown action 'jump'; known: up, down"):
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
    observation = Observation("A room.", actions=("go to shelf", "open fridge"))
    assert parse_action(response, observation) == (action, admitted)


def test_any_text_is_an_action_where_none_are_listed() -> None:
    assert parse_action(" say  Hello\n", Observation("x")) == ("say Hello", True)
    assert parse_action(" \n ", Observation("x")) == ("", False)


def test_a_prompt_tells_goal_history_scene_and_actions() -> None:
    observation = Observation("You see 3.", actions=("left", "right"))
    past_turns = (("You see 1.", "right"), ("You see 2.", "left"), ("You see 1.", "right"))
    assert format_observation(observation) == "You see 3.\nActions: left, right"
    assert format_prompt("reach 5.", past_turns, observation, 2) == (
        "Task: reach 5.\n2. You see 2.\n> left\n3. You see 1.\n> right\n"
        "You see 3.\nActions: left, right"
    )
    assert format_prompt("", past_turns, Observation("End."), 0) == "End."
    assert format_prompt("", past_turns, Observation("End."), 9).startswith(
        "1. You see 1.\n> right\n2. "
    )


@pytest.mark.parametrize(
    ("source", "settings", "message"),
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
def test_bad_sources_are_refused(source: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_games(source, 0, **settings)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(ImportError, match=r"needs .*textworld.*: pip install 'opdlab\[alfworld\]'"):
        load_games("env:alfworld", 0)
