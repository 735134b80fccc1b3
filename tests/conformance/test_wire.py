"""shared/wire.py: every call gets its own replies, or an error; never those of another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

import shared.wire
from shared.connection import FAILURES, connect
from shared.settings import Settings
from shared.wire import Line, ListenWire, command, open_wire
from tests.proxy import Proxy
from tests.waiting import async_wait_until


@pytest.fixture
async def redis(redis_url: str, prefix: str) -> AsyncIterator[Any]:
    client = connect(Settings(redis_url=redis_url, prefix=prefix))
    yield client
    await client.aclose(close_connection_pool=True)


@pytest.fixture
async def line(redis: Any) -> AsyncIterator[Line]:
    line = Line(redis)
    yield line
    await line.aclose()


async def said(line: Line, text: str) -> str:
    (echo,) = await line.call(command("ECHO", text), 1)
    return str(echo.decode())


async def the_only_connection_of(redis: Any) -> int:
    (one,) = redis.connection_pool._in_use_connections
    return int(one._writer.transport.get_extra_info("sockname")[1])


def test_a_command_is_what_redis_reads() -> None:
    assert command("SET", b"k\r\n", 12) == b"*3\r\n$3\r\nSET\r\n$3\r\nk\r\n\r\n$2\r\n12\r\n"


@pytest.mark.parametrize("part", [None, True, ["a"]])
def test_what_redis_has_no_bytes_for_is_refused(part: Any) -> None:
    with pytest.raises(TypeError):
        command("SET", "k", part)


async def test_calls_that_overlap_get_their_own_replies(line: Line) -> None:
    texts = [str(number) * (number % 50 * 400 + 1) for number in range(200)]
    assert await asyncio.gather(*(said(line, text) for text in texts)) == texts


async def test_all_calls_share_one_connection(line: Line, redis: Any) -> None:
    await asyncio.gather(*(said(line, "a") for _ in range(50)))
    assert len(redis.connection_pool._in_use_connections) == 1


async def test_a_call_may_have_several_replies_with_refusals_among_them(line: Line) -> None:
    commands = command("ECHO", "a") + command("NONSENSE") + command("GET", "not there") + command("ECHO", "b")
    first, refusal, nothing, last = await line.call(commands, 4)
    assert (first, nothing, last) == (b"a", None, b"b")
    assert isinstance(refusal, ResponseError)
    assert await said(line, "goes on") == "goes on"


async def test_a_call_that_was_cancelled_leaves_its_replies_to_nobody(line: Line) -> None:
    await said(line, "open")
    calls = [asyncio.create_task(said(line, str(number))) for number in range(20)]
    await asyncio.sleep(0)
    for number in range(0, 20, 3):
        calls[number].cancel()
    heard = await asyncio.gather(*calls, return_exceptions=True)
    assert [h for h in heard if isinstance(h, str)] == [str(number) for number in range(20) if number % 3]


async def test_when_the_connection_is_killed_every_call_is_told_and_the_next_one_works(line: Line, redis: Any) -> None:
    await said(line, "open")
    port = await the_only_connection_of(redis)
    waiting = [asyncio.create_task(line.call(command("BLPOP", "nobody-pushes", 0), 1)) for _ in range(3)]
    await asyncio.sleep(0)
    await redis.client_kill_filter(addr=f"127.0.0.1:{port}")
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, FAILURES)
    assert await said(line, "again") == "again"


async def test_an_answer_that_nobody_asked_for_is_not_given_to_the_next_call(line: Line) -> None:
    await line.call(command("PING"), 1)
    wire = line._wire
    assert wire is not None
    wire.write(command("ECHO", "stray"))
    await async_wait_until(lambda: wire.is_broken, timeout=5, description="the end of a connection that is out of step")
    assert await line.call(command("ECHO", "asked"), 1) == [b"asked"]


async def test_a_call_that_is_not_answered_fails(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.wire, "COMMAND_TIMEOUT_S", 0.1)
    monkeypatch.setattr(shared.wire, "LOOK_S", 0.02)
    with pytest.raises(RedisTimeoutError):
        await line.call(command("BLPOP", "nobody-pushes", 0), 1)
    assert await said(line, "again") == "again"


async def test_a_silent_connection_that_is_dead_is_given_up(
    valkey_server: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.wire, "PROBE_S", 0.5)  # a machine may stand still for longer than a probe of 0.1 s
    monkeypatch.setattr(shared.wire, "LOOK_S", 0.02)

    class Deaf:
        def hear(self, response: Any) -> None:
            """Nothing is expected."""

        def heard_all(self) -> None:
            """As above."""

    with Proxy(valkey_server.port) as proxy:
        client = connect(Settings(redis_url=proxy.url, prefix=prefix))
        try:
            async with open_wire(client, lambda transport: ListenWire(transport, Deaf())) as wire:
                listening = asyncio.create_task(wire.until_broken())
                done, _ = await asyncio.wait({listening}, timeout=1.5)
                assert not done, "its probes were answered"
                proxy.delay_s = 60
                with pytest.raises(RedisConnectionError):
                    async with asyncio.timeout(5):
                        await listening
        finally:
            await client.aclose(close_connection_pool=True)


async def test_a_line_that_is_closed_while_it_connects_tells_who_calls() -> None:
    """It must not look as if the caller had been cancelled."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read(-1)
        writer.close()

    connected = asyncio.Event()
    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = connect(Settings(redis_url=f"redis://127.0.0.1:{port}/0?protocol=3"))  # which begins with a question
        line = Line(client)
        calling = asyncio.create_task(line.call(command("PING"), 1))
        await connected.wait()
        await line.aclose()
        with pytest.raises(FAILURES):
            await calling
        await client.aclose(close_connection_pool=True)


async def test_a_line_takes_no_connection_that_others_use(line: Line, redis: Any) -> None:
    """Without its sentinels, who gave one away could not get another."""
    await redis.ping()
    free = list(redis.connection_pool._available_connections)
    await line.call(command("PING"), 1)
    assert free
    assert redis.connection_pool._available_connections == free
