"""The bell of a worker, which waits for it on a connection of its own; and how much it may claim at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from arq.connections import ArqRedis

from shared.connection import FAILURES, connect
from shared.settings import Settings
from shared.store import CLAIM_LIMIT, JobStore
from shared.tasks import end_task
from shared.wire import Line
from tests.jobs import a_worker, submitted
from tests.waiting import async_wait_until


@pytest.fixture
async def workers_store(redis_url: str, prefix: str) -> AsyncIterator[JobStore]:
    """As a worker has it."""
    settings = Settings(redis_url=redis_url, prefix=prefix)
    client = connect(settings)
    store = JobStore(client, settings, Line(client))
    yield store
    await store.aclose()


async def until_waiting(client: ArqRedis, count: int) -> None:
    """Until so many connections wait for a bell."""

    async def are_waiting() -> dict[str, int]:
        clients: dict[str, int] = await client.info("clients")
        return clients if clients["blocked_clients"] == count else {}

    clients: dict[str, int] = await async_wait_until(are_waiting, timeout=5, description=f"{count} wait for the bell")
    assert clients["blocked_clients"] == count


async def test_a_bell_wakes_the_worker_that_waits(workers_store: JobStore) -> None:
    worker = await a_worker(workers_store)
    waiting = asyncio.create_task(workers_store.claim(worker.id, 1, wait_s=10))
    await until_waiting(workers_store.redis, 1)
    job_id = await submitted(workers_store)  # which the same store sends while it waits
    assert [claim.job_id for claim in await waiting] == [job_id]


async def test_a_worker_that_hears_no_bell_looks_all_the_same(workers_store: JobStore) -> None:
    worker = await a_worker(workers_store)
    assert await workers_store.claim(worker.id, 1, wait_s=1) == []
    job_id = await submitted(workers_store)
    await workers_store.redis.delete(workers_store.keys.bell)
    assert [claim.job_id for claim in await workers_store.claim(worker.id, 1, wait_s=1)] == [job_id]


async def test_a_redis_that_has_forgotten_the_scripts_is_taught_them_again(workers_store: JobStore) -> None:
    worker = await a_worker(workers_store)
    job_id = await submitted(workers_store)
    await workers_store.redis.script_flush()
    assert [claim.job_id for claim in await workers_store.claim(worker.id, 1, wait_s=10)] == [job_id]


async def test_who_waits_no_longer_takes_no_bell_from_the_others(workers_store: JobStore) -> None:
    first, second = await a_worker(workers_store), await a_worker(workers_store)
    waiting = asyncio.create_task(workers_store.claim(first.id, 1, wait_s=10))
    await until_waiting(workers_store.redis, 1)
    await end_task(waiting)
    await until_waiting(workers_store.redis, 0)
    await submitted(workers_store)
    assert len(await workers_store.claim(second.id, 1, wait_s=10)) == 1


async def test_a_wait_that_is_cut_tells_and_the_next_one_works(workers_store: JobStore) -> None:
    worker = await a_worker(workers_store)
    waiting = asyncio.create_task(workers_store.claim(worker.id, 1, wait_s=10))
    await until_waiting(workers_store.redis, 1)
    await workers_store.stop_waiting()
    with pytest.raises(FAILURES):
        await waiting
    await submitted(workers_store)
    assert len(await workers_store.claim(worker.id, 1, wait_s=10)) == 1


async def test_a_worker_that_drains_leaves_the_bell_to_others(workers_store: JobStore) -> None:
    draining, other = await a_worker(workers_store), await a_worker(workers_store)
    waiting = asyncio.create_task(workers_store.claim(draining.id, 1, wait_s=10))
    await until_waiting(workers_store.redis, 1)
    await workers_store.tell_draining(draining.id)
    await submitted(workers_store)
    assert await waiting == []
    assert len(await workers_store.claim(other.id, 1, wait_s=10)) == 1


async def test_a_claim_leaves_more_than_the_limit_to_the_next(workers_store: JobStore) -> None:
    """However many slots there are, Redis is not held up for long."""
    for _ in range(CLAIM_LIMIT + 1):
        await submitted(workers_store)
    worker = await a_worker(workers_store)
    assert len(await worker.claim(10_000)) == CLAIM_LIMIT
    assert await workers_store.wait_for_bell(1), "some are left"
    assert len(await worker.claim(10_000)) == 1
