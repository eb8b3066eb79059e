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
from diagnostics.io.files import KINDS, has_type, short
from opd.serving.json_endpoint import JsonEndpoint

ID = re.compile(r"0|[1-9][0-9]{0,8}")
CLAMPED = -9999.0
"""What vLLM writes for a log-probability of minus infinity."""


@dataclass(frozen=True, eq=False)
class PositionLogprobs:
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
) -> PositionLogprobs:
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
    return PositionLogprobs(ids, logp.astype(np.float32), sampled.astype(np.float32))


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


ENTRY_BYTES, SPARE_BYTES = 512, 1 << 20
"""Most bytes of one id's log-probability in an answer, and of what stands around them."""


def chosen(endpoint: JsonEndpoint, name: str) -> dict[str, Any]:
    """The server's entry of the model of that name, or of its only one."""
    listed = endpoint.ask("/models", most=SPARE_BYTES)
    models = field(endpoint, listed, "data", list, "/models")
    for entry in models:
        field(endpoint, entry, "id", str, "/models")
        if not isinstance(entry.get("max_model_len"), int | None):
            raise InvalidInput(
                endpoint.redacted(
                    f"{endpoint.url}/models: max_model_len is {short(entry['max_model_len'])}, "
                    "expected a whole number"
                )
            )
    entries = {entry["id"]: entry for entry in models}
    if not name and len(entries) == 1:
        (name,) = entries
    if name not in entries:
        known = ", ".join(sorted(entries)) or "none"
        raise InvalidInput(
            endpoint.redacted(
                f"{endpoint.url} has no model {name!r}; name one of its own behind the address, "
                f"{endpoint.url}#MODEL: {known[:300]}"
            )
        )
    return entries[name]


def field(endpoint: JsonEndpoint, answer: Any, name: str, kind: type, path: str) -> Any:
    """A field of a server's answer, of the type that vLLM's has.

    Raises:
      InvalidInput: it lacks, or is of another type: another kind of server answers; says which
        where that can be told.
    """
    value = answer.get(name) if isinstance(answer, dict) else None
    if isinstance(value, kind):
        return value
    raise InvalidInput(
        endpoint.redacted(
            f"{endpoint.url}{path}: the answer has no {name!r}, {KINDS[kind]}, as vLLM's has, but "
            f"is {described(answer)}; the {endpoint.role} must be a server of vLLM's, which tells "
            "the log-probabilities of given ids (prompt_logprobs)"
        )
    )


def described(answer: Any) -> str:
    """What kind of answer came, and of which kind of server, if that can be told."""
    if not isinstance(answer, dict):
        return short(answer)
    known = [server for name, server in SERVERS.items() if name in answer]
    likely = f" (as of {known[0]})" if known else ""
    return f"an object with the fields {', '.join(map(str, answer))}"[:200] + likely


SERVERS = {"content": "llama.cpp", "text": "SGLang", "timings": "llama.cpp"}
"""Which server's answers to /detokenize, or to a question, have a field that vLLM's have not."""
