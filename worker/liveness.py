"""Renews this worker's lease from a thread of its own, so that an agent that blocks the event loop does not cost it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping

import structlog
from redis.exceptions import RedisError

from shared import scripts
from shared.connection import connect_blocking
from shared.store import JobStore

log = structlog.get_logger(__name__)

BEATS_PER_LEASE = 5


class Heartbeat:
    """The heartbeat of one worker. `on_lease_lost` is called in the event loop's thread."""

    def __init__(
        self, store: JobStore, worker_id: str, description: Mapping[str, str | int], on_lease_lost: Callable[[], None]
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._description = description
        self._on_lease_lost = on_lease_lost
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat_forever, name="heartbeat", daemon=True)
        self._redis = connect_blocking(store.settings)
        self._beat = self._redis.register_script(scripts.source("beat"))

    async def start(self) -> None:
        """Takes the lease, then keeps it. Raises RedisError if it cannot be taken."""
        await asyncio.to_thread(self._beat_once)
        self._thread.start()

    async def stop(self) -> None:
        self._stopping.set()
        await asyncio.to_thread(self._thread.join)
        self._redis.close()

    def _beat_once(self) -> bool:
        """Renews the lease; False if there was none to renew."""
        keys, args = self._store.beat_args(self._worker_id, self._description)
        return bool(self._beat(keys, args))

    def _beat_forever(self) -> None:
        while not self._stopping.wait(self._store.settings.lease_s / BEATS_PER_LEASE):
            try:
                kept = self._beat_once()
            except (RedisError, OSError) as error:
                log.warning("heartbeat_failed", worker=self._worker_id, reason=str(error))
                continue
            if not kept:
                log.error("lease_lost", worker=self._worker_id)
                self._loop.call_soon_threadsafe(self._on_lease_lost)
