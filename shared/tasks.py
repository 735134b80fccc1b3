"""How a background task is ended."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.2


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
