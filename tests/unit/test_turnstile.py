"""A crowd of requests begins a few at a time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import pairwise
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from api.turnstile import AT_ONCE, TurnstileMiddleware


class Door:
    """A turnstile, and who has gone through."""

    def __init__(self) -> None:
        self.entered: list[int] = []
        self._turnstile = TurnstileMiddleware(self._app)

    async def _app(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        self.entered.append(scope["number"])

    def come(self, number: int) -> Any:
        """A request, as a coroutine."""

        async def receive() -> Message:
            raise AssertionError("nobody reads it")

        async def send(_: Message) -> None:
            raise AssertionError("nobody answers it")

        return self._turnstile({"type": "http", "number": number}, receive, send)

    def crowd(self, size: int) -> list[asyncio.Task[None]]:
        """So many that all come in the same turn."""
        return [asyncio.create_task(self.come(number)) for number in range(size)]


async def test_who_comes_alone_need_not_wait() -> None:
    door = Door()
    for number in range(3):
        entering = door.come(number)
        with suppress(StopIteration):
            entering.send(None)
            raise AssertionError("it waits")
        await asyncio.sleep(0)
    assert door.entered == [0, 1, 2]


async def test_of_a_crowd_a_few_enter_in_each_turn_in_the_order_in_which_they_came() -> None:
    door, size = Door(), 3 * AT_ONCE + 1
    tasks = door.crowd(size)
    seen = [0]
    while len(door.entered) < size:
        await asyncio.sleep(0)
        seen.append(len(door.entered))
    assert max(after - before for before, after in pairwise(seen)) == AT_ONCE
    assert door.entered == list(range(size))
    await asyncio.gather(*tasks)


async def test_who_comes_while_others_wait_enters_behind_them() -> None:
    door = Door()
    tasks = door.crowd(2 * AT_ONCE)
    await asyncio.sleep(0)
    assert len(door.entered) == AT_ONCE
    late = asyncio.create_task(door.come(1000))
    await asyncio.gather(*tasks, late)
    assert door.entered == [*range(2 * AT_ONCE), 1000]


async def test_one_that_leaves_the_queue_holds_nobody_up() -> None:
    door, size = Door(), AT_ONCE + 4
    tasks = door.crowd(size)
    await asyncio.sleep(0)
    left = (AT_ONCE, size - 1)
    for number in left:
        tasks[number].cancel()
    await asyncio.wait(tasks)
    assert door.entered == [number for number in range(size) if number not in left]
    await asyncio.sleep(0)
    await asyncio.gather(*door.crowd(1))
    assert door.entered[-1] == 0
