"""A household in text: things lie in places, some of which are shut; bring what is asked for.

Small, without dependencies, the same for the same seed, and always solvable: `Household.expert` goes a
shortest way. What lies in a place is seen only there, and in a shut one only after
it was opened, so a player has to search. What the goal names is in capitals wherever it is told, so
that very small models can play.
"""

import random
from collections.abc import Sequence

from opd.envs.base import Observation

SHUT = ("fridge", "cabinet", "drawer", "box", "oven", "safe")
OPEN = ("table", "shelf", "sink", "desk", "bed", "stove")
THINGS = ("apple", "book", "bowl", "cup", "fork", "key", "knife", "lamp", "mug", "pen", "plate")
PLACES, LYING, WANTED = (3, 5), (3, 5), (1, 2)


class Household:
    """One household. At most one thing is held."""

    def begin(self, seed: int) -> Observation:
        """A new household: 3 to 5 places, 3 to 5 things, 1 or 2 of them to be moved."""
        draw = random.Random(f"rooms-{seed}")
        count = draw.randint(*PLACES)
        shut = draw.randint(1, count - 1)
        self.places = draw.sample(SHUT, shut) + draw.sample(OPEN, count - shut)
        draw.shuffle(self.places)
        things = draw.sample(THINGS, draw.randint(*LYING))
        target = draw.choice(self.places)
        count = draw.randint(*WANTED)
        things = [thing.upper() for thing in things[:count]] + things[count:]
        self.places = [place.upper() if place == target else place for place in self.places]
        self.target, self.wanted = target.upper(), tuple(things[:count])
        elsewhere = [place for place in self.places if place != self.target]
        self.where: dict[str, str] = {
            thing: draw.choice(elsewhere if thing in self.wanted else self.places)
            for thing in things
        }
        self.at = self.held = ""
        self.shut = {place for place in self.places if place.lower() in SHUT}
        what = listed([f"the {thing}" for thing in self.wanted])
        seen = listed([one(place) for place in self.places])
        return self._scene(f"You see {seen}.", goal=f"put {what} in the {self.target}.")

    def act(self, action: str) -> Observation:
        """What an action of the last scene does; any other does nothing."""
        if action not in self._actions():
            return self._scene("Nothing happens.")
        verb, thing = action.split()[:2]
        if verb == "go":
            self.at = action.removeprefix("go to ")
            return self._scene(f"You are at the {self.at}. {self._content()}")
        if verb == "open":
            self.shut.discard(self.at)
            return self._scene(f"You open the {self.at}. {self._content()}")
        if verb == "take":
            self.held = thing
            del self.where[thing]
            return self._scene(f"You take the {thing}.")
        self.where[thing], self.held = self.at, ""
        return self._scene(f"You put the {thing} in the {self.at}.")

    def close(self) -> None:
        pass

    def expert(self) -> str:
        """An action that leads to the goal, by one who knows where all things are.

        From the start on, and for who always took it, it is one of a shortest way.
        """
        if self.held:
            return self._towards(self.target, f"put {self.held} in {self.target}")
        left = [thing for thing in self.wanted if self.where[thing] != self.target]
        near = [thing for thing in left if self.where[thing] == self.at]
        thing = (near or left)[0]
        place = self.where[thing]
        return self._towards(place, f"take {thing} from {place}")

    def _towards(self, place: str, then: str) -> str:
        if self.at != place:
            return f"go to {place}"
        return f"open {place}" if place in self.shut else then

    def _actions(self) -> tuple[str, ...]:
        found = [f"go to {place}" for place in self.places if place != self.at]
        if not self.at:
            return tuple(found)
        if self.at in self.shut:
            return (f"open {self.at}", *found)
        if self.held:
            return (f"put {self.held} in {self.at}", *found)
        lying = [thing for thing, place in self.where.items() if place == self.at]
        return (*(f"take {thing} from {self.at}" for thing in lying), *found)

    def _content(self) -> str:
        if self.at in self.shut:
            return "It is shut."
        lying = [one(thing) for thing, place in self.where.items() if place == self.at]
        return f"There is {listed(lying) if lying else 'nothing'}."

    def _scene(self, text: str, goal: str = "") -> Observation:
        won = all(self.where.get(thing) == self.target for thing in self.wanted)
        return Observation(text=text, goal=goal, actions=self._actions(), over=won, won=won)


def one(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
