"""Writing styles of the toy models: tags, end tokens and repetition loops.

Simulates a tokenizer mismatch: part of the training text uses the other model's form of a tag, and
the first byte of each such tag is excluded from the loss. The model learns to continue such text,
but assigns that byte a very low probability.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, Literal

UNLABELLED = -100
TAG = re.compile(r"(</?think>)")
MAX_REPEATS = 10


@dataclass(frozen=True)
class WritingStyle:
    """How one model writes."""

    tag: Literal["token", "spelled"] = "token"
    """Whether a think tag is one special token or spelled in bytes."""
    end: Literal["<|im_end|>", "<|endoftext|>"] = "<|im_end|>"
    """The token that ends a response."""
    foreign: float = 0.0
    """Share of responses written in the opposite style, with its end token."""
    read: float = 0.0
    """Share of responses in the opposite style in which the first bytes of tags are not labelled.
    """
    loops: float = 0.0
    """Probability that a step of the solution is repeated.

    Each further repetition has probability 0.9, up to MAX_REPEATS.
    """

    @property
    def opposite(self) -> "WritingStyle":
        """The opposite style."""
        return WritingStyle(
            tag="spelled" if self.tag == "token" else "token",
            end="<|endoftext|>" if self.end == "<|im_end|>" else "<|im_end|>",
        )


PLAIN = WritingStyle()


def encode_solution(
    tokenizer: Any, solution: str, habit: WritingStyle, generator: random.Random
) -> tuple[list[int], list[int]]:
    """Encode a solution in a writing style, with the end token.

    Args:
        tokenizer: The tokenizer.
        solution: The worked solution.
        habit: The writing style.
        generator: Source of randomness.

    Returns:
        Ids and labels; labels are the ids, or UNLABELLED where a token is excluded from the loss.
    """
    uniform = generator.random()
    style = habit.opposite if uniform < habit.foreign + habit.read else habit
    tags_are_labelled = not habit.foreign <= uniform < habit.foreign + habit.read
    ids: list[int] = []
    labels: list[int] = []
    for piece in TAG.split(repeat_steps(solution, habit.loops, generator)):
        piece_ids = tokenizer.encode(piece)
        if TAG.fullmatch(piece) and style.tag == "spelled":
            piece_ids = tokenizer.encode(piece[0]) + tokenizer.encode(piece[1:])
        piece_labels = list(piece_ids)
        if TAG.fullmatch(piece) and not tags_are_labelled:
            piece_labels[0] = UNLABELLED
        ids, labels = ids + piece_ids, labels + piece_labels
    # a response with unlabelled tags ends with the model's own end token
    ids += tokenizer.encode(style.end if tags_are_labelled else habit.end)
    return ids, [*labels, ids[-1]]


def repeat_steps(solution: str, rate: float, generator: random.Random) -> str:
    """Repeat steps of a solution; see `WritingStyle.loops`.

    The number of random draws depends on the steps.

    Args:
        solution: The worked solution.
        rate: Probability that a step is repeated.
        generator: Source of randomness.

    Returns:
        The solution with repeated steps.
    """
    if rate == 0:
        return solution
    head, steps, tail = re.fullmatch(r"(<think>)(.*)(</think>.*)", solution).groups()  # type: ignore[union-attr]
    repeated_steps = []
    for step in steps.split(" "):
        repeated_steps.append(step)
        if generator.random() < rate:
            repeats = 1
            while repeats < MAX_REPEATS and generator.random() < 0.9:
                repeats += 1
            repeated_steps += [step] * repeats
    return f"{head}{' '.join(repeated_steps)}{tail}"
