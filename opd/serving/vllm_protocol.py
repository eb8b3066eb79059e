"""Answers of a teacher's server, read strictly: log-probabilities of the ids that were sent.

Free of torch. Shapes: n positions of a sequence, K ids a position.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.io.files import has_type, short

ID = re.compile(r"0|[1-9][0-9]{0,8}")
CLAMPED = -9999.0
"""What vLLM writes for a log-probability of minus infinity."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What the teacher says of n positions of a sequence.

    ids (n, K): the most probable, in descending order; logp (n, K): of them; sampled (n,): of the
    id that stands there. Natural, float32 as the server computed them.
    """

    ids: NDArray[np.int64]
    logp: NDArray[np.float32]
    sampled: NDArray[np.float32]


def read_row(
    choice: Mapping[str, Any],
    row: Sequence[int],
    places: Sequence[int],
    k: int,
    vocabulary: int,
) -> Answer:
    """The numbers of one sequence.

    Raises:
      ValueError: they are of another sequence, or too few, or no log-probabilities.
    """
    told = choice.get("prompt_logprobs")
    if not isinstance(told, list):
        raise InvalidInput(
            "it has no prompt_logprobs, log-probabilities of the ids that were sent; the server "
            "must be vLLM's, or answer as it does"
        )
    if choice.get("prompt_token_ids") not in (None, list(row)):
        raise InvalidInput("its token ids are not those that were sent")
    if len(told) != len(row):
        raise InvalidInput(f"{len(told)} positions for {len(row)} ids")
    ids = np.empty((len(places), k), np.int64)
    logp = np.empty((len(places), k), np.float64)
    sampled = np.empty(len(places), np.float64)
    for i, place in enumerate(places):
        ids[i], logp[i], sampled[i] = read_position(told[place], row[place], place, k)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise InvalidInput(
            f"the teacher's top-K holds the id {ids.max()}, and the student has {vocabulary} ids; "
            "lower support_k, or take a teacher with the student's vocabulary"
        )
    _check_numbers(logp, sampled, places)
    return Answer(ids, logp.astype(np.float32), sampled.astype(np.float32))


def read_position(
    told: Any, token: int, place: int, k: int
) -> tuple[list[int], list[float], float]:
    """The K most probable ids, their log-probabilities, and that of the token which stands there.

    The server adds the token to its K where it is not among them.
    """
    if not isinstance(told, dict) or str(token) not in told:
        raise InvalidInput(
            f"position {place}: the id {token} that was sent has no log-probability; are these "
            "another row's?"
        )
    if len(told) not in (k, k + 1):
        raise InvalidInput(
            f"position {place}: {len(told)} log-probabilities where {k} or {k + 1} were asked; "
            f"start the server with --max-logprobs {k} or more"
        )
    for v, entry in told.items():
        value = entry.get("logprob") if isinstance(entry, dict) else None
        if ID.fullmatch(v) is None:
            raise InvalidInput(f"position {place}: {short(v)} is no token id")
        if not has_type(value, float):
            raise InvalidInput(f"position {place}, id {v}: {short(value)} is no log-probability")
    best = sorted(told.items(), key=_place)[:k]
    logp = [at["logprob"] for _, at in best]
    return [int(v) for v, _ in best], logp, told[str(token)]["logprob"]


def _place(entry: tuple[str, Any]) -> tuple[float, int]:
    """Descending probability, equal ones in the server's order of ranks."""
    at = entry[1]
    return -at["logprob"], at.get("rank") or 0


def _check_numbers(
    logp: NDArray[np.float64], sampled: NDArray[np.float64], places: Sequence[int]
) -> None:
    """Refuse what cannot be log-probabilities of one softmax, and impossible tokens."""
    mass = np.exp(logp.clip(max=1.0)).sum(1)
    for wrong, what in (
        (np.isnan(sampled) | np.isnan(logp).any(1), "not a number"),
        (
            (sampled <= CLAMPED) | (logp <= CLAMPED).any(1),
            "a probability of 0: the teacher excludes ids, by a mask on its logits or a head of "
            "padding; lower support_k, or mask what it cannot say",
        ),
        (
            (sampled > 1e-3) | (mass > 1.001),
            "probabilities beyond 1 in sum: these are no log-probabilities; start the server "
            "without --logprobs-mode raw_logits",
        ),
    ):
        if wrong.any():
            raise InvalidInput(f"position {places[int(wrong.argmax())]}: {what}")
