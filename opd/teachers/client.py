"""Client of a remote teacher: log-probabilities of token ids from a vLLM or SGLang server.

`opd.teachers.connection.connect` makes one. Every server returns its own most probable ids and the
sampled one; some also return ids that the student chose, which is found out when it is connected
(`opd.teachers.server_kinds`). Does not import torch.

A server cannot provide full distributions (`full_` objectives, the local KL, entropies, ranks);
hidden states (the gradient probe); another temperature than 1.

Shapes: L ids of a sequence, n of its positions, K most probable ids and C chosen ids per position.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from opd.serving.fan_out import run_all
from opd.serving.fingerprint import TEACHER_TOLERANCE, check_same_model, probe_tokens
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.position_logprobs import PositionLogprobs, ScoreQuery, no_chosen_ids
from opd.teachers.server_kinds import ScoreRoute, ServerKind

PROBE_TOKENS = 32
MAX_TOKENS_PER_REQUEST = 8192
"""Maximum number of ids of a request with several sequences; a response is held in memory."""


class TeacherClient:
    """A teacher behind an address; built by `connect`, which checks it.

    Args:
        endpoint: The server, with an address that ends in /v1.
        root_endpoint: The same server, without /v1.
        kind: Its kind.
        model: The name of the model in the server.
        limit: Maximum number of ids of a sequence, including one generated token; None: unknown.
        vocabulary: Number of ids of the student.
        concurrency: Number of concurrent requests.
    """

    def __init__(
        self,
        endpoint: JsonEndpoint,
        root_endpoint: JsonEndpoint,
        kind: ServerKind,
        model: str,
        limit: int | None,
        vocabulary: int,
        concurrency: int,
    ) -> None:
        self.endpoint, self.root_endpoint, self.kind = endpoint, root_endpoint, kind
        self.model, self.limit = model, limit
        self.vocabulary, self.concurrency = vocabulary, concurrency
        self.probe = probe_tokens(vocabulary, PROBE_TOKENS)
        self.fingerprint: NDArray[np.float32] | None = None
        self.chosen_route: ScoreRoute | None = None
        self.chosen_probe: tuple[ScoreQuery, NDArray[np.float32]] | None = None

    def query(
        self,
        rows: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        k: int,
        chosen_ids: Sequence[NDArray[np.int64]] | None = None,
    ) -> list[PositionLogprobs]:
        """Request the log-probabilities of all sequences.

        Afterwards the fingerprint is checked, so that a batch is never scored by a server that was
        restarted with another model.

        Args:
            rows: Token ids of each sequence.
            positions: The positions of each sequence to score, from 1 on.
            k: Number of most probable ids per position.
            chosen_ids: (n, C) further ids to score at the positions of each sequence, -1 where
                there is none; None for none at all.

        Returns:
            The log-probabilities of each sequence, in order.

        Raises:
            OperationFailed: The server does not respond within the timeout, or is another model
                now.
            InvalidInput: A response does not match its request; names the row and the position. Or
                ids are chosen, but the server was not connected for them.
        """
        ids = [no_chosen_ids(len(p)) for p in positions] if chosen_ids is None else chosen_ids
        queries = [
            ScoreQuery(row, row_positions, k, row_ids)
            for row, row_positions, row_ids in zip(rows, positions, ids, strict=True)
        ]
        answers = self._query_all(queries)
        self.check_fingerprint()
        if any(query.has_chosen for query in queries):
            self.check_chosen_fingerprint()
        return answers

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
                f"response may have {max_length} and {self.kind.name} generates one more; start it "
                f"with {self.kind.length_option} {max_length + 1}, or lower max_prompt or "
                "max_response"
            )

    def check_fingerprint(self) -> NDArray[np.float32]:
        """Check that the server still is the same model.

        Returns:
            Log-probabilities of the probe tokens.

        Raises:
            OperationFailed: They differ from those of the first call.
        """
        query = self.probe_query(0)
        (answer,) = self.send(self.kind.top_k, [query], "the probe")
        if self.fingerprint is None:
            self.fingerprint = answer.sampled
        self._compare(answer.sampled, self.fingerprint)
        return answer.sampled

    def check_chosen_fingerprint(self) -> None:
        """Check that the server still gives chosen ids the log-probabilities of the start.

        Raises:
            OperationFailed: They differ.
        """
        if self.chosen_route is not None and self.chosen_probe is not None:
            query, expected = self.chosen_probe
            (answer,) = self.send(self.chosen_route, [query], "the probe of chosen ids")
            self._compare(answer.chosen_logp.ravel(), expected.ravel())

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

    def probe_query(self, k: int, chosen_ids: NDArray[np.int64] | None = None) -> ScoreQuery:
        """Return the question about the probe tokens.

        Args:
            k: Number of most probable ids per position.
            chosen_ids: (PROBE_TOKENS - 1, C) further ids; None for none.

        Returns:
            The query, at all positions from 1 on.
        """
        positions = range(1, len(self.probe))
        ids = no_chosen_ids(len(positions)) if chosen_ids is None else chosen_ids
        return ScoreQuery(self.probe, positions, k, ids)

    def send(
        self, route: ScoreRoute, queries: Sequence[ScoreQuery], description: str
    ) -> list[PositionLogprobs]:
        """Send one request.

        Args:
            route: Route of the server.
            queries: The queries of the request, at most `route.max_rows`.
            description: What is requested, for messages.

        Returns:
            The log-probabilities of each query.

        Raises:
            OperationFailed: The server does not respond within the timeout.
            InvalidInput: The server refuses, or the response does not match the request.
        """
        endpoint = self.endpoint if route.has_version_prefix else self.root_endpoint
        return route.score(endpoint, self.model, queries, self.vocabulary, description)

    def start(self) -> None:
        """Accept requests again after `stop`."""
        self.endpoint.start()
        self.root_endpoint.start()

    def stop(self) -> None:
        """Cancel the running requests of all threads, each of which raises, until `start`."""
        self.endpoint.stop()
        self.root_endpoint.stop()

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

    def _query_all(self, queries: Sequence[ScoreQuery]) -> list[PositionLogprobs]:
        """Request the log-probabilities of all queries, with concurrent requests."""
        scored_rows = [i for i, query in enumerate(queries) if query.positions]
        chosen_rows = [i for i in scored_rows if queries[i].has_chosen]
        top_rows = [i for i in scored_rows if not queries[i].has_chosen]
        route = self.chosen_route
        if chosen_rows and route is None:
            raise InvalidInput(
                f"{self.endpoint.url} was connected without asking whether it scores ids that the "
                "student chose; connect it with num_chosen"
            )
        sizes = [len(query.ids) for query in queries]
        parts = [(self.kind.top_k, g) for g in group_rows(top_rows, sizes, self.kind.top_k)]
        if route is not None:
            parts += [(route, group) for group in group_rows(chosen_rows, sizes, route)]
        calls = [
            partial(
                self.send,
                part_route,
                [queries[i] for i in group],
                f"rows {', '.join(map(str, group))} of {len(queries)}",
            )
            for part_route, group in parts
        ]
        self.start()
        answers = run_all(
            calls,
            concurrency=self.concurrency,
            stop=self.stop,
            description=f"teacher {self.model}",
        )
        logprobs: dict[int, PositionLogprobs] = {}
        for (_, group), group_answers in zip(parts, answers, strict=True):
            for i, answer in zip(group, group_answers, strict=True):
                logprobs[i] = with_chosen(answer, queries[i])
        return [logprobs.get(i) or no_logprobs(query) for i, query in enumerate(queries)]


def with_chosen(answer: PositionLogprobs, query: ScoreQuery) -> PositionLogprobs:
    """Return an answer with an array of chosen ids, all padding if the route returns none."""
    if answer.chosen_logp.shape == query.chosen_ids.shape:
        return answer
    chosen_logp = np.zeros(query.chosen_ids.shape, np.float32)
    return PositionLogprobs(answer.ids, answer.logp, answer.sampled, chosen_logp)


def no_logprobs(query: ScoreQuery) -> PositionLogprobs:
    """Return the answer to a query without positions."""
    empty = np.zeros((0, query.k), np.float32)
    return PositionLogprobs(
        empty.astype(np.int64),
        empty,
        np.zeros(0, np.float32),
        np.zeros(query.chosen_ids.shape, np.float32),
    )


def group_rows(
    row_indices: Sequence[int], sizes: Sequence[int], route: ScoreRoute
) -> list[list[int]]:
    """Split rows into requests.

    Args:
        row_indices: Indices of the rows to group.
        sizes: Number of ids of every row.
        route: The route of the requests.

    Returns:
        Groups in order, each of at most `route.max_rows` rows, and of one row or at most
        MAX_TOKENS_PER_REQUEST ids.
    """
    groups: list[list[int]] = []
    for i in row_indices:
        last = groups[-1] if groups else []
        if (
            last
            and len(last) < route.max_rows
            and sum(sizes[j] for j in last) + sizes[i] <= MAX_TOKENS_PER_REQUEST
        ):
            last.append(i)
        else:
            groups.append([i])
    return groups
