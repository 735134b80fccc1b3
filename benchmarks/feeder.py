"""A publisher without an agent: feeds the entries of every job as fast as the API process takes them.

`python -m benchmarks.feeder --at-once 10`, with the settings of a worker. It claims like one and publishes with the
worker's own publisher, so that the API is all that is left to measure. Every token is an entry of its own: text and
reasoning take turns, and neighbours of two kinds are not merged.

It holds back while much waits for the API in Redis, since Redis would cut the connection at 32 MB.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from dataclasses import dataclass
from typing import Any

import click
import uvloop

from shared.connection import connect
from shared.entries import Kind, OkMarker, Tally
from shared.jobs import Status
from shared.settings import Settings
from shared.store import Claim, JobStore
from tests.upstream import Script, stamped_token
from worker.liveness import Heartbeat
from worker.publisher import AttemptLog, Publisher

MOST_WAITING_BYTES = 1024 * 1024
LOOK_S = 0.02  # how often it asks for new jobs
PAUSE_S = 0.001

_WAITING = re.compile(r"\bomem=(\d+)")


@dataclass(slots=True)
class Feeding:
    """An attempt, and how much of it is still to say."""

    attempt: AttemptLog
    tokens: int
    said: int = 0

    def say(self, count: int) -> None:
        for sequence in range(self.said, min(self.tokens, self.said + count)):
            kind = Kind.REASONING if sequence % 2 else Kind.DELTA
            self.attempt.append(kind, stamped_token(sequence).encode())
        self.said = min(self.tokens, self.said + count)

    async def finish(self) -> None:
        def marker(tally: Tally) -> bytes:
            return OkMarker(tally.count, tally.digest, "stop", None).payload()

        await self.attempt.finish(Kind.OK, marker, Status.SUCCEEDED, {"finish_reason": "stop"})


async def feed(settings: Settings, at_once: int) -> None:
    """Runs until it is killed."""
    store = JobStore(connect(settings), settings)
    worker_id = f"feeder-{os.getpid()}-{secrets.token_hex(4)}"
    heartbeat = Heartbeat(
        store, worker_id, {"agent": "feeder", "max_jobs": settings.max_jobs}, list, on_lease_lost=lambda: None
    )
    await heartbeat.start()
    loop = asyncio.get_running_loop()
    feeding: list[Feeding] = []
    look_at = 0.0
    async with Publisher(store, worker_id) as publisher, asyncio.TaskGroup() as ends:
        while True:
            if loop.time() >= look_at:
                claims = await store.claim(worker_id, settings.max_jobs)
                feeding += [Feeding(publisher.open(claim, lambda _: None), _tokens(claim)) for claim in claims]
                look_at = loop.time() + LOOK_S
            for one in feeding:
                one.say(at_once)
            for one in [one for one in feeding if one.said == one.tokens]:
                ends.create_task(one.finish())
            feeding = [one for one in feeding if one.said < one.tokens]
            for one in feeding:
                await one.attempt.flushed()
            if not feeding:
                await asyncio.sleep(PAUSE_S)
            while feeding and await _waiting_bytes(store.redis) > MOST_WAITING_BYTES:  # noqa: ASYNC110 - another process
                await asyncio.sleep(PAUSE_S)


def _tokens(claim: Claim) -> int:
    return Script.parse(claim.request or b"").tokens


async def _waiting_bytes(redis: Any) -> int:
    """What Redis still has to send to its subscribers."""
    clients: bytes = await redis.execute_command("CLIENT", "LIST", "TYPE", "PUBSUB", NEVER_DECODE=True)
    return sum(map(int, _WAITING.findall(clients.decode())))


@click.command(help=__doc__)
@click.option("--at-once", default=10, show_default=True, help="Tokens of a stream that are published together.")
def main(at_once: int) -> None:
    uvloop.run(feed(Settings(), at_once))


if __name__ == "__main__":
    main()
