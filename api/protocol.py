"""uvicorn's HTTP protocol with what it lacks: limits on a request's head and on stalled readers, and no trailers.

uvicorn closes a connection only when everything written to it was taken. A client that takes nothing would be kept,
with its socket and what is buffered for it, for as long as it likes, even when its answer has long been complete.

It also tells of a client that goes away without being waited for, so that an open stream needs one task, not two.

What is written for every token goes past uvicorn's `send`: see `BodyWriter`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import structlog
from starlette.types import Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.bypass import SERVER_SEND
from shared.settings import Settings

log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 512 * 1024  # request line and headers; one read of the socket may carry 256 KB of body behind them
_IN_BODY = -(1 << 62)
# What the kernel buffers for a client beyond what is on its way. By default it takes megabytes, and tells of room only
# when a third of them is free: a slow client would look like a stalled one, and cost as much.
UNSENT_BYTES = 128 * 1024


class LimitedHttpToolsProtocol(HttpToolsProtocol):
    """Refuses a request whose head does not end within MAX_HEAD_BYTES with a 400, and closes the connection.

    The same for as many bytes in a chunked body that are none of its data: extensions of chunks, and trailers. Trailers
    are dropped, as RFC 9110 allows: uvicorn would take them for headers, which a proxy in front of it has not seen.

    Cuts off a client that has taken nothing for `stall_timeout_s` although something waits for it.
    """

    # uvicorn's attributes are as many as fit into a small object; with one more, it would become a large one.
    __slots__ = ("_framing_bytes", "_gone", "_stall_watch")

    stall_timeout_s = 60.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._framing_bytes = 0  # since the last of a body's data; counted from _IN_BODY in a body
        self._stall_watch: asyncio.TimerHandle | None = None
        self._gone: Callable[[], None] | None = None  # who is to be told that the client has gone away

    # -- the head, and what is around the data of a body ---------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._framing_bytes += len(data)
        super().data_received(data)
        if self._framing_bytes > MAX_HEAD_BYTES:
            self._refuse("The request's headers are too large.")
        elif 0 > self._framing_bytes > _IN_BODY + MAX_HEAD_BYTES:
            self._refuse("The request's trailers or chunk extensions are too large.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._framing_bytes >= 0:  # else it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._framing_bytes = _IN_BODY

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._framing_bytes = _IN_BODY  # data has limits of its own

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._framing_bytes = 0

    def _refuse(self, why: str) -> None:
        if self.transport.is_closing():
            return
        cycle = self.cycle  # None before the first request
        if cycle is not None and cycle.response_started and not cycle.response_complete:  # type: ignore[redundant-expr]
            self.transport.close()  # a 400 would stand in the middle of the answer
        else:
            self.send_400_response(why)

    # -- clients that go away ------------------------------------------------------------------------------------------

    def watch(self, gone: Callable[[], None]) -> None:
        """Calls `gone` if the client goes away, until `watch_no_longer`."""
        self._gone = gone
        self.flow.resume_reading()  # a connection that is not read is not seen to end

    def watch_no_longer(self, gone: Callable[[], None]) -> None:
        if self._gone == gone:  # the next request on the connection may watch already
            self._gone = None

    # -- stalled readers -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        connection: socket.socket | None = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_watch()
        super().connection_lost(exc)
        if self._gone is not None:
            self._gone()

    def _watch(self, waiting_bytes: int) -> None:
        self._end_watch()
        self._stall_watch = self.loop.call_later(self.stall_timeout_s, self._look_again, waiting_bytes)

    def _look_again(self, waiting_bytes: int) -> None:
        still_waiting_bytes = self.transport.get_write_buffer_size()
        if still_waiting_bytes < waiting_bytes:
            self._watch(still_waiting_bytes)
        else:
            log.warning("client_stalled", waiting_bytes=still_waiting_bytes)
            self.transport.abort()

    def _end_watch(self) -> None:
        if self._stall_watch is not None:
            self._stall_watch.cancel()
            self._stall_watch = None


class BodyWriter:
    """Writes pieces of a chunked body that has begun, just as uvicorn's `send` does where it need not wait.

    For a fifth of its price, which an answer would pay for every token: a coroutine, a message, and what may be asked
    of any message.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def takes_now(self) -> bool:
        """Whether the client takes at once what it is sent. Otherwise `send` has to be awaited instead."""
        return not self._cycle.flow.write_paused

    def write(self, piece: bytes) -> None:
        """Only while the client `takes_now`; at least one byte. A client that has gone away gets nothing."""
        cycle = self._cycle
        if not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def body_writer(send: Send) -> BodyWriter | None:
    """For an answer that has begun; None if this is not the `send` of uvicorn on httptools, or its body not chunked."""
    cycle = getattr(send, "__self__", None)
    return BodyWriter(cycle) if isinstance(cycle, RequestResponseCycle) and cycle.chunked_encoding else None


def connection_of(scope: Scope) -> LimitedHttpToolsProtocol | None:
    """The connection of a request; None if another server than ours has it, or if it is lost."""
    transport = getattr(getattr(scope.get(SERVER_SEND), "__self__", None), "transport", None)
    protocol = transport.get_protocol() if transport is not None else None
    return protocol if isinstance(protocol, LimitedHttpToolsProtocol) else None


def protocol_for(settings: Settings) -> type[LimitedHttpToolsProtocol]:
    """uvicorn takes a class, and gives it no room for options."""
    return type("Protocol", (LimitedHttpToolsProtocol,), {"stall_timeout_s": settings.stall_timeout_s})
