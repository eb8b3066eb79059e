"""HTTP requests with one deadline for everything: name lookup, connecting, TLS, headers and body.

The client is httpx2. Its own time limits hold for a single read, so that a server which sends a
byte now and then is never too slow. Here every request is a task of an event loop in a thread of
its own, and is cancelled at its deadline wherever it has got to.

No redirect is followed, nothing of the environment (proxies, .netrc) is used, no compressed answer
is asked for or unpacked, and a body is read up to a bound.
"""

import asyncio
import ssl
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

IDLE = 4.0
"""Seconds for which an unused connection is kept; vLLM's server closes it after 5."""


@dataclass(frozen=True)
class Reply:
    """A whole answer. headers: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Failure:
    """No answer. A "passing" failure may pass; "untrusted": the certificate; "long": the body."""

    kind: Literal["passing", "untrusted", "long", "stopped"]
    text: str


class HttpClient:
    """Persistent connections for requests of several threads at once."""

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
        most: int,
        seconds: float,
    ) -> Reply | Failure:
        """The answer, or why there is none.

        Args:
          most: bytes of the body. seconds: from now until the body's last byte.
        """
        with self._lock:
            if self._stopped:
                return Failure("stopped", "")
            if self._client is None:
                self._client = make_client()
            work = exchange(self._client, method, url, headers, body, most, seconds)
            request = asyncio.run_coroutine_threadsafe(work, self._loop)
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
        return self._stopped

    def stop(self) -> None:
        """End all requests under way, in other threads, and allow no more until `start`."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for request in running:
            request.cancel()

    def start(self) -> None:
        with self._lock:
            self._stopped = False

    def close(self) -> None:
        """Give up the connections; a later request makes new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            asyncio.run_coroutine_threadsafe(client.aclose(), self._loop).result()


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """A running event loop in a thread that ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="http", daemon=True).start()
    return loop


def make_client() -> Any:
    """A client that adds nothing of its own to requests."""
    import httpx2

    limits = httpx2.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE
    )
    return httpx2.AsyncClient(
        verify=ssl.create_default_context(),
        trust_env=False,
        follow_redirects=False,
        timeout=None,
        limits=limits,
        headers={"Accept-Encoding": "identity"},
    )


async def exchange(
    client: Any,
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes | None,
    most: int,
    seconds: float,
) -> Reply | Failure:
    """One request and its answer. Errors are returned as text: theirs may quote the server."""
    import httpx2

    try:
        async with (
            asyncio.timeout(seconds),
            client.stream(method, url, headers=dict(headers), content=body) as response,
        ):
            blocks, size = [], 0
            async for block in response.aiter_raw():
                blocks.append(block)
                size += len(block)
                if size > most:
                    return Failure("long", f"the answer is longer than {most} bytes")
            replied = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status_code, replied, b"".join(blocks))
    except TimeoutError:
        return Failure("passing", f"TimeoutError: no whole answer within {seconds:.1f} s")
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        chain = causes(error)
        untrusted = [str(x) for x in chain if isinstance(x, ssl.SSLCertVerificationError)]
        if untrusted:
            return Failure("untrusted", untrusted[0])
        texts = dict.fromkeys(str(x) for x in chain if str(x))
        return Failure("passing", f"{type(error).__name__}: {'; '.join(texts)}")


def causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, the last cause last."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
