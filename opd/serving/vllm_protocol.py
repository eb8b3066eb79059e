"""Strict parsing of vLLM server responses: models, and log-probabilities of prompt tokens.

Does not import torch. Shapes: n positions of a sequence, K token ids per position.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from diagnostics.errors import InvalidInput
from diagnostics.io.files import TYPE_NAMES, has_type, short_repr
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.position_logprobs import PositionLogprobs, check_logprobs

T = TypeVar("T")
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")
TOKEN_IDS = re.compile(rf"(?:{TOKEN_ID.pattern})(?:,(?:{TOKEN_ID.pattern}))*")


def read_row(
    choice: Mapping[str, Any],
    row: Sequence[int],
    positions: Sequence[int],
    k: int,
    vocabulary: int,
) -> PositionLogprobs:
    """Parse the log-probabilities of one sequence.

    Args:
        choice: An element of "choices" in the response.
        row: The token ids that were sent.
        positions: Positions of the sequence to read, from 1 on.
        k: Number of most probable ids per position.
        vocabulary: Vocabulary size of the student.

    Returns:
        The log-probabilities at `positions`.

    Raises:
        InvalidInput: The response is of another sequence, is incomplete, or has values that are not
            log-probabilities.
    """
    entries = check_row(choice, row)
    parsed = [read_position(entries[i], row[i], i, k) for i in positions]
    ids = np.array([x[0] for x in parsed], np.int64).reshape(len(parsed), k)
    logp = np.array([x[1] for x in parsed], np.float64).reshape(len(parsed), k)
    sampled = np.array([x[2] for x in parsed], np.float64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise InvalidInput(
            f"the teacher's top-K contains the id {ids.max()}, but the student has {vocabulary} "
            "ids; lower support_k, or use a teacher with the student's vocabulary"
        )
    check_logprobs(
        positions,
        logp,
        sampled,
        excluded="lower support_k, or mask tokens that the teacher cannot produce",
    )
    return PositionLogprobs(ids, logp.astype(np.float32), sampled.astype(np.float32))


def check_row(choice: Mapping[str, Any], row: Sequence[int]) -> list[Any]:
    """Return the log-probabilities of a sequence's positions, checked to be of this sequence.

    Args:
        choice: An element of "choices" in the response.
        row: The token ids that were sent.

    Returns:
        An entry for each position.

    Raises:
        InvalidInput: The response has no log-probabilities, or is of another sequence.
    """
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise InvalidInput(
            "it has no prompt_logprobs (log-probabilities of the prompt tokens); the server must "
            "be vLLM or return the same fields"
        )
    if choice.get("prompt_token_ids") not in (None, list(row)):
        raise InvalidInput("its prompt_token_ids differ from the ids that were sent")
    if len(entries) != len(row):
        raise InvalidInput(f"{len(entries)} positions for {len(row)} ids")
    return entries


def read_position(
    entries: Any, token: int, position: int, k: int
) -> tuple[list[int], list[float], float]:
    """Parse the log-probabilities at one position.

    The server adds the entry of the prompt token when it is not among the K most probable.

    Args:
        entries: Token id (as text) to its entry with "logprob" and "rank".
        token: The prompt token at the position.
        position: The position, for messages.
        k: Number of most probable ids that were requested.

    Returns:
        The K most probable ids, their log-probabilities, and the log-probability of `token`.

    Raises:
        InvalidInput: `token` is missing, there are not K entries, or an id or value is malformed.
    """
    if not isinstance(entries, dict) or str(token) not in entries:
        raise InvalidInput(
            f"position {position}: the prompt token {token} has no log-probability; are these "
            "values of another row?"
        )
    if len(entries) not in (k, k + 1):
        raise InvalidInput(
            f"position {position}: {len(entries)} log-probabilities, expected {k} or {k + 1}; "
            f"start the server with --max-logprobs {k} or more"
        )
    values: list[Any] = [
        x.get("logprob") if isinstance(x, dict) else None for x in entries.values()
    ]
    if TOKEN_IDS.fullmatch(",".join(entries)) is None or set(map(type, values)) != {float}:
        check_entries(entries, position)
    # by descending probability, ties by the server's rank
    ranks = [entry.get("rank") or 0 for entry in entries.values()]
    ordered = sorted(zip([-x for x in values], ranks, range(len(values)), entries, strict=True))[:k]
    logp = [-negative for negative, *_ in ordered]
    return [int(v) for *_, v in ordered], logp, entries[str(token)]["logprob"]


def check_entries(entries: Mapping[str, Any], position: int) -> None:
    """Check each id and log-probability at a position.

    Args:
        entries: Token id (as text) to its entry.
        position: The position, for messages.

    Raises:
        InvalidInput: An id or value is malformed; names it.
    """
    for v, entry in entries.items():
        value = entry.get("logprob") if isinstance(entry, dict) else None
        if TOKEN_ID.fullmatch(v) is None:
            raise InvalidInput(f"position {position}: {short_repr(v)} is not a token id")
        if not has_type(value, float):
            raise InvalidInput(
                f"position {position}, id {v}: {short_repr(value)} is not a log-probability"
            )


MAX_ENTRY_BYTES, OVERHEAD_BYTES = 512, 1 << 20
"""Maximum size in a response of one id's log-probability, and of everything else."""


def request_completions(
    endpoint: JsonEndpoint,
    payload: Mapping[str, Any],
    parsers: Sequence[Callable[[Mapping[str, Any]], T]],
    *,
    num_entries: int,
    description: str,
) -> list[T]:
    """Send one request to /completions and parse its choices.

    Args:
        endpoint: The server, with an address that ends in /v1.
        payload: The request, with the name of the "model".
        parsers: For each row of the request, in order, a function that parses its choice.
        num_entries: Maximum number of log-probabilities in the response.
        description: What is requested, for messages.

    Returns:
        What each parser returns.

    Raises:
        OperationFailed: The server does not respond within the timeout.
        InvalidInput: The response is of another model or of other rows, or a parser rejects it.
    """
    max_bytes = num_entries * MAX_ENTRY_BYTES + OVERHEAD_BYTES
    answer = endpoint.request("/completions", payload, max_bytes=max_bytes, description=description)
    with explain_mismatch(endpoint, description):
        if missing_fields := sorted({"model", "choices"} - set(answer)):
            raise InvalidInput(f"it lacks {missing_fields[0]!r}: {describe_answer(answer)}")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        rows = [choice["index"] for choice in choices]
        if answer["model"] != payload["model"] or rows != list(range(len(parsers))):
            raise InvalidInput(
                f"it is of model {answer['model']!r} and rows {rows}, requested were "
                f"{len(parsers)} rows of {payload['model']!r}"
            )
        return [parse(choice) for parse, choice in zip(parsers, choices, strict=True)]


@contextmanager
def explain_mismatch(endpoint: JsonEndpoint, description: str) -> Iterator[None]:
    """Turn every error of parsing a response into one that names server and request.

    Args:
        endpoint: The server.
        description: What was requested.

    Yields:
        Nothing.

    Raises:
        InvalidInput: The block raises an error.
    """
    try:
        yield
        return
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    raise InvalidInput(  # not chained: the exception may quote the server, and so the API key
        endpoint.redacted(
            f"{endpoint.url} ({description}): the response does not match the request: {problem}"
        )
    )


def select_model(endpoint: JsonEndpoint, name: str) -> dict[str, Any]:
    """Return a server's entry for one of its models.

    Args:
        endpoint: The server, with an address that ends in /v1.
        name: Name of the model; "" for the only one.

    Returns:
        The entry of /v1/models, with "id" and possibly "max_model_len".

    Raises:
        InvalidInput: There is no such model, several models and no name, or the response is
            malformed.
    """
    listing = endpoint.request("/models", max_bytes=OVERHEAD_BYTES)
    models = answer_field(endpoint, listing, "data", list, "/models")
    for entry in models:
        answer_field(endpoint, entry, "id", str, "/models")
        if not isinstance(entry.get("max_model_len"), int | None):
            raise InvalidInput(
                endpoint.redacted(
                    f"{endpoint.url}/models: max_model_len is "
                    f"{short_repr(entry['max_model_len'])}, expected an integer"
                )
            )
    entries = {entry["id"]: entry for entry in models}
    if not name and len(entries) == 1:
        (name,) = entries
    if name not in entries:
        known_names = ", ".join(sorted(entries)) or "none"
        raise InvalidInput(
            endpoint.redacted(
                f"{endpoint.url} has no model {name!r}; append the name of one of its models to "
                f"the address, {endpoint.url}#MODEL: {known_names[:300]}"
            )
        )
    return entries[name]


def check_is_vllm(endpoint: JsonEndpoint, entry: Mapping[str, Any]) -> None:
    """Refuse a server that says it is another engine.

    Args:
        endpoint: The server, for messages.
        entry: Its entry of a model in /v1/models.

    Raises:
        InvalidInput: It names an engine that has none of the routes of vLLM's development mode.
    """
    owner = entry.get("owned_by")
    if isinstance(owner, str) and owner in OTHER_ENGINES:
        raise InvalidInput(
            f"{endpoint.url} is {OTHER_ENGINES[owner]}, but a {endpoint.role} server must be vLLM "
            "0.32 or later: it has to load the student's weights (/collective_rpc) and return the "
            "token ids of its responses (return_token_ids)"
        )


def require_fields(fields: Any, names: Sequence[str], place: str) -> None:
    """Check that a part of a response has the fields that vLLM returns.

    Args:
        fields: The part.
        names: Names of the fields.
        place: What it is a part of, for messages.

    Raises:
        InvalidInput: Names every field that is absent or null.
    """
    present = fields if isinstance(fields, dict) else {}
    absent = [name for name in names if present.get(name) is None]
    if absent:
        known = ", ".join(map(str, present))[:200] or short_repr(fields)
        raise InvalidInput(
            f"its {place} lacks {', '.join(absent)}, which vLLM returns, and has {known}; the "
            "server must be vLLM 0.32 or later"
        )


def answer_field(endpoint: JsonEndpoint, answer: Any, name: str, kind: type, path: str) -> Any:
    """Return a field of a server's response, checked for the type that vLLM returns.

    Args:
        endpoint: The server, for messages.
        answer: The parsed JSON response.
        name: Name of the field.
        kind: Type of its value.
        path: Path of the request, for messages.

    Returns:
        The value of the field.

    Raises:
        InvalidInput: The field is missing or has another type; the server is probably not vLLM.
            Names the kind of server where it can be recognised.
    """
    value = answer.get(name) if isinstance(answer, dict) else None
    if isinstance(value, kind):
        return value
    raise InvalidInput(
        endpoint.redacted(
            f"{endpoint.url}{path}: the response has no field {name!r} ({TYPE_NAMES[kind]}), which "
            f"vLLM returns, but is {describe_answer(answer)}; the {endpoint.role} must be a vLLM "
            "server, which returns the log-probabilities of prompt tokens (prompt_logprobs)"
        )
    )


def describe_answer(answer: Any) -> str:
    """Describe an unexpected response and the kind of server that returns it, if known."""
    if not isinstance(answer, dict):
        return short_repr(answer)
    servers = [server for name, server in SERVER_BY_FIELD.items() if name in answer]
    hint = f" (as returned by {servers[0]})" if servers else ""
    return f"an object with the fields {', '.join(map(str, answer))}"[:200] + hint


OTHER_ENGINES = {"sglang": "SGLang", "llamacpp": "llama.cpp"}
"""What other engines call themselves in /v1/models, and their names."""
SERVER_BY_FIELD = {"content": "llama.cpp", "text": "SGLang", "timings": "llama.cpp"}
"""Fields that vLLM's responses to /detokenize and /completions do not have, and whose they are."""
