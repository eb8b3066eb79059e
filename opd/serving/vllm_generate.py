"""vLLM's token-in-token-out route: log-probabilities of ids that the client chooses.

    python -m vllm.entrypoints.openai.api_server --model TEACHER --enable-scale-out \
        --max-logprobs 64

`POST /inference/v1/generate` takes the ids of one sequence and sampling parameters. With
`prompt_logprob_token_ids`, a list of ids for every prediction from `prompt_logprob_start` on, -1
where there is none, it returns `prompt_token_id_logprobs`: a float32 array in NumPy's file format,
in base64. Row i holds the log-probabilities of its ids as predictions of the token at
`prompt_logprob_start` + i + 1; padding is minus infinity. vLLM 0.32 does this with the model runner
V2 only, which needs Triton, so not on a CPU; the route exists with `--enable-scale-out`.

Does not import torch. Shapes: n positions of a sequence, K most probable ids and C chosen ids per
position.
"""

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.position_logprobs import PADDING_ID, PositionLogprobs, ScoreQuery, check_chosen
from opd.serving.vllm_protocol import (
    MAX_ENTRY_BYTES,
    OVERHEAD_BYTES,
    describe_answer,
    explain_mismatch,
    read_row,
)

PATH = "/inference/v1/generate"
MAX_TOP_K_GAP = 0.25
"""Mean difference in nats between the two values of the ids that one answer scores as most probable
and as chosen; half-precision products of other batches differ by a few hundredths."""
SCORE_BYTES = 16
"""Maximum size of one float32 in base64, with room for padding."""


def score_generate(
    endpoint: JsonEndpoint,
    model: str,
    queries: Sequence[ScoreQuery],
    vocabulary: int,
    description: str,
) -> list[PositionLogprobs]:
    """Score one sequence at chosen ids, and at its most probable ids if the query has some.

    Args:
        endpoint: The server's address without /v1.
        model: Name of the model.
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
    payload = generate_payload(model, query)
    num_rows, num_ids = len(query.ids) - query.positions[0], query.chosen_ids.shape[1] + 1
    max_bytes = (
        len(query.ids) * (query.k + 1) * MAX_ENTRY_BYTES
        + num_rows * num_ids * SCORE_BYTES
        + OVERHEAD_BYTES
    )
    answer = endpoint.request(PATH, payload, max_bytes=max_bytes, description=description)
    with explain_mismatch(endpoint, description):
        return [read_generate(answer, model, query, vocabulary)]


def generate_payload(model: str, query: ScoreQuery) -> dict[str, Any]:
    """Return the request of one sequence.

    The token at each position is scored after the chosen ids. Positions without a question in
    between have padding only.

    Args:
        model: Name of the model.
        query: What to score.

    Returns:
        The body of the request.
    """
    start = query.positions[0] - 1
    rows = [[PADDING_ID]] * (len(query.ids) - 1 - start)
    row_ids = np.concatenate([query.chosen_ids, query.tokens[:, None]], 1).tolist()
    for position, row in zip(query.positions, row_ids, strict=True):
        rows[position - 1 - start] = row
    parameters: dict[str, Any] = {
        "max_tokens": 1,
        "temperature": 1.0,
        "detokenize": False,
        "prompt_logprob_token_ids": rows,
        "prompt_logprob_start": start,
    }
    if query.k:
        parameters["prompt_logprobs"] = query.k
    return {
        "model": model,
        "token_ids": list(query.ids),
        "sampling_params": parameters,
        "return_token_ids": True,
    }


def read_generate(
    answer: Mapping[str, Any], model: str, query: ScoreQuery, vocabulary: int
) -> PositionLogprobs:
    """Parse the response to one sequence.

    Args:
        answer: The JSON of the response.
        model: Name of the model that was asked.
        query: What was asked.
        vocabulary: Vocabulary size of the student.

    Returns:
        The log-probabilities.

    Raises:
        InvalidInput: The response is of another model or sequence, lacks the scores, or has values
            that are not log-probabilities.
    """
    encoded = answer.get("prompt_token_id_logprobs")
    if not isinstance(encoded, str):
        raise InvalidInput(
            "it has no prompt_token_id_logprobs (log-probabilities of chosen ids), which vLLM 0.32 "
            f"or later returns, but is {describe_answer(answer)}"
        )
    if answer["model"] != model or answer["prompt_token_ids"] != list(query.ids):
        raise InvalidInput(
            f"it is of model {short_repr(answer['model'])}, requested was {model!r}"
            if answer["model"] != model
            else "its prompt_token_ids differ from the ids that were sent"
        )
    start = query.positions[0] - 1
    shape = (len(query.ids) - 1 - start, query.chosen_ids.shape[1] + 1)
    rows = np.array(query.positions) - 1 - start
    values = decode_scores(encoded, shape)[rows].astype(np.float64)
    sampled = values[:, -1]
    chosen_logp = check_chosen(query, values[:, :-1], sampled)
    if query.k:
        row = list(query.ids)
        top = read_row(answer, row, query.positions, query.k, vocabulary)
        check_top_k(query, top, chosen_logp)
        return PositionLogprobs(top.ids, top.logp, sampled.astype(np.float32), chosen_logp)
    empty_ids, empty_logp = np.zeros((len(rows), 0), np.int64), np.zeros((len(rows), 0), np.float32)
    return PositionLogprobs(empty_ids, empty_logp, sampled.astype(np.float32), chosen_logp)


def decode_scores(encoded: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Decode an array that is sent as a NumPy file in base64.

    Args:
        encoded: The text.
        shape: Its expected shape.

    Returns:
        The array.

    Raises:
        InvalidInput: The text is no such file, or the array has another shape or type.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (binascii.Error, ValueError, OSError, EOFError) as error:
        raise InvalidInput(
            f"its scores are not a NumPy array in base64 ({type(error).__name__})"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
        kind = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise InvalidInput(
            f"its scores are {kind}, expected float32 {shape}: positions by ids, so ids or "
            "positions are missing or too many"
        )
    return array


def check_top_k(query: ScoreQuery, top: PositionLogprobs, chosen_logp: NDArray[np.float32]) -> None:
    """Compare the values of ids that are among the most probable and among the chosen ones.

    Args:
        query: What was asked.
        top: The most probable ids.
        chosen_logp: (n, C) log-probabilities of the chosen ids.

    Raises:
        InvalidInput: They differ, so that one of the two lists is of other positions or in another
            order; names the first position.
    """
    equal = query.chosen_ids[:, :, None] == top.ids[:, None, :]
    gaps = np.where(equal, np.abs(chosen_logp[:, :, None] - top.logp[:, None, :]), 0.0)
    if equal.any() and not gaps.sum() <= MAX_TOP_K_GAP * equal.sum():
        row = int((gaps > MAX_TOP_K_GAP).any((1, 2)).argmax())
        raise InvalidInput(
            f"position {query.positions[row]}: ids that are both among the most probable and among "
            f"the chosen ones have two log-probabilities, {gaps[row].max():.2g} nats apart; is one "
            "of the lists of another position or in another order?"
        )
