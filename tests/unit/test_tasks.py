"""A task that is to end ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from shared.tasks import end_task


async def test_a_lost_cancellation_is_repeated() -> None:
    async def deaf_at_first() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(deaf_at_first())
    await asyncio.sleep(0)
    await end_task(task)
    assert task.cancelled()


async def test_a_task_that_has_failed_has_ended() -> None:
    async def fails() -> None:
        raise RuntimeError

    task = asyncio.create_task(fails())
    await end_task(task)
    assert task.done()
