"""What an open stream costs while nothing is said: `python -m benchmarks.idle_memory [--streams 5000]`.

All streams are open on one API process. Their agents have said one token and are silent; the streams are watched long
enough that each gets its pings and its look at Redis.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import click

from benchmarks.accounting import Meter, connections_to, resident_bytes
from benchmarks.load import Load
from benchmarks.rounds import Case, Figures, conclude, in_loop, options, run_rounds
from benchmarks.systems import SYSTEMS, Serving, Start
from benchmarks.wire import Connection, address_of

STREAMS = 5000
SILENT = Load(users=1, tokens=2, interval_ms=600_000)  # less than the idle timeout of 120 s passes before the end
OPEN_PER_S = 400
WARM_UP = 50  # streams that are opened before, so that what a process loads once is not counted
SETTLE_S = 5.0
WATCH_S = 30.0


@dataclass(slots=True)
class OpenStream:
    """A connection whose first token is waited for, and which is then left alone."""

    spoken: asyncio.Event = field(default_factory=asyncio.Event)
    connection: Connection | None = None

    def feed(self, data: bytes, _now_ns: int) -> None:
        if b"@0." in data:
            self.spoken.set()


async def open_streams(base_url: str, count: int) -> list[OpenStream]:
    """Returns when each has its first token."""
    host, port = address_of(base_url)
    loop = asyncio.get_running_loop()
    request = SILENT.request(f"{host}:{port}")
    streams: list[OpenStream] = []
    begun = loop.time()
    for number in range(count):
        stream = OpenStream()
        _, stream.connection = await loop.create_connection(partial(Connection, stream.feed), host, port)
        stream.connection.transport.write(request)
        streams.append(stream)
        await asyncio.sleep(max(0.0, begun + number / OPEN_PER_S - loop.time()))
    async with asyncio.timeout(60):
        for stream in streams:
            await stream.spoken.wait()
    return streams


def close(streams: list[OpenStream]) -> None:
    for stream in streams:
        if stream.connection is not None:
            stream.connection.transport.abort()


async def watch(serving: Serving, count: int, watch_s: float) -> Figures:
    (base_url,) = serving.base_urls
    close(await open_streams(base_url, WARM_UP))
    await asyncio.sleep(SETTLE_S)
    before = _memory(serving)
    streams = await open_streams(base_url, count)
    try:
        await asyncio.sleep(SETTLE_S)
        after = _memory(serving)
        meter = Meter(serving.processes, (), time.monotonic())
        await asyncio.sleep(watch_s)
        cost = meter.read(time.monotonic())
        lost = sum(stream.connection is None or stream.connection.closed.done() for stream in streams)
        connections = _redis_connections(serving)
    finally:
        close(streams)
    figures: Figures = {"streams": count, "lost": lost, "foreign_cores": cost.foreign_cores}
    for role in serving.processes:
        figures[f"{role}_bytes_per_stream"] = round((after[role] - before[role]) / count)
        figures[f"{role}_cores"] = round(cost.server_s[role] / cost.wall_s, 4)
    return figures | {f"{role}_redis_connections": held for role, held in connections.items()}


def _memory(serving: Serving) -> dict[str, int]:
    return {role: sum(map(resident_bytes, pids)) for role, pids in serving.processes.items()}


def _redis_connections(serving: Serving) -> dict[str, int]:
    if serving.redis_url is None:
        return {}
    port = urlsplit(serving.redis_url).port or 6379
    return {
        role: sum(connections_to(pid, port) for pid in pids)
        for role, pids in serving.processes.items()
        if role != "valkey"
    }


def _measure(start: Start, count: int, watch_s: float, folder: Path) -> Figures:
    with start(folder) as serving:
        return in_loop(watch(serving, count, watch_s))


def cases(count: int = STREAMS, *, short: bool = False) -> list[Case]:
    watch_s = 16.0 if short else WATCH_S  # at least one ping interval
    names = ("endmark",) if short else ("endmark", "seam", "bare seam", "naive arq")
    return [
        Case(system=name, name=f"{count} idle streams", measure=partial(_measure, SYSTEMS[name], count, watch_s))
        for name in names
    ]


@click.command(help=__doc__)
@click.option("--streams", default=STREAMS, show_default=True, help="How many are open at the same time.")
@options(rounds=1)
def main(streams: int, rounds: int, results: Path) -> None:
    conclude("idle_memory", run_rounds(cases(streams), rounds), results)


if __name__ == "__main__":
    main()
