"""Households for ALFWorld's engine, generated from seeds: the PDDL problem and the task as text.

ALFWorld's own games must be downloaded, but its package contains their rules, grammar, goals, and
the table of which objects fit into which receptacles. A generated problem has one room,
receptacles, objects in them, and one of the six tasks. Needs the extra alfworld; nothing is
downloaded.
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
"""ALFWorld's task types, and the rooms in which each is possible."""
ABILITIES = {"clean": "Cleanable", "heat": "Heatable", "cool": "Coolable"}
LAMP, TABLES = "DeskLamp", ("Desk", "SideTable", "CoffeeTable", "Shelf")
NUM_CLUTTER, MAX_DRAWS = 8, 500
MANGLED = {"|": "_bar_", "-": "_minus_", "+": "_plus_", ".": "_dot_", ",": "_comma_"}


@dataclass(frozen=True)
class Household:
    """A room with receptacles, objects and a task."""

    task: str
    """Task type, a key of TASKS."""
    receptacles: list[tuple[str, str]]
    """(id, type) of each receptacle."""
    things: list[tuple[str, str, int]]
    """(id, type, index of its receptacle) of each object."""
    goal_type: str
    """Type of the objects that the task is about."""
    target: str
    """Type of the receptacle that they belong in; "" for look_at_obj_in_light."""


def draw_household(seed: int) -> Household:
    """Generate the household of a seed; the goal objects are not in their target receptacle.

    Args:
        seed: Determines the household.

    Returns:
        The household.

    Raises:
        OperationFailed: None of MAX_DRAWS draws has a room in which its task is possible.
    """
    generator = random.Random(f"alfred-{seed}")
    for _ in range(MAX_DRAWS):
        task = generator.choice(list(TASKS))
        home = furnish_room(generator, task, generator.choice(TASKS[task]))
        if home is not None:
            return home
    raise OperationFailed(f"no household for seed {seed} in {MAX_DRAWS} draws; use another seed")


def furnish_room(generator: random.Random, task: str, room: str) -> Household | None:
    """Draw a room for a task.

    Args:
        generator: Source of randomness.
        task: Task type.
        room: Type of the room.

    Returns:
        The household, or None if the task is not possible in the drawn room.
    """
    from alfworld.gen.constants import VAL_ACTION_OBJECTS, VAL_RECEPTACLE_OBJECTS

    def fits(kind: str, receptacle: str) -> bool:
        return kind in VAL_RECEPTACLE_OBJECTS.get(receptacle, ())

    kinds = [kind for kind, count in ROOMS[room].items() for _ in range(generator.randint(*count))]
    ability = next((name for verb, name in ABILITIES.items() if f"_{verb}_" in task), None)
    candidates = [x for x in THINGS[room] if ability is None or x in VAL_ACTION_OBJECTS[ability]]
    goal_type = generator.choice(candidates)
    light = task == "look_at_obj_in_light"
    tools = {"SinkBasin", "Microwave", "Fridge"} if ability else set()
    targets = sorted({kind for kind in kinds if fits(goal_type, kind)} - tools)
    start_places = [i for i, kind in enumerate(kinds) if fits(goal_type, kind)]
    target = "" if light or not targets else generator.choice(targets)
    start_places = [i for i in start_places if kinds[i] != target]
    tables = [i for i, kind in enumerate(kinds) if kind in TABLES]
    if not start_places or not (tables if light else target):
        return None
    copies = 2 if task == "pick_two_obj_and_place" else 1
    placements = [(goal_type, generator.choice(start_places)) for _ in range(copies)]
    if light:
        placements.append((LAMP, generator.choice(tables)))
    for kind in generator.choices([x for x in THINGS[room] if x != goal_type], k=NUM_CLUTTER):
        places = [i for i, receptacle in enumerate(kinds) if fits(kind, receptacle)]
        if places:
            placements.append((kind, generator.choice(places)))
    receptacles = [(object_id(generator, kind), kind) for kind in kinds]
    things = [(object_id(generator, kind), kind, place) for kind, place in placements]
    return Household(task, receptacles, things, goal_type, target)


def object_id(generator: random.Random, kind: str) -> str:
    """Return an id in ALFRED's format, type and position; a sink basin has one more part."""
    position = "|".join(f"{generator.uniform(-4, 4):+06.2f}" for _ in range(3))
    return f"Sink|{position}|SinkBasin" if kind == "SinkBasin" else f"{kind}|{position}"


def goal_text(home: Household) -> str:
    """Return the task as text."""
    from alfworld.gen.goal_library import gdict

    words = {"obj": home.goal_type.lower(), "recep": home.target.lower(), "toggle": LAMP.lower()}
    return gdict[home.task]["templates"][0].format(**words)


def game_definition(home: Household) -> dict[str, Any]:
    """Return the argument of `textworld.envs.PddlEnv.load`."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    with open(ALFRED_PDDL_PATH) as rules, open(ALFRED_TWL2_PATH) as grammar:
        return {
            "pddl_domain": rules.read(),
            "grammar": grammar.read().replace("UNKNOWN GOAL", goal_text(home)),
            "pddl_problem": pddl_problem(home),
            "solvable": None,
            "walkthrough": None,
        }


def pddl_problem(home: Household) -> str:
    """Return the household as a PDDL problem: objects, initial facts, goal, in this order."""
    from alfworld.gen import constants
    from alfworld.gen.goal_library import gdict

    spots = [f"loc_{i}" for i in range(len(home.receptacles))]
    start = f"loc_{len(spots)}"
    kinds = sorted({kind for _, kind, _ in home.things} | {"Knife", "ButterKnife", LAMP})
    receptacle_types = sorted(
        {kind for _, kind in home.receptacles} | {"SinkBasin", "Microwave", "Fridge"}
    )
    pairs = zip(home.receptacles, spots, strict=True)
    places = [(mangle(name), kind, spot) for (name, kind), spot in pairs]
    things = [(mangle(name), kind, places[i][0], spots[i]) for name, kind, i in home.things]
    objects = [
        "agent1 - agent",
        *(f"{kind}Type - otype" for kind in kinds),
        *(f"{kind}Type - rtype" for kind in receptacle_types),
        *(f"{name} - object" for name, *_ in things),
        *(f"{name} - receptacle" for name, *_ in places),
        *(f"{spot} - location" for spot in (*spots, start)),
    ]
    facts = [f"(atLocation agent1 {start})"]
    for name, kind, spot in places:
        facts += [f"(receptacleType {name} {kind}Type)", f"(receptacleAtLocation {name} {spot})"]
        facts += [f"(openable {name})"] * (kind in constants.OPENABLE_CLASS_SET)
    for name, kind, receptacle, spot in things:
        facts += [f"(objectType {name} {kind}Type)", f"(inReceptacle {name} {receptacle})"]
        facts += [f"(objectAtLocation {name} {spot})"]
        facts += [f"(pickupable {name})"] * (kind != LAMP)
        for ability in (*ABILITIES.values(), "Toggleable", "Sliceable"):
            facts += [f"({ability.lower()} {name})"] * (
                kind in constants.VAL_ACTION_OBJECTS[ability]
            )
    for receptacle in receptacle_types:
        contents = [
            kind for kind in kinds if kind in constants.VAL_RECEPTACLE_OBJECTS.get(receptacle, ())
        ]
        facts += [f"(canContain {receptacle}Type {kind}Type)" for kind in contents]
    facts += distance_facts([*spots, start])
    goal = gdict[home.task]["pddl"].format(obj=home.goal_type, recep=home.target, toggle=LAMP)
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


def distance_facts(spots: Sequence[str]) -> list[str]:
    """Return the PDDL distances between all pairs of locations."""
    return [
        f"(= (distance {a} {b}) {1 + abs(i - j)})"
        for i, a in enumerate(spots)
        for j, b in enumerate(spots)
    ]


def mangle(name: str) -> str:
    """Encode an id so that ALFWorld's `Demangler` can decode it."""
    return "".join(MANGLED.get(letter, letter) for letter in name)
