"""A teacher's server for tests: a real Hugging Face model behind vLLM's JSON, with faults to order.

A fault is a function of the answer's bytes that returns (status, headers, body), or raises Drop.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Fault = Callable[[bytes], tuple[int, dict[str, str], bytes]]


class Drop(Exception):
    """The connection ends without an answer."""


class Teacher:
    """The model, what it was asked, and the faults that its next answers to /completions have.

    Per call of `ask` one fault is taken from `faults`; those left over are for later calls.
    """

    def __init__(self, folder: Path, *, most: int = 20, limit: int = 256) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.network = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.most, self.limit = most, limit
        self.faults: list[Fault] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.connections = 0
        self.lock = threading.Lock()

    def order(self, path: str, question: Any) -> tuple[int, dict[str, Any]]:
        """The answer to whatever is not /completions; without a question it was a GET."""
        if path == "/v1/models":
            return 200, self.models()
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(question["tokens"])}
        if path == "/tokenize":
            ids = self.tokenizer.encode(question["prompt"], add_special_tokens=False)
            return 200, {"tokens": ids}
        return 404, {"error": {"message": "Not Found"}}

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "teacher", "max_model_len": self.limit}]}

    def completions(self, question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        k = question["prompt_logprobs"]
        if k > self.most:
            message = f"Requested prompt logprobs of {k}, which is greater than max {self.most}"
            return 400, {"error": {"message": message}}
        if max(map(max, question["prompt"])) >= self.network.config.vocab_size:
            return 400, {"error": {"message": "a token id is out of vocabulary"}}
        rows = [self.row(ids, k) for ids in question["prompt"]]
        choices = [
            {"index": i, "text": "", "prompt_token_ids": ids, "prompt_logprobs": told}
            for i, (ids, told) in enumerate(zip(question["prompt"], rows, strict=True))
        ]
        return 200, {"model": question["model"], "choices": choices}

    def row(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        with torch.no_grad(), self.lock:
            logp = self.network(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        told: list[dict[str, Any] | None] = [None]
        for at, token in zip(logp, ids[1:], strict=True):
            rank = 1 + int((at > at[token]).sum())
            best = [(v, r + 1) for r, v in enumerate(at.topk(k).indices.tolist())] if k else []
            entries = dict([(token, rank), *best])
            told.append({str(v): {"logprob": float(at[v]), "rank": r} for v, r in entries.items()})
        return told


@contextmanager
def serving(teacher: Teacher, port: int = 0) -> Iterator[str]:
    """The URL at which the teacher answers inside the block; afterwards connections are refused."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def setup(self) -> None:
            super().setup()
            teacher.connections += 1
            live.append(self.connection)

        def do_GET(self) -> None:
            self.told(teacher.order(self.path, None))

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions":
                return self.told(teacher.order(self.path, question))
            with teacher.lock:
                teacher.asked.append(question)
                teacher.keys.append(self.headers.get("Authorization"))
                teacher.at_once += 1
                teacher.most_at_once = max(teacher.at_once, teacher.most_at_once)
                fault = teacher.faults.pop(0) if teacher.faults else None
            try:
                status, answer = teacher.completions(question)
                body = json.dumps(answer).encode()
                headers: dict[str, str] = {}
                if fault is not None:
                    status, headers, body = fault(body)
            except Drop:
                self.close_connection = True
                return None
            finally:
                with teacher.lock:
                    teacher.at_once -= 1
            return self.say(status, headers, body)

        def told(self, answer: tuple[int, dict[str, Any]]) -> None:
            self.say(answer[0], {}, json.dumps(answer[1]).encode())

        def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    live: list[Any] = []
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        for connection in live:
            with_shutdown(connection)
        thread.join()


def with_shutdown(connection: Any) -> None:
    with suppress(OSError):
        connection.shutdown(2)


def status(number: int, **headers: str) -> Fault:
    return lambda body: (number, headers, b'{"error": {"message": "as ordered"}}')


def dropped(body: bytes) -> tuple[int, dict[str, str], bytes]:
    raise Drop


def cut(body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Half of the JSON, its length told rightly."""
    return 200, {}, body[: len(body) // 2]


def short(body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Half of the JSON, and a length that promises all; the connection then ends."""
    return 200, {"Content-Length": str(len(body)), "Connection": "close"}, body[: len(body) // 2]


def slow(seconds: float) -> Fault:
    def fault(body: bytes) -> tuple[int, dict[str, str], bytes]:
        time.sleep(seconds)
        return 200, {}, body

    return fault


def changed(function: Callable[[dict[str, Any]], Any]) -> Fault:
    """The answer after `function` changed it in place."""

    def fault(body: bytes) -> tuple[int, dict[str, str], bytes]:
        answer = json.loads(body)
        function(answer)
        return 200, {}, json.dumps(answer).encode()

    return fault
