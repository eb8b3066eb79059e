"""Lengths of a pair's responses in tokens, and in places for tags, by number of steps.

A token is a byte, a think tag or an end token. A response of n steps is a think tag, n lines
separated by spaces, a think tag, the digit of the answer and an end token; it has n + 1 places for
tags, one before every line and one behind the last.
"""

from collections.abc import Sequence
from functools import cache

from opd.data import chain_task

LINE_TOKENS = 12.5
"""Mean tokens of a line with its space, without the digits of its number."""
LONGEST_LINE = 13
"""Largest number of tokens of a line with its space, without the digits of its number."""
FRAME_TOKENS = 3
"""Tokens of a response beside lines with their spaces: two tags, answer and end, less one space."""


def step_range(response_tokens: int) -> range:
    """Return the numbers of steps of the problems with this typical response length.

    Around the number of steps that comes nearest to it, from two thirds of that number.

    Args:
        response_tokens: Typical length of a response in tokens.

    Returns:
        The numbers of steps, rising.
    """
    num_steps, tokens = 0, float(FRAME_TOKENS)
    while tokens < response_tokens:
        num_steps += 1
        tokens += LINE_TOKENS + len(str(num_steps))
    excess = (tokens - response_tokens) / (LINE_TOKENS + len(str(num_steps)))
    centre = num_steps - excess
    fewest = round(centre * 2 / 3)
    return range(fewest, round(2 * centre) - fewest + 1)


def fewest_places(steps: Sequence[int]) -> int:
    """Return the number of places for tags of the shortest of responses of these steps."""
    return min(steps) + 1


def tokens_for_places(num_places: float) -> int:
    """Return the smallest response length with at least this many places for tags everywhere."""
    return next(n for n in range(64, 1025) if fewest_places(step_range(n)) >= num_places)


def tag_probabilities(num_tags: float, num_places: int) -> list[float]:
    """Return the probability of a tag in each place of a response.

    A style is certain of its tags: in the order start, end, and then the places between them, the
    first floor(num_tags) have a tag, and the next one has it with probability num_tags -
    floor(num_tags).

    Args:
        num_tags: Expected number of tags.
        num_places: Places of the response.

    Returns:
        The probabilities, whose sum is the smaller of `num_tags` and `num_places`.
    """
    order = dict.fromkeys((0, num_places - 1, *range(1, num_places - 1)))
    probability_by_place = {
        place: min(1.0, max(0.0, num_tags - rank)) for rank, place in enumerate(order)
    }
    return [probability_by_place[place] for place in range(num_places)]


@cache
def shortest_response(steps: range) -> int:
    """Return the number of tokens of the shortest right solution."""
    prompts = chain_task.all_prompts(steps[:1])
    frame = len("<think></think>") - 2
    return min(len(chain_task.solve(prompt)[1]) - frame for prompt in prompts) + 1


def longest_response(steps: range, tag_tokens: int) -> int:
    """Return an upper bound of the number of tokens of a solution with a tag in every place.

    Args:
        steps: Numbers of steps.
        tag_tokens: Tokens of a tag; 0 for solutions without tags.

    Returns:
        The bound.
    """
    num_steps = steps[-1]
    lines = sum(LONGEST_LINE + len(str(number)) for number in range(1, num_steps + 1))
    return FRAME_TOKENS + lines + tag_tokens * (num_steps + 1)
