"""HTTP requests with one deadline for name lookup, connection, TLS, headers and body together.

The client is httpx2. Its own timeouts apply to each read separately, so a server that sends one
byte at a time never exceeds them. Here every request is a task of an event loop in a background
thread and is cancelled at its deadline, whatever stage it has reached.

Redirects are not followed, proxies and .netrc of the environment are ignored, compressed responses
are neither requested nor decompressed, and the size of a body is limited.
"""

import asyncio
import ssl
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

KEEPALIVE_SECONDS = 4.0
"""Seconds for which an idle connection is kept; vLLM's server closes it after 5."""


@dataclass(frozen=True)
class Reply:
    """A complete HTTP response."""

    status: int
    headers: Mapping[str, str]
    """Header names are in lower case."""
    body: bytes


@dataclass(frozen=True)
class Failure:
    """A request without a response."""

    kind: Literal["retryable", "untrusted", "too_long", "stopped"]
    """"retryable": a network error or timeout; "untrusted": the TLS certificate; "too_long": the
    body exceeds its limit; "stopped": the client was stopped."""
    text: str


class HttpClient:
    """Persistent connections to one server that several threads share."""

    def __init__(self) -> None:
        self._loop = event_loop()
        self._lock = threading.Lock()
        self._client: Any = None
        self._running: set[Future[Reply | Failure]] = set()
        self._stopped = False

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        *,
        max_bytes: int,
        timeout: float,
    ) -> Reply | Failure:
        """Send a request and wait for its response.

        Args:
            method: The HTTP method.
            url: The complete address.
            headers: Request headers.
            body: Request body, or None.
            max_bytes: Maximum size of the response body in bytes.
            timeout: Seconds from now until the last byte of the body.

        Returns:
            The response, or why there is none.
        """
        with self._lock:
            if self._stopped:
                return Failure("stopped", "")
            if self._client is None:
                self._client = make_client(url)
            coroutine = send_request(self._client, method, url, headers, body, max_bytes, timeout)
            request = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._running.add(request)
        try:
            return request.result()
        except CancelledError:
            return Failure("stopped", "")
        finally:
            request.cancel()  # if this thread was interrupted while it waited
            with self._lock:
                self._running.discard(request)

    @property
    def stopped(self) -> bool:
        """Whether requests are rejected."""
        return self._stopped

    def stop(self) -> None:
        """Cancel the running requests of all threads and reject new ones until `start`."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for request in running:
            request.cancel()

    def start(self) -> None:
        """Accept requests again after `stop`."""
        with self._lock:
            self._stopped = False

    def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            asyncio.run_coroutine_threadsafe(client.aclose(), self._loop).result()


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Start an event loop in a daemon thread, once for each process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="http", daemon=True).start()
    return loop


def make_client(url: str) -> Any:
    """Create an httpx2 client that adds nothing to requests and ignores the environment.

    Args:
        url: The address of a request. Reading the trusted certificates takes 20 ms or more, so that
            a client of a server without TLS does not; it trusts none.

    Returns:
        An `httpx2.AsyncClient`.
    """
    import httpx2

    has_tls = url.startswith("https:")
    context = ssl.create_default_context() if has_tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    limits = httpx2.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS
    )
    return httpx2.AsyncClient(
        verify=context,
        trust_env=False,
        follow_redirects=False,
        timeout=None,
        limits=limits,
        headers={"Accept-Encoding": "identity"},
    )


async def send_request(
    client: Any,
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes | None,
    max_bytes: int,
    timeout: float,
) -> Reply | Failure:
    """Send one request and read its response.

    Exceptions are converted to text, because their messages may quote the server.

    Args:
        client: An `httpx2.AsyncClient`.
        method: The HTTP method.
        url: The complete address.
        headers: Request headers.
        body: Request body, or None.
        max_bytes: Maximum size of the response body in bytes.
        timeout: Seconds until the last byte of the body.

    Returns:
        The response, or why there is none.
    """
    import httpx2

    try:
        async with (
            asyncio.timeout(timeout),
            client.stream(method, url, headers=dict(headers), content=body) as response,
        ):
            blocks, size = [], 0
            async for block in response.aiter_raw():
                blocks.append(block)
                size += len(block)
                if size > max_bytes:
                    return Failure("too_long", f"the response is longer than {max_bytes} bytes")
            response_headers = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status_code, response_headers, b"".join(blocks))
    except TimeoutError:
        return Failure("retryable", f"TimeoutError: no complete response within {timeout:.1f} s")
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        chain = exception_chain(error)
        untrusted = [str(x) for x in chain if isinstance(x, ssl.SSLCertVerificationError)]
        if untrusted:
            return Failure("untrusted", untrusted[0])
        texts = dict.fromkeys(str(x) for x in chain if str(x))
        return Failure("retryable", f"{type(error).__name__}: {'; '.join(texts)}")


def exception_chain(error: BaseException) -> list[BaseException]:
    """Return an exception followed by its causes, the root cause last."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
