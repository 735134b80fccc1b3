"""Presence: a worker that was seen on its channel and is not there any more has lost its lease, unless it beats.

On a real server only: fakeredis goes on counting a subscriber whose connection is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import pytest

from shared.listening import responses, subscribe
from shared.store import JobStore, Swept
from tests.conftest import MakeStore
from tests.jobs import Attempt, WorkerSteps, a_worker, submitted
from tests.waiting import async_wait_until

pytestmark = pytest.mark.parametrize("backend", ["valkey"], indirect=True)


@pytest.fixture
def store(make_store: MakeStore) -> JobStore:
    """Its leases end only if somebody ends them."""
    return make_store(lease_s=1000)


async def subscribers(worker: WorkerSteps) -> int:
    channel = worker.store.keys.worker_channel(worker.id)
    [(_, count)] = await worker.store.redis.pubsub_numsub(channel)
    return int(count)


@asynccontextmanager
async def on_its_channel(worker: WorkerSteps) -> AsyncIterator[None]:
    async with worker.store.redis.pubsub() as pubsub:
        await subscribe(pubsub, worker.store.keys.worker_channel(worker.id))
        await anext(responses(pubsub))
        yield
    async with asyncio.timeout(5):
        while await subscribers(worker):
            await asyncio.sleep(0)


async def noted_of(worker: WorkerSteps) -> dict[bytes, bytes]:
    """What Redis notes about its presence."""
    fields: Awaitable[dict[bytes, bytes]] = worker.store.redis.hgetall(worker.store.keys.worker(worker.id))  # type: ignore[assignment]  # redis-py types both its clients at once
    return {name: value for name, value in (await fields).items() if name in (b"present_on", b"absent_ms")}


async def note(worker: WorkerSteps, **fields: str | int) -> None:
    await worker.store.redis.hset(worker.store.keys.worker(worker.id), mapping=fields)  # type: ignore[misc]  # as above


async def holds_lease(worker: WorkerSteps) -> bool:
    return await worker.beat() == 1


async def what_is_swept(store: JobStore) -> list[Swept]:
    return await async_wait_until(store.sweep, timeout=5, description="the recovery of a job")


async def a_present_worker_that_left(store: JobStore) -> tuple[WorkerSteps, Attempt]:
    """It executes an attempt, and its connection is gone."""
    worker = await a_worker(store)
    await submitted(store)
    attempt = await worker.claim_one()
    async with on_its_channel(worker):
        await worker.beat()
    return worker, attempt


async def test_a_worker_whose_connection_is_gone_is_lost_long_before_its_lease_ends(store: JobStore) -> None:
    lost, attempt = await a_present_worker_that_left(store)
    swept = await what_is_swept(store)
    assert swept == [Swept(attempt.job_id, "retried")]
    assert not await holds_lease(lost)


async def test_what_was_shown_ends_as_it_does_with_a_lease(store: JobStore) -> None:
    _, attempt = await a_present_worker_that_left(store)
    await attempt.say(b"a")
    swept = await what_is_swept(store)
    assert swept == [Swept(attempt.job_id, "worker_lost")]


async def test_a_worker_that_is_there_loses_nothing_when_another_is_lost(store: JobStore) -> None:
    stays = await a_worker(store)
    await submitted(store)
    (kept,) = await stays.claim()
    async with on_its_channel(stays):
        await stays.beat()
        _, lost = await a_present_worker_that_left(store)
        swept = await what_is_swept(store)
        assert swept == [Swept(lost.job_id, "retried")]
        assert await stays.jobs() == {kept.job_id}
        assert await holds_lease(stays)


async def test_one_look_is_not_enough(store: JobStore) -> None:
    worker, _ = await a_present_worker_that_left(store)
    assert await store.sweep() == []
    assert b"absent_ms" in await noted_of(worker)
    assert await holds_lease(worker)


async def test_a_beat_proves_more_than_a_missing_connection(store: JobStore) -> None:
    worker, _ = await a_present_worker_that_left(store)
    await note(worker, absent_ms=1)
    assert await worker.beat() == 1
    assert await noted_of(worker) == {}
    assert await store.sweep() == []
    assert await holds_lease(worker), "until it is seen present again, only its lease counts"


async def test_a_worker_that_was_never_seen_present_is_not_judged_by_it(store: JobStore) -> None:
    worker = await a_worker(store)
    await submitted(store)
    await worker.claim_one()
    await note(worker, absent_ms=1)
    assert await store.sweep() == []
    assert await holds_lease(worker)


async def test_a_subscription_that_ended_with_its_server_means_nothing(store: JobStore) -> None:
    """Redis was restarted, or a replica has taken over: all subscriptions are gone, the data is not."""
    worker, _ = await a_present_worker_that_left(store)
    await note(worker, present_on="another-server", absent_ms=1)
    assert await store.sweep() == []
    assert await holds_lease(worker)


async def test_a_worker_that_came_back_was_not_away(store: JobStore) -> None:
    worker, _ = await a_present_worker_that_left(store)
    await note(worker, absent_ms=1)
    async with on_its_channel(worker):
        assert await store.sweep() == []
        assert b"absent_ms" not in await noted_of(worker)
    assert await store.sweep() == []
    assert await holds_lease(worker), "the time starts anew"


async def is_late(store: JobStore) -> bool:
    seconds, microseconds = await store.redis.time()
    return bool(await store.redis.zcount(store.keys.deadlines, "-inf", seconds * 1000 + microseconds // 1000))


async def test_processes_do_not_all_sweep_at_once(make_store: MakeStore) -> None:
    store = make_store(queue_timeout_s=0.01)
    assert await store.sweep(unless_within_ms=60_000) == []
    job_id = await submitted(store)
    async with asyncio.timeout(5):
        while not await is_late(store):
            await asyncio.sleep(0)
    assert await store.sweep(unless_within_ms=60_000) == []
    assert await store.sweep() == [Swept(job_id, "no_worker")]
