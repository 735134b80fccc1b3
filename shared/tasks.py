"""How background tasks are begun and ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import structlog

log = structlog.get_logger(__name__)

AGAIN_S = 0.2
_TURNS = 3  # of the event loop: what was begun takes its first step, the publisher hears of it, and the wire is written


async def stand_back() -> None:
    """Lets what has just been begun, and what it says at once, go first."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancels a task and returns when it has ended, however it did.

    One cancellation may be lost. redis-py looks at each connection that it takes from its pool under a timeout of zero,
    which on Python 3.11 now and then takes the cancellation of somebody else for its own: a worker that was told to
    stop just then went on for ever.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=AGAIN_S)
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not report it as forgotten


class Errands:
    """Short tasks that outlive the request that began them. The owner waits for them before it goes."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(errand)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("errand_failed", exc_info=error)

    async def finish(self, within_s: float) -> None:
        """Waits for all, and for those that they begin; what takes longer is cancelled."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._tasks:
                    await asyncio.wait(set(self._tasks))
        for task in list(self._tasks):
            await end_task(task)
