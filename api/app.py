"""Wires the API together: `uvicorn --factory api.app:create_app`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from api import files
from api.chat import create_completion
from api.errors import ApiError, InvalidRequestError, NotFoundError
from api.middleware import AuthMiddleware, ErrorMiddleware, RequestIdMiddleware
from api.services import Services
from api.sse import SERVER_SEND
from api.system import health, list_models, ready, retrieve_model
from api.tail import Switchboard
from shared import logs
from shared.connection import connect
from shared.files import FileStore
from shared.garbage import collect_less
from shared.settings import Settings
from shared.store import JobStore
from shared.sweeper import sweep_forever
from shared.tasks import end_task
from shared.wire import Line

log = structlog.get_logger(__name__)


class _App(Starlette):
    """Remembers the server's own `send`: what middleware puts around it costs a stream something with every token."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[SERVER_SEND] = send
        await super().__call__(scope, receive, send)


def create_app(settings: Settings | None = None) -> Starlette:
    """The API. Settings default to the environment's; raises pydantic.ValidationError if they are wrong.

    Starting does not need Redis: `/ready` tells when it is there.
    """
    if settings is None:
        settings = Settings()
        logs.configure(settings)
    redis = connect(settings)
    store = JobStore(redis, settings, Line(redis))
    switchboard = Switchboard(store)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.services = Services(
            settings=settings,
            store=store,
            files=FileStore(store.redis, settings),
            switchboard=switchboard,
            started_s=int(time.time()),
        )
        async with switchboard:
            sweeper = asyncio.create_task(sweep_forever(store))
            collect_less()
            log.info("api_started", model=settings.model_name)
            yield
            await end_task(sweeper)
        await store.aclose()
        log.info("api_stopped")

    middleware = [Middleware(RequestIdMiddleware)]
    if settings.cors_origins:  # outside of the key check: a preflight request carries no key
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        )
    middleware += [Middleware(ErrorMiddleware), Middleware(AuthMiddleware, settings=settings)]
    app = _App(
        routes=[
            Route("/v1/chat/completions", create_completion, methods=["POST"]),
            Route("/v1/files", files.create, methods=["POST"]),
            Route("/v1/files", files.list_page, methods=["GET"]),
            Route("/v1/files/{file_id}", files.retrieve, methods=["GET"]),
            Route("/v1/files/{file_id}", files.delete, methods=["DELETE"]),
            Route("/v1/files/{file_id}/content", files.content),
            Route("/v1/models", list_models),
            Route("/v1/models/{model:path}", retrieve_model),
            Route("/health", health),
            Route("/ready", ready),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirected POST is a GET to many clients
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals in the OpenAI shape."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        shaped: ApiError = NotFoundError(f"Unknown route: {request.method} {request.url.path}")
    elif error.status_code == 405:
        shaped = InvalidRequestError(
            f"{request.url.path} does not take {request.method}.",
            code="method_not_allowed",
            status=405,
            headers=error.headers,
        )
    else:
        shaped = InvalidRequestError(str(error.detail), status=error.status_code, headers=error.headers)
    return shaped.response()
