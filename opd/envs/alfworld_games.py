"""Households for ALFWorld's engine, drawn by seed: the planning problem and the task in words.

ALFWorld's own games have to be downloaded; its package brings their rules, grammar, goals, and what
fits into what. A problem holds one room, receptacles, things in them, and one of the six tasks.
Needs alfworld (extra alfworld); nothing is downloaded.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diagnostics.errors import OperationFailed

ROOMS: dict[str, dict[str, tuple[int, int]]] = {
    "kitchen": {
        "CounterTop": (1, 3),
        "Cabinet": (2, 5),
        "Drawer": (1, 4),
        "Fridge": (1, 1),
        "Microwave": (1, 1),
        "SinkBasin": (1, 1),
        "StoveBurner": (1, 3),
        "DiningTable": (0, 1),
        "GarbageCan": (1, 1),
        "CoffeeMachine": (0, 1),
    },
    "bedroom": {
        "Bed": (1, 1),
        "Desk": (1, 1),
        "Drawer": (2, 4),
        "SideTable": (1, 2),
        "Shelf": (1, 3),
        "GarbageCan": (1, 1),
        "Safe": (0, 1),
    },
    "living room": {
        "Sofa": (1, 1),
        "ArmChair": (1, 2),
        "CoffeeTable": (1, 1),
        "SideTable": (1, 2),
        "Drawer": (0, 3),
        "Shelf": (0, 2),
        "GarbageCan": (1, 1),
    },
    "bathroom": {
        "SinkBasin": (1, 1),
        "CounterTop": (1, 1),
        "Toilet": (1, 1),
        "Cabinet": (1, 4),
        "Drawer": (0, 2),
        "GarbageCan": (1, 1),
        "Shelf": (0, 1),
    },
}
THINGS: dict[str, tuple[str, ...]] = {
    "kitchen": (
        *("Apple", "Bread", "Egg", "Lettuce", "Potato", "Tomato", "Bowl", "Cup", "Fork", "Knife"),
        *("Mug", "Pan", "Plate", "Pot", "SaltShaker", "Spatula", "Spoon", "DishSponge"),
    ),
    "bedroom": ("AlarmClock", "Book", "CD", "CellPhone", "CreditCard", "KeyChain", "Pen", "Pillow"),
    "living room": ("Book", "CreditCard", "KeyChain", "Laptop", "Newspaper", "Pillow", "Vase"),
    "bathroom": ("Candle", "Cloth", "SoapBar", "SoapBottle", "SprayBottle", "ToiletPaper"),
}
TASKS = {
    "pick_and_place_simple": tuple(ROOMS),
    "pick_two_obj_and_place": tuple(ROOMS),
    "pick_clean_then_place_in_recep": ("kitchen", "bathroom"),
    "pick_heat_then_place_in_recep": ("kitchen",),
    "pick_cool_then_place_in_recep": ("kitchen",),
    "look_at_obj_in_light": ("bedroom", "living room"),
}
"""ALFWorld's tasks, and the rooms in which they can be done."""
ABLE = {"clean": "Cleanable", "heat": "Heatable", "cool": "Coolable"}
LAMP, TABLES = "DeskLamp", ("Desk", "SideTable", "CoffeeTable", "Shelf")
CLUTTER, TRIES = 8, 500
MANGLED = {"|": "_bar_", "-": "_minus_", "+": "_plus_", ".": "_dot_", ",": "_comma_"}


@dataclass(frozen=True)
class Household:
    """receptacles: (id, type); things: (id, type, place in the list of receptacles)."""

    task: str
    receptacles: list[tuple[str, str]]
    things: list[tuple[str, str, int]]
    wanted: str
    target: str


def household(seed: int) -> Household:
    """The household of a seed; the wanted things are not where they shall be.

    Raises:
      RuntimeError: none of TRIES draws has a room in which its task can be done.
    """
    draw = random.Random(f"alfred-{seed}")
    for _ in range(TRIES):
        task = draw.choice(list(TASKS))
        found = furnished(draw, task, draw.choice(TASKS[task]))
        if found is not None:
            return found
    raise OperationFailed(f"no household for seed {seed} in {TRIES} draws")


def furnished(draw: random.Random, task: str, room: str) -> Household | None:
    """A room for a task, or None where what was drawn does not allow it."""
    from alfworld.gen.constants import VAL_ACTION_OBJECTS, VAL_RECEPTACLE_OBJECTS

    def fits(kind: str, into: str) -> bool:
        return kind in VAL_RECEPTACLE_OBJECTS.get(into, ())

    kinds = [kind for kind, count in ROOMS[room].items() for _ in range(draw.randint(*count))]
    able = next((name for verb, name in ABLE.items() if f"_{verb}_" in task), None)
    pool = [x for x in THINGS[room] if able is None or x in VAL_ACTION_OBJECTS[able]]
    wanted = draw.choice(pool)
    light = task == "look_at_obj_in_light"
    tools = {"SinkBasin", "Microwave", "Fridge"} if able else set()
    targets = sorted({kind for kind in kinds if fits(wanted, kind)} - tools)
    elsewhere = [i for i, kind in enumerate(kinds) if fits(wanted, kind)]
    target = "" if light or not targets else draw.choice(targets)
    elsewhere = [i for i in elsewhere if kinds[i] != target]
    tables = [i for i, kind in enumerate(kinds) if kind in TABLES]
    if not elsewhere or not (tables if light else target):
        return None
    copies = 2 if task == "pick_two_obj_and_place" else 1
    lying = [(wanted, draw.choice(elsewhere)) for _ in range(copies)]
    if light:
        lying.append((LAMP, draw.choice(tables)))
    for kind in draw.choices([x for x in THINGS[room] if x != wanted], k=CLUTTER):
        places = [i for i, into in enumerate(kinds) if fits(kind, into)]
        if places:
            lying.append((kind, draw.choice(places)))
    receptacles = [(identifier(draw, kind), kind) for kind in kinds]
    things = [(identifier(draw, kind), kind, place) for kind, place in lying]
    return Household(task, receptacles, things, wanted, target)


def identifier(draw: random.Random, kind: str) -> str:
    """An id as ALFRED writes it, kind and position; a sink's basin has one more part."""
    place = "|".join(f"{draw.uniform(-4, 4):+06.2f}" for _ in range(3))
    return f"Sink|{place}|SinkBasin" if kind == "SinkBasin" else f"{kind}|{place}"


def goal_of(home: Household) -> str:
    """The task in words."""
    from alfworld.gen.goal_library import gdict

    words = {"obj": home.wanted.lower(), "recep": home.target.lower(), "toggle": LAMP.lower()}
    return gdict[home.task]["templates"][0].format(**words)


def game(home: Household) -> dict[str, Any]:
    """What `textworld.envs.PddlEnv.load` takes."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    with open(ALFRED_PDDL_PATH) as rules, open(ALFRED_TWL2_PATH) as grammar:
        return {
            "pddl_domain": rules.read(),
            "grammar": grammar.read().replace("UNKNOWN GOAL", goal_of(home)),
            "pddl_problem": problem(home),
            "solvable": None,
            "walkthrough": None,
        }


def problem(home: Household) -> str:
    """The household in the planner's language. Its parser wants objects, facts, goal, in order."""
    from alfworld.gen import constants
    from alfworld.gen.goal_library import gdict

    spots = [f"loc_{i}" for i in range(len(home.receptacles))]
    start = f"loc_{len(spots)}"
    kinds = sorted({kind for _, kind, _ in home.things} | {"Knife", "ButterKnife", LAMP})
    intos = sorted({kind for _, kind in home.receptacles} | {"SinkBasin", "Microwave", "Fridge"})
    pairs = zip(home.receptacles, spots, strict=True)
    places = [(mangled(name), kind, spot) for (name, kind), spot in pairs]
    things = [(mangled(name), kind, places[at][0], spots[at]) for name, kind, at in home.things]
    objects = [
        "agent1 - agent",
        *(f"{kind}Type - otype" for kind in kinds),
        *(f"{kind}Type - rtype" for kind in intos),
        *(f"{name} - object" for name, *_ in things),
        *(f"{name} - receptacle" for name, *_ in places),
        *(f"{spot} - location" for spot in (*spots, start)),
    ]
    facts = [f"(atLocation agent1 {start})"]
    for name, kind, spot in places:
        facts += [f"(receptacleType {name} {kind}Type)", f"(receptacleAtLocation {name} {spot})"]
        facts += [f"(openable {name})"] * (kind in constants.OPENABLE_CLASS_SET)
    for name, kind, into, spot in things:
        facts += [f"(objectType {name} {kind}Type)", f"(inReceptacle {name} {into})"]
        facts += [f"(objectAtLocation {name} {spot})"]
        facts += [f"(pickupable {name})"] * (kind != LAMP)
        for able in (*ABLE.values(), "Toggleable", "Sliceable"):
            facts += [f"({able.lower()} {name})"] * (kind in constants.VAL_ACTION_OBJECTS[able])
    for into in intos:
        holds = [kind for kind in kinds if kind in constants.VAL_RECEPTACLE_OBJECTS.get(into, ())]
        facts += [f"(canContain {into}Type {kind}Type)" for kind in holds]
    facts += distances([*spots, start])
    goal = gdict[home.task]["pddl"].format(obj=home.wanted, recep=home.target, toggle=LAMP)
    return "\n".join(
        [
            "(define (problem household)",
            "(:domain alfred)",
            "(:objects",
            *objects,
            ")",
            "(:init",
            "(= (total-cost) 0)",
            *facts,
            ")",
            goal.replace("#", "-"),
        ]
    )


def distances(spots: Sequence[str]) -> list[str]:
    return [
        f"(= (distance {a} {b}) {1 + abs(i - j)})"
        for i, a in enumerate(spots)
        for j, b in enumerate(spots)
    ]


def mangled(name: str) -> str:
    """An id as ALFWorld's names are read back from."""
    return "".join(MANGLED.get(letter, letter) for letter in name)
