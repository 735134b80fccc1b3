"""A task that is to end ends, and what has just been begun goes first."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from shared.tasks import end_task, stand_back


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


async def test_the_first_word_of_what_was_just_begun_is_written_first() -> None:
    loop, said, written = asyncio.get_running_loop(), asyncio.Event(), list[str]()

    async def publisher() -> None:
        await said.wait()
        loop.call_soon(written.append, "the first word")  # as the wire does, at the end of the turn

    async def agent() -> None:
        said.set()

    publishing = asyncio.create_task(publisher())
    await asyncio.sleep(0)
    speaking = asyncio.create_task(agent())
    await stand_back()
    assert written == ["the first word"]
    await asyncio.gather(publishing, speaking)
