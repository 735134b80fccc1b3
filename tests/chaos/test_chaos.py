"""No promise is broken while processes die, stop, and lose each other and Redis.

A run is a load of real clients and a schedule of faults, made of a seed. Then everything is mended, and what the
clients were told is compared with what the agent has said and with what Redis holds (tests/chaos/oracle.py).

    CHAOS_SEED      the seed of a run that failed; without it 1, or a new one if CHAOS_SECONDS is set
    CHAOS_SECONDS   how long the faults go on (`make chaos`: 300)
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.cluster import LONGEST_JOB_S, Cluster
from tests.chaos.faults import Fault, schedule
from tests.chaos.load import Load
from tests.chaos.oracle import Oracle
from tests.waiting import async_wait_until

SECONDS = float(os.environ.get("CHAOS_SECONDS") or 8)
SEED = int(os.environ.get("CHAOS_SEED") or (secrets.randbelow(1_000_000) if "CHAOS_SECONDS" in os.environ else 1))


@pytest.mark.timeout(SECONDS + 4 * LONGEST_JOB_S)
@pytest.mark.parametrize("appendfsync", ["always", "everysec"])
async def test_chaos(tmp_path: Path, appendfsync: str) -> None:
    faults = schedule(SEED, SECONDS)
    plan = "\n".join(map(str, faults))
    try:
        async with Cluster(tmp_path, appendfsync=appendfsync) as cluster:
            broken, summary = await run(cluster, faults, durable=appendfsync == "always")
            print(f"CHAOS_SEED={SEED} appendfsync {appendfsync}: {summary}")  # noqa: T201 - `make chaos` shows it
            logs = cluster.logs() if broken else ""
    except Exception as error:
        error.add_note(f"CHAOS_SEED={SEED} CHAOS_SECONDS={SECONDS:g}\n{plan}")
        raise
    assert not broken, f"CHAOS_SEED={SEED} CHAOS_SECONDS={SECONDS:g}\n{plan}\n\n{logs}\n\n" + "\n".join(broken[:40])


async def run(cluster: Cluster, faults: list[Fault], *, durable: bool) -> tuple[list[str], str]:
    """The rules that were broken, and a line about what happened."""
    load = Load(cluster, SEED)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        started = time.monotonic()
        async with asyncio.TaskGroup() as strikes:
            for fault in faults:
                await asyncio.sleep(max(0.0, started + fault.at_s - time.monotonic()))
                strikes.create_task(cluster.strike(fault))
            await asyncio.sleep(max(0.0, started + SECONDS - time.monotonic()))
        load.stop()

    await async_wait_until(lambda: _is_idle(cluster), timeout=LONGEST_JOB_S, description="all jobs to end")
    before = Oracle(cluster, load.told, durable=durable)
    broken = [rule for session in load.sessions for rule in await _blocked(load, before, session, durable=durable)]
    await async_wait_until(lambda: _is_idle(cluster), timeout=LONGEST_JOB_S, description="the last turns to end")
    broken += Oracle(cluster, load.told, durable=durable).broken_rules()
    outcomes = Counter(told.outcome for told in load.told)
    return broken, f"{len(faults)} faults, {len(load.told)} requests: {dict(outcomes.most_common())}"


def _is_idle(cluster: Cluster) -> bool:
    held = list(cluster.redis.client.scan_iter(cluster.keys.worker_jobs("*")))
    return cluster.redis.client.zcard(cluster.keys.deadlines) == 0 and not held


async def _blocked(load: Load, oracle: Oracle, session: str, *, durable: bool) -> list[str]:
    """Asks the session for one more turn: it must be answered, and know of every turn that ended well."""
    steps = {"fragments": 1, "every_s": 0, "size": 0}
    told = await load.ask(load.stream_by_sdk, f"last.{session}", 0, session, steps)
    if told.outcome != "success":
        return [f"the session is blocked: {told}"]
    remembers = told.text.partition("]")[0] + "]"
    expected = oracle.turns_that_ended_well(session)
    if durable and remembers != _json(expected):
        return [f"{session} remembers {remembers} instead of {_json(expected)}"]
    return []


def _json(labels: list[str]) -> str:
    return "[" + ", ".join(f'"{label}"' for label in labels) + "]"
