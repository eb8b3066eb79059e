"""Scoring by a teacher on a server against the same teacher at hand, on the same machine.

    python -m vllm.entrypoints.openai.api_server --model TEACHER --port 8000 [...]
    python -m benchmarks.remote STUDENT TEACHER http://127.0.0.1:8000/v1 [--rows 32]

Tokens a second of supervised text, wall clock, medians of `--repeats`, the two in turn; the
processor seconds and bytes that the answers cost here; and what a server costs that refuses every
tenth question, through a proxy that does so.
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

from opd.data.chain_task import problems
from opd.data.prompts import encode
from opd.rollouts.hf_engine import sample
from opd.scoring.score import score_support
from opd.teachers.client import TeacherClient, connect
from opd.teachers.pair import ModelPair, load_pair
from opd.teachers.remote_scores import asked

MICRO_TOKENS, CHUNK_ELEMENTS = 4096, 1 << 24


class Counted:
    """What went through a proxy: questions, those that were refused, and bytes of answers."""

    def __init__(self) -> None:
        self.asked, self.refused, self.size = count(1), 0, 0


@contextmanager
def proxy(url: str, every: int) -> Iterator[tuple[str, Counted]]:
    """A server before the server, which answers every `every`-th question with 503; 0 for none."""
    aim, counted = urlsplit(url), Counted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.forward("GET", None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if every and self.path.endswith("/completions") and next(counted.asked) % every == 0:
                counted.refused += 1
                return self.say(503, b"{}")
            return self.forward("POST", body)

        def forward(self, method: str, body: bytes | None) -> None:
            there = HTTPConnection(aim.netloc)
            there.request(method, self.path, body, {"Content-Type": "application/json"})
            found = there.getresponse()
            self.say(found.status, found.read())
            there.close()

        def say(self, status: int, body: bytes) -> None:
            counted.size += len(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{aim.path}", counted
    server.shutdown()


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds of this process."""
    wall, own = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - own


def measured(pair: ModelPair, url: str, given: argparse.Namespace) -> dict[str, float]:
    prompts = encode(pair.tokenizer, problems("train", given.rows, 0), 1, 512)
    batch = sample(
        pair.student,
        prompts,
        [pair.student.vocabulary - 1],  # drawn by one response in hundreds
        max_response=given.response,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    tokens = int(batch.mask.sum())
    how = {"k": given.k, "temperature": 1.0, "max_tokens_per_microbatch": MICRO_TOKENS}

    def near() -> None:
        score_support(pair, prompts, batch, max_logits_per_chunk=CHUNK_ELEMENTS, **how)

    def far(remote: TeacherClient) -> None:
        told = asked(remote, prompts, batch, given.k)
        score_support(pair, prompts, batch, max_logits_per_chunk=CHUNK_ELEMENTS, told=told, **how)

    def student() -> None:
        score_support(pair, prompts, batch, max_logits_per_chunk=CHUNK_ELEMENTS, told=known, **how)

    def connected(address: str) -> TeacherClient:
        how = {"k": given.k, "patience": 600.0, "in_flight": given.at_once}
        return connect(address, pair.tokenizer, pair.student.vocabulary, **how)

    with proxy(url, 0) as (whole, counted), proxy(url, 10) as (flaky, refusing):
        direct, plain, failing = connected(url), connected(whole), connected(flaky)
        known = asked(direct, prompts, batch, given.k)
        near()
        before = counted.size
        asked(plain, prompts, batch, given.k)
        size = counted.size - before
        times: dict[str, list[tuple[float, float]]] = {}
        for _ in range(given.repeats):
            for name, run in (
                ("local", near),
                ("student alone", student),
                ("remote", lambda: far(direct)),
                ("remote, proxy", lambda: far(plain)),
                ("remote, every tenth refused", lambda: far(failing)),
            ):
                times.setdefault(name, []).append(timed(run))
    found: dict[str, float] = {"tokens": tokens, "bytes a token": size / tokens}
    for name, pairs in times.items():
        wall, own = (statistics.median(column) for column in zip(*pairs, strict=True))
        found |= {f"{name}: tokens/s": tokens / wall, f"{name}: processor s here": own}
    return found | {"refused": refusing.refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("teacher", help="the model that the server has")
    parser.add_argument("url")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pair = load_pair(given.student, given.teacher, "cpu", "float32")
    json.dump(measured(pair, given.url, given), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
