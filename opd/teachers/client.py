"""Client of a remote teacher: log-probabilities of token ids from a vLLM server.

    python -m vllm.entrypoints.openai.api_server --model TEACHER --max-logprobs 64

`/v1/completions` takes token ids and returns, for every one of them, its log-probability under the
full softmax at temperature 1 and the K most probable ids (`prompt_logprobs`). Does not import
torch.

A server cannot provide: log-probabilities of ids that were neither sampled nor among its own K
(supports "student" and "union"); full distributions (`full_` objectives, the local KL, entropies,
ranks); hidden states (the gradient probe); another temperature.

Shapes: L ids of a sequence, n of its positions, K ids per position.
"""

import json
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.io.files import short_repr
from opd.serving.fan_out import run_all
from opd.serving.fingerprint import TEACHER_TOLERANCE, check_same_model, probe_tokens
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.vllm_protocol import (
    MAX_ENTRY_BYTES,
    OVERHEAD_BYTES,
    PositionLogprobs,
    answer_field,
    read_row,
    request_completions,
    select_model,
)

PROBE_TOKENS = 32
MAX_ROWS_PER_REQUEST, MAX_TOKENS_PER_REQUEST = 4, 8192
"""Maximum number of sequences of one request, and of ids of a request with several sequences; a
response is held in memory."""
TEXT_CHUNK = 512
"""Number of ids whose text is compared at once."""
MULTISCRIPT_TEXT = " ".join(
    chr(c) for c in (*range(33, 127), *range(161, 0x2400, 11), *range(0x3041, 0xD7FF, 199))
)
"""Characters of many scripts, separated by spaces."""


class TeacherClient:
    """A teacher behind an address; built by `connect`, which checks it.

    Args:
        endpoint: The server.
        model: The name of the model in the server.
        limit: Maximum number of ids of a sequence, including one generated token; None: unknown.
        vocabulary: Number of ids of the student.
        concurrency: Number of concurrent requests.
    """

    def __init__(
        self,
        endpoint: JsonEndpoint,
        model: str,
        limit: int | None,
        vocabulary: int,
        concurrency: int,
    ) -> None:
        self.endpoint, self.model, self.limit = endpoint, model, limit
        self.vocabulary, self.concurrency = vocabulary, concurrency
        self.probe = probe_tokens(vocabulary, PROBE_TOKENS)
        self.fingerprint: NDArray[np.float32] | None = None

    def query(
        self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], k: int
    ) -> list[PositionLogprobs]:
        """Request the log-probabilities of all sequences.

        Afterwards the fingerprint is checked, so that a batch is never scored by a server that was
        restarted with another model.

        Args:
            rows: Token ids of each sequence.
            positions: The positions of each sequence to score, from 1 on.
            k: Number of most probable ids per position.

        Returns:
            The log-probabilities of each sequence, in order.

        Raises:
            OperationFailed: The server does not respond within the timeout, or is another model
                now.
            InvalidInput: A response does not match its request; names the row and the position.
        """
        scored_rows = [i for i, row_positions in enumerate(positions) if row_positions]
        logprobs = dict(
            zip(scored_rows, self._query_all(scored_rows, rows, positions, k), strict=True)
        )
        self.check_fingerprint()
        empty = PositionLogprobs(
            np.zeros((0, k), np.int64), np.zeros((0, k), np.float32), np.zeros(0, np.float32)
        )
        return [logprobs.get(i, empty) for i in range(len(rows))]

    def check_length(self, max_length: int) -> None:
        """Check that the server supports a sequence length.

        Args:
            max_length: Maximum length of prompt and response together, in tokens.

        Raises:
            InvalidInput: The server's maximum is lower.
        """
        if self.limit is not None and self.limit < max_length + 1:
            raise InvalidInput(
                f"{self.endpoint.url} supports at most {self.limit} tokens, but a prompt with its "
                f"response may have {max_length} and vLLM generates one more; start it with "
                f"--max-model-len {max_length + 1}, or lower max_prompt or max_response"
            )

    def check_fingerprint(self) -> NDArray[np.float32]:
        """Check that the server still is the same model.

        Returns:
            Log-probabilities of the probe tokens.

        Raises:
            OperationFailed: They differ from those of the first call.
        """
        (answer,) = self._query_rows([self.probe], [range(1, len(self.probe))], 0, "the probe")
        if self.fingerprint is None:
            self.fingerprint = answer.sampled
        self._compare(answer.sampled, self.fingerprint)
        return answer.sampled

    def verify_fingerprint(self, path: Path) -> None:
        """Store the fingerprint in a file of the run folder, or compare it with the stored one.

        Args:
            path: JSON file with the fingerprints of the run's servers.

        Raises:
            OperationFailed: The run was started with another model at this address.
        """
        fingerprint = self.check_fingerprint()
        fingerprints = json.loads(path.read_text()) if path.exists() else {}
        name = f"{self.endpoint.url}#{self.model}"
        if name in fingerprints:
            self._compare(np.array(fingerprints[name], np.float32), fingerprint)
        else:
            write_text(path, json.dumps(fingerprints | {name: fingerprint.tolist()}))

    def _compare(self, actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        check_same_model(
            actual,
            expected,
            tolerance=TEACHER_TOLERANCE,
            problem=f"{self.endpoint.url} is not the same model as at the start",
            remedy=(
                f"Serve the same model as {self.model!r} again and run the same command to resume "
                "from the last checkpoint"
            ),
        )

    def _query_all(
        self,
        scored_rows: list[int],
        rows: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        k: int,
    ) -> list[PositionLogprobs]:
        """Request the log-probabilities of the rows `scored_rows`, with concurrent requests."""
        groups = group_rows(scored_rows, [len(row) for row in rows])
        calls = [
            partial(
                self._query_rows,
                [rows[i] for i in group],
                [positions[i] for i in group],
                k,
                f"rows {', '.join(map(str, group))} of {len(rows)}",
            )
            for group in groups
        ]
        self.endpoint.start()
        answers = run_all(
            calls,
            concurrency=self.concurrency,
            stop=self.endpoint.stop,
            description=f"teacher {self.model}",
        )
        return [row for answer in answers for row in answer]

    def _query_rows(
        self,
        rows: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        k: int,
        description: str,
    ) -> list[PositionLogprobs]:
        """Send one request; return the log-probabilities of each of its rows."""
        payload = {
            "model": self.model,
            "prompt": [list(row) for row in rows],
            "prompt_logprobs": k,
            "max_tokens": 1,
            "temperature": 1.0,
            "return_token_ids": True,
        }
        parsers = [
            partial(read_row, row=row, positions=row_positions, k=k, vocabulary=self.vocabulary)
            for row, row_positions in zip(rows, positions, strict=True)
        ]
        return request_completions(
            self.endpoint,
            payload,
            parsers,
            num_entries=sum(len(row) for row in rows) * (k + 1),
            description=description,
        )


def group_rows(row_indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Split rows into requests.

    Args:
        row_indices: Indices of the rows to group.
        sizes: Number of ids of every row.

    Returns:
        Groups in order, each of at most MAX_ROWS_PER_REQUEST rows, and of one row or at most
        MAX_TOKENS_PER_REQUEST ids.
    """
    groups: list[list[int]] = []
    for i in row_indices:
        last = groups[-1] if groups else []
        if (
            last
            and len(last) < MAX_ROWS_PER_REQUEST
            and sum(sizes[j] for j in last) + sizes[i] <= MAX_TOKENS_PER_REQUEST
        ):
            last.append(i)
        else:
            groups.append([i])
    return groups


def connect(
    url: str,
    tokenizer: Any,
    vocabulary: int,
    *,
    k: int,
    timeout: float,
    concurrency: int,
) -> TeacherClient:
    """Connect to a teacher server and check that it suits the student.

    Args:
        url: http://HOST:PORT/v1, followed by #MODEL if the server has several models.
        tokenizer: The student's; every id must have the same text in the server.
        vocabulary: Number of ids of the student.
        k: Number of most probable ids per position that will be requested.
        timeout: Seconds to wait for a server that fails.
        concurrency: Number of concurrent requests.

    Returns:
        The client.

    Raises:
        InvalidInput: The server has several models, another vocabulary, or returns fewer than `k`
            log-probabilities.
        OperationFailed: It does not respond.
    """
    url, _, name = url.partition("#")
    endpoint = JsonEndpoint(url, timeout=timeout)
    entry = select_model(endpoint, name)
    check_same_text(endpoint, entry["id"], tokenizer)
    client = TeacherClient(
        endpoint, entry["id"], entry.get("max_model_len"), vocabulary, concurrency
    )
    try:
        client._query_rows([client.probe], [range(1, PROBE_TOKENS)], k, f"the probe, with {k} ids")
    except ValueError as error:
        raise InvalidInput(
            f"{error}. The teacher must have the ids 0 to {vocabulary - 1} and return the {k} most "
            f"probable: start the server with --max-logprobs {k}, or lower support_k"
        ) from error
    client.check_fingerprint()
    return client


def check_same_text(endpoint: JsonEndpoint, model: str, tokenizer: Any) -> None:
    """Check that the ids of a server have the same text as the student's.

    Compares the text of every id, and the ids of a text in many scripts, because ids of partial
    characters have no text of their own.

    Args:
        endpoint: The server, with an address that ends in /v1.
        model: Name of the model.
        tokenizer: The student's.

    Raises:
        InvalidInput: Names the first id that differs; or the server cannot detokenize.
    """
    root_endpoint = JsonEndpoint(endpoint.url.removesuffix("/v1"), timeout=endpoint.timeout)
    reason = (
        "; on-policy distillation scores the student's ids with the teacher, so both need the same "
        "vocabulary"
    )

    def server_text(ids: Sequence[int]) -> str:
        payload = {"model": model, "tokens": list(ids)}
        max_bytes = MAX_ENTRY_BYTES * len(ids) + OVERHEAD_BYTES
        answer = root_endpoint.request(
            "/detokenize", payload, max_bytes=max_bytes, description="the text of token ids"
        )
        text: str = answer_field(root_endpoint, answer, "prompt", str, "/detokenize")
        return text

    for start in range(0, len(tokenizer), TEXT_CHUNK):
        chunk = list(range(start, min(start + TEXT_CHUNK, len(tokenizer))))
        if server_text(chunk) == tokenizer.decode(chunk):
            continue
        for v in chunk:
            student_text, teacher_text = tokenizer.decode([v]), server_text([v])
            if student_text != teacher_text:
                raise InvalidInput(
                    endpoint.redacted(
                        f"{endpoint.url} decodes the id {v} as {short_repr(teacher_text)}, the "
                        f"student as {short_repr(student_text)}{reason}"
                    )
                )
    payload = {"model": model, "prompt": MULTISCRIPT_TEXT, "add_special_tokens": False}
    max_bytes = MAX_ENTRY_BYTES * len(MULTISCRIPT_TEXT) + OVERHEAD_BYTES
    answer = root_endpoint.request(
        "/tokenize", payload, max_bytes=max_bytes, description="the token ids of a text"
    )
    teacher_ids = answer_field(root_endpoint, answer, "tokens", list, "/tokenize")
    student_ids = tokenizer.encode(MULTISCRIPT_TEXT, add_special_tokens=False)
    if teacher_ids != student_ids:
        id_pairs = zip_longest(student_ids, teacher_ids)
        position, (student_id, teacher_id) = next(
            (i, pair) for i, pair in enumerate(id_pairs) if pair[0] != pair[1]
        )
        raise InvalidInput(
            f"{endpoint.url} has the id {teacher_id} where the student has {student_id}, at "
            f"position {position} of a text in many scripts{reason}"
        )
    root_endpoint.close()
