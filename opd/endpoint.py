"""An HTTP address that answers JSON: persistent connections, bounded answers, bounded patience.

Standard library alone, free of torch. No redirect is followed and no proxy of the environment used;
an answer is read up to a bound and parsed as JSON, never unpickled. The key is read from the
environment and sent; no message, record or file holds it.
"""

import json
import os
import random
import socket
import ssl
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.terminal import visible

KEY = "OPDLAB_TEACHER_KEY"
"""Environment variable with the bearer key of a teacher's server, if it wants one."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""States of a server that may be another one soon."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second try, doubled at every further one, and the most."""
BLOCK = 1 << 20


class _Passing(Exception):
    """A try failed in a way that may pass. after: seconds that the server asks for."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


def is_url(name: str) -> bool:
    return "://" in name


class Endpoint:
    """A server that is asked by several threads at once.

    Args:
      url: http or https, with the path that questions are put below; no user, query or fragment.
      patience: seconds for which a question is put again while it fails in ways that may pass; a
        try has at most a third of it.
      of: what the server is, "teacher" or "rollout"; messages, the setting of its patience and the
        variable with its key are named after it.

    Raises:
      ValueError: another kind of address, or one with a password or a query in it.
    """

    def __init__(self, url: str, *, patience: float, of: str = "teacher") -> None:
        self.of, self.key = of, KEY.replace("TEACHER", of.upper())
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"{url!r} is no http:// or https:// address of a server")
        if parts.username is not None or parts.password is not None or parts.query:
            raise InvalidInput(
                f"the address of {parts.hostname} holds a user, a password or a query, which the "
                f"run's record would keep; put the key into the environment variable {self.key}"
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.patience = patience
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._key = os.environ.get(self.key, "")
        if self._key and not self._secure and parts.hostname not in ("localhost", "127.0.0.1"):
            warnings.warn(f"{self.key} goes to {self.url} unencrypted; use https", stacklevel=2)
        self._lock = threading.Lock()
        self._idle: list[HTTPConnection] = []
        self._busy: set[HTTPConnection] = set()
        self._stopped = threading.Event()
        self._failing = False
        self._random = random.Random()  # when to try again; no result depends on it

    def ask(
        self,
        path: str,
        question: Any = None,
        *,
        most: int,
        about: str = "",
        passing: Sequence[int] = PASSING,
    ) -> Any:
        """The JSON answer to a GET, or to a POST of a question.

        Connection errors, time-outs, the states that are `passing` and answers that are not whole
        JSON are tried again, with exponentially growing, jittered waits, for at most `patience`
        seconds.

        Args:
          path: below the address, with its slash. most: bytes of the answer. about: what is asked
            of, for messages. passing: states of the server that may be another one soon.

        Raises:
          RuntimeError: patience is over, or `stop` was called.
          ValueError: the server refuses the question, redirects, or answers at too great length.
        """
        body = None if question is None else json.dumps(question).encode()
        where = f"{self.url}{path}" + (f" ({about})" if about else "")
        began, wait, tries = time.monotonic(), FIRST_WAIT, 0
        while True:
            if self._stopped.is_set():
                raise OperationFailed(f"{where}: not asked any more, another question failed")
            left = self.patience - (time.monotonic() - began)
            try:
                found, raw = self._try(path, body, most, where, min(left, self.patience / 3))
                answer = self._judged(found, raw, where, passing)
            except _Passing as failure:
                pause = max(failure.after, wait * self._random.uniform(0.5, 1.5))
                wait = min(2 * wait, LONGEST_WAIT)
                over = time.monotonic() - began
                if over + pause >= self.patience:
                    raise OperationFailed(
                        f"{where}: no answer for {over:.0f} s ({failure}); see to the server, and "
                        "the same command goes on from the last checkpoint; "
                        f"{self.of}_patience, {self.patience:.0f} s, says how long to wait"
                    ) from failure
                tries += 1
                if tries > 1:  # one failure among many answers is not worth a word
                    self._tell_once(
                        True, f"{where}: {failure}; trying again for {self.patience:.0f} s"
                    )
                self._stopped.wait(pause)
            else:
                self._tell_once(False, f"{self.url}: answers again")
                return answer

    def stop(self) -> None:
        """End all questions under way, in other threads; each raises. Until `start`."""
        self._stopped.set()
        with self._lock:
            busy = list(self._busy)
        for connection in busy:
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)  # wakes who waits on it

    def start(self) -> None:
        self._stopped.clear()

    def close(self) -> None:
        """Give up the connections; a later question makes new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _try(
        self, path: str, body: bytes | None, most: int, where: str, seconds: float
    ) -> tuple[HTTPResponse, bytes]:
        """One try; a connection that the server closed meanwhile is made anew without a wait."""
        until = time.monotonic() + max(seconds, 1.0)
        with self._lock:
            old = self._idle.pop() if self._idle else None
        if old is not None:
            try:
                return self._on(old, path, body, most, where, until)
            except _Passing as failure:
                if self._stopped.is_set() or not isinstance(failure.__cause__, ConnectionError):
                    raise
        return self._on(self._connection(), path, body, most, where, until)

    def _connection(self) -> HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            return HTTPSConnection(self._host, self._port, context=context)
        return HTTPConnection(self._host, self._port)

    def _on(
        self,
        connection: HTTPConnection,
        path: str,
        body: bytes | None,
        most: int,
        where: str,
        until: float,
    ) -> tuple[HTTPResponse, bytes]:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        left = until - time.monotonic()
        connection.timeout = left
        if connection.sock is not None:
            connection.sock.settimeout(left)
        with self._lock:
            self._busy.add(connection)
        whole = False
        try:
            method = "GET" if body is None else "POST"
            connection.request(method, self._path + path, body, headers)
            found = connection.getresponse()
            raw = self._read(connection, found, most, where, until)
            whole = not found.will_close and not found.length  # one that was cut is no JSON either
            found.close()
        except ssl.SSLCertVerificationError as error:
            raise InvalidInput(f"{where}: its certificate is not trusted ({error})") from error
        except (OSError, HTTPException) as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self._busy.discard(connection)
                if whole:
                    self._idle.append(connection)
            if not whole:
                connection.close()
        return found, raw

    def _read(
        self,
        connection: HTTPConnection,
        found: HTTPResponse,
        most: int,
        where: str,
        until: float,
    ) -> bytes:
        """The body, in blocks, so that neither its size nor a slow server is without bound."""
        blocks, size = [], 0
        while block := found.read1(BLOCK):
            blocks.append(block)
            size += len(block)
            if size > most:
                raise InvalidInput(
                    f"{where}: the answer is longer than {most} bytes, more than was asked for; is "
                    f"this the {self.of} server?"
                )
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer came too slowly")
            if connection.sock is not None:
                connection.sock.settimeout(left)
        return b"".join(blocks)

    def _judged(self, found: HTTPResponse, raw: bytes, where: str, passing: Sequence[int]) -> Any:
        """The answer as JSON, or what its status means."""
        status = found.status
        if status == 200:
            try:
                return json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise _Passing(f"the answer is no JSON ({error})") from error
        said = self._clean(raw)
        if status in passing:
            asked = found.headers.get("Retry-After", "")
            raise _Passing(f"status {status}: {said}", float(asked) if asked.isdigit() else 0.0)
        if 300 <= status < 400:
            raise InvalidInput(
                f"{where}: status {status} sends to {found.headers.get('Location')!r}, and no "
                "redirect is followed; if that is the server, give its address"
            )
        remedy = {
            401: f"set the environment variable {self.key}",
            403: f"set the environment variable {self.key} to a key that may ask this",
            404: "does the address end in /v1, and is it of vLLM's OpenAI server?",
        }.get(status, "it refuses the question")
        raise InvalidInput(f"{where}: status {status}: {said}; {remedy}")

    def _clean(self, raw: bytes) -> str:
        """What an error says, short, on one line and without the key."""
        text = " ".join(raw[:4096].decode(errors="replace").split())
        try:
            told = json.loads(raw)
            text = str(told.get("error", told).get("message", text))
        except (ValueError, AttributeError, RecursionError):
            pass
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= 300 else text[:300] + " ..."

    def _tell_once(self, failing: bool, message: str) -> None:
        """Say that the server fails when it begins to, and that it answers when it does again."""
        with self._lock:
            changed, self._failing = failing != self._failing, failing
        if changed:
            tqdm.write(visible(message), file=sys.stderr)
