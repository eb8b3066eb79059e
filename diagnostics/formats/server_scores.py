"""Log-probabilities in the answers of inference servers: of the tokens, and of K ids per position.

A server reports one model. Whose role it has is the reader's choice: the sampler where it generated
the response, the teacher where it scored a given one. Shapes: T response positions, K ids.
"""

from collections.abc import Sequence
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.formats.dump_format import Row, Scores
from diagnostics.io.files import short_repr

LOWEST_LOGP = -998.0
"""Lower values in a top-K list mark ids without a log-probability; they do not count."""

GENERATED_NOTE = (
    "servers report log-probabilities of the raw logits unless told otherwise, which are those of "
    "the sampler's distribution at temperature 1 and top-p 1 only"
)


def score_columns(logps: Sequence[Any] | None, scores: Scores) -> Row:
    """Return the column of the tokens' log-probabilities, (T,), for a role; empty without them."""
    return {} if logps is None else {f"{scores}_logp": list(logps)}


def support_columns(
    positions: Sequence[dict[int, float]], tokens: Sequence[Any], scores: Scores
) -> Row:
    """Return the columns of a support from the ids of each position.

    Some servers add the token itself where it is not among the K most probable ids; it is left out,
    so that all positions have K.

    Args:
        positions: T objects, id -> log-probability; they may have different numbers of ids.
        tokens: The T tokens.
        scores: The model that they are the most probable ids of.

    Returns:
        Columns of `support`, padded to the widest position with ids that do not count; empty if no
        position has two ids, which is no more than the sampled token.
    """
    lists = [
        sorted((x for x in ids.items() if x[1] > LOWEST_LOGP), key=lambda x: -x[1])
        for ids in positions
    ]
    smallest = min(map(len, lists), default=0)
    lists = [
        ids[:-1] if len(ids) == smallest + 1 and ids[-1][0] == token else ids
        for ids, token in zip(lists, tokens, strict=True)
    ]
    width = max(map(len, lists), default=0)
    if width < 2:
        return {}
    role = "teacher" if scores == "teacher" else "student"
    padded = [[*ids, *[(0, 0.0)] * (width - len(ids))] for ids in lists]
    return {
        "support.ids": [[i for i, _ in ids] for ids in padded],
        f"support.{role}_logp": [[logp for _, logp in ids] for ids in padded],
        "support.present": [[k < len(ids) for k in range(width)] for ids in lists],
        "support.source": role,
    }


def require_token(ids: dict[int, float], token: Any, position: int, location: str) -> float:
    """Return the log-probability of the token of a position.

    Args:
        ids: Id -> log-probability at the position.
        token: The token there.
        position: Index of the position, for the message.
        location: Beginning of the message.

    Returns:
        The log-probability.

    Raises:
        InvalidInput: The position has no entry for the token: ids and log-probabilities are shifted
            against each other.
    """
    if token not in ids:
        raise InvalidInput(
            f"{location}: position {position} has log-probabilities of {short_repr(sorted(ids))} "
            f"and not of its token {short_repr(token)}; tokens and log-probabilities are shifted "
            "against each other"
        )
    return ids[token]
