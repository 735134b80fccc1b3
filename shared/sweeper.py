"""Runs the sweep now and then. Every API and worker process does, so that any survivor recovers the others' jobs."""

from __future__ import annotations

import asyncio
import random

import structlog

from shared import metrics
from shared.connection import FAILURES
from shared.sentinel import Address, address_of_primary
from shared.store import JobStore

log = structlog.get_logger(__name__)

INTERVAL_S = 0.2  # of all processes together, and a little more of a single one


async def sweep_forever(store: JobStore) -> None:
    """Runs until it is cancelled; outlives an unreachable Redis.

    No sweep before Redis has taken writes for one whole lease, at the start and after every outage: first the workers
    that are alive have to be able to say so, by a beat, or by their presence.
    """
    loop = asyncio.get_running_loop()

    def after_a_lease() -> float:
        return loop.time() + store.settings.lease_s * random.uniform(1, 1.25)  # noqa: S311  # spreads the processes

    primary: Address | None = None
    sweeps_from = after_a_lease()
    while True:
        await asyncio.sleep(INTERVAL_S * random.uniform(1, 1.25))  # noqa: S311  # as above
        before, primary = primary, address_of_primary(store.redis)
        if before not in (None, primary):  # a failover that broke no sweep: an outage all the same
            sweeps_from = after_a_lease()
        try:
            if loop.time() < sweeps_from:
                await store.probe()
                continue
            for job_id, what in await store.sweep(unless_within_ms=round(INTERVAL_S * 1000)):
                log.warning("job_swept", job=job_id, what=what)
                metrics.job_swept(what)
        except FAILURES as error:
            log.warning("sweep_failed", reason=str(error))
            sweeps_from = after_a_lease()
        except Exception:  # a defect must not end the sweeps of this process, which may be the only one
            log.exception("sweep_broken")
