"""Compare scoring by a teacher on a server with the same teacher in this process.

    python -m vllm.entrypoints.openai.api_server --model TEACHER --port 8000 [...]
    python -m benchmarks.remote STUDENT TEACHER http://127.0.0.1:8000/v1 [--rows 32]

Prints supervised tokens per second by wall clock, as medians of `--repeats` with both alternating;
the CPU seconds and bytes that the responses cost this process; and the cost of a server that
refuses every tenth request, simulated by a proxy.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import urlsplit

import torch

from diagnostics.batch import Rollouts
from opd.data.chain_task import problems
from opd.data.prompts import Prompts, encode_prompts
from opd.objectives.factory import make_objective
from opd.rollouts.hf_engine import sample
from opd.scoring.request import ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.client import TeacherClient
from opd.teachers.connection import connect
from opd.teachers.pair import ModelPair, load_pair
from opd.teachers.remote_scores import TeacherScores, score_remote
from opd.teachers.teacher import ServerTeacher, Teacher

MICRO_TOKENS, CHUNK_ELEMENTS = 4096, 1 << 24


class ProxyCounts:
    """Counts of a proxy: requests, refused requests, and bytes of responses and requests."""

    def __init__(self) -> None:
        self.asked, self.refused, self.size, self.request_size = count(1), 0, 0, 0


@contextmanager
def proxy(url: str, refuse_every: int) -> Iterator[tuple[str, ProxyCounts]]:
    """Run a proxy that answers every `refuse_every`-th completion request with 503; 0 for none."""
    aim, counts = urlsplit(url), ProxyCounts()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.forward("GET", None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            counts.request_size += len(body)
            if (
                refuse_every
                and self.path.endswith("/completions")
                and next(counts.asked) % refuse_every == 0
            ):
                counts.refused += 1
                return self.respond(503, b"{}")
            return self.forward("POST", body)

        def forward(self, method: str, body: bytes | None) -> None:
            connection = HTTPConnection(aim.netloc)
            connection.request(method, self.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            self.respond(response.status, response.read())
            connection.close()

        def respond(self, status: int, body: bytes) -> None:
            counts.size += len(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{aim.path}", counts
    server.shutdown()


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of a call in this process."""
    wall, process_seconds = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - process_seconds


class AnsweredTeacher(ServerTeacher):
    """A server that was asked before, to time the student alone."""

    answers: TeacherScores

    def top_k(self, *_: object) -> TeacherScores:
        return self.answers


def sample_responses(pair: ModelPair, args: argparse.Namespace) -> tuple[Prompts, Rollouts]:
    """Sample the responses that are scored; nearly all have the length `args.response`."""
    prompts = encode_prompts(pair.tokenizer, problems("train", args.rows, 0), 1, 512)
    rollouts = sample(
        pair.student,
        prompts,
        [pair.student.vocabulary - 1],  # sampled in fewer than one of a hundred responses
        max_response=args.response,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    return prompts, rollouts


def measure(pair: ModelPair, url: str, args: argparse.Namespace) -> dict[str, float]:
    """Return throughput, CPU seconds and bytes of each way of scoring."""
    prompts, batch = sample_responses(pair, args)
    tokens = int(batch.mask.sum())
    request = ScoreRequest(
        requirements=make_objective("teacher_topk", support_k=args.k).requirements,
        full_statistics=False,
        max_tokens_per_microbatch=MICRO_TOKENS,
        max_logits_per_chunk=CHUNK_ELEMENTS,
    )

    def score_with(teacher: Teacher) -> None:
        score_batch(pair.student, teacher, prompts, batch, request)

    def score_locally() -> None:
        score_with(pair.teacher)

    def score_remotely(remote: TeacherClient) -> None:
        score_with(ServerTeacher(url, remote))

    def score_student_only() -> None:
        teacher = AnsweredTeacher(url, direct)
        teacher.answers = known_scores
        score_with(teacher)

    def connect_client(address: str) -> TeacherClient:
        options = {"k": args.k, "timeout": 600.0, "concurrency": args.at_once}
        return connect(address, pair.tokenizer, pair.student.vocabulary, **options)

    with proxy(url, 0) as (proxy_url, counts), proxy(url, 10) as (flaky, refusing):
        direct, plain, failing = (
            connect_client(url),
            connect_client(proxy_url),
            connect_client(flaky),
        )
        known_scores = score_remote(direct, prompts, batch, args.k)
        score_locally()
        size_before = counts.size
        score_remote(plain, prompts, batch, args.k)
        size = counts.size - size_before
        times: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.repeats):
            for name, run in (
                ("local", score_locally),
                ("student alone", score_student_only),
                ("remote", lambda: score_remotely(direct)),
                ("remote, proxy", lambda: score_remotely(plain)),
                ("remote, every tenth refused", lambda: score_remotely(failing)),
            ):
                times.setdefault(name, []).append(timed(run))
    numbers: dict[str, float] = {"tokens": tokens, "bytes a token": size / tokens}
    for name, pairs in times.items():
        wall, process_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        numbers |= {
            f"{name}: tokens/s": tokens / wall,
            f"{name}: processor s here": process_seconds,
        }
    return numbers | {"refused": refusing.refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("teacher", help="the model that the server serves")
    parser.add_argument("url")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pair = load_pair(args.student, args.teacher, "cpu", "float32")
    json.dump(measure(pair, args.url, args), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
