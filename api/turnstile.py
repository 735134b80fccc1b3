"""Lets requests begin one after the other: one in each turn of the event loop.

A crowd that arrives at once would otherwise be let in as a whole, in one turn: nobody's answer could go on until the
last of them was read, checked and queued, neither theirs nor those of streams that are open already.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send


class TurnstileMiddleware:
    """Requests go on in the order in which they came. The first middleware; one that comes alone need not wait.

    The wait is, like that in the socket's backlog before it, in no span and no metric. It is one turn for each request
    that came before in the same crowd, for `/health` as well.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._is_free = True  # nobody has entered in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            loop = asyncio.get_running_loop()
            if self._is_free:
                self._is_free = False
                loop.call_soon(self._let_in, loop)
            else:
                waiter = loop.create_future()
                self._waiting.append(waiter)
                await waiter
        await self._app(scope, receive, send)

    def _let_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """The next turn: one more may enter in it."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # it was cancelled
                waiter.set_result(None)
                loop.call_soon(self._let_in, loop)
                return
        self._is_free = True
