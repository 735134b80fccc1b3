"""Takes a job through the protocol step by step, as API and worker do, but without an agent."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from arq.constants import job_key_prefix

from shared.entries import (
    BEGINNING,
    Entry,
    EntryId,
    ErrorMarker,
    Kind,
    OkMarker,
    Tally,
    Usage,
    entry_to_message,
)
from shared.jobs import JobRecord, Status, Submission, new_job_id
from shared.store import Claim, Ending, IdleDeadline, JobStore


def a_submission(job_id: str | None = None, *, session: str = "", **changes: Any) -> Submission:
    """A request of one user message, unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "job_id": job_id or new_job_id(),
        "session": session,
        "model": "endmark",
        "messages": [{"role": "user", "content": "Hello"}],
        "owns_history": not session,
    }
    return Submission(**(fields | changes))


async def submitted(store: JobStore, /, job_id: str | None = None, *, session: str = "", **changes: Any) -> str:
    """The id of a job that was just accepted."""
    job = a_submission(job_id, session=session, **changes)
    assert (await store.submit(job)).is_new
    return job.job_id


async def the_next_ms(store: JobStore) -> None:
    """Until Redis's clock shows another millisecond."""

    async def now_ms() -> int:
        seconds, microseconds = await store.redis.time()
        return int(seconds * 1000 + microseconds // 1000)

    start_ms = await now_ms()
    async with asyncio.timeout(5):
        while await now_ms() == start_ms:
            pass


@dataclass
class Attempt:
    """One attempt in the hands of the worker that claimed it."""

    store: JobStore
    worker_id: str
    claim: Claim
    tally: Tally = field(default_factory=Tally)

    @property
    def job_id(self) -> str:
        return self.claim.job_id

    async def append(self, entry: Entry, *, publish: bool = True) -> bytes | None:
        """Exactly what the publisher sends for an entry. None if the stream is gone; raises if Redis refuses it."""
        keys = self.store.keys
        stored: bytes | None = await self.store.redis.xadd(
            keys.stream(self.job_id), {entry.kind.value: entry.payload}, id=str(entry.id), nomkstream=True
        )
        if publish:
            await self.store.redis.publish(keys.stream_channel(self.job_id), entry_to_message(entry))
        return stored

    async def say(self, *payloads: bytes, kind: Kind = Kind.DELTA, publish: bool = True) -> list[Entry]:
        """Appends the next entries."""
        entries = []
        for payload in payloads:
            self.tally.add(kind, payload)
            entry = Entry(EntryId(self.claim.attempt, self.tally.count), kind, payload)
            assert await self.append(entry, publish=publish) is not None
            entries.append(entry)
        return entries

    async def finish(
        self,
        marker: Entry,
        status: Status,
        fields: Mapping[str, str | bytes | int] | None = None,
        session_state: bytes | None = None,
        *,
        agent_stopped: bool = True,
    ) -> Ending:
        keys, args = self.store.finish_args(
            self.claim, self.worker_id, marker, status, fields or {}, session_state, agent_stopped=agent_stopped
        )
        return Ending((await self.store.script("finish")(keys, args)).decode())

    def ok_marker(self, usage: Usage | None = None) -> Entry:
        payload = OkMarker(self.tally.count, self.tally.digest, "stop", usage).payload()
        return Entry(EntryId(self.claim.attempt, self.tally.count + 1), Kind.OK, payload)

    def error_marker(self) -> Entry:
        payload = ErrorMarker("agent_error", "The agent failed.").payload()
        return Entry(EntryId(self.claim.attempt, self.tally.count + 1), Kind.ERROR, payload)

    async def finish_ok(self, session_state: bytes | None = None) -> Ending:
        return await self.finish(self.ok_marker(), Status.SUCCEEDED, {"finish_reason": "stop"}, session_state)

    async def finish_error(self) -> Ending:
        return await self.finish(self.error_marker(), Status.FAILED)

    async def release(self) -> None:
        await self.store.release(self.claim, self.worker_id)


class WorkerSteps:
    """A worker that does only what a test tells it."""

    def __init__(self, store: JobStore, worker_id: str | None = None) -> None:
        self.store = store
        self.id = worker_id or f"worker-{secrets.token_hex(4)}"

    async def beat(self, idle_deadlines: Iterable[IdleDeadline] = ()) -> int:
        """1 if it kept its lease, 0 if it had none."""
        args = self.store.beat_args(self.id, {"agent": "none"}, idle_deadlines)
        kept: int = await self.store.script("beat")(*args)
        return kept

    async def claim(self, slots: int = 1) -> list[Attempt]:
        return [Attempt(self.store, self.id, claim) for claim in await self.store.claim(self.id, slots)]

    async def claim_one(self) -> Attempt:
        (attempt,) = await self.claim()
        return attempt

    async def lapse(self) -> None:
        """Its lease ends now."""
        await self.store.redis.zadd(self.store.keys.workers, {self.id: 1}, xx=True)

    async def jobs(self) -> set[str]:
        """The jobs that would be recovered if it were lost."""
        members: set[bytes] = await self.store.redis.smembers(self.store.keys.worker_jobs(self.id))  # type: ignore[misc]  # redis-py types both its clients at once
        return {member.decode() for member in members}


async def a_worker(store: JobStore, worker_id: str | None = None) -> WorkerSteps:
    """A worker with a lease."""
    worker = WorkerSteps(store, worker_id)
    await worker.beat()
    return worker


async def running(store: JobStore, *, session: str = "") -> Attempt:
    """The first attempt of a new job, claimed by a new worker."""
    job_id = await submitted(store, session=session)
    attempt = await (await a_worker(store)).claim_one()
    assert attempt.job_id == job_id
    return attempt


async def nobody_listens(store: JobStore, job_id: str) -> None:
    """It has been so for long, as far as claims have looked: the next one gives the job up."""
    seconds, _ = await store.redis.time()
    fields = {"accepted_ms": "1", "unheard_ms": f"1 {seconds * 1000}"}
    await store.redis.hset(store.keys.job(job_id), mapping=fields)  # type: ignore[misc]  # redis-py types both its clients at once


async def entries_of(store: JobStore, job_id: str) -> list[Entry]:
    """The whole stream, as a reader gets it: of a pack, what it holds."""
    entries: list[Entry] = []
    more = True
    while more:
        read = await store.read_after(job_id, entries[-1].id if entries else BEGINNING, 1000)
        entries += read.entries
        more = read.more
    return entries


async def record_of(store: JobStore, job_id: str) -> JobRecord:
    record = await store.record(job_id)
    assert record is not None, f"{job_id} has no record"
    return record


async def status_of(store: JobStore, job_id: str) -> Status:
    return (await record_of(store, job_id)).status


async def everything(store: JobStore) -> dict[str, Any]:
    """The values of all keys of the deployment and of its jobs in arq: equal before and after what changes nothing."""
    redis: Any = store.redis
    names = [name.decode() async for name in redis.scan_iter(f"{store.keys.prefix}:*", count=1000)]
    job_ids = {match[1] for name in names if (match := re.search(r"{(.*)}", name))}
    names += [f"{job_key_prefix}{job_id}" for job_id in job_ids]
    return {name: value for name in names if (value := await _value(redis, name)) is not None}


async def _value(redis: Any, name: str) -> Any:
    match (await redis.type(name)).decode():
        case "string":
            return await redis.get(name)
        case "hash":
            return await redis.hgetall(name)
        case "list":
            return await redis.lrange(name, 0, -1)
        case "set":
            return await redis.smembers(name)
        case "zset":
            return await redis.zrange(name, 0, -1, withscores=True)
        case "stream":
            return await redis.xrange(name)
    return None
