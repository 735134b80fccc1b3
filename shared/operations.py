"""What operators see and do beside single jobs: the queue, the workers, and the trail of what was done.

Errors: shared.connection.FAILURES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shared.store import JobStore
from shared.text import json_bytes, parse_json

AUDIT_ENTRIES = 10_000  # that are kept, about
AUDIT_MS = 90 * 24 * 3600 * 1000  # how long the trail is kept after its last entry


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """What waits and what runs, at one moment. Instants are Redis's clock, ms since the epoch."""

    now_ms: int
    claimable: int  # jobs that the next free worker takes
    unfinished: int  # claimable ones, those that wait for the turn before theirs, and those that run
    running: int  # as far as the workers hold them
    oldest_ms: int | None  # since when the oldest claimable job has been; None: there is none
    workers: int  # that hold a lease
    slots: int  # jobs that these may run at a time
    paused_by: str | None  # None: the queue is not paused
    paused_for_ms: int | None  # how much longer


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """A worker that holds a lease, as it describes itself."""

    worker_id: str
    host: str
    pid: int
    version: str
    agent: str
    max_jobs: int
    started_ms: int  # its own clock, ms since the epoch
    lease_ends_ms: int  # Redis's clock
    last_beat_ms: int
    is_draining: bool
    jobs: list[str]  # ids of what it executes


class AuditEntry(NamedTuple):
    """Something that an operator did."""

    entry_id: str
    at_ms: int
    operator: str
    action: str
    target: str
    details: dict[str, Any]


class Operations:
    """The operators' view of one deployment."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._redis = store.redis
        self._keys = store.keys

    async def queue(self) -> QueueState:
        keys = self._keys
        seconds, microseconds = await self._redis.time()
        now_ms = seconds * 1000 + microseconds // 1000
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zcount(keys.queue, "-inf", now_ms)
            pipe.zrange(keys.queue, 0, 0, withscores=True)
            pipe.zcard(keys.deadlines)
            pipe.get(keys.paused)
            pipe.pttl(keys.paused)
            claimable, oldest, unfinished, paused_by, paused_for_ms = await pipe.execute()
        workers = await self.workers()
        return QueueState(
            now_ms=now_ms,
            claimable=claimable,
            unfinished=unfinished,
            running=sum(len(worker.jobs) for worker in workers),
            oldest_ms=int(oldest[0][1]) if oldest else None,
            workers=len(workers),
            slots=sum(worker.max_jobs for worker in workers),
            paused_by=paused_by.decode() if paused_by else None,
            paused_for_ms=paused_for_ms if paused_by else None,
        )

    async def claimable(self, job_ids: Sequence[str]) -> set[str]:
        """Those of the jobs that wait for a worker; the other ones that are queued wait for the turn before theirs."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.zscore(self._keys.queue, job_id)
            scores = await pipe.execute()
        return {job_id for job_id, score in zip(job_ids, scores, strict=True) if score is not None}

    async def pause(self, operator: str, for_s: float) -> None:
        """No worker claims anything until `resume`, or for so long. What runs goes on; what waits may time out."""
        await self._redis.set(self._keys.paused, operator, px=round(for_s * 1000))

    async def resume(self) -> None:
        await self._redis.delete(self._keys.paused)
        await self._store.ring()

    async def workers(self) -> list[WorkerState]:
        """Those that hold a lease, the longest-running first."""
        keys = self._keys
        listed: list[tuple[bytes, float]] = await self._redis.zrange(keys.workers, 0, -1, withscores=True)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            for worker_id, _ in listed:
                pipe.hgetall(keys.worker(worker_id.decode()))
                pipe.smembers(keys.worker_jobs(worker_id.decode()))
            (seconds, microseconds), *rows = await pipe.execute()
        now_ms = seconds * 1000 + microseconds // 1000
        states = [
            self._worker_state(worker_id.decode(), int(lease_ends_ms), described, jobs)
            for (worker_id, lease_ends_ms), described, jobs in zip(listed, rows[::2], rows[1::2], strict=True)
            if lease_ends_ms > now_ms
        ]
        return sorted(states, key=lambda worker: (worker.started_ms, worker.worker_id))

    def _worker_state(
        self, worker_id: str, lease_ends_ms: int, described: Mapping[bytes, bytes], jobs: set[bytes]
    ) -> WorkerState:
        def text(name: bytes) -> str:
            return described.get(name, b"").decode()

        return WorkerState(
            worker_id=worker_id,
            host=text(b"host"),
            pid=int(text(b"pid") or 0),
            version=text(b"version"),
            agent=text(b"agent"),
            max_jobs=int(text(b"max_jobs") or 0),
            started_ms=int(text(b"started_ms") or 0),
            lease_ends_ms=lease_ends_ms,
            last_beat_ms=lease_ends_ms - round(self._store.settings.lease_s * 1000),
            is_draining=text(b"draining") == "1",
            jobs=sorted(job.decode() for job in jobs),
        )

    async def drain(self, worker_id: str) -> bool:
        """Tells a worker to finish what it runs, and to leave. False if nobody of that name listens."""
        heard = await self._redis.publish(self._keys.worker_channel(worker_id), "drain")
        return bool(heard)

    async def note(self, operator: str, action: str, target: str, details: Mapping[str, Any]) -> None:
        """Adds to the trail."""
        entry = {"operator": operator, "action": action, "target": target, "details": json_bytes(dict(details))}
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xadd(self._keys.audit, entry, maxlen=AUDIT_ENTRIES, approximate=True)  # type: ignore[arg-type]  # str and bytes are fine
            pipe.pexpire(self._keys.audit, AUDIT_MS)
            await pipe.execute()

    async def trail(self, limit: int, before: str | None = None) -> list[AuditEntry]:
        """What was done, the latest first; `before` is the id of the last entry that was seen."""
        newest = f"({before}" if before else "+"
        rows = await self._redis.xrevrange(self._keys.audit, newest, "-", count=limit)
        return [
            AuditEntry(
                entry_id.decode(),
                int(entry_id.partition(b"-")[0]),
                entry[b"operator"].decode(),
                entry[b"action"].decode(),
                entry[b"target"].decode(),
                parse_json(entry[b"details"]),
            )
            for entry_id, entry in rows
        ]
