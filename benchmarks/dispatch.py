"""How soon an accepted job starts, and how many can: `python -m benchmarks.dispatch [--rounds 3]`.

    idle     one job after another with pauses between; from the submission to the agent's first line, in its worker
    no-op    jobs that wait when the workers begin, and whose agent says nothing; by the instants of their records

With 1, 4 and 8 workers of the default 50 slots. The naive version with arq's own poll of 0.5 s.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import redis
from arq import create_pool
from arq.connections import RedisSettings
from arq.constants import default_queue_name
from arq.jobs import Job

from benchmarks.load import spread
from benchmarks.rounds import Case, Figures, conclude, in_loop, options, run_rounds, watched
from benchmarks.systems import PREFIX, Serving, endmark, naive_arq
from shared.connection import connect
from shared.entries import BEGINNING, Kind
from shared.jobs import Submission, new_job_id
from shared.keys import Keys
from shared.settings import Settings
from shared.store import JobStore
from shared.wire import Line

WORKERS = (1, 4, 8)
JOBS = 4000  # that wait; less than the default limit of unfinished jobs
NAIVE_JOBS = 2000
SUBMISSIONS = 300  # one after another
NAIVE_SUBMISSIONS = 30
LONGEST_PAUSE_S = 0.02
NAIVE_ASIDE = "arq:aside"
DEFAULT_SLOTS = {"ENDMARK_MAX_JOBS": "50"}
AT_A_TIME = 50  # submissions side by side, when only their number matters
WAIT_S = 60.0

_STAMP = re.compile(rb"@0\.([0-9a-f]+);")


def _submission(script: str) -> Submission:
    messages = [{"role": "system", "content": "You count."}, {"role": "user", "content": script}]
    return Submission(job_id=new_job_id(), session="", model="endmark", messages=messages, owns_history=True)


@contextmanager
def _store(redis_url: str) -> Iterator[JobStore]:
    """As the API has it. To be used within one event loop."""
    settings = Settings(redis_url=redis_url, prefix=PREFIX)
    client = connect(settings)
    yield JobStore(client, settings, Line(client))


# -- how soon ----------------------------------------------------------------------------------------------------------


def _measure_idle(workers: int, folder: Path) -> Figures:
    with endmark(folder, apis=0, workers=workers, environment=DEFAULT_SLOTS) as serving:
        return watched(serving, _submit_one_by_one(serving, SUBMISSIONS))


async def _submit_one_by_one(serving: Serving, count: int) -> Figures:
    draw, taken_ns = random.Random(1), []
    with _store(serving.redis_url or "") as store:
        for _ in range(count):
            await asyncio.sleep(LONGEST_PAUSE_S * draw.random())
            job = _submission("[[mock k=1 i=0]]")
            submitted_ns = time.monotonic_ns()
            await store.submit(job)
            taken_ns.append(await _started_ns(store, job.job_id) - submitted_ns)
        await store.aclose()
    return {"start_ms": _as_json(taken_ns)}


async def _started_ns(store: JobStore, job_id: str) -> int:
    """When the agent began, as it has said itself."""
    async with asyncio.timeout(WAIT_S):
        while True:
            await asyncio.sleep(LONGEST_PAUSE_S)
            for entry in (await store.read_after(job_id, BEGINNING, 10)).entries:
                if entry.kind is Kind.DELTA and (stamp := _STAMP.match(entry.payload)):
                    return int(stamp[1], 16)


def _measure_naive_idle(folder: Path) -> Figures:
    with naive_arq(folder) as serving:
        return watched(serving, _enqueue_one_by_one(serving, NAIVE_SUBMISSIONS))


async def _enqueue_one_by_one(serving: Serving, count: int) -> Figures:
    draw, taken_ns = random.Random(1), []
    pool = await create_pool(RedisSettings.from_dsn(serving.redis_url or ""))
    for number in range(count):
        await asyncio.sleep(0.5 * draw.random())  # in any phase of its poll
        stream, enqueued_ns = f"dispatch-{number}", time.monotonic_ns()
        await pool.enqueue_job("run_completion", stream, "[[mock k=1 i=0]]")
        rows: list[Any] = []
        while not rows:
            rows = await pool.xread({stream: "0-0"}, block=1000)
        stamp = _STAMP.match(rows[0][1][0][1][b"token"])
        if stamp is None:
            raise RuntimeError("the naive worker does not stamp its tokens")
        taken_ns.append(int(stamp[1], 16) - enqueued_ns)
    await pool.aclose()
    return {"start_ms": _as_json(taken_ns)}


def _as_json(taken_ns: list[int]) -> Figures:
    measured = spread(taken_ns)
    if measured is None:
        raise RuntimeError("nothing was submitted")
    return {"p50": measured.p50, "p95": measured.p95, "p99": measured.p99, "most": measured.most}


# -- how many ----------------------------------------------------------------------------------------------------------


def _measure_no_op(workers: int, jobs: int, folder: Path) -> Figures:
    """The queue is put aside until every worker is up, then given back as one."""
    keys, job_ids = Keys(PREFIX), list[str]()
    aside = f"{PREFIX}:aside"

    def prepare(redis_url: str) -> None:
        job_ids.extend(in_loop(submit_many(redis_url, jobs)))
        with redis.Redis.from_url(redis_url) as client:
            client.rename(keys.queue, aside)

    with ExitStack() as stack:
        serving = stack.enter_context(
            endmark(folder, apis=0, workers=workers, environment=DEFAULT_SLOTS, before_workers=prepare)
        )
        client = stack.enter_context(redis.Redis.from_url(serving.redis_url or ""))
        client.rename(aside, keys.queue)
        return watched(serving, _watch_queue(serving, job_ids))


async def submit_many(redis_url: str, count: int) -> list[str]:
    """No-op jobs; their ids."""
    submissions = [_submission("[[mock k=0]]") for _ in range(count)]
    with _store(redis_url) as store:
        for start in range(0, count, AT_A_TIME):
            await asyncio.gather(*(store.submit(job) for job in submissions[start : start + AT_A_TIME]))
        await store.aclose()
    return [job.job_id for job in submissions]


async def _watch_queue(serving: Serving, job_ids: list[str]) -> Figures:
    with _store(serving.redis_url or "") as store:
        await store.ring()
        async with asyncio.timeout(WAIT_S):
            while await store.redis.zcard(store.keys.deadlines):  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.05)
        records = [await store.record(job_id) for job_id in job_ids]
        await store.aclose()
    started = [record.started_ms for record in records if record is not None and record.started_ms is not None]
    finished = [record.finished_ms for record in records if record is not None and record.finished_ms is not None]
    if len(finished) < len(job_ids):
        raise RuntimeError(f"{len(job_ids) - len(finished)} jobs have no end")
    span_s = (max(finished) - min(started)) / 1000
    busy = {record.worker for record in records if record is not None}
    return {"jobs": len(job_ids), "jobs_per_s": round(len(job_ids) / span_s), "workers_that_took_part": len(busy)}


def _measure_naive_no_op(jobs: int, folder: Path) -> Figures:
    with naive_arq(folder) as serving:
        return watched(serving, _drain_naive(serving, jobs))


async def _drain_naive(serving: Serving, count: int) -> Figures:
    """arq has one worker here, which polls: the jobs wait aside until all of them are there."""
    pool = await create_pool(RedisSettings.from_dsn(serving.redis_url or ""), default_queue_name=NAIVE_ASIDE)
    jobs: list[Job] = []
    for start in range(0, count, AT_A_TIME):
        batch = [pool.enqueue_job("run_completion", f"n-{start + n}", "[[mock k=0]]") for n in range(AT_A_TIME)]
        jobs += [job for job in await asyncio.gather(*batch) if job is not None]
    await pool.rename(NAIVE_ASIDE, default_queue_name)
    async with asyncio.timeout(WAIT_S):
        results = [await job.result_info() or await _result(job) for job in jobs]
    await pool.aclose()
    span_s = (max(r.finish_time for r in results) - min(r.start_time for r in results)).total_seconds()
    return {"jobs": len(jobs), "jobs_per_s": round(len(jobs) / span_s)}


async def _result(job: Job) -> Any:
    while (result := await job.result_info()) is None:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.05)
    return result


def cases(*, short: bool = False) -> list[Case]:
    jobs = JOBS // 2 if short else JOBS
    idle = [Case(system="endmark", name="idle", measure=partial(_measure_idle, 1))]
    no_op = [
        Case(system="endmark", name=f"no-op, {workers} workers", measure=partial(_measure_no_op, workers, jobs))
        for workers in WORKERS
    ]
    if short:
        return idle + no_op
    naive = [
        Case(system="naive arq", name="idle", measure=_measure_naive_idle),
        Case(system="naive arq", name="no-op, 1 workers", measure=partial(_measure_naive_no_op, NAIVE_JOBS)),
    ]
    return idle + no_op + naive


@click.command(help=__doc__)
@options(rounds=3)
def main(rounds: int, results: Path) -> None:
    conclude("dispatch", run_rounds(cases(), rounds), results)


if __name__ == "__main__":
    main()
