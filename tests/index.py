"""What the index is to hold, made anew from the records: for tests that compare."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from shared.jobs import JobRecord, Status, pair_digest
from shared.keys import Keys
from shared.store import JobStore

Members = dict[str, dict[str, int]]  # key of a sorted set: ids of jobs, and when they were accepted


def expected_index(keys: Keys, records: list[JobRecord]) -> Members:
    """The sorted sets of the index, if these are all jobs."""
    sets: Members = defaultdict(dict)
    for job in records:
        store, code = "1" if job.store else "0", job.error.code if job.error else ""
        shelf = ":".join([job.tenant, job.kind, store, job.status, code, job.model])
        sets[keys.shelf(shelf)][job.job_id] = job.accepted_ms
        if job.session:
            sets[keys.session_jobs(job.session)][job.job_id] = job.accepted_ms
        if job.worker and job.status in (Status.FAILED, Status.CANCELLED):
            sets[keys.worker_jobs_ended_badly(job.worker)][job.job_id] = job.accepted_ms
        for pair in job.metadata.items():
            sets[keys.pair_jobs(job.tenant, pair_digest(*pair))][job.job_id] = job.accepted_ms
    return dict(sets)


async def actual_index(store: JobStore) -> Members:
    redis: Any = store.redis
    sets: Members = {}
    async for key in redis.scan_iter(f"{store.keys.prefix}:index:*", count=1000):
        if await redis.type(key) == b"zset":
            members = await redis.zrange(key, 0, -1, withscores=True)
            sets[key.decode()] = {job_id.decode(): int(score) for job_id, score in members}
    return sets


def actual_index_of(redis: Any, keys: Keys) -> Members:
    """The same through a blocking client."""
    return {
        key.decode(): {job_id.decode(): int(score) for job_id, score in redis.zrange(key, 0, -1, withscores=True)}
        for key in redis.scan_iter(f"{keys.prefix}:index:*", count=1000)
        if redis.type(key) == b"zset"
    }


async def index_keys(store: JobStore) -> list[str]:
    """All keys of the index, with what takes out the expired ones."""
    redis: Any = store.redis
    return sorted([key.decode() async for key in redis.scan_iter(f"{store.keys.prefix}:index:*", count=1000)])
