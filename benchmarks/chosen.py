"""Bytes and seconds of scoring ids that the student chose, by every route of a teacher server.

    python -m benchmarks.chosen STUDENT TEACHER http://127.0.0.1:8000/v1 [--k 16]
    python -m benchmarks.chosen STUDENT TEACHER stand-in:vllm

"stand-in:vllm" and "stand-in:sglang" serve the teacher with the tests' servers, which keep to the
routes' protocols; their bytes are those of the real servers, their seconds are not. Prints for each
route, per sampled token: bytes of requests and of responses, the wall-clock time, and the CPU time
of this process; and the mean and largest difference from the teacher in this process in nats; or
why the server refuses.

On a GPU this also checks vLLM's model runner V2, which scores chosen ids there; nobody has run it
there yet:

    python -m vllm.entrypoints.openai.api_server --model TEACHER --enable-scale-out \
        --max-logprobs 64
    python -m benchmarks.chosen STUDENT TEACHER http://127.0.0.1:8000/v1 --dtype bfloat16
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.remote import proxy, sample_responses, timed
from opd.models.forward import log_probabilities, response_hidden_states
from opd.serving.fan_out import run_all
from opd.serving.position_logprobs import PositionLogprobs, ScoreQuery, no_chosen_ids
from opd.teachers.client import TeacherClient
from opd.teachers.connection import connect
from opd.teachers.pair import ModelPair, load_pair
from opd.teachers.server_kinds import ScoreRoute


@contextmanager
def server_of(url: str, teacher: str) -> Iterator[str]:
    """Serve the teacher with a stand-in if the address asks for one; yield the address."""
    if not url.startswith("stand-in:"):
        yield url
        return
    from tests.helpers.servers.chosen_ids import GenerateTeacher, SglangTeacher
    from tests.helpers.servers.teacher_server import serve

    folder = Path(teacher)
    if url.endswith("sglang"):
        with serve(SglangTeacher(folder, limit=4096)) as address:
            yield address
        return
    with serve(GenerateTeacher(folder, max_logprobs=-1, limit=4096)) as address:
        yield address


Expected = tuple[NDArray[np.float32], NDArray[np.float32]]
"""The local teacher's log-probabilities of the chosen ids (n, K) and of the tokens (n,)."""


def make_queries(
    pair: ModelPair, args: argparse.Namespace
) -> tuple[list[ScoreQuery], list[Expected]]:
    """Sample responses; return queries at the student's K most probable ids, and their answers."""
    prompts, batch = sample_responses(pair, args)
    queries, expected = [], []
    for row in range(len(batch.tokens)):
        part, part_prompts = batch.rows([row]).trim(), prompts.rows([row])
        states = response_hidden_states(pair.student, part_prompts, part, part.sampled)
        with torch.no_grad():
            chosen_ids = log_probabilities(pair.student, states, 1.0).topk(args.k).indices
            states = response_hidden_states(pair.teacher.model, part_prompts, part, part.sampled)
            q = log_probabilities(pair.teacher.model, states, 1.0).cpu()
        prefix = part_prompts.tokens[part_prompts.mask].tolist()
        ids = [*prefix, *part.tokens[part.attention_mask].tolist()]
        positions = range(len(prefix), len(ids))
        chosen_ids, tokens = chosen_ids.cpu(), torch.tensor(ids)[list(positions), None]
        queries.append(ScoreQuery(ids, positions, args.k, chosen_ids.numpy()))
        expected.append((q.gather(1, chosen_ids).numpy(), q.gather(1, tokens)[:, 0].numpy()))
    return queries, expected


def ways(client: TeacherClient) -> dict[str, tuple[ScoreRoute, bool, bool]]:
    """Return name -> route, whether its own K most probable ids are asked for, and chosen ones."""
    named = {f"{client.kind.top_k.name}: own top-K": (client.kind.top_k, True, False)}
    for route in client.kind.chosen_routes:
        if route.max_vocabulary is not None and client.vocabulary > route.max_vocabulary:
            continue
        named[f"{route.name}: chosen ids"] = (route, False, True)
        named[f"{route.name}: chosen ids and own top-K"] = (route, True, True)
    return named


def ask(
    client: TeacherClient,
    route: ScoreRoute,
    queries: list[ScoreQuery],
    has_top_k: bool,
    has_chosen: bool,
) -> list[PositionLogprobs]:
    """Send all queries by a route, with concurrent requests; return the answers in order."""
    changed = [
        ScoreQuery(
            query.ids,
            query.positions,
            query.k if has_top_k else 0,
            query.chosen_ids if has_chosen else no_chosen_ids(len(query.positions)),
        )
        for query in queries
    ]
    size = route.max_rows
    groups = [changed[i : i + size] for i in range(0, len(changed), size)]
    client.start()
    answers = run_all(
        [partial(client.send, route, group, "rows") for group in groups],
        concurrency=client.concurrency,
        stop=client.stop,
    )
    return [answer for group in answers for answer in group]


def differences(
    answers: list[PositionLogprobs], expected: list[Expected], has_chosen: bool
) -> NDArray[np.float32]:
    """Return the absolute differences of all log-probabilities from the local teacher's."""
    gaps = [
        np.abs(answer.sampled - tokens)
        for answer, (_, tokens) in zip(answers, expected, strict=True)
    ]
    if has_chosen:
        gaps += [
            np.abs(answer.chosen_logp - logp).ravel()
            for answer, (logp, _) in zip(answers, expected, strict=True)
        ]
    return np.concatenate(gaps)


def measure(pair: ModelPair, url: str, args: argparse.Namespace) -> dict[str, object]:
    """Return bytes, wall-clock and CPU seconds per token of each way."""
    queries, expected = make_queries(pair, args)
    num_tokens = sum(len(query.positions) for query in queries)
    numbers: dict[str, object] = {"tokens": num_tokens, "k": args.k}

    def connect_client(address: str) -> TeacherClient:
        options = {"k": args.k, "timeout": 600.0, "concurrency": args.concurrency}
        return connect(address, pair.tokenizer, pair.student.vocabulary, **options)

    with proxy(url, 0) as (proxy_url, counts):
        direct, counted = connect_client(url), connect_client(proxy_url)
        for name, (route, has_top_k, has_chosen) in ways(direct).items():
            arguments = (route, queries, has_top_k, has_chosen)
            response_bytes, request_bytes = counts.size, counts.request_size
            try:
                answers = ask(counted, *arguments)
            except ValueError as error:
                numbers[name] = str(error)
                continue
            times = [timed(partial(ask, direct, *arguments)) for _ in range(args.repeats)]
            wall, processor = (statistics.median(x) for x in zip(*times, strict=True))
            gaps = differences(answers, expected, has_chosen)
            numbers[name] = {
                "mean difference": float(gaps.mean()),
                "largest difference": float(gaps.max()),
                "request bytes a token": round((counts.request_size - request_bytes) / num_tokens),
                "response bytes a token": round((counts.size - response_bytes) / num_tokens),
                "milliseconds a token": round(1e3 * wall / num_tokens, 3),
                "processor milliseconds a token here": round(1e3 * processor / num_tokens, 3),
            }
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("teacher", help="the model that the server serves")
    parser.add_argument("url", help="http://HOST:PORT/v1, stand-in:vllm or stand-in:sglang")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pair = load_pair(args.student, args.teacher, args.device, args.dtype)
    start = time.perf_counter()
    with server_of(args.url, args.teacher) as url:
        json.dump(measure(pair, url, args), sys.stdout, indent=1)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
