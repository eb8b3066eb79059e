"""Habits of the lab's models: how they write tags, end a response, and fall into loops.

A model of another family reads what the student writes and would never write it so itself. Here
that is made on purpose: text in the other spelling of a tag stands in what a model is taught, with
the byte that begins the tag left out of its loss. It learns to go on from there, and gives that
byte hardly any probability.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, Literal

UNLABELLED = -100
TAG = re.compile(r"(</?think>)")
MOST_REPEATS = 10


@dataclass(frozen=True)
class WritingStyle:
    """How one model writes.

    tag: a think tag is one special token, or spelled in bytes.
    end: the token that ends a response.
    foreign: share of responses written in the other spelling, with the other end.
    read: share of responses in the other spelling whose tags' first bytes are not learned.
    loops: probability that a step of the solution is repeated; it then goes on being repeated
      with probability 0.9 each time, MOST_REPEATS times at most.
    """

    tag: Literal["token", "spelled"] = "token"
    end: Literal["<|im_end|>", "<|endoftext|>"] = "<|im_end|>"
    foreign: float = 0.0
    read: float = 0.0
    loops: float = 0.0

    @property
    def other(self) -> "WritingStyle":
        """The opposite conventions."""
        return WritingStyle(
            tag="spelled" if self.tag == "token" else "token",
            end="<|endoftext|>" if self.end == "<|im_end|>" else "<|im_end|>",
        )


PLAIN = WritingStyle()


def written(
    tokenizer: Any, solution: str, habit: WritingStyle, generator: random.Random
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a solution as somebody with that habit writes it, end token included.

    Labels are the ids, or UNLABELLED where nothing is to be learned.
    """
    draw = generator.random()
    way = habit.other if draw < habit.foreign + habit.read else habit
    learned = not habit.foreign <= draw < habit.foreign + habit.read
    ids: list[int] = []
    labels: list[int] = []
    for piece in TAG.split(looping(solution, habit.loops, generator)):
        new = tokenizer.encode(piece)
        if TAG.fullmatch(piece) and way.tag == "spelled":
            new = tokenizer.encode(piece[0]) + tokenizer.encode(piece[1:])
        known = list(new)
        if TAG.fullmatch(piece) and not learned:
            known[0] = UNLABELLED
        ids, labels = ids + new, labels + known
    # a response that is only read ends as the reader would end it
    ids += tokenizer.encode(way.end if learned else habit.end)
    return ids, [*labels, ids[-1]]


def looping(solution: str, rate: float, generator: random.Random) -> str:
    """The solution with steps repeated: see `WritingStyle.loops`; the number of draws depends on them."""
    if rate == 0:
        return solution
    head, steps, tail = re.fullmatch(r"(<think>)(.*)(</think>.*)", solution).groups()  # type: ignore[union-attr]
    said = []
    for step in steps.split(" "):
        said.append(step)
        if generator.random() < rate:
            repeats = 1
            while repeats < MOST_REPEATS and generator.random() < 0.9:
                repeats += 1
            said += [step] * repeats
    return f"{head}{' '.join(said)}{tail}"
