"""Lets requests begin a few at a time: AT_ONCE in each turn of the event loop.

A crowd that arrives at once would otherwise be let in as a whole, in one turn: nobody's answer could go on until the
last of them was read, checked and queued, neither theirs nor those of streams that are open already. One by one would
be dear: what a turn asks of Redis is one write, and each write wakes Redis, which takes the core from whoever has it.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

AT_ONCE = 12  # 3 to 5 ms of work, docs/decisions/0021-a-jobs-way.md


class TurnstileMiddleware:
    """Requests go on in the order in which they came. The first middleware; one that comes alone need not wait.

    The wait is, like that in the socket's backlog before it, in no span and no metric. It is one turn for each
    AT_ONCE that came before in the same crowd, for `/health` as well.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._room = AT_ONCE  # for so many more in this turn; none while somebody waits
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            loop = asyncio.get_running_loop()
            if self._room:
                self._enter(loop)
            else:
                waiter = loop.create_future()
                self._waiting.append(waiter)
                await waiter
        await self._app(scope, receive, send)

    def _enter(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._room == AT_ONCE:
            loop.call_soon(self._let_in, loop)
        self._room -= 1

    def _let_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """The next turn: a few more may enter in it."""
        self._room = AT_ONCE
        while self._waiting and self._room:
            waiter = self._waiting.popleft()
            if not waiter.done():  # it was cancelled
                waiter.set_result(None)
                self._enter(loop)
