"""vLLM's completions route: log-probabilities of a server's own most probable ids, or of all ids.

    python -m vllm.entrypoints.openai.api_server --model TEACHER --max-logprobs 64

`POST /v1/completions` takes token ids and returns, for every one of them, its log-probability under
the full softmax at temperature 1 and the K most probable ids (`prompt_logprobs`); with
`prompt_logprobs` -1 and a server started with `--max-logprobs -1` those of the whole vocabulary,
among which any ids can be looked up. That takes some 80 bytes for every id of the vocabulary at
every token, so it is for small vocabularies.

Does not import torch. Shapes: n positions of a sequence, K most probable ids, C chosen ids and V
ids of the student per position.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from diagnostics.errors import InvalidInput
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.position_logprobs import (
    MAX_EXCESS,
    PositionLogprobs,
    ScoreQuery,
    check_chosen,
)
from opd.serving.vllm_protocol import (
    check_row,
    read_position,
    read_row,
    request_completions,
)

BYTES_PER_ID = 80
"""Size of one id's log-probability in JSON."""
MAX_WHOLE_BYTES = 1 << 17
"""Largest size of the distribution at one token, up to which whole distributions are requested."""
MAX_WHOLE_VOCABULARY = MAX_WHOLE_BYTES // BYTES_PER_ID


def score_top_k(
    endpoint: JsonEndpoint,
    model: str,
    queries: Sequence[ScoreQuery],
    vocabulary: int,
    description: str,
) -> list[PositionLogprobs]:
    """Score sequences at their most probable ids; no ids may be chosen.

    Args:
        endpoint: The server, with an address that ends in /v1.
        model: Name of the model.
        queries: The queries, all with the same K.
        vocabulary: Vocabulary size of the student.
        description: What is requested, for messages.

    Returns:
        The log-probabilities of each query.

    Raises:
        OperationFailed: The server does not respond within the timeout.
        InvalidInput: The server refuses, or its response does not match the request; names the
            position.
    """
    k = queries[0].k
    parsers = [
        partial(
            read_row, row=list(query.ids), positions=query.positions, k=k, vocabulary=vocabulary
        )
        for query in queries
    ]
    return request_completions(
        endpoint,
        completions_payload(model, queries, k),
        parsers,
        num_entries=sum(len(query.ids) for query in queries) * (k + 1),
        description=description,
    )


def score_whole(
    endpoint: JsonEndpoint,
    model: str,
    queries: Sequence[ScoreQuery],
    vocabulary: int,
    description: str,
) -> list[PositionLogprobs]:
    """Score sequences at chosen and most probable ids, found in distributions of all ids.

    Args:
        endpoint: The server, with an address that ends in /v1.
        model: Name of the model.
        queries: The queries.
        vocabulary: Vocabulary size of the student.
        description: What is requested, for messages.

    Returns:
        The log-probabilities of each query.

    Raises:
        OperationFailed: The server does not respond within the timeout.
        InvalidInput: The server refuses, or its response does not match the request; names the
            position.
    """
    return request_completions(
        endpoint,
        completions_payload(model, queries, -1),
        [partial(read_whole, query=query, vocabulary=vocabulary) for query in queries],
        num_entries=sum(len(query.ids) for query in queries) * 2 * MAX_WHOLE_VOCABULARY,
        description=description,
    )


def completions_payload(model: str, queries: Sequence[ScoreQuery], k: int) -> dict[str, Any]:
    """Return the request of some sequences with K most probable ids, -1 for all ids."""
    return {
        "model": model,
        "prompt": [list(query.ids) for query in queries],
        "prompt_logprobs": k,
        "max_tokens": 1,
        "temperature": 1.0,
        "return_token_ids": True,
    }


def read_whole(choice: Mapping[str, Any], query: ScoreQuery, vocabulary: int) -> PositionLogprobs:
    """Parse the distributions of one sequence.

    Args:
        choice: An element of "choices" in the response.
        query: What was asked.
        vocabulary: Vocabulary size V of the student; the server may have further ids.

    Returns:
        The log-probabilities.

    Raises:
        InvalidInput: The response is of another sequence, an id of the student has no
            log-probability, or the probabilities do not sum to 1.
    """
    entries = check_row(choice, query.ids)
    size = len(query.positions)
    ids, logp = np.empty((size, query.k), np.int64), np.empty((size, query.k))
    sampled, chosen_logp = np.empty(size), np.zeros(query.chosen_ids.shape)
    for i, (position, token) in enumerate(zip(query.positions, query.tokens, strict=True)):
        entry_ids, values, sampled[i] = read_position(
            entries[position], int(token), position, len(entries[position])
        )
        order = {v: rank for rank, v in enumerate(entry_ids)}
        absent = next((v for v in range(vocabulary) if v not in order), None)
        if absent is not None:
            raise InvalidInput(
                f"position {position}: the id {absent} has no log-probability, although all ids "
                "were requested; start the server with --max-logprobs -1"
            )
        mass = float(np.exp(np.array(values)).sum())
        if not abs(mass - 1) <= MAX_EXCESS:
            raise InvalidInput(
                f"position {position}: the probabilities of all ids sum to {mass:.4g}, not 1; "
                "start the server without --logprobs-mode raw_logits"
            )
        if query.k and max(entry_ids[: query.k]) >= vocabulary:
            raise InvalidInput(
                f"position {position}: the teacher's top-K contains the id "
                f"{max(entry_ids[: query.k])}, but the student has {vocabulary} ids; lower "
                "support_k, or use a teacher with the student's vocabulary"
            )
        ids[i], logp[i] = entry_ids[: query.k], values[: query.k]
        chosen_logp[i] = [values[order[v]] if v >= 0 else 0.0 for v in query.chosen_ids[i].tolist()]
    return PositionLogprobs(
        ids,
        logp.astype(np.float32),
        sampled.astype(np.float32),
        check_chosen(query, chosen_logp, sampled),
    )
