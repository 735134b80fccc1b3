"""What goes on without the middleware: an answer that has begun holds nothing of what was around its request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import structlog
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.bypass import SERVER_SEND, BypassApp, call_outside, stay_inside
from api.middleware import RequestIdMiddleware

Rest = Callable[[], Awaitable[None]]


class Exchange:
    """A request to an application with one route and one middleware, and in which order things happened."""

    def __init__(self, *, stays: bool = False, copies: bool = False, raises: Exception | None = None) -> None:
        self.happened: list[str] = []
        self.rest: Rest = self.say_rest
        exchange = self

        class Around:
            def __init__(self, app: ASGIApp) -> None:
                self.app = app

            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                if stays:
                    stay_inside(scope)
                await self.app(dict(scope) if copies else scope, receive, send)
                exchange.happened.append("the middleware returns")
                if raises is not None:
                    raise raises

        class Streamed:
            async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                exchange.server_send = scope[SERVER_SEND]
                await call_outside(scope, exchange.rest)

        async def endpoint(_: Request) -> Any:
            return Streamed()

        middleware = [Middleware(RequestIdMiddleware), Middleware(Around)]
        self.app = BypassApp(routes=[Route("/", endpoint)], middleware=middleware)
        self.server_send: Send | None = None

    async def say_rest(self) -> None:
        self.happened.append(f"the rest of {structlog.contextvars.get_contextvars().get('request_id')}")

    async def run(self) -> list[str]:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [(b"x-request-id", b"r1")],
        }
        await self.app(scope, self._receive, self._send)
        return self.happened

    async def _receive(self) -> Message:
        return {"type": "http.request", "body": b""}

    async def _send(self, message: Message) -> None:
        self.happened.append(message["type"])


async def test_an_answer_goes_on_when_the_middleware_has_returned_and_its_lines_still_name_the_request() -> None:
    exchange = Exchange()
    assert await exchange.run() == ["http.response.start", "the middleware returns", "the rest of r1"]
    assert exchange.server_send == exchange._send, "and without the middleware's own `send`"


async def test_an_answer_that_has_begun_goes_on_whatever_the_middleware_raises() -> None:
    exchange = Exchange(raises=RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        await exchange.run()
    assert exchange.happened[-1] == "the rest of r1"


async def test_middleware_that_passes_on_a_copy_of_the_scope_loses_nothing() -> None:
    assert (await Exchange(copies=True).run())[-1] == "the rest of r1"


async def test_inside_of_a_span_the_middleware_stays() -> None:
    assert await Exchange(stays=True).run() == ["http.response.start", "the rest of r1", "the middleware returns"]


async def test_what_the_rest_raises_reaches_the_server_and_the_name_of_the_request_is_left_behind() -> None:
    exchange = Exchange()

    async def fail() -> None:
        raise OSError("the connection")

    exchange.rest = fail
    with structlog.contextvars.bound_contextvars(request_id="of an outer application"):
        with pytest.raises(OSError, match="the connection"):
            await exchange.run()
        assert structlog.contextvars.get_contextvars() == {"request_id": "of an outer application"}
