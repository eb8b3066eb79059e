"""A fake vLLM teacher server: a Hugging Face model behind vLLM's JSON API, with faults.

A fault is a function of the response body that returns (status, headers, body), or raises
DropConnection.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Fault = Callable[[bytes], tuple[int, dict[str, str], bytes]]
Positions = list[dict[str, Any] | None]
Route = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


class DropConnection(Exception):
    """The connection ends without a response."""


def load_network(folder: Path) -> Any:
    """Load the model of a folder, in the main thread.

    `from_pretrained` switches the tying of weights off for all threads; two at once may leave it
    off.
    """
    assert threading.current_thread() is threading.main_thread()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@cache
def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class FakeTeacher:
    """The model, the requests for scores it received, and the faults of its next responses to them.

    Each request takes one fault from `faults`; the remaining ones are for later requests.
    """

    def __init__(self, folder: Path, *, max_logprobs: int = 20, limit: int = 256) -> None:
        self.tokenizer, self.network = load_tokenizer(folder), load_network(folder)
        self.max_logprobs, self.limit = max_logprobs, limit
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.num_running = self.max_running = 0
        self.connections = 0
        self.lock = threading.Lock()
        # looked up at every request, because tests replace the method
        self.routes: dict[str, Route] = {
            "/v1/completions": lambda payload: self.completions(payload)
        }

    def handle(self, path: str, payload: Any) -> tuple[int, dict[str, Any]]:
        """Answer a request that is not for scores; a GET request has no payload."""
        if path == "/v1/models":
            return 200, self.models()
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(payload["tokens"])}
        if path == "/tokenize":
            ids = self.tokenizer.encode(payload["prompt"], add_special_tokens=False)
            return 200, {"tokens": ids}
        return 404, {"error": {"message": "Not Found"}}

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "teacher", "max_model_len": self.limit}]}

    def completions(self, payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        k = payload["prompt_logprobs"]
        vocabulary = self.network.config.vocab_size
        num_logprobs = vocabulary if k == -1 else k
        if num_logprobs > (vocabulary if self.max_logprobs == -1 else self.max_logprobs):
            message = (
                f"Requested prompt logprobs of {num_logprobs}, which is greater than max "
                f"{self.max_logprobs}"
            )
            return 400, {"error": {"message": message}}
        if max(map(max, payload["prompt"])) >= vocabulary:
            return 400, {"error": {"message": "a token id is out of vocabulary"}}
        rows = [self.prompt_logprobs(ids, num_logprobs) for ids in payload["prompt"]]
        choices = [
            {"index": i, "text": "", "prompt_token_ids": ids, "prompt_logprobs": logprobs}
            for i, (ids, logprobs) in enumerate(zip(payload["prompt"], rows, strict=True))
        ]
        return 200, {"model": payload["model"], "choices": choices}

    def prompt_logprobs(self, ids: list[int], k: int) -> Positions:
        """Each position's sampled id and K most probable ids, computed once for each network."""
        with self.lock:
            known_answers = KNOWN_ANSWERS.setdefault(self.network, {})
            if (*ids, k) not in known_answers:
                known_answers[*ids, k] = describe_positions(self.network, ids, k)
            return known_answers[*ids, k]


KNOWN_ANSWERS: WeakKeyDictionary[Any, dict[tuple[int, ...], Positions]] = WeakKeyDictionary()
"""Network -> token ids and K -> the answer."""


@torch.no_grad()
def describe_positions(network: Any, ids: list[int], k: int) -> Positions:
    logp = network(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    sampled_logp = logp.gather(1, torch.tensor(ids[1:])[:, None])
    ranks = 1 + (logp > sampled_logp).sum(1)
    top_logp, top_ids = logp.topk(k)
    positions: Positions = [None]
    for token, sampled, rank, values, top in zip(
        ids[1:],
        sampled_logp[:, 0].tolist(),
        ranks.tolist(),
        top_logp.tolist(),
        top_ids.tolist(),
        strict=True,
    ):
        entries = {str(token): {"logprob": sampled, "rank": rank}}
        for r, (v, value) in enumerate(zip(top, values, strict=True), 1):
            entries[str(v)] = {"logprob": value, "rank": r}
        positions.append(entries)
    return positions


@contextmanager
def serve(teacher: FakeTeacher, port: int = 0) -> Iterator[str]:
    """Serve the teacher inside the block and yield its URL; refuse connections afterwards."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def setup(self) -> None:
            super().setup()
            teacher.connections += 1
            connections.append(self.connection)

        def do_GET(self) -> None:
            self.reply_json(teacher.handle(self.path, None))

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path not in teacher.routes:
                return self.reply_json(teacher.handle(self.path, payload))
            with teacher.lock:
                teacher.requests.append(payload)
                teacher.keys.append(self.headers.get("Authorization"))
                teacher.num_running += 1
                teacher.max_running = max(teacher.num_running, teacher.max_running)
                fault = teacher.faults.pop(0) if teacher.faults else None
            try:
                status, answer = teacher.routes[self.path](payload)
                body = json.dumps(answer).encode()
                headers: dict[str, str] = {}
                if fault is not None:
                    status, headers, body = fault(body)
            except DropConnection:
                self.close_connection = True
                return None
            finally:
                with teacher.lock:
                    teacher.num_running -= 1
            return self.reply(status, headers, body)

        def reply_json(self, answer: tuple[int, dict[str, Any]]) -> None:
            self.reply(answer[0], {}, json.dumps(answer[1]).encode())

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    connections: list[Any] = []
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        for connection in connections:
            shutdown_connection(connection)
        thread.join()


def shutdown_connection(connection: Any) -> None:
    with suppress(OSError):
        connection.shutdown(2)


def error_status(number: int, **headers: str) -> Fault:
    return lambda body: (number, headers, b'{"error": {"message": "as ordered"}}')


def drop_connection(body: bytes) -> tuple[int, dict[str, str], bytes]:
    raise DropConnection


def truncate_body(body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Half of the JSON with its correct length."""
    return 200, {}, body[: len(body) // 2]


def shorten_body(body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Half of the JSON with the length of all of it; the connection then ends."""
    return 200, {"Content-Length": str(len(body)), "Connection": "close"}, body[: len(body) // 2]


def delay(seconds: float) -> Fault:
    def fault(body: bytes) -> tuple[int, dict[str, str], bytes]:
        time.sleep(seconds)
        return 200, {}, body

    return fault


def edit_answer(function: Callable[[dict[str, Any]], Any]) -> Fault:
    """Change the response in place with `function`."""

    def fault(body: bytes) -> tuple[int, dict[str, str], bytes]:
        answer = json.loads(body)
        function(answer)
        return 200, {}, json.dumps(answer).encode()

    return fault
