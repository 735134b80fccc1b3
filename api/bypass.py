"""The way past the middleware, for an answer that has begun and goes on.

Middleware has to see a request and the beginning of its answer. What it would hold until the end, a dozen coroutines
with all that they refer to, is as much as an open stream itself; and each `send` of its own would cost something with
every token.

Rule 1: what goes on is called when all middleware has returned, whatever that raised, in the same task. Lines that it
        logs name the request, as before. How long it takes, and what it raises, is for the server, not for middleware.
Rule 2: a request with a span, of its own or of its client, goes on inside of its middleware: the span ends with the
        answer, and the lines that are logged until then name its trace.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

SERVER_SEND = "endmark.server_send"  # in the scope: the server's own `send`
_REST = "endmark.rest"  # in the scope: a list for what goes on, which copies of the scope share; None: it stays inside

Rest = Callable[[], Awaitable[None]]


class BypassApp(Starlette):
    """An application whose answers may go on without its middleware."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left: list[Rest] = []
        scope[SERVER_SEND], scope[_REST] = send, left
        try:
            await super().__call__(scope, receive, send)
        finally:
            if left:
                tokens = structlog.contextvars.bind_contextvars(request_id=scope["request_id"])
                try:
                    await left.pop()()
                finally:
                    structlog.contextvars.reset_contextvars(**tokens)


def stay_inside(scope: Scope) -> None:
    """From here on, what goes on is called at once."""
    scope[_REST] = None


async def call_outside(scope: Scope, rest: Rest) -> None:
    """Calls `rest` when the middleware has returned; at once, if it stays, or is not ours."""
    left: list[Rest] | None = scope.get(_REST)
    if left is None:
        await rest()
    else:
        left.append(rest)
