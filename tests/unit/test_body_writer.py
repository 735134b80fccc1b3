"""What is written past uvicorn's `send` is, byte for byte, what `send` would have written."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from api.protocol import BodyWriter, body_writer


class Transport:
    """Keeps what is written to it."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None:
        raise AssertionError("nobody reads")


async def an_answer(*, method: str = "GET", headers: list[tuple[bytes, bytes]] | None = None) -> Any:
    """uvicorn's side of an exchange whose answer has begun."""
    transport: Any = Transport()
    scope: Any = {"type": "http", "method": method}  # all that it asks for
    cycle = RequestResponseCycle(
        scope=scope,
        transport=transport,
        flow=FlowControl(transport),
        logger=logging.getLogger("uvicorn"),
        access_logger=logging.getLogger("uvicorn.access"),
        access_log=False,
        default_headers=[],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=True,
        on_response=lambda: None,
    )
    await cycle.send({"type": "http.response.start", "status": 200, "headers": headers or []})
    return cycle


def writer_of(cycle: Any) -> BodyWriter:
    writer = body_writer(cycle.send)
    assert writer is not None
    return writer


async def test_it_writes_what_send_writes() -> None:
    sent, written = await an_answer(), await an_answer()
    writer = writer_of(written)
    for piece in (b"a", b"data: {}\n\n", b"x" * 70_000):
        await sent.send({"type": "http.response.body", "body": piece, "more_body": True})
        assert writer.takes_now
        writer.write(piece)
    for cycle in (sent, written):
        await cycle.send({"type": "http.response.body", "body": b"the last", "more_body": False})
    assert written.transport.written == sent.transport.written
    assert written.response_complete


async def test_a_client_that_is_slow_or_gone_is_known() -> None:
    cycle = await an_answer()
    writer = writer_of(cycle)
    seen = []
    for change in (cycle.flow.pause_writing, cycle.flow.resume_writing):
        change()
        seen.append(writer.takes_now)
    assert seen == [False, True]
    before = cycle.transport.written
    cycle.disconnected = True
    writer.write(b"a")
    assert cycle.transport.written == before


@pytest.mark.parametrize("answer", [{"method": "HEAD"}, {"headers": [(b"content-length", b"3")]}], ids=str)
async def test_there_is_none_for_a_body_that_is_not_chunked(answer: Any) -> None:
    assert body_writer((await an_answer(**answer)).send) is None


async def test_there_is_none_for_another_server() -> None:
    async def send(_: Any) -> None:
        raise AssertionError("it is only looked at")

    assert body_writer(send) is None
