"""A household text game: objects are in places, some of which are closed; bring objects to a place.

Small, without dependencies, deterministic per seed, and always solvable: `Household.expert` takes a
shortest path. Objects are visible only at their place, and in a closed place only after opening it,
so a player has to search. Names from the goal are in capitals everywhere, so that very small models
can play.
"""

import random
from collections.abc import Sequence

from opd.envs.base import Observation

CLOSABLE = ("fridge", "cabinet", "drawer", "box", "oven", "safe")
ALWAYS_OPEN = ("table", "shelf", "sink", "desk", "bed", "stove")
THINGS = ("apple", "book", "bowl", "cup", "fork", "key", "knife", "lamp", "mug", "pen", "plate")
NUM_PLACES, NUM_THINGS, NUM_GOAL_THINGS = (3, 5), (3, 5), (1, 2)


class Household:
    """One household; the player holds at most one object."""

    def begin(self, seed: int) -> Observation:
        """Generate a household: 3 to 5 places, 3 to 5 objects, 1 or 2 of them to be moved."""
        generator = random.Random(f"rooms-{seed}")
        count = generator.randint(*NUM_PLACES)
        num_closable = generator.randint(1, count - 1)
        self.places = generator.sample(CLOSABLE, num_closable) + generator.sample(
            ALWAYS_OPEN, count - num_closable
        )
        generator.shuffle(self.places)
        things = generator.sample(THINGS, generator.randint(*NUM_THINGS))
        target = generator.choice(self.places)
        count = generator.randint(*NUM_GOAL_THINGS)
        things = [thing.upper() for thing in things[:count]] + things[count:]
        self.places = [place.upper() if place == target else place for place in self.places]
        self.target, self.goal_things = target.upper(), tuple(things[:count])
        other_places = [place for place in self.places if place != self.target]
        self.place_of: dict[str, str] = {
            thing: generator.choice(other_places if thing in self.goal_things else self.places)
            for thing in things
        }
        self.current_place = self.held_thing = ""
        self.closed_places = {place for place in self.places if place.lower() in CLOSABLE}
        goal_phrase = join_words([f"the {thing}" for thing in self.goal_things])
        place_phrase = join_words([with_article(place) for place in self.places])
        return self._observe(
            f"You see {place_phrase}.", goal=f"put {goal_phrase} in the {self.target}."
        )

    def act(self, action: str) -> Observation:
        """Take an admissible action; any other has no effect."""
        if action not in self._actions():
            return self._observe("Nothing happens.")
        verb, thing = action.split()[:2]
        if verb == "go":
            self.current_place = action.removeprefix("go to ")
            return self._observe(f"You are at the {self.current_place}. {self._content()}")
        if verb == "open":
            self.closed_places.discard(self.current_place)
            return self._observe(f"You open the {self.current_place}. {self._content()}")
        if verb == "take":
            self.held_thing = thing
            del self.place_of[thing]
            return self._observe(f"You take the {thing}.")
        self.place_of[thing], self.held_thing = self.current_place, ""
        return self._observe(f"You put the {thing} in the {self.current_place}.")

    def close(self) -> None:
        """Do nothing: the game has no resources."""
        pass

    def expert(self) -> str:
        """Return an action of a player that knows where all objects are.

        Followed from the start, these actions are a shortest path to the goal.

        Returns:
            The action.
        """
        if self.held_thing:
            return self._approach(self.target, f"put {self.held_thing} in {self.target}")
        remaining = [thing for thing in self.goal_things if self.place_of[thing] != self.target]
        reachable = [thing for thing in remaining if self.place_of[thing] == self.current_place]
        thing = (reachable or remaining)[0]
        place = self.place_of[thing]
        return self._approach(place, f"take {thing} from {place}")

    def _approach(self, place: str, action: str) -> str:
        """Return the next step to `place`, or `action` when the player is at the open place."""
        if self.current_place != place:
            return f"go to {place}"
        return f"open {place}" if place in self.closed_places else action

    def _actions(self) -> tuple[str, ...]:
        moves = [f"go to {place}" for place in self.places if place != self.current_place]
        if not self.current_place:
            return tuple(moves)
        if self.current_place in self.closed_places:
            return (f"open {self.current_place}", *moves)
        if self.held_thing:
            return (f"put {self.held_thing} in {self.current_place}", *moves)
        things = [thing for thing, place in self.place_of.items() if place == self.current_place]
        return (*(f"take {thing} from {self.current_place}" for thing in things), *moves)

    def _content(self) -> str:
        if self.current_place in self.closed_places:
            return "It is shut."
        things = [
            with_article(thing)
            for thing, place in self.place_of.items()
            if place == self.current_place
        ]
        return f"There is {join_words(things) if things else 'nothing'}."

    def _observe(self, text: str, goal: str = "") -> Observation:
        won = all(self.place_of.get(thing) == self.target for thing in self.goal_things)
        return Observation(text=text, goal=goal, actions=self._actions(), over=won, won=won)


def with_article(noun: str) -> str:
    """Return a noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def join_words(words: Sequence[str]) -> str:
    """Join words as "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
