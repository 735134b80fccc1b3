"""Redis dies, is full, is slow, is read-only: streams go on where they stopped, or end in an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from shared.jobs import Status
from tests.conftest import leaks
from tests.deployment import Deployment, deployed, free_port, noted, script
from tests.durable_server import DurableServer
from tests.proxy import Proxy
from tests.waiting import async_wait_until

Start = Callable[..., Deployment]
FRAGMENTS = [f"<{number}>" for number in range(40)]
WHOLE = "".join(FRAGMENTS)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DurableServer]:
    with DurableServer(tmp_path / "redis", maxmemory_policy="noeviction") as server:
        yield server


@pytest.fixture
def start(tmp_path: Path, server: DurableServer, prefix: str) -> Iterator[Start]:
    """`start(**settings)` gives a running service on a Redis of its own; afterwards nothing may be left in it."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Deployment:
            folder = tmp_path / "service"
            folder.mkdir()
            return stack.enter_context(deployed(folder, server.url, prefix, **settings))

        yield start
        assert leaks(server.client, prefix) == []


class Heard(NamedTuple):
    text: str
    code: str | None  # of the error that ended it; None: it ended well


async def hear(service: Deployment, messages: list[Any], begun: asyncio.Event | None = None, **options: Any) -> Heard:
    """One stream to its ending, which must be one or the other. `begun` is set by its first chunk."""
    text, finished = "", False
    async with service.async_client(timeout=60) as client:
        try:
            stream = await client.chat.completions.create(model="endmark", messages=messages, stream=True, **options)
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                finished = finished or chunk.choices[0].finish_reason is not None
                if begun is not None:
                    begun.set()
        except openai.APIError as error:
            assert not finished
            return Heard(text, str(error.code))
    assert finished
    return Heard(text, None)


class Crowd:
    """Some streams that have all begun. Each belongs to a session of its own."""

    def __init__(self, service: Deployment, messages: list[Any], size: int) -> None:
        self._begun = [asyncio.Event() for _ in range(size)]
        self._streams = [
            asyncio.create_task(hear(service, messages, begun, extra_body={"session_id": f"session {number}"}))
            for number, begun in enumerate(self._begun)
        ]

    async def has_begun(self) -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*(begun.wait() for begun in self._begun))

    async def heard(self) -> list[Heard]:
        return await asyncio.gather(*self._streams)


async def idle(service: Deployment) -> None:
    await asyncio.to_thread(service.wait_until_idle, timeout=20)


# -- Redis goes away ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("down_s", "codes"), [(0.5, {None}), (4, {None, "worker_lost"})])
async def test_a_redis_that_is_killed_and_comes_back_with_its_data(
    start: Start, server: DurableServer, down_s: float, codes: set[str | None]
) -> None:
    """Shorter than the lease nothing is lost. A longer outage may cost a living worker its jobs, never a lie."""
    service = start(workers=2, lease_s=2)
    crowd = Crowd(service, script(say=FRAGMENTS, every_s=0.1), size=20)
    await crowd.has_begun()
    server.kill()
    await asyncio.sleep(down_s)
    server.start()
    for heard in await crowd.heard():
        assert heard.code in codes
        assert heard.text == WHOLE if heard.code is None else WHOLE.startswith(heard.text)
    await idle(service)
    after = await Crowd(service, script(say=["again"]), size=20).heard()
    assert after == [Heard("again", None)] * 20, "no session is blocked"


async def test_a_stream_outlives_ten_seconds_of_refused_connections(start: Start, server: DurableServer) -> None:
    service = start()
    crowd = Crowd(service, script(say=FRAGMENTS, every_s=0.3), size=3)
    await crowd.has_begun()
    server.stop()
    await asyncio.sleep(10)
    server.start()
    assert await crowd.heard() == [Heard(WHOLE, None)] * 3
    await idle(service)


async def test_connections_that_are_killed_under_load_cost_nothing(start: Start, server: DurableServer) -> None:
    service = start(workers=2)
    crowd = Crowd(service, script(say=FRAGMENTS, every_s=0.1), size=20)
    await crowd.has_begun()
    for _ in range(10):
        for kind in ("normal", "pubsub"):
            server.client.client_kill_filter(_type=kind, skipme=True)
        await asyncio.sleep(0.3)
    assert await crowd.heard() == [Heard(WHOLE, None)] * 20
    await idle(service)


async def test_a_client_that_leaves_while_redis_is_away_takes_its_job_with_it(
    start: Start, server: DurableServer, tmp_path: Path
) -> None:
    """Nobody else would end the agent before its deadline."""
    log = tmp_path / "log"
    with Proxy(server.port) as proxy:
        service = start(ENDMARK_REDIS_URL=proxy.url)
        body = {"messages": script(say=["a"], then="hang", log=str(log)), "stream": True}
        with service.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
            proxy.close()
        await async_wait_until(
            lambda: "leave_repeated" in service.api.output, timeout=10, description="Redis not to hear of it"
        )
        proxy.open()
        await async_wait_until(lambda: noted(log, "cancelled"), timeout=20, description="the agent to be cancelled")
        await idle(service)


async def test_a_slow_redis_makes_slow_streams_and_whole_ones(start: Start, server: DurableServer) -> None:
    with Proxy(server.port) as proxy:
        service = start(ENDMARK_REDIS_URL=proxy.url)
        proxy.delay_s = 0.05
        heard = await Crowd(service, script(say=FRAGMENTS, every_s=0.01), size=20).heard()
        assert heard == [Heard(WHOLE, None)] * 20
        await idle(service)


async def test_a_primary_that_is_a_replica_for_a_while(start: Start, server: DurableServer) -> None:
    """As after a failover that was taken back: its data stays, and for some seconds it takes no writes."""
    service = start(lease_s=2)
    crowd = Crowd(service, script(say=FRAGMENTS, every_s=0.1), size=5)
    await crowd.has_begun()
    server.client.replicaof("127.0.0.1", str(free_port()))
    refused = await hear(service, script(say=["never"]))
    assert refused == Heard("", "queue_unreachable")
    await asyncio.sleep(3)
    server.client.replicaof("NO", "ONE")
    assert await crowd.heard() == [Heard(WHOLE, None)] * 5
    await idle(service)


async def test_a_worker_that_starts_while_redis_takes_no_writes_waits(start: Start, server: DurableServer) -> None:
    service = start(workers=0, lease_s=1)
    server.client.client_pause(3000, all=False)  # PING is answered, the first beat is not
    await asyncio.to_thread(service.start_worker)
    assert await hear(service, script(say=["a"])) == Heard("a", None)
    await idle(service)


# -- Redis is full -----------------------------------------------------------------------------------------------------


def fill(server: DurableServer) -> None:
    server.client.config_set("maxmemory", 1)


def make_room(server: DurableServer) -> None:
    server.client.config_set("maxmemory", 0)


async def test_a_full_redis_refuses_requests_and_lets_streams_wait(start: Start, server: DurableServer) -> None:
    service = start(lease_s=1)
    crowd = Crowd(service, script(say=FRAGMENTS, every_s=0.1), size=5)
    await crowd.has_begun()
    fill(server)
    refused = await hear(service, script(say=["never"]), extra_body={"session_id": "session 0"})
    assert refused == Heard("", "queue_unreachable")
    await asyncio.sleep(3)  # longer than the lease, which is kept all the same
    assert service.workers[0].output.count("lease_lost") == 0
    make_room(server)
    assert await crowd.heard() == [Heard(WHOLE, None)] * 5
    await idle(service)


async def test_jobs_end_in_a_full_redis(start: Start, server: DurableServer, tmp_path: Path) -> None:
    """What ends a job must not need the memory that only its end sets free."""
    log = tmp_path / "log"
    service = start(run_timeout_s=3, lease_s=1, workers=2)
    talking = Crowd(service, script(say=FRAGMENTS, every_s=0.2), size=3)
    await talking.has_begun()
    failing = Crowd(service, script(say=["a"], then="hang"), size=3)
    await failing.has_begun()
    async with service.async_client() as client:
        leaving = await client.chat.completions.create(
            model="endmark", messages=script(say=["a"], then="hang", log=str(log)), stream=True
        )
        first = await anext(aiter(leaving))
        fill(server)
        await leaving.close()
    await asyncio.to_thread(service.wait_for_status, first.id, Status.CANCELLED, timeout=3)
    await async_wait_until(lambda: noted(log, "cancelled") == 1, timeout=5, description="the agent to be stopped")
    for heard in (*await talking.heard(), *await failing.heard()):
        assert heard.code == "timeout"
        assert heard.text == "a" or WHOLE.startswith(heard.text)
    await idle(service)

    make_room(server)
    assert await hear(service, script(say=["again"])) == Heard("again", None)
    await idle(service)


async def test_a_worker_that_dies_while_redis_is_full_leaves_no_job_behind(start: Start, server: DurableServer) -> None:
    service = start(lease_s=1)
    crowd = Crowd(service, script(say=["a"], then="hang"), size=3)
    await crowd.has_begun()
    fill(server)
    service.workers[0].process.kill()
    assert await crowd.heard() == [Heard("a", "worker_lost")] * 3
    await idle(service)
