"""uvicorn's HTTP protocol with what it lacks: limits, deadlines, one request at a time, and no trailers or upgrades.

uvicorn closes a connection only when everything written to it was taken. A client that takes nothing would be kept,
with its socket and what is buffered for it, for as long as it likes, even when its answer has long been complete. So
would one that sends nothing.

It also tells of a client that goes away without being waited for, so that an open stream needs one task, not two.

What is written for every token goes past uvicorn's `send`: see `BodyWriter`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import httptools
import structlog
from starlette.types import Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from api.bypass import SERVER_SEND
from shared.settings import Settings

log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 512 * 1024  # request line and headers; one read of the socket may carry 256 KB of body behind them
_IN_BODY = -(1 << 62)
_OF_AN_UPGRADE = frozenset({b"upgrade", b"http2-settings"})  # headers, and names in `Connection`
# What the kernel buffers for a client beyond what is on its way. By default it takes megabytes, and tells of room only
# when a third of them is free: a slow client would look like a stalled one, and cost as much.
UNSENT_BYTES = 128 * 1024


class _TooEarlyError(Exception):
    """A request came before the one ahead of it was answered."""


class LimitedHttpToolsProtocol(HttpToolsProtocol):
    """One HTTP/1.1 connection.

    - A request whose head does not end within MAX_HEAD_BYTES is refused with a 400, and the connection closed. The same
      for as many bytes in a chunked body that are none of its data: extensions of chunks, and trailers.
    - Trailers are dropped, as RFC 9110 allows: uvicorn takes them for headers, which a proxy before it has not seen.
    - `Upgrade` is ignored, as RFC 9110 allows: httptools would leave the body out, and take it for the next request.
      Java's own client asks for HTTP/2 that way.
    - What comes behind a request that has not been answered is dropped, and the connection closed behind the answer:
      uvicorn would queue any number of requests. A client that pipelines has to expect that (RFC 9112, 9.3.2).
    - A client that has taken nothing for `stall_timeout_s` although something waits for it is cut off. So is one that
      has begun no request for so long, has not ended the head that it has begun, or has sent no more of its body.
    """

    # uvicorn's attributes are as many as fit into a small object; with one more, it would become a large one.
    __slots__ = ("_arrival_watch", "_framing_bytes", "_gone", "_is_deaf", "_stall_watch")

    stall_timeout_s = 60.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._framing_bytes = 0  # since the last of a body's data; counted from _IN_BODY in a body
        self._is_deaf = False  # what comes from now on is dropped; the connection is closed behind the answer
        self._arrival_watch: asyncio.TimerHandle | None = None
        self._stall_watch: asyncio.TimerHandle | None = None
        self._gone: Callable[[], None] | None = None  # who is to be told that the client has gone away

    # -- what comes in -------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._framing_bytes == 0:
            data = data.lstrip(b"\r\n")  # of empty lines before a request no head has begun (RFC 9112, 2.2)
        if self._is_deaf or not data:
            return
        self._framing_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse("Invalid HTTP request received.")
        else:
            if self._framing_bytes > MAX_HEAD_BYTES:
                self._refuse("The request's headers are too large.")
            elif 0 > self._framing_bytes > _IN_BODY + MAX_HEAD_BYTES:
                self._refuse("The request's trailers or chunk extensions are too large.")
        if self._framing_bytes or self._arrival_watch is not None:
            self._watch_arrival()
        self._watch_idleness()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            behind_head = data[upgrade.args[0] :]
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(head + behind_head)

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                names = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in names if token.lower() not in _OF_AN_UPGRADE)
            if name not in _OF_AN_UPGRADE:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._framing_bytes >= 0:  # else it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]  # None at first
            raise _TooEarlyError
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # the head comes again without it
        super().on_headers_complete()
        self._framing_bytes = _IN_BODY

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._framing_bytes = _IN_BODY  # data has limits of its own

    def on_message_complete(self) -> None:
        if self._framing_bytes < 0:  # else it is the head of an upgrade
            super().on_message_complete()
            self._framing_bytes = 0

    def _refuse(self, why: str, status: int = 400) -> None:
        """Answers the request that comes in and closes the connection; an answer that is under way is not to suffer."""
        cycle: RequestResponseCycle | None = self.cycle
        is_in_body = self._framing_bytes < 0
        if not is_in_body and cycle is not None and not cycle.response_complete:  # it comes behind another one
            self._is_deaf = True
            cycle.keep_alive = False
        elif not self.transport.is_closing():
            if not is_in_body or (cycle is not None and not cycle.response_started):
                body = why.encode()
                self.transport.write(
                    b"%bcontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
                    % (STATUS_LINE[status], len(body), body)
                )
            self.transport.close()

    def _watch_arrival(self) -> None:
        """A head has its time as a whole; a body may take long, if only it goes on and somebody wants it."""
        is_whole = self._framing_bytes == 0
        goes_on = self._framing_bytes < 0 and not self.cycle.response_complete
        if self._arrival_watch is not None and (is_whole or goes_on):
            self._arrival_watch.cancel()
            self._arrival_watch = None
        if self._arrival_watch is None and not is_whole and not self._is_deaf and not self.transport.is_closing():
            self._arrival_watch = self.loop.call_later(self.stall_timeout_s, self._arrives_no_further)

    def _watch_idleness(self) -> None:
        """Behind an answer that was complete before its request: uvicorn's own watch ends with what comes in."""
        cycle: RequestResponseCycle | None = self.cycle
        is_idle = self._framing_bytes == 0 and cycle is not None and cycle.response_complete
        if is_idle and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _arrives_no_further(self) -> None:
        self._arrival_watch = None
        if self.flow.read_paused:  # it is we who do not take it
            self._watch_arrival()
        else:
            self._refuse(f"The request did not go on for {self.stall_timeout_s:g} s.", 408)

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
        self.timeout_keep_alive_task = self.loop.call_later(self.stall_timeout_s, self.timeout_keep_alive_handler)
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
        if self._arrival_watch is not None:
            self._arrival_watch.cancel()
        self._unset_keepalive_if_required()  # uvicorn leaves it armed if the connection was reset
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
