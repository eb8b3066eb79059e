"""What a teacher server is asked about a sequence, what it answers, and checks of the numbers.

Does not import torch. Shapes: n positions of a sequence, K most probable ids and C chosen ids per
position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput

MIN_LOGPROB = -9999.0
"""The value that vLLM returns for a log-probability of minus infinity."""
PADDING_ID = -1
"""Marks an absent id among the chosen ones."""
MAX_EXCESS = 1e-3
"""Excess of a probability, or of a sum of them, over 1 that is rounding."""
MAX_SPLIT = 1e-3
"""Difference in nats between two values of one id in one answer that is rounding."""


def no_chosen_ids(count: int) -> NDArray[np.int64]:
    """Return the (count, 0) chosen ids of positions at which none are asked for."""
    return np.zeros((count, 0), np.int64)


@dataclass(frozen=True, eq=False)
class ScoreQuery:
    """What is asked about one sequence."""

    ids: Sequence[int]
    """Token ids of the sequence."""
    positions: Sequence[int]
    """The n positions to score, ascending, from 1 on."""
    k: int
    """Number of most probable ids per position."""
    chosen_ids: NDArray[np.int64]
    """(n, C) further ids to score, PADDING_ID where there is none; no id twice at a position."""

    @property
    def has_chosen(self) -> bool:
        """Whether any id is chosen."""
        return bool((self.chosen_ids != PADDING_ID).any())

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(n,) tokens at the positions."""
        return np.asarray(self.ids, np.int64)[list(self.positions)]


@dataclass(frozen=True, eq=False)
class PositionLogprobs:
    """The teacher's log-probabilities at n positions of a sequence.

    Natural logarithms, float32 as the server computed them.
    """

    ids: NDArray[np.int64]
    """(n, K) most probable token ids, in descending order."""
    logp: NDArray[np.float32]
    """(n, K) log-probabilities of `ids`."""
    sampled: NDArray[np.float32]
    """(n,) log-probability of the token at the position."""
    chosen_logp: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """(n, C) log-probabilities of the chosen ids, 0 at padding."""


def check_logprobs(
    positions: Sequence[int],
    logp: NDArray[np.float64],
    sampled: NDArray[np.float64],
    *,
    excluded: str,
) -> None:
    """Reject values that are not log-probabilities of one softmax, and probabilities of 0.

    Args:
        positions: The n positions, for messages.
        logp: (n, K) values of different ids.
        sampled: (n,) values of the tokens at the positions.
        excluded: Remedy for a probability of 0.

    Raises:
        InvalidInput: Names the first position with such a value, and the cause.
    """
    mass = np.exp(logp.clip(max=1.0)).sum(1)
    for invalid, reason in (
        (np.isnan(sampled) | np.isnan(logp).any(1), "not a number"),
        (
            (sampled <= MIN_LOGPROB) | (logp <= MIN_LOGPROB).any(1),
            "a probability of 0: the teacher excludes token ids, by a logits mask or a padded "
            f"head; {excluded}",
        ),
        (
            (sampled > MAX_EXCESS) | (mass > 1 + MAX_EXCESS),
            "probabilities sum to more than 1, so these are not log-probabilities; start the "
            "server without --logprobs-mode raw_logits",
        ),
    ):
        if invalid.any():
            raise InvalidInput(f"position {positions[int(invalid.argmax())]}: {reason}")


def check_chosen(
    query: ScoreQuery, values: NDArray[np.float64], sampled: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Check the log-probabilities of chosen ids.

    A token that is among the chosen ids was scored twice; that the two values agree shows that the
    values are in the order of the ids and belong to the position.

    Args:
        query: The question.
        values: (n, C) values of the chosen ids; anything at padding.
        sampled: (n,) values of the tokens at the positions.

    Returns:
        (n, C) log-probabilities, 0 at padding.

    Raises:
        InvalidInput: A value is not a log-probability, or an id has two; names the position.
    """
    present = query.chosen_ids != PADDING_ID
    logp = np.where(present, values, 0.0)
    check_logprobs(
        query.positions,
        np.where(present, values, -1e3),
        sampled,
        excluded="use a support of the teacher's ids, or a teacher that can produce every id",
    )
    twice = present & (query.chosen_ids == query.tokens[:, None])
    for row, column in np.argwhere(twice).tolist():
        token = int(query.tokens[row])
        check_split(token, sampled[row], logp[row, column], query.positions[row])
    return logp.astype(np.float32)


def check_split(token: int, first: float, second: float, position: int) -> None:
    """Check that an answer gives one id one log-probability.

    Args:
        token: The id.
        first: One of its values.
        second: The other.
        position: The position, for messages.

    Raises:
        InvalidInput: They differ by more than MAX_SPLIT.
    """
    if abs(first - second) > MAX_SPLIT:
        raise InvalidInput(
            f"position {position}: the id {token} has the two log-probabilities {first:.4g} and "
            f"{second:.4g}; are the values in another order than the ids, or of another position?"
        )
