"""JSON endpoints: API keys never appear in messages, and no server exceeds the timeout."""

import base64
import html
import json
import logging
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from diagnostics.errors import InvalidInput, OperationFailed
from opd.config.settings import with_settings
from opd.serving import json_endpoint
from opd.serving.api_keys import key_pattern
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.vllm_protocol import select_model
from opd.teachers.connection import check_same_text
from opd.teachers.server_kinds import VLLM
from opd.training.train import train
from tests.helpers.runs import settings

SECRET = "sk-SECRET/0123456789+?=x"


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_endpoint, "FIRST_RETRY_DELAY", 0.02)
    monkeypatch.delenv(json_endpoint.KEY_VARIABLE, raising=False)


@contextmanager
def raw_server(send_reply: Callable[[socket.socket], object]) -> Iterator[str]:
    """Serve connections: read the request headers, then call `send_reply` with the connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.02)
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            send_reply(connection)

    def accept() -> None:
        while not ended.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                connection.settimeout(5)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        thread.join()
        listener.close()


def reply_with(
    body: bytes, status: str = "200 OK", **headers: str
) -> Callable[[socket.socket], None]:
    lines = {"Content-Length": str(len(body))} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return lambda connection: connection.sendall(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)


def error_of(url: str, timeout: float = 0.1, max_bytes: int = 10_000) -> Exception:
    with pytest.raises((InvalidInput, OperationFailed)) as caught:
        JsonEndpoint(url, timeout=timeout).request("/x", {}, max_bytes=max_bytes)
    return caught.value


# --- keys ----------------------------------------------------------------------------------------

BASE64 = base64.b64encode(SECRET.encode()).decode()
ECHOES = {
    "redirect": reply_with(b"", "302 X", Location=f"http://x/?k={SECRET}"),
    "redirect, percent-encoded": reply_with(b"", "302 X", Location=f"/?k={quote(SECRET, safe='')}"),
    "status line": lambda c: c.sendall(f"{SECRET} x\r\n\r\n".encode()),
    "version": lambda c: c.sendall(f"HTTP/{SECRET} 200 OK\r\n\r\n".encode()),
    "reason": reply_with(b"{}x", f"500 {SECRET}"),
    "header that is none": lambda c: c.sendall(f"HTTP/1.1 200 OK\r\n{SECRET}\r\n\r\n".encode()),
    "length": reply_with(b"", Content_Length=SECRET),
    "chunk": lambda c: c.sendall(
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{SECRET}\r\n".encode()
    ),
    "error": reply_with(json.dumps({"error": {"message": f"bad {SECRET}"}}).encode(), "400 X"),
    "error, cut": reply_with(b"x" * 285 + SECRET.encode(), "400 X"),
    "error, in a list": reply_with(json.dumps([SECRET]).encode(), "503 X"),
    "error, base64": reply_with(f"Basic {BASE64}".encode(), "403 X"),
    "error, upper case": reply_with(SECRET.upper().encode(), "401 X"),
    "no JSON": reply_with(SECRET.encode()),
    "compressed": reply_with(b"{}", Content_Encoding=SECRET),
}


@pytest.mark.parametrize("case", ECHOES)
def test_a_key_that_comes_back_is_in_no_error_and_no_log(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(json_endpoint.KEY_VARIABLE, SECRET)
    caplog.set_level(logging.DEBUG)
    with raw_server(ECHOES[case]) as url:
        error = error_of(url)
    quoted_text = "".join(traceback.format_exception(error)) + caplog.text
    current: BaseException | None = error
    while current is not None:  # including exceptions that tracebacks do not show
        quoted_text += repr(current) + repr(current.args)
        current = current.__cause__ or current.__context__
    for form in (SECRET, SECRET.upper(), quote(SECRET, safe=""), BASE64.rstrip("="), SECRET[:12]):
        assert form not in quoted_text
    assert "127.0.0.1" in str(error)


SPELLINGS = {
    "as it is": lambda key: key,
    "percent-encoded, but the slash": quote,
    "percent-encoded, lower case": lambda key: quote(key, safe="").lower(),
    "as in a form": quote_plus,
    "JSON": lambda key: json.dumps(key)[1:-1],
    "JSON with escaped slashes": lambda key: key.replace("/", r"\/"),
    "JSON in ASCII escapes": lambda key: "".join(f"\\u{ord(x):04X}" for x in key),
    "Python": lambda key: "".join(f"\\x{ord(x):02x}" for x in key),
    "HTML": html.escape,
    "HTML numbers": lambda key: "".join(f"&#{ord(x)};" for x in key),
    "wrapped": lambda key: f"{key[:9]}\n  {key[9:]}",
    "cut": lambda key: f"{key[:16]}...",
    "Basic": lambda key: base64.b64encode(f"user:{key}".encode()).decode(),
    "hexadecimal": lambda key: key.encode().hex(),
}
"""How servers and libraries write a key."""


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("key", [SECRET, SECRET * 30, "sk-A'b\"/9&c=d+e-f<g>\\h~i%j=="])
def test_every_spelling_of_a_key_is_removed_and_nothing_else(key: str, spelling: str) -> None:
    pattern = key_pattern(key)
    assert pattern is not None
    written = SPELLINGS[spelling](key)
    shown = pattern.sub("***", f"the key {written} was refused, of sk-A and {key[:3]}")
    assert re.fullmatch(rf"the key \*\*\*(\.\.\.|=*)? was refused, of sk-A and {key[:3]}", shown)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", " ", "\x00", "é"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if end != "\x00":  # environment variables cannot contain it
        monkeypatch.setenv(json_endpoint.KEY_VARIABLE, f"{SECRET}{end}")
        with pytest.raises(
            InvalidInput, match=f"{json_endpoint.KEY_VARIABLE} has .*: character 25 of"
        ) as caught:
            JsonEndpoint("https://somewhere/v1", timeout=1.0)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "http://me:hush@somewhere/v1",
        "https://hush@somewhere/v1",
        "http://somewhere/v1?key=hush",
        "ftp://me:hush@somewhere/v1",
        "http://me:hush@somewhere:port/v1",
    ],
)
def test_a_secret_in_an_address_is_refused_before_anything_is_written(
    address: str, tiny_pair, tmp_path: Path
) -> None:
    with pytest.raises(
        InvalidInput, match=r"a user, a password|not an http:// or https://"
    ) as caught:
        train(with_settings(settings(tiny_pair, tmp_path / "run"), teacher=address))
    servers = (f"{address}", "http://fine/v1")
    with pytest.raises(InvalidInput) as server_error:
        train(settings(tiny_pair, tmp_path / "run", engine="servers", rollout_servers=servers))
    with pytest.raises(InvalidInput) as type_error:
        train(settings(tiny_pair, tmp_path / "run", rollout_servers=servers, lr=-1.0))
    assert "hush" not in str(caught.value) + str(server_error.value) + str(type_error.value)
    assert not (tmp_path / "run").exists()


# --- timeouts ------------------------------------------------------------------------------------

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def drip(connection: socket.socket, data: bytes, gap: float = 0.05) -> None:
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(gap)


def flood(connection: socket.socket, data: bytes, gap: float = 0.0) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        connection.sendall(data)
        time.sleep(gap)


SLOW = {
    "nothing": lambda c: time.sleep(20),
    "status line": lambda c: drip(c, b"HTTP/1.1 " + b"2" * 400),
    "headers": lambda c: drip(c, b"HTTP/1.1 200 OK\r\nX: " + b"a" * 400),
    "headers without end": lambda c: (
        c.sendall(b"HTTP/1.1 200 OK\r\n"),
        flood(c, b"X: y\r\n", 0.05),
    ),
    "100 without end": lambda c: flood(c, b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
    "100 in floods": lambda c: flood(c, b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "body": lambda c: (
        c.sendall(CHUNKED[:17] + b"Content-Length: 900\r\n\r\n"),
        drip(c, b" " * 900),
    ),
    "size of a chunk": lambda c: (c.sendall(CHUNKED), drip(c, b"0" * 400 + b"2\r\n{}")),
    "chunks of a byte": lambda c: (c.sendall(CHUNKED), flood(c, b"1\r\n \r\n", 0.05)),
    "trailers": lambda c: (c.sendall(CHUNKED + b"2\r\n{}\r\n0\r\n"), flood(c, b"X: y\r\n", 0.05)),
}


@pytest.fixture(scope="module")
def slow_errors() -> dict[str, tuple[Exception, float]]:
    """Error of each slow server and the seconds until it; the requests run at the same time."""
    getaddrinfo, finished = socket.getaddrinfo, threading.Event()

    def look_up(host: str, *arguments: Any, **options: Any) -> Any:
        if "somewhere.invalid" in str(host):
            return finished.wait(20) and []
        return getaddrinfo(host, *arguments, **options)

    def request(url: str) -> tuple[Exception, float]:
        start = time.monotonic()
        return error_of(url, timeout=1.2), time.monotonic() - start

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(json_endpoint, "FIRST_RETRY_DELAY", 0.02)
        patch.setattr(socket, "getaddrinfo", look_up)
        urls = {case: stack.enter_context(raw_server(reply)) for case, reply in SLOW.items()}
        # accepts the connection but does not answer the TLS handshake
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        urls["TLS without end"] = f"https://127.0.0.1:{silent.getsockname()[1]}"
        urls["name lookup without end"] = "http://somewhere.invalid"
        pool = stack.enter_context(ThreadPoolExecutor(len(urls)))
        stack.callback(finished.set)
        return dict(zip(urls, pool.map(request, urls.values()), strict=True))


@pytest.mark.parametrize("case", [*SLOW, "TLS without end", "name lookup without end"])
def test_no_way_of_being_slow_outlasts_patience(
    slow_errors: dict[str, tuple[Exception, float]], case: str
) -> None:
    error, seconds = slow_errors[case]
    assert isinstance(error, OperationFailed)
    assert re.search(r"no response for .* s \(TimeoutError", str(error)), error
    assert "set by teacher_timeout, 1 s" in str(error)
    assert seconds < 6  # two attempts of a second, and a margin for a busy machine


def test_questions_under_way_end_when_they_are_stopped() -> None:
    endpoint: JsonEndpoint
    errors: list[Exception] = []

    def ask() -> None:
        try:
            endpoint.request("/x", {}, max_bytes=100)
        except OperationFailed as error:
            errors.append(error)

    with raw_server(SLOW["nothing"]) as url:
        endpoint = JsonEndpoint(url, timeout=60.0)
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        endpoint.stop()
        for thread in threads:
            thread.join(5)
        ask()  # rejected until `start`
    assert [("another request failed" in str(error)) for error in errors] == [True] * 4


# --- sizes and kinds of answers ------------------------------------------------------------------


def test_answers_are_bounded_and_never_unpacked() -> None:
    import gzip

    bomb = gzip.compress(b" " * 10_000_000)  # 10 kB that would be 10 MB
    with raw_server(reply_with(bomb, Content_Encoding="gzip")) as url:
        assert "is compressed (gzip)" in str(error_of(url, max_bytes=100_000))
    with raw_server(reply_with(b" " * 50_000)) as url:
        assert "longer than 10000 bytes" in str(error_of(url))
    endless = lambda c: (c.sendall(CHUNKED), flood(c, b"400\r\n" + b" " * 1024 + b"\r\n"))  # noqa: E731
    with raw_server(endless) as url:
        assert "longer than 10000 bytes" in str(error_of(url, timeout=60.0))


def test_the_certificate_must_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout k -out c"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                with suppress(OSError):
                    connection = context.wrap_socket(listener.accept()[0], server_side=True)
                    connection.recv(65536)
                    reply_with(b'{"trusted": true}')(connection)

        threading.Thread(target=serve, daemon=True).start()
        url = f"https://localhost:{listener.getsockname()[1]}"
        error = error_of(url, timeout=9.0)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c"))
        answer = JsonEndpoint(url, timeout=9.0).request("/x", max_bytes=100)
    assert isinstance(error, InvalidInput)
    assert "its TLS certificate is not trusted" in str(error)
    assert answer == {"trusted": True}


PAGE = b"<!DOCTYPE html><html><body>Welcome to nginx!</body></html>"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (PAGE, "the response is a web page, not JSON; .* that it ends in /v1"),
        (
            b"[]",
            r"/models: the response has no field 'data' \(a list\), .* but is \[\]",
        ),
        (b'"yes"', "/models: the response has no field 'data'.*but is 'yes'"),
        (
            b'{"models": []}',
            "/models: the response has no field 'data'.*an object with the fields models",
        ),
        (b'{"data": [{"name": "m"}]}', r"/models: the response has no field 'id' \(text\)"),
        (
            b'{"data": [1]}',
            r"/models: the response has no field 'id' \(text\), which vLLM returns, but is 1",
        ),
        (b'{"data": [{"id": "m", "max_model_len": "9"}]}', "max_model_len is '9'"),
    ],
)
def test_another_kind_of_server_is_said_when_it_lists_its_models(body: bytes, message: str) -> None:
    with raw_server(reply_with(body)) as url, pytest.raises(InvalidInput, match=message) as caught:
        select_model(JsonEndpoint(url, timeout=9.0), "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            b'{"content": "a"}',
            "200 OK",
            r"/detokenize.* fields content \(as returned by llama.cpp\)",
        ),
        (
            b'{"text": "a"}',
            "200 OK",
            r"/detokenize.* fields text \(as returned by SGLang\).*prompt_logprobs",
        ),
        (b'{"prompt": 3}', "200 OK", r"/detokenize: the response has no field 'prompt' \(text\)"),
        (b'{"detail": "Not Found"}', "404 X", "status 404: .*is that of vLLM's OpenAI server"),
        (PAGE, "404 X", "status 404: a web page"),
    ],
)
def test_another_kind_of_server_is_said_when_it_is_asked_for_text(
    tiny_pair, body: bytes, status: str, message: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[0])
    with raw_server(reply_with(body, status)) as url, pytest.raises(InvalidInput, match=message):
        check_same_text(JsonEndpoint(url, timeout=9.0), VLLM, "m", tokenizer)
