"""Wires the API together: `uvicorn --factory api.app:create_app`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api import files, job_webhook, jobs, operations, responses, stored_completions
from api.bypass import BypassApp
from api.chat import create_completion, watch_completion
from api.dashboard.app import dashboard_routes
from api.departures import Departures
from api.errors import ApiError, InvalidRequestError, NotFoundError
from api.middleware import AuthMiddleware, ErrorMiddleware, RequestIdMiddleware
from api.observe import ObserveMiddleware, scrape
from api.reference import reference_routes
from api.services import Services
from api.system import health, list_models, ready, retrieve_model
from api.tail import Switchboard
from api.turnstile import TurnstileMiddleware
from shared import logs, tracing
from shared.connection import connect
from shared.files import FileStore
from shared.garbage import collect_less
from shared.index import JobIndex
from shared.sentinel import follow_primary
from shared.settings import Settings
from shared.store import JobStore
from shared.sweeper import sweep_forever
from shared.tasks import Errands, end_task
from shared.webhooks import WebhookStore
from shared.wire import Line

log = structlog.get_logger(__name__)

ERRANDS_S = 3.0  # how long a stopping process waits for what its requests have left to do


def create_app(settings: Settings | None = None) -> Starlette:
    """The API. Settings default to the environment's; raises pydantic.ValidationError if they are wrong.

    Starting does not need Redis: `/ready` tells when it is there.
    """
    if settings is None:
        settings = Settings()
        logs.configure(settings)
        tracing.configure("endmark-api")
    redis = connect(settings)
    store = JobStore(redis, settings, Line(redis))
    switchboard = Switchboard(store)
    errands = Errands()
    departures = Departures(store, errands)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.services = Services(
            settings=settings,
            store=store,
            index=JobIndex(store),
            files=FileStore(store.redis, settings),
            webhooks=WebhookStore(store.redis, settings),
            switchboard=switchboard,
            errands=errands,
            departures=departures,
            started_s=int(time.time()),
        )
        async with switchboard:
            services = [asyncio.create_task(service) for service in (follow_primary(store.redis), sweep_forever(store))]
            collect_less()
            log.info("api_started", model=settings.model_name)
            yield
            for service in services:
                await end_task(service)
        departures.stop()
        await errands.finish(within_s=ERRANDS_S)
        await store.aclose()
        await asyncio.to_thread(tracing.flush)
        log.info("api_stopped")

    middleware = [Middleware(TurnstileMiddleware), Middleware(RequestIdMiddleware), Middleware(ObserveMiddleware)]
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
    app = BypassApp(
        routes=[
            _route("/v1/chat/completions", GET=stored_completions.list_page, POST=create_completion),
            _route(
                "/v1/chat/completions/{id}",
                GET=stored_completions.retrieve,
                POST=stored_completions.update,
                DELETE=stored_completions.delete,
            ),
            Route("/v1/chat/completions/{id}/messages", stored_completions.list_messages),
            Route("/v1/chat/completions/{id}/stream", watch_completion),
            Route("/v1/responses", responses.create, methods=["POST"]),
            _route("/v1/responses/{id}", GET=responses.retrieve, DELETE=responses.delete),
            Route("/v1/responses/{id}/cancel", responses.cancel, methods=["POST"]),
            Route("/v1/responses/{id}/input_items", responses.input_items_page),
            Route("/v1/jobs", jobs.list_jobs),
            Route("/v1/jobs/counts", jobs.count_jobs),
            Route("/v1/jobs/cancel", jobs.bulk_cancel, methods=["POST"]),
            Route("/v1/jobs/retry", jobs.bulk_retry, methods=["POST"]),
            _route("/v1/jobs/{id}", GET=jobs.retrieve, DELETE=jobs.delete),
            Route("/v1/jobs/{id}/events", jobs.events),
            Route("/v1/jobs/{id}/webhook", job_webhook.retrieve),
            Route("/v1/jobs/{id}/cancel", jobs.cancel, methods=["POST"]),
            Route("/v1/jobs/{id}/retry", jobs.retry, methods=["POST"]),
            Route("/v1/queue", operations.queue),
            Route("/v1/queue/pause", operations.pause, methods=["POST"]),
            Route("/v1/queue/resume", operations.resume, methods=["POST"]),
            Route("/v1/workers", operations.workers),
            Route("/v1/workers/{id}/drain", operations.drain, methods=["POST"]),
            Route("/v1/audit", operations.audit),
            _route("/v1/files", GET=files.list_page, POST=files.create),
            _route("/v1/files/{file_id}", GET=files.retrieve, DELETE=files.delete),
            Route("/v1/files/{file_id}/content", files.content),
            Route("/v1/models", list_models),
            Route("/v1/models/{model:path}", retrieve_model),
            Route("/health", health),
            Route("/ready", ready),
            *dashboard_routes(settings),
            Route("/metrics", scrape),
            *reference_routes(),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirected POST is a GET to many clients
    return app


def _route(path: str, **endpoints: Callable[[Request], Awaitable[Response]]) -> Route:
    """One route for all methods of a path, so that a 405 names all of them."""

    async def answer(request: Request) -> Response:
        return await endpoints["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, answer, methods=list(endpoints))


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
