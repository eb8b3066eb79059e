"""SGLang's generate route: log-probabilities of most probable ids and of chosen ids.

    python -m sglang.launch_server --model-path TEACHER

`POST /generate` with `return_logprob` returns, from `logprob_start_len` on, the log-probability of
each input token, the `top_logprobs_num` most probable ids, and the ids of `token_ids_logprob`, each
as [log-probability, id, text]. The first entry of each list is null, because nothing predicts that
token. The ids are one list for the whole request, so a sequence is asked for the union of the
chosen ids of its positions: the response grows with positions times different ids, at most with the
square of the length.

SGLang reports the last id of its vocabulary as 0 among the input tokens; the largest token is
therefore asked for as a chosen id too.

Does not import torch. Shapes: n positions of a sequence, K most probable ids and C chosen ids per
position, U different ids of a request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.io.files import has_type, short_repr
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.position_logprobs import (
    PADDING_ID,
    PositionLogprobs,
    ScoreQuery,
    check_chosen,
    check_logprobs,
    check_split,
)
from opd.serving.vllm_protocol import (
    MAX_ENTRY_BYTES,
    OVERHEAD_BYTES,
    describe_answer,
    explain_mismatch,
)

PATH = "/generate"


def score_sglang(
    endpoint: JsonEndpoint,
    model: str,
    queries: Sequence[ScoreQuery],
    vocabulary: int,
    description: str,
) -> list[PositionLogprobs]:
    """Score one sequence at its most probable ids and at chosen ids.

    Args:
        endpoint: The server's address without /v1.
        model: Name of the model; SGLang serves one.
        queries: One query.
        vocabulary: Vocabulary size of the student.
        description: What is requested, for messages.

    Returns:
        Its log-probabilities.

    Raises:
        OperationFailed: The server does not respond within the timeout.
        InvalidInput: The server refuses, or its response does not match the request; names the
            position.
    """
    (query,) = queries
    ids = request_ids(query)
    start = query.positions[0] - 1
    payload = {
        "input_ids": list(query.ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": query.k,
        "token_ids_logprob": ids,
        "return_text_in_logprobs": False,
        "stream": False,
    }
    num_entries = (len(query.ids) - start) * (1 + query.k + len(ids))
    answer = endpoint.request(
        PATH,
        payload,
        max_bytes=num_entries * MAX_ENTRY_BYTES + OVERHEAD_BYTES,
        description=description,
    )
    with explain_mismatch(endpoint, description):
        return [read_sglang(answer, query, ids, vocabulary)]


def request_ids(query: ScoreQuery) -> list[int]:
    """Return the U different ids of a request: all that are chosen, and the largest token."""
    present = query.chosen_ids[query.chosen_ids != PADDING_ID]
    return [int(v) for v in np.union1d(present, query.tokens.max())]


def read_sglang(
    answer: Mapping[str, Any], query: ScoreQuery, ids: Sequence[int], vocabulary: int
) -> PositionLogprobs:
    """Parse the response to one sequence.

    Args:
        answer: The JSON of the response.
        query: What was asked.
        ids: The U ids of the request, ascending.
        vocabulary: Vocabulary size of the student.

    Returns:
        The log-probabilities.

    Raises:
        InvalidInput: The response lacks a field, is of another sequence, has fewer, other or
            repeated ids, or values that are not log-probabilities.
    """
    fields = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(fields, dict):
        raise InvalidInput(f"it has no meta_info, but is {describe_answer(answer)}")
    if fields["prompt_tokens"] != len(query.ids):
        raise InvalidInput(
            f"it is of {fields['prompt_tokens']} tokens, but {len(query.ids)} were sent; is the "
            "server's --context-length too short?"
        )
    start = query.positions[0] - 1
    size = len(query.ids) - start

    def entries_of(name: str) -> list[Any]:
        entries = fields.get(name)
        if not isinstance(entries, list) or len(entries) != size:
            raise InvalidInput(
                f"its {name} are {short_repr(entries)}, expected a list of {size} positions; the "
                "server must be SGLang with the fields of its /generate route"
            )
        return entries

    tokens = entries_of("input_token_logprobs")
    chosen_entries = entries_of("input_token_ids_logprobs")
    top_entries = entries_of("input_top_logprobs") if query.k else [None] * size
    count, columns = len(query.positions), {v: u for u, v in enumerate(ids)}
    sampled, values = np.empty(count), np.empty((count, len(ids)))
    top_ids, top_logp = np.empty((count, query.k), np.int64), np.empty((count, query.k))
    for i, (position, token) in enumerate(zip(query.positions, query.tokens.tolist(), strict=True)):
        entry_ids, entry_logp = read_entries(chosen_entries[position - start], position)
        check_ids(entry_ids, ids, position)
        values[i] = entry_logp
        (reported_id,), (sampled[i],) = read_entries([tokens[position - start]], position)
        expected = entry_logp[columns[token]] if token in columns else sampled[i]
        if reported_id != token and not (reported_id == 0 and token == ids[-1]):
            raise InvalidInput(
                f"position {position}: the input token is {reported_id}, but {token} was sent; are "
                "these values of another row?"
            )
        if reported_id != token:
            sampled[i] = expected
        check_split(token, sampled[i], expected, position)
        if query.k:
            top = read_entries(top_entries[position - start], position, query.k)
            order = np.argsort(-top[1], kind="stable")
            top_ids[i], top_logp[i] = np.array(top[0])[order], top[1][order]
    check_logprobs(
        query.positions, top_logp, sampled, excluded="lower support_k, or mask such tokens"
    )
    if top_ids.size and not 0 <= top_ids.min() <= top_ids.max() < vocabulary:
        raise InvalidInput(
            f"the teacher's top-K contains the id {top_ids.max()}, but the student has "
            f"{vocabulary} ids; lower support_k, or use a teacher with the student's vocabulary"
        )
    index = np.searchsorted(np.array(ids), query.chosen_ids.clip(min=ids[0]))
    chosen_logp = check_chosen(query, np.take_along_axis(values, index, 1), sampled)
    return PositionLogprobs(
        top_ids, top_logp.astype(np.float32), sampled.astype(np.float32), chosen_logp
    )


def read_entries(
    entries: Any, position: int, count: int | None = None
) -> tuple[list[int], NDArray[np.float64]]:
    """Parse entries [log-probability, id, text] of one position.

    Args:
        entries: The entries.
        position: The position, for messages.
        count: Expected number; None for any.

    Returns:
        The ids and their log-probabilities.

    Raises:
        InvalidInput: An entry is malformed, ids are repeated, or there are fewer or more.
    """
    if not isinstance(entries, list) or (count is not None and len(entries) != count):
        found = f"{len(entries)} entries" if isinstance(entries, list) else short_repr(entries)
        raise InvalidInput(f"position {position}: {found}, expected {count or 'a list'}")
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) >= 2 and has_type(entry[1], int)):
            raise InvalidInput(
                f"position {position}: {short_repr(entry)} is no log-probability with its id"
            )
        if not has_type(entry[0], float):
            raise InvalidInput(
                f"position {position}, id {entry[1]}: {short_repr(entry[0])} is not a "
                "log-probability"
            )
    ids = [entry[1] for entry in entries]
    if len(set(ids)) < len(ids):
        raise InvalidInput(f"position {position}: an id is repeated among {ids[:20]}")
    return ids, np.array([entry[0] for entry in entries], np.float64)


def check_ids(actual: Sequence[int], expected: Sequence[int], position: int) -> None:
    """Check that a position has the ids that were chosen, in their order.

    Args:
        actual: Ids of the response.
        expected: Ids of the request.
        position: The position, for messages.

    Raises:
        InvalidInput: Ids are missing, are others, or have another order.
    """
    if list(actual) == list(expected):
        return
    missing = sorted(set(expected) - set(actual))
    if missing:
        raise InvalidInput(
            f"position {position}: {len(actual)} chosen ids instead of {len(expected)}; the id "
            f"{missing[0]} has no log-probability"
        )
    raise InvalidInput(
        f"position {position}: the chosen ids are {list(actual)[:20]} instead of "
        f"{list(expected)[:20]}, other ids or in another order"
    )
