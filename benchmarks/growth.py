"""How the cost grows: `python -m benchmarks.growth [--kept 1000,10000]`.

    open streams      1 to 5,000 of them, with the same tokens and the same jobs a second in all
    tokens a job      10 to 100,000, as fast as they are taken
    workers           1 to 8, 100 streams
    API processes     1 to 4, 100 streams; of the seam: of its only kind
    jobs kept         finished jobs in Redis; the default stops at 10,000, since a million takes minutes and 5 GB

Each figure is the CPU of all processes for a token, and the memory of Redis for one. Beside the seam and the naive
version, where they have what grows, as far as the naive one can follow.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import click
import redis

from benchmarks.dispatch import submit_many
from benchmarks.load import Load
from benchmarks.rounds import Case, Figures, conclude, in_loop, options, run_rounds, under_load
from benchmarks.systems import PREFIX, SYSTEMS, Start, endmark, naive_arq, seam
from shared.keys import Keys

TOKENS_PER_S = 2000
STREAM_TOKENS = 20
TOTAL_TOKENS = 40_000
OPEN_STREAMS = (1, 10, 100, 1000, 5000)
TOKENS_A_JOB = (10, 100, 1000, 10_000, 100_000)
FLAT_OUT_TOKENS = 200_000
WORKERS = (1, 2, 4, 8)
APIS = (1, 2, 4)
PACED = Load(users=100, tokens=200, interval_ms=20)
ONE = Load(users=1, tokens=10, interval_ms=5, rounds=100, think_s=0.02)
BATCH = 5000  # jobs that wait at a time, less than the limit of unfinished jobs
DRAIN_S = 120


def with_open_streams(count: int, total: int) -> Load:
    rounds = max(1, total // (STREAM_TOKENS * count))
    return Load(
        users=count, tokens=STREAM_TOKENS, interval_ms=count * 1000 / TOKENS_PER_S, rounds=rounds, think_s=0.001
    )


def with_tokens_a_job(tokens: int, total: int) -> Load:
    jobs = max(1, min(1000, total // tokens))
    users = min(10, jobs)
    return Load(users=users, tokens=tokens, interval_ms=0, rounds=jobs // users, ramp_s=0.1, think_s=0.01, words="b=1")


def _measure(start: Start, load: Load, folder: Path) -> Figures:
    with start(folder) as serving:
        if serving.redis_url is None:
            return under_load(serving, {"streams": load}).to_json()
        with redis.Redis.from_url(serving.redis_url) as client:
            before = _used_bytes(client)
            measured = under_load(serving, {"streams": load})
            tokens = measured.loads["streams"].tokens
            return measured.to_json() | {"redis_bytes_per_token": round((_used_bytes(client) - before) / tokens, 1)}


def _used_bytes(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory_dataset"])  # type: ignore[index]  # redis-py types both its clients at once


def _measure_kept(count: int, folder: Path) -> Figures:
    """A stream at a time, beside finished jobs that are kept."""
    with endmark(folder) as serving, redis.Redis.from_url(serving.redis_url or "") as client:
        before = _used_bytes(client)
        for start in range(0, count, BATCH):
            in_loop(submit_many(serving.redis_url or "", min(BATCH, count - start)))
            in_loop(_until_drained(client))
        per_job = (_used_bytes(client) - before) / count
        return under_load(serving, {"streams": ONE}).to_json() | {"redis_bytes_per_job": round(per_job)}


async def _until_drained(client: redis.Redis) -> None:
    async with asyncio.timeout(DRAIN_S):
        while client.zcard(Keys(PREFIX).deadlines):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.05)


def cases(kept: list[int]) -> list[Case]:
    runs: list[tuple[str, str, Start, Load]] = []
    for system in ("endmark", "seam", "naive arq"):
        is_naive = system == "naive arq"
        total, flat_out = TOTAL_TOKENS // (40 if is_naive else 1), FLAT_OUT_TOKENS // (10 if is_naive else 1)
        loads = [(f"{n} open streams", with_open_streams(n, total)) for n in OPEN_STREAMS]
        loads += [(f"{n} tokens a job", with_tokens_a_job(n, flat_out)) for n in TOKENS_A_JOB if n <= flat_out]
        runs += [(system, name, SYSTEMS[system], load) for name, load in loads]
    processes: list[tuple[str, str, Start]] = [
        ("endmark", f"{n} workers", partial(endmark, workers=n)) for n in WORKERS
    ]
    processes += [("naive arq", f"{n} workers", partial(naive_arq, workers=n)) for n in WORKERS]
    processes += [("endmark", f"{n} API processes", partial(endmark, apis=n)) for n in APIS]
    processes += [("seam", f"{n} API processes", partial(seam, apis=n)) for n in APIS]
    processes += [("naive arq", f"{n} API processes", partial(naive_arq, apis=n)) for n in APIS]
    runs += [(*process, PACED) for process in processes]
    measured = [
        Case(system=system, name=name, measure=partial(_measure, start, load)) for system, name, start, load in runs
    ]
    return measured + [Case(system="endmark", name=f"{n} jobs kept", measure=partial(_measure_kept, n)) for n in kept]


@click.command(help=__doc__)
@click.option("--kept", default="1000,10000", show_default=True, help="Numbers of finished jobs, comma-separated.")
@options(rounds=1)
def main(kept: str, rounds: int, results: Path) -> None:
    conclude("growth", run_rounds(cases([int(number) for number in kept.split(",") if number]), rounds), results)


if __name__ == "__main__":
    main()
