"""The way past the middleware, for an answer that has begun and goes on.

Middleware has to see a request and the beginning of its answer. What it would hold until the end, a dozen coroutines
with all that they refer to, is as much as an open stream itself; and each `send` of its own would cost something with
every token.

Rule 1: what goes on is called when all middleware has returned, whatever that raised, in the same task. Lines that it
        logs name the request, as before.
Rule 2: a request with a span, of its own or of its client, goes on inside of its middleware: the span ends with the
        answer, and the lines that are logged until then name its trace.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

SERVER_SEND = "endmark.server_send"  # in the scope: the server's own `send`
_REST = "endmark.rest"  # in the scope: what goes on, or None

Rest = Callable[[], Awaitable[None]]


class BypassApp(Starlette):
    """An application whose answers may go on without its middleware."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[SERVER_SEND], scope[_REST] = send, None
        try:
            await super().__call__(scope, receive, send)
        finally:
            if scope.get(_REST) is not None:
                structlog.contextvars.bind_contextvars(request_id=scope["request_id"])
                try:
                    await scope.pop(_REST)()
                finally:
                    structlog.contextvars.unbind_contextvars("request_id")


def stay_inside(scope: Scope) -> None:
    """From here on, what goes on is called at once."""
    del scope[_REST]


async def go_on(scope: Scope, rest: Rest) -> None:
    """Calls `rest` when the middleware has returned, or at once if it stays, or is not ours."""
    if _REST in scope:
        scope[_REST] = rest
    else:
        await rest()
