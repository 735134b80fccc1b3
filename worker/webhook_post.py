"""Sends one webhook over HTTP, once.

Rule 1: the address is looked up once, checked, and connected to. A name that resolves to something else a moment later
        changes nothing.
Rule 2: nothing is followed, reused or sent through a proxy of the environment: each attempt is one connection.
Rule 3: what the endpoint says counts as soon as its status line is there. What follows is read within limits, so that
        it is not cut off, and thrown away.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpcore2

from shared.destinations import Destination, is_public
from shared.webhooks import AttemptResult

CONNECT_TIMEOUT_S = 5.0  # for one address
MAX_ADDRESSES = 4  # of a name, that are tried one after the other
MAX_REST_BYTES, REST_TIMEOUT_S = 64 * 1024, 2.0  # of an answer, behind its status line
RESOLVING_THREADS = 16  # of their own: a name server that does not answer must not hold up the agents' threads

Resolve = Callable[[str, int], Awaitable[list[str]]]


class AddressRefusedError(Exception):
    """The name has no public address."""


class CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to the addresses of a name, and only to those that are allowed."""

    def __init__(self, resolve: Resolve, *, public_only: bool) -> None:
        self._resolve = resolve
        self._public_only = public_only
        self._tcp = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Raises AddressRefusedError, socket.gaierror, or what httpcore2 raises for the last address."""
        addresses = await self._resolve(host, port)
        if self._public_only:
            addresses = [address for address in addresses if is_public(address)]
            if not addresses:
                raise AddressRefusedError
        failure: Exception = httpcore2.ConnectError("the name has no address")
        for address in addresses[:MAX_ADDRESSES]:
            try:
                return await self._tcp.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


class WebhookPoster:
    """Posts webhooks. `resolve` gives the addresses of a name; by default, those that the system knows."""

    def __init__(self, *, timeout_s: float, resolve: Resolve | None = None) -> None:
        self._timeout_s = timeout_s
        self._resolve = resolve or self._look_up
        self._tls = httpcore2.default_ssl_context()
        self._threads = ThreadPoolExecutor(RESOLVING_THREADS, thread_name_prefix="webhook-dns")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def post(
        self, to: Destination, headers: Mapping[str, str], body: bytes, *, public_only: bool
    ) -> AttemptResult:
        """Sends it once, and never raises for what the endpoint does: the result says it."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        backend = CheckedBackend(self._resolve, public_only=public_only)
        url = httpcore2.URL(scheme=to.scheme, host=to.host, port=to.port, target=to.target)
        timeouts = {"connect": CONNECT_TIMEOUT_S, "read": self._timeout_s, "write": self._timeout_s}
        status_code: int | None = None
        error: str | None = None
        try:
            async with (
                asyncio.timeout(self._timeout_s) as limit,
                httpcore2.AsyncConnectionPool(self._tls, max_keepalive_connections=0, network_backend=backend) as pool,
                pool.stream(
                    "POST", url, headers=list(headers.items()), content=body, extensions={"timeout": timeouts}
                ) as response,
            ):
                status_code = response.status
                limit.reschedule(loop.time() + REST_TIMEOUT_S)
                await _read_rest(response)
        except (TimeoutError, httpcore2.TimeoutException):
            error = "timeout"
        except AddressRefusedError:
            error = "address_refused"
        except socket.gaierror:
            error = "name_not_resolved"
        except httpcore2.ConnectError as failure:
            error = "tls_failed" if isinstance(failure.__context__, ssl.SSLError) else "not_connected"
        except httpcore2.NetworkError:
            error = "connection_lost"
        except httpcore2.ProtocolError:
            error = "not_http"
        if status_code is not None:
            error = None
        return AttemptResult(status_code, error, round((loop.time() - started_at) * 1000))

    async def _look_up(self, host: str, port: int) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]


async def _read_rest(response: httpcore2.Response) -> None:
    read = 0
    async for part in response.aiter_stream():
        read += len(part)
        if read > MAX_REST_BYTES:
            return
