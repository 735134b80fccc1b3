"""Runs the sweep now and then. Every API and worker process does, so that any survivor recovers the others' jobs."""

from __future__ import annotations

import asyncio
import random

import structlog

from shared.connection import FAILURES
from shared.sentinel import Address, address_of_primary
from shared.store import JobStore

log = structlog.get_logger(__name__)

INTERVAL_S = 0.2  # of all processes together, and a little more of a single one


async def sweep_forever(store: JobStore) -> None:
    """Runs until it is cancelled; outlives an unreachable Redis.

    No sweep within one lease of the start or of an outage: first the workers that are alive have to be able to say so,
    by a beat, or by their presence.
    """
    pause_s = store.settings.lease_s
    primary: Address | None = None
    while True:
        await asyncio.sleep(pause_s * random.uniform(1, 1.25))  # noqa: S311  # spreads the processes, no secret
        before, primary = primary, address_of_primary(store.redis)
        if before not in (None, primary):  # a failover that broke no sweep: an outage all the same
            pause_s = store.settings.lease_s
            continue
        try:
            for job_id, what in await store.sweep(unless_within_ms=round(INTERVAL_S * 1000)):
                log.warning("job_swept", job=job_id, what=what)
            pause_s = INTERVAL_S
        except FAILURES as error:
            log.warning("sweep_failed", reason=str(error))
            pause_s = store.settings.lease_s
