"""The worlds of an audit.

Shapes: V vocabulary.
"""

from dataclasses import dataclass
from functools import lru_cache

from opd.objectives.audit.worlds import World, make_world


@dataclass(frozen=True)
class Worlds:
    """The worlds of an audit."""

    random: World
    """Responses of random lengths."""
    equal: World
    """Responses of equal lengths."""
    others: tuple[World, ...]
    """Further worlds: distant, close, another vocabulary."""
    near: tuple[World, ...]
    """The first two with a teacher so close that no clip is active."""
    small: World
    """A world in which descent is cheap."""

    @property
    def matching(self) -> tuple[World, ...]:
        """Worlds in which targets are compared."""
        return (self.random, self.equal, *self.others)

    @property
    def vocabulary(self) -> int:
        """Smallest V."""
        return self.random.student.shape[1]


LARGE = 33
"""Vocabulary from which worlds are smaller: a tree of two tokens has over a thousand responses."""


@lru_cache(maxsize=8)
def make_worlds(vocabulary: int, *, full: bool, length: int = 3) -> Worlds:
    """Make the worlds of an audit.

    Args:
        vocabulary: Smallest V.
        full: Whether there are more of them.
        length: Longest response; at most 2 where the vocabulary is large.

    Returns:
        The worlds.
    """
    v, length = vocabulary, length if vocabulary < 9 else 2
    seeds = range(3 if full else 1)
    distant = [
        make_world(
            f"distant {i}",
            vocabulary=v + 1,
            length=length,
            random_lengths=True,
            seed=20 + i,
            num_prompts=1,
            sharpness=2.0,
            distance=2.0,
        )
        for i in seeds
    ]
    flat = [
        make_world(
            f"flat {i}",
            vocabulary=v + 2,
            length=2,
            random_lengths=True,
            seed=40 + i,
            num_prompts=1,
            sharpness=0.3,
            distance=0.4,
        )
        for i in seeds
    ]
    near = tuple(
        make_world("near", vocabulary=size, length=2, random_lengths=x, seed=3, distance=0.02)
        for size, x in ((v, True), (v + 2, False))
    )
    return Worlds(
        random=make_world("random", vocabulary=v, length=length, random_lengths=True, seed=1),
        equal=make_world(
            "equal",
            vocabulary=v,
            length=length,
            random_lengths=False,
            seed=2,
            num_prompts=1 if v >= LARGE else 2,
        ),
        others=(*distant, *flat),
        near=near,
        small=make_world(
            "small",
            vocabulary=v,
            length=1 if v >= LARGE else 2,
            random_lengths=True,
            seed=7,
            num_prompts=1,
        ),
    )
