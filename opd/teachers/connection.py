"""Connecting a teacher on a server: its model, its vocabulary, and which ids it scores.

Does not import torch. Shapes: C chosen ids per position.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr
from opd.serving.fingerprint import TEACHER_TOLERANCE, check_same_model
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.position_logprobs import PositionLogprobs
from opd.serving.vllm_completions import MAX_WHOLE_VOCABULARY
from opd.serving.vllm_protocol import MAX_ENTRY_BYTES, OVERHEAD_BYTES, answer_field, select_model
from opd.teachers.client import TeacherClient
from opd.teachers.server_kinds import VLLM, ServerKind, server_kind

TEXT_CHUNK = 512
"""Number of ids whose text is compared at once."""
MULTISCRIPT_TEXT = " ".join(
    chr(c) for c in (*range(33, 127), *range(161, 0x2400, 11), *range(0x3041, 0xD7FF, 199))
)
"""Characters of many scripts, separated by spaces."""


def connect(
    url: str,
    tokenizer: Any,
    vocabulary: int,
    *,
    k: int,
    timeout: float,
    concurrency: int,
    num_chosen: int = 0,
) -> TeacherClient:
    """Connect to a teacher server and check that it suits the student.

    Args:
        url: http://HOST:PORT/v1, followed by #MODEL if the server has several models.
        tokenizer: The student's; every id must have the same text in the server.
        vocabulary: Number of ids of the student.
        k: Number of most probable ids per position that will be requested.
        timeout: Seconds to wait for a server that fails.
        concurrency: Number of concurrent requests.
        num_chosen: Number C of ids per position that the student will choose, besides the sampled
            one; 0 if it will choose none.

    Returns:
        The client.

    Raises:
        InvalidInput: The server has several models, another vocabulary, returns fewer than `k`
            log-probabilities, or cannot score chosen ids.
        OperationFailed: It does not respond.
    """
    url, _, name = url.partition("#")
    endpoint = JsonEndpoint(url, timeout=timeout)
    root_endpoint = JsonEndpoint(endpoint.url.removesuffix("/v1"), timeout=timeout)
    entry = select_model(endpoint, name)
    kind = server_kind(entry)
    check_same_text(root_endpoint, kind, entry["id"], tokenizer)
    client = TeacherClient(
        endpoint,
        root_endpoint,
        kind,
        entry["id"],
        entry.get("max_model_len"),
        vocabulary,
        concurrency,
    )
    try:
        (answer,) = client.send(kind.top_k, [client.probe_query(k)], f"the probe, with {k} ids")
    except ValueError as error:
        remedy = f"start the server with --max-logprobs {k}, or " if kind is VLLM else ""
        raise InvalidInput(
            f"{error}. The teacher must have the ids 0 to {vocabulary - 1} and return the {k} most "
            f"probable: {remedy}lower support_k"
        ) from error
    client.check_fingerprint()
    if num_chosen:
        choose_route(client, answer, num_chosen)
    return client


def choose_route(client: TeacherClient, top: PositionLogprobs, num_chosen: int) -> None:
    """Find the route by which a server scores chosen ids, and check its values.

    The probe chooses the most probable ids in reverse order, whose log-probabilities are known.

    Args:
        client: The client, whose route is set.
        top: Most probable ids of the probe.
        num_chosen: Number C of ids per position.

    Raises:
        InvalidInput: No route of the server scores chosen ids; says why, and which servers do.
        OperationFailed: A route returns other log-probabilities than the server's most probable
            ids have.
    """
    chosen_ids = probe_ids(top.ids, num_chosen, client.vocabulary)
    num_known = min(num_chosen, top.ids.shape[1])
    query, refusals = client.probe_query(0, chosen_ids), []
    for route in client.kind.chosen_routes:
        if route.max_vocabulary is not None and client.vocabulary > route.max_vocabulary:
            refusals.append(
                f"{route.name}: the vocabulary has {client.vocabulary} ids, more than the "
                f"{route.max_vocabulary} up to which that is affordable"
            )
            continue
        try:
            (answer,) = client.send(route, [query], f"the probe, with {num_chosen} chosen ids")
        except ValueError as error:
            refusals.append(f"{route.name}: {error}")
            continue
        check_same_model(
            answer.chosen_logp[:, :num_known].ravel(),
            top.logp[:, :num_known][:, ::-1].ravel(),
            tolerance=TEACHER_TOLERANCE,
            problem=f"{client.endpoint.url}{route.name} gives chosen ids other log-probabilities "
            "than the same ids have among the most probable",
            remedy="Update the server",
        )
        client.chosen_route, client.chosen_probe = route, (query, answer.chosen_logp)
        return
    raise InvalidInput(
        f"{client.endpoint.url}, {server_version(client)}, cannot score ids that the student "
        f"chose: {'; '.join(refusals)}. Serve the teacher with vLLM 0.32 or later and its model "
        "runner V2 (VLLM_USE_V2_MODEL_RUNNER=1, on a GPU, because it needs Triton), with "
        f"--enable-scale-out --max-logprobs {num_chosen + 1}; or with SGLang; or, for at most "
        f"{MAX_WHOLE_VOCABULARY} ids, with any vLLM and --max-logprobs -1; or use an objective on "
        "the teacher's own ids, such as teacher_topk, and map_eos off"
    )


def probe_ids(top_ids: NDArray[np.int64], num_chosen: int, vocabulary: int) -> NDArray[np.int64]:
    """Return (n, C) different ids per position: the first of (n, K) reversed, then others.

    Args:
        top_ids: (n, K) most probable ids.
        num_chosen: C.
        vocabulary: Number of ids.

    Returns:
        The ids; the first min(C, K) are the most probable ones.
    """
    first = top_ids[:, :num_chosen][:, ::-1]
    others = [np.setdiff1d(np.arange(vocabulary), row)[: num_chosen - len(row)] for row in first]
    return np.concatenate([first, np.array(others, np.int64).reshape(len(first), -1)], 1)


def server_version(client: TeacherClient) -> str:
    """Return the name and version of a server, for messages."""
    if client.kind is not VLLM:
        return client.kind.name
    try:
        answer = client.root_endpoint.request("/version", max_bytes=OVERHEAD_BYTES)
        version = answer_field(client.root_endpoint, answer, "version", str, "/version")
    except ValueError:
        return f"{client.kind.name} of an unknown version"
    return client.endpoint.redacted(f"{client.kind.name} {version[:40]}")


def check_same_text(
    root_endpoint: JsonEndpoint, kind: ServerKind, model: str, tokenizer: Any
) -> None:
    """Check that the ids of a server have the same text as the student's.

    Compares the text of every id, and the ids of a text in many scripts, because ids of partial
    characters have no text of their own.

    Args:
        root_endpoint: The server's address without /v1.
        kind: Its kind.
        model: Name of the model.
        tokenizer: The student's.

    Raises:
        InvalidInput: Names the first id that differs; or the server cannot detokenize.
    """
    reason = (
        "; on-policy distillation scores the student's ids with the teacher, so both need the same "
        "vocabulary"
    )

    def server_text(ids: Sequence[int]) -> str:
        payload = {"model": model, "tokens": list(ids), **kind.detokenize_options}
        max_bytes = MAX_ENTRY_BYTES * len(ids) + OVERHEAD_BYTES
        answer = root_endpoint.request(
            "/detokenize", payload, max_bytes=max_bytes, description="the text of token ids"
        )
        text: str = answer_field(root_endpoint, answer, kind.text_field, str, "/detokenize")
        return text

    for start in range(0, len(tokenizer), TEXT_CHUNK):
        chunk = list(range(start, min(start + TEXT_CHUNK, len(tokenizer))))
        if server_text(chunk) == tokenizer.decode(chunk):
            continue
        for v in chunk:
            student_text, teacher_text = tokenizer.decode([v]), server_text([v])
            if student_text != teacher_text:
                raise InvalidInput(
                    root_endpoint.redacted(
                        f"{root_endpoint.url} decodes the id {v} as {short_repr(teacher_text)}, "
                        f"the student as {short_repr(student_text)}{reason}"
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
            f"{root_endpoint.url} has the id {teacher_id} where the student has {student_id}, at "
            f"position {position} of a text in many scripts{reason}"
        )
    root_endpoint.close()
