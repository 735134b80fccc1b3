"""Listens to what other processes tell this worker: which of its jobs have been ended from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from redis.exceptions import RedisError

from shared.store import JobStore

log = structlog.get_logger(__name__)

QUIET_S = 5.0  # how long nothing is heard before the connection is tried
RETRY_S = 0.2


async def follow_orders(
    store: JobStore,
    worker_id: str,
    *,
    on_stop: Callable[[str], None],
    on_connected: Callable[[], Awaitable[None]],
) -> None:
    """Calls `on_stop(job id)` for every job that is to stop; runs until it is cancelled.

    Pub/sub forgets what is said while nobody listens: `on_connected` is awaited after every (re)connection, to look
    for jobs that have ended meanwhile.
    """
    while True:
        try:
            async with store.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(store.keys.worker_channel(worker_id))
                await on_connected()
                while True:
                    message = await pubsub.get_message(timeout=QUIET_S)
                    if message is None:
                        await pubsub.ping()
                        continue
                    order, _, job_id = message["data"].decode().partition(" ")
                    if order == "stop":
                        on_stop(job_id)
        except (RedisError, OSError) as error:
            log.warning("orders_connection_lost", worker=worker_id, reason=str(error))
            await asyncio.sleep(RETRY_S)
