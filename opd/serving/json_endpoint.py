"""Client of an HTTP server that returns JSON: limited response sizes, retries, and an API key.

A response is read up to a maximum size and parsed as JSON, never unpickled. The API key is read
from the environment and sent with every request; messages, run folders and files never contain it,
even if the server sends it back.
"""

import json
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import urlsplit

import orjson
from tqdm import tqdm

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.terminal import escape_control_chars
from opd.serving.addresses import KEY_VARIABLE, address_problem, key_variable
from opd.serving.api_keys import check_key, key_pattern, redact_logs
from opd.serving.http_client import HttpClient, Reply

__all__ = ["KEY_VARIABLE", "RETRYABLE_STATUSES", "JsonEndpoint"]

RETRYABLE_STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""HTTP status codes of temporary failures."""
FIRST_RETRY_DELAY, MAX_RETRY_DELAY = 0.5, 30.0
"""Seconds before the first retry, which double with each further one, and their maximum."""
MIN_ATTEMPT_TIMEOUT = 1.0
"""Minimum timeout of one attempt in seconds."""


class _RetryableError(Exception):
    """A temporary failure. retry_after: seconds, from the Retry-After header."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class JsonEndpoint:
    """A server that several threads send requests to.

    Args:
        url: Http or https address, with the path prefix of all requests; without user, query or
            fragment.
        timeout: Seconds for which a request is retried after temporary failures. One attempt takes
            at most a third of it, from the name lookup to the last byte.
        role: "teacher" or "rollout"; determines the name of the timeout setting in messages and
            the environment variable of the API key.

    Raises:
        InvalidInput: The address has another scheme, a password or a query, or the key has
            characters that a header cannot contain.
    """

    def __init__(self, url: str, *, timeout: float, role: str = "teacher") -> None:
        if problem := address_problem(url, role):
            raise InvalidInput(problem)
        parts = urlsplit(url)
        self.role, self.key, self.timeout = role, key_variable(role), timeout
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._key = os.environ.get(self.key, "")
        check_key(self.key, self._key)
        if (
            self._key
            and parts.scheme == "http"
            and parts.hostname not in ("localhost", "127.0.0.1")
        ):
            warnings.warn(
                f"{self.key} is sent to {self.url} unencrypted; use an https address", stacklevel=2
            )
        self._secrets = key_pattern(self._key)
        if self._secrets is not None:
            redact_logs(self._secrets)
        self._client = HttpClient()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._failing = False
        self._random = random.Random()  # jitter of retry delays; no result depends on it

    def request(
        self,
        path: str,
        payload: Any = None,
        *,
        max_bytes: int,
        description: str = "",
        retryable_statuses: Sequence[int] = RETRYABLE_STATUSES,
    ) -> Any:
        """Send a GET request, or a POST request with a JSON payload, and return the JSON response.

        Connection errors, timeouts, retryable status codes and incomplete JSON are retried with
        exponentially growing, jittered delays, for at most `timeout` seconds.

        Args:
            path: Path below the address, with its leading slash.
            payload: The JSON body of a POST request; None sends a GET request.
            max_bytes: Maximum size of the response in bytes.
            description: What is requested, for messages.
            retryable_statuses: Status codes of temporary failures.

        Returns:
            The parsed JSON.

        Raises:
            OperationFailed: The timeout has expired, or `stop` was called.
            InvalidInput: The server rejects the request, redirects, or returns a web page or a
                response that is too long.
        """
        body = None if payload is None else json.dumps(payload).encode()
        location = f"{self.url}{path}" + (f" ({description})" if description else "")
        start, delay, retries = time.monotonic(), FIRST_RETRY_DELAY, 0
        while True:
            remaining = self.timeout - (time.monotonic() - start)
            attempt_timeout = max(MIN_ATTEMPT_TIMEOUT, min(remaining, self.timeout / 3))
            try:
                answer = self._attempt(
                    path, body, max_bytes, location, attempt_timeout, retryable_statuses
                )
            except _RetryableError as failure:
                pause = max(failure.retry_after, delay * self._random.uniform(0.5, 1.5))
                delay = min(2 * delay, MAX_RETRY_DELAY)
                elapsed = time.monotonic() - start
                if elapsed + pause >= self.timeout:
                    raise OperationFailed(
                        f"{location}: no response for {elapsed:.0f} s ({failure}). Check the "
                        "server and run the same command again to resume from the last "
                        f"checkpoint. The timeout is set by {self.role}_timeout, "
                        f"{self.timeout:.0f} s"
                    ) from failure
                retries += 1
                if retries > 1:  # a single failure among many requests is not reported
                    self._report_change(
                        True, f"{location}: {failure}; retrying for up to {self.timeout:.0f} s"
                    )
                self._stopping.wait(pause)
            else:
                self._report_change(False, f"{self.url}: responds again")
                return answer

    def stop(self) -> None:
        """Cancel the running requests of all threads, each of which raises, until `start`."""
        self._stopping.set()
        self._client.stop()

    def start(self) -> None:
        """Accept requests again after `stop`."""
        self._stopping.clear()
        self._client.start()

    def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        self._client.close()

    def redacted(self, text: str) -> str:
        """Return a text that quotes the server with every form of the API key replaced."""
        return self._secrets.sub("***", text) if self._secrets is not None else text

    def _attempt(
        self,
        path: str,
        body: bytes | None,
        max_bytes: int,
        location: str,
        timeout: float,
        retryable_statuses: Sequence[int],
    ) -> Any:
        """Send the request once; raise `_RetryableError` for a temporary failure.

        Exceptions of the client and the decoder are not chained, because they may contain the key.
        """
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        method = "GET" if body is None else "POST"
        reply = self._client.send(
            method, f"{self.url}{path}", headers, body, max_bytes=max_bytes, timeout=timeout
        )
        if not isinstance(reply, Reply):
            text = self.redacted(reply.text)
            if reply.kind == "stopped":
                raise OperationFailed(f"{location}: cancelled because another request failed")
            if reply.kind == "untrusted":
                raise InvalidInput(f"{location}: its TLS certificate is not trusted ({text})")
            if reply.kind == "too_long":
                raise InvalidInput(
                    f"{location}: {text}, the maximum for this request; is this the {self.role} "
                    "server?"
                )
            raise _RetryableError(text)
        if reply.status != 200:
            self._raise_for_status(reply, location, retryable_statuses)
        if is_web_page(reply):
            raise InvalidInput(
                f"{location}: the response is a web page, not JSON; check that this is the address "
                f"of a vLLM {self.role} server and that it ends in /v1"
            )
        if (coding := reply.headers.get("content-encoding", "identity")) != "identity":
            raise InvalidInput(
                f"{location}: the response is compressed ({self.redacted(coding)}), although an "
                "uncompressed one was requested; is there a proxy that compresses?"
            )
        answer, problem = parse_json(reply.body)
        if problem:
            raise _RetryableError(f"the response is not valid JSON ({self.redacted(problem)})")
        return answer

    def _raise_for_status(
        self, reply: Reply, location: str, retryable_statuses: Sequence[int]
    ) -> NoReturn:
        """Raise the error for a status code other than 200."""
        status, message = reply.status, self._error_message(reply)
        if status in retryable_statuses:
            retry_after = reply.headers.get("retry-after", "")
            is_number = retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10
            raise _RetryableError(
                f"status {status}: {message}", float(retry_after) if is_number else 0.0
            )
        if 300 <= status < 400:
            target = self.redacted(reply.headers.get("location", ""))[:300]
            raise InvalidInput(
                f"{location}: status {status} redirects to {target!r}; redirects are not followed. "
                "If that is the server, use its address"
            )
        remedy = {
            401: f"set the environment variable {self.key}",
            403: f"set the environment variable {self.key} to a key with access to this server",
            404: "check that the address ends in /v1 and is that of vLLM's OpenAI server",
        }.get(status, "the server rejects the request")
        raise InvalidInput(f"{location}: status {status}: {message}; {remedy}")

    def _error_message(self, reply: Reply) -> str:
        """Return a server's error message: short, on one line and without the key."""
        if is_web_page(reply):
            return "a web page"
        text = reply.body.decode(errors="replace")
        answer, _ = parse_json(reply.body)
        if isinstance(answer, dict):
            error = answer.get("error", answer)
            text = str(error.get("message", text) if isinstance(error, dict) else error)
        text = " ".join(self.redacted(text).split())  # before truncation, which may split the key
        return text if len(text) <= 300 else text[:300] + " ..."

    def _report_change(self, failing: bool, message: str) -> None:
        """Print a message when the server starts to fail, and when it responds again."""
        with self._lock:
            state_changed, self._failing = failing != self._failing, failing
        if state_changed:
            tqdm.write(escape_control_chars(message), file=sys.stderr)


def parse_json(body: bytes) -> tuple[Any, str]:
    """Parse a JSON body.

    Args:
        body: UTF-8 text.

    Returns:
        The value and ""; or None and why the body is not valid JSON.
    """
    with suppress(orjson.JSONDecodeError):  # it takes a third of the time, but refuses NaN
        return orjson.loads(body), ""
    try:
        return json.loads(body), ""
    except (ValueError, RecursionError) as error:
        return None, f"{type(error).__name__}: {error}"


def is_web_page(reply: Reply) -> bool:
    """Return whether a response is HTML or XML."""
    return "html" in reply.headers.get("content-type", "") or reply.body.lstrip()[:1] == b"<"
