"""An HTTP address that answers JSON, with bounded answers, bounded patience and a secret key.

An answer is read up to a bound and parsed as JSON, never unpickled. The key is read from the
environment and sent; no message, record or file holds it, even if the server sends it back.
"""

import json
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from tqdm import tqdm

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.terminal import visible
from opd.serving.addresses import KEY, address_problem, key_variable
from opd.serving.api_keys import hide_in_logs, refuse_odd_key, spellings
from opd.serving.http_client import HttpClient, Reply

__all__ = ["KEY", "PASSING", "JsonEndpoint"]

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""States of a server that may be another one soon."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second try, doubled at every further one, and the most."""
SHORTEST_TRY = 1.0
"""Seconds that a try has at least."""


class _Passing(Exception):
    """A try failed in a way that may pass. after: seconds that the server asks for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class JsonEndpoint:
    """A server that is asked by several threads at once.

    Args:
      url: http or https, with the path that questions are put below; no user, query or fragment.
      patience: seconds for which a question is put again while it fails in ways that may pass; a
        try has at most a third of it, for everything from the name's look-up to the last byte.
      role: what the server is, "teacher" or "rollout"; messages, the setting of its patience and
        the variable with its key are named after it.

    Raises:
      InvalidInput: another kind of address, one with a password or a query in it, or a key that no
        header can hold.
    """

    def __init__(self, url: str, *, patience: float, role: str = "teacher") -> None:
        if problem := address_problem(url, role):
            raise InvalidInput(problem)
        parts = urlsplit(url)
        self.role, self.key, self.patience = role, key_variable(role), patience
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._key = os.environ.get(self.key, "")
        refuse_odd_key(self.key, self._key)
        if (
            self._key
            and parts.scheme == "http"
            and parts.hostname not in ("localhost", "127.0.0.1")
        ):
            warnings.warn(f"{self.key} goes to {self.url} unencrypted; use https", stacklevel=2)
        self._secrets = spellings(self._key)
        if self._secrets is not None:
            hide_in_logs(self._secrets)
        self._client = HttpClient()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
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
          OperationFailed: patience is over, or `stop` was called.
          InvalidInput: the server refuses the question, redirects, answers at too great length, or
            with a web page.
        """
        body = None if question is None else json.dumps(question).encode()
        where = f"{self.url}{path}" + (f" ({about})" if about else "")
        began, wait, tries = time.monotonic(), FIRST_WAIT, 0
        while True:
            left = self.patience - (time.monotonic() - began)
            seconds = max(SHORTEST_TRY, min(left, self.patience / 3))
            try:
                answer = self._try(path, body, most, where, seconds, passing)
            except _Passing as failure:
                pause = max(failure.after, wait * self._random.uniform(0.5, 1.5))
                wait = min(2 * wait, LONGEST_WAIT)
                over = time.monotonic() - began
                if over + pause >= self.patience:
                    raise OperationFailed(
                        f"{where}: no answer for {over:.0f} s ({failure}); see to the server, and "
                        "the same command goes on from the last checkpoint; "
                        f"{self.role}_patience, {self.patience:.0f} s, says how long to wait"
                    ) from failure
                tries += 1
                if tries > 1:  # one failure among many answers is not worth a word
                    self._tell_once(
                        True, f"{where}: {failure}; trying again for {self.patience:.0f} s"
                    )
                self._stopping.wait(pause)
            else:
                self._tell_once(False, f"{self.url}: answers again")
                return answer

    def stop(self) -> None:
        """End all questions under way, in other threads; each raises. Until `start`."""
        self._stopping.set()
        self._client.stop()

    def start(self) -> None:
        self._stopping.clear()
        self._client.start()

    def close(self) -> None:
        """Give up the connections; a later question makes new ones."""
        self._client.close()

    def redacted(self, text: str) -> str:
        """A text with what the server said, without the key that it may have sent back."""
        return self._secrets.sub("***", text) if self._secrets is not None else text

    def _try(
        self,
        path: str,
        body: bytes | None,
        most: int,
        where: str,
        seconds: float,
        passing: Sequence[int],
    ) -> Any:
        """The answer of one try; raises `_Passing` if it is worth another one.

        Nothing is raised from an error of the client or the decoder, which may hold the key.
        """
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        method = "GET" if body is None else "POST"
        reply = self._client.send(
            method, f"{self.url}{path}", headers, body, most=most, seconds=seconds
        )
        if not isinstance(reply, Reply):
            text = self.redacted(reply.text)
            if reply.kind == "stopped":
                raise OperationFailed(f"{where}: not asked any more, another question failed")
            if reply.kind == "untrusted":
                raise InvalidInput(f"{where}: its certificate is not trusted ({text})")
            if reply.kind == "long":
                raise InvalidInput(
                    f"{where}: {text}, more than was asked for; is this the {self.role} server?"
                )
            raise _Passing(text)
        if reply.status != 200:
            self._refuse(reply, where, passing)
        if is_page(reply):
            raise InvalidInput(
                f"{where}: the answer is a web page, not JSON; is this the address of a "
                f"{self.role} server of vLLM, and does it end in /v1?"
            )
        if (coding := reply.headers.get("content-encoding", "identity")) != "identity":
            raise InvalidInput(
                f"{where}: the answer is compressed ({self.redacted(coding)}), which was not asked "
                "for; is there a proxy that compresses?"
            )
        answer, problem = parsed(reply.body)
        if problem:
            raise _Passing(f"the answer is no JSON ({self.redacted(problem)})")
        return answer

    def _refuse(self, reply: Reply, where: str, passing: Sequence[int]) -> NoReturn:
        """Raise what a status other than 200 means."""
        status, said = reply.status, self._quoted(reply)
        if status in passing:
            asked = reply.headers.get("retry-after", "")
            digits = asked.isascii() and asked.isdigit() and len(asked) < 10
            raise _Passing(f"status {status}: {said}", float(asked) if digits else 0.0)
        if 300 <= status < 400:
            aim = self.redacted(reply.headers.get("location", ""))[:300]
            raise InvalidInput(
                f"{where}: status {status} sends to {aim!r}, and no redirect is followed; if that "
                "is the server, give its address"
            )
        remedy = {
            401: f"set the environment variable {self.key}",
            403: f"set the environment variable {self.key} to a key that may ask this",
            404: "does the address end in /v1, and is it of vLLM's OpenAI server?",
        }.get(status, "it refuses the question")
        raise InvalidInput(f"{where}: status {status}: {said}; {remedy}")

    def _quoted(self, reply: Reply) -> str:
        """What an error says, short, on one line and without the key."""
        if is_page(reply):
            return "a web page"
        text = reply.body.decode(errors="replace")
        answer, _ = parsed(reply.body)
        if isinstance(answer, dict):
            error = answer.get("error", answer)
            text = str(error.get("message", text) if isinstance(error, dict) else error)
        text = " ".join(self.redacted(text).split())  # before it is cut, which may leave a part
        return text if len(text) <= 300 else text[:300] + " ..."

    def _tell_once(self, failing: bool, message: str) -> None:
        """Say that the server fails when it begins to, and that it answers when it does again."""
        with self._lock:
            changed, self._failing = failing != self._failing, failing
        if changed:
            tqdm.write(visible(message), file=sys.stderr)


def parsed(body: bytes) -> tuple[Any, str]:
    """What JSON says, and "" or why it is none."""
    try:
        return json.loads(body), ""
    except (ValueError, RecursionError) as error:
        return None, f"{type(error).__name__}: {error}"


def is_page(reply: Reply) -> bool:
    """Whether an answer is HTML or XML."""
    return "html" in reply.headers.get("content-type", "") or reply.body.lstrip()[:1] == b"<"
