"""Listens to what other processes tell this worker: which of its jobs have been ended from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from shared.connection import FAILURES
from shared.listening import responses, subscribe
from shared.store import JobStore

log = structlog.get_logger(__name__)

RETRY_S = 0.2


async def follow_orders(
    store: JobStore,
    worker_id: str,
    *,
    on_stop: Callable[[str], None],
    on_drain: Callable[[], None],
    on_connected: Callable[[], Awaitable[None]],
) -> None:
    """Calls `on_stop(job id)` for every job that is to stop, `on_drain` when the worker is; runs until it is cancelled.

    Pub/sub forgets what is said while nobody listens: `on_connected` is awaited after every (re)connection, to look
    for jobs that have ended meanwhile.
    """
    while True:
        try:
            async with store.redis.pubsub() as pubsub:
                await subscribe(pubsub, store.keys.worker_channel(worker_id))
                async for response in responses(pubsub):
                    match response:
                        case [b"subscribe", *_]:
                            await on_connected()
                        case [b"message", _, payload]:
                            order, _, job_id = payload.decode().partition(" ")
                            if order == "stop":
                                on_stop(job_id)
                            elif order == "drain":
                                on_drain()
        except FAILURES as error:
            log.warning("orders_connection_lost", worker=worker_id, reason=str(error))
        except Exception:  # an order that cannot be read, or a broken record: the next one must be heard all the same
            log.exception("order_failed", worker=worker_id)
        await asyncio.sleep(RETRY_S)
