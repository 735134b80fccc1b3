"""A streaming HTTP/1.1 client connection that costs the load generator next to nothing.

Body bytes are handed on as they arrive, with a clock that is read once for each read of the socket: the client's own
work is not counted as the server's delay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import StrEnum
from typing import cast
from urllib.parse import urlsplit

import httptools

Sink = Callable[[bytes, int], None]  # body bytes, and when they were read (time.monotonic_ns)


class Close(StrEnum):
    """How the transport of an answer ended."""

    END = "end"  # the body is complete, as far as HTTP can tell
    EOF = "eof"  # the connection was closed in the middle of the body
    RESET = "reset"  # it broke
    REFUSED = "refused"  # it never began
    SILENT = "silent"  # no byte came for too long
    CUT = "cut"  # the measurement was over before


class Connection(asyncio.Protocol):
    """One connection for one request."""

    transport: asyncio.Transport

    def __init__(self, sink: Sink) -> None:
        self.status = 0
        self.last_byte_ns = time.monotonic_ns()
        self.closed: asyncio.Future[Close] = asyncio.get_running_loop().create_future()
        self._sink = sink
        self._parser = httptools.HttpResponseParser(self)

    # -- asyncio -------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        self.last_byte_ns = time.monotonic_ns()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end(Close.EOF)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(Close.EOF if exc is None else Close.RESET)

    # -- httptools -----------------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._sink(data, self.last_byte_ns)

    def on_message_complete(self) -> None:
        self._end(Close.END)

    def _end(self, how: Close) -> None:
        if not self.closed.done():
            self.closed.set_result(how)


def address_of(base_url: str) -> tuple[str, int]:
    """Host and port of `http://host:port`."""
    parts = urlsplit(base_url)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{base_url} is not http://host:port")
    return parts.hostname, parts.port


def encode_request(host: str, path: str, body: bytes) -> bytes:
    """A POST of JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
