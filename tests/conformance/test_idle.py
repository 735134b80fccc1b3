"""The idle deadline in Redis: a job whose agent says nothing ends, even if its worker cannot end it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.jobs import Status
from shared.store import IdleDeadline, JobStore, Swept
from tests.conftest import MakeStore
from tests.jobs import Attempt, WorkerSteps, a_worker, record_of, running, status_of, submitted
from tests.waiting import async_wait_until
from worker.liveness import Heartbeat

PASSED_S = -1000.0  # longer ago than any lease here
FAR_S = 1000.0


@pytest.fixture
def store(make_store: MakeStore) -> JobStore:
    return make_store(lease_s=100, run_timeout_s=600)


async def tell(attempt: Attempt, left_s: float, *, of_attempt: int | None = None, by: str | None = None) -> None:
    """The attempt's worker beats, and tells when its agent will have been silent for too long."""
    deadline = IdleDeadline(attempt.job_id, of_attempt or attempt.claim.attempt, left_s)
    worker = WorkerSteps(attempt.store, by or attempt.worker_id)
    await worker.beat([deadline])


async def deadline_of(attempt: Attempt) -> float:
    score = await attempt.store.redis.zscore(attempt.store.keys.deadlines, attempt.job_id)
    assert score is not None
    return float(score)


async def now_ms(store: JobStore) -> int:
    seconds, microseconds = await store.redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


async def test_the_sweep_ends_a_job_whose_agent_has_been_silent_for_too_long(store: JobStore) -> None:
    attempt = await running(store)
    await attempt.say(b"a")
    await tell(attempt, PASSED_S)
    assert await store.sweep() == [Swept(attempt.job_id, "timeout")]
    record = await record_of(store, attempt.job_id)
    assert (record.status, record.error and record.error.code) == (Status.FAILED, "timeout")


async def test_a_worker_has_one_lease_to_do_it_itself(store: JobStore) -> None:
    """And to tell that the agent has spoken: who keeps its lease has told in time."""
    attempt = await running(store)
    before = await now_ms(store)
    await tell(attempt, 20)
    after = await now_ms(store)
    assert before + 120_000 <= await deadline_of(attempt) <= after + 120_000
    await tell(attempt, -50)
    assert await store.sweep() == []


async def test_an_agent_that_speaks_gets_more_time(store: JobStore) -> None:
    attempt = await running(store)
    await tell(attempt, PASSED_S)
    await tell(attempt, 20)
    assert await store.sweep() == []


async def test_an_agent_that_speaks_gets_no_more_than_the_run_timeout(store: JobStore) -> None:
    attempt = await running(store)
    before = await deadline_of(attempt)
    await tell(attempt, FAR_S)
    assert await deadline_of(attempt) == before


async def test_only_the_attempt_that_runs_has_an_idle_deadline(store: JobStore) -> None:
    attempt = await running(store)
    before = await deadline_of(attempt)
    await tell(attempt, PASSED_S, of_attempt=2)
    await tell(attempt, PASSED_S, by="another-worker")
    assert await deadline_of(attempt) == before
    assert await store.sweep() == []


async def test_a_job_that_has_ended_keeps_its_session_as_long_as_before(store: JobStore) -> None:
    attempt = await running(store, session="api:s")
    await store.cancel(attempt.job_id, "nobody wants it")
    before = await deadline_of(attempt)
    await tell(attempt, PASSED_S)
    assert await deadline_of(attempt) == before
    await attempt.release()
    await tell(attempt, PASSED_S)
    assert await store.redis.zscore(store.keys.deadlines, attempt.job_id) is None, "what is released has no deadline"


async def test_a_job_that_waits_again_is_not_silent(store: JobStore) -> None:
    attempt = await running(store)
    await WorkerSteps(store, attempt.worker_id).lapse()
    assert await store.sweep() == [Swept(attempt.job_id, "retried")]
    await tell(attempt, PASSED_S)
    assert await store.sweep() == []
    assert await status_of(store, attempt.job_id) is Status.QUEUED


# -- the heartbeat, on a real server only: it has a connection of its own ----------------------------------------------


class Agents:
    """What a heartbeat is told of the one agent that runs, and how often it has asked."""

    def __init__(self, attempt: Attempt, left_s: float) -> None:
        self._attempt = attempt
        self.left_s = left_s
        self.asked = 0

    def idle_deadlines(self) -> list[IdleDeadline]:
        self.asked += 1
        return [IdleDeadline(self._attempt.job_id, self._attempt.claim.attempt, self.left_s)]


@asynccontextmanager
async def beating(store: JobStore, *, left_s: float) -> AsyncIterator[tuple[Attempt, Agents]]:
    """A worker with a heartbeat, after its first beat since its agent runs."""
    worker = await a_worker(store)
    await submitted(store)
    attempt = await worker.claim_one()
    agents = Agents(attempt, left_s)
    heartbeat = Heartbeat(store, worker.id, {"agent": "none"}, agents.idle_deadlines, on_lease_lost=lambda: None)
    await heartbeat.start()
    try:
        yield attempt, agents
    finally:
        await heartbeat.stop()


@pytest.mark.parametrize("backend", ["valkey"], indirect=True)
async def test_an_idle_deadline_is_told_once_until_it_has_passed(make_store: MakeStore) -> None:
    store = make_store(lease_s=0.6)
    async with beating(store, left_s=100) as (attempt, agents):
        told = await deadline_of(attempt)
        agents.left_s = 200
        asked = agents.asked
        await async_wait_until(lambda: agents.asked > asked + 3, timeout=10, description="more beats")
        assert await deadline_of(attempt) == told


@pytest.mark.parametrize("backend", ["valkey"], indirect=True)
async def test_an_idle_deadline_that_has_passed_is_told_anew(make_store: MakeStore) -> None:
    store = make_store(lease_s=0.6)
    async with beating(store, left_s=0.1) as (attempt, agents):
        told = await deadline_of(attempt)
        agents.left_s = 200
        await async_wait_until(lambda: agents.asked > 3, timeout=10, description="more beats")
        assert await deadline_of(attempt) > told + 100_000
