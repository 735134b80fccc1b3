"""When a silent stream is pinged: not before its interval is over, and in the same instants as all others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message

from api.errors import ClientGoneError
from api.sse import PING, TOGETHER_S, StreamedAnswer

PING_S = 15.0
PINGS = 4


class SilentAnswer:
    """An answer whose agent never speaks. Its clock goes on only by waiting; the client leaves after some pings."""

    settings = SimpleNamespace(ping_interval_s=PING_S, heartbeat_interval_s=3600.0, stall_timeout_s=60.0)
    has_been_told = False

    def __init__(self, begun_at: float) -> None:
        self.now = begun_at
        self.woken_at: list[float] = []

    def follow(self, *_: object) -> Any:
        @asynccontextmanager
        async def following() -> AsyncIterator[None]:
            yield

        return following()

    def has_ended(self) -> bool:
        return False

    async def entries(self, _tail: object, timeout_s: float, _push: object) -> list[Any]:
        if len(self.woken_at) == PINGS:
            raise ClientGoneError
        self.now += timeout_s
        self.woken_at.append(self.now)
        return []


async def pinged(begun_at: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a stream that begins then was pinged, of its clock."""
    answer: Any = SilentAnswer(begun_at)
    encoder: Any = SimpleNamespace(opening=bytes)
    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "get_running_loop", lambda: SimpleNamespace(time=lambda: answer.now))
        streamed = StreamedAnswer(answer, encoder)
    at: list[float] = []

    async def send(message: Message) -> None:
        if message.get("body") == PING:
            at.append(answer.now)

    async def receive() -> Message:
        raise AssertionError("nobody reads it")

    await streamed({"type": "http", "method": "POST"}, receive, send)
    return at


@pytest.mark.parametrize("begun_at", [0.0, 7.031, 7.0999, 1234.5678])
async def test_a_silent_stream_is_pinged_together_with_others(begun_at: float, monkeypatch: pytest.MonkeyPatch) -> None:
    instants = await pinged(begun_at, monkeypatch)
    assert len(instants) == PINGS
    for before, at in zip([begun_at, *instants], instants, strict=False):
        assert PING_S - 1e-6 <= at - before <= PING_S + TOGETHER_S + 1e-6
        assert at / TOGETHER_S == pytest.approx(round(at / TOGETHER_S), abs=1e-6)
