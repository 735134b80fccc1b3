"""What the API tells about itself: metrics and spans of its requests and its answers, and the route for Prometheus."""

from __future__ import annotations

import asyncio
import time

import structlog
from opentelemetry.trace import SpanKind, Status, StatusCode, get_current_span
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.bypass import stay_inside
from api.operations import operations_of, operator_of
from shared import metrics, tracing
from shared.connection import FAILURES
from shared.entries import ErrorMarker, OkMarker
from shared.jobs import ErrorCode

log = structlog.get_logger(__name__)

UNTRACED = ("/health", "/ready", "/metrics")  # asked every few seconds by machines
CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that went away before there was an answer
SCRAPE_PATIENCE_S = 2.0  # how long Redis may take before the rest is told without it


class ObserveMiddleware:
    """Counts every request, and opens the span in which it is answered.

    A span that is there already, of an instrumented server, becomes the parent; otherwise the client's is continued.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in metrics.METHODS else metrics.OTHER
        status: int | None = None

        async def notice_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                metrics.request_answered(method, _route(scope), status)
            await send(message)

        try:
            if scope["path"] in UNTRACED:
                await self.app(scope, receive, notice_status)
                return
            is_nested = get_current_span().get_span_context().is_valid
            parent = None if is_nested else tracing.context_of(Headers(scope=scope))
            kind = SpanKind.INTERNAL if is_nested else SpanKind.SERVER
            spanning = tracing.span(method, parent, kind=kind)
            if spanning is not tracing.NO_SPAN:
                stay_inside(scope)
            with spanning as span:
                try:
                    await self.app(scope, receive, notice_status)
                finally:
                    if span.is_recording():
                        route = _route(scope)
                        span.update_name(f"{method} {route}")
                        span.set_attribute("http.request.method", method)
                        span.set_attribute("http.route", route)
                        span.set_attribute("http.response.status_code", status or CLIENT_CLOSED_REQUEST)
                        span.set_attribute("endmark.request.id", scope["request_id"])
                        if status is not None and status >= 500:
                            span.set_attribute("error.type", str(status))
                            span.set_status(Status(StatusCode.ERROR))
        finally:
            if status is None:
                metrics.request_answered(method, _route(scope), CLIENT_CLOSED_REQUEST)


def _route(scope: Scope) -> str:
    """The template of the route. One that was refused before it was routed is looked up."""
    route = scope.get("route")
    if route is None:
        asked: Scope = {name: scope[name] for name in ("type", "method", "path")} | {"root_path": "", "headers": []}
        route = next((r for r in scope["app"].routes if r.matches(asked)[0] is not Match.NONE), None)
    path: str = getattr(route, "path", metrics.UNMATCHED)
    return path


class AnswerObservation:
    """One client's way through a job: a span, and at the end what became of it. Made when it begins."""

    __slots__ = ("_opened_ms", "_span", "_spanning")

    def __init__(self, job_id: str) -> None:
        self._opened_ms = time.time_ns() // 1_000_000
        self._spanning = tracing.span("relay", attributes={"endmark.job.id": job_id})
        self._span = self._spanning.__enter__()
        metrics.open_streams.inc()

    def end(self, ending: OkMarker | ErrorMarker | None, error: BaseException | None) -> None:
        """`ending`: what the client was told; None: nothing, and `error` is why."""
        code, finished_ms = metrics.CLIENT_GONE, 0
        if isinstance(ending, OkMarker):
            code, finished_ms = metrics.NO_CODE, ending.finished_ms
        elif ending is not None:
            code = ending.code
        elif isinstance(error, asyncio.CancelledError):
            code = ErrorCode.STREAM_INTERRUPTED
        if code != metrics.NO_CODE:
            self._span.set_attribute("error.type", code)
            self._span.set_status(Status(StatusCode.ERROR))
        metrics.open_streams.dec()
        metrics.answer_ended(code, finished_ms, self._opened_ms)
        self._spanning.__exit__(None, None, None)


async def scrape(request: Request) -> Response:
    """`GET /metrics`, for Prometheus, with one of ENDMARK_ADMIN_KEYS. Without Redis it tells what it knows itself."""
    operator_of(request)
    queue = None
    try:
        async with asyncio.timeout(SCRAPE_PATIENCE_S):
            queue = await operations_of(request).queue()
    except (*FAILURES, TimeoutError) as error:
        log.warning("scrape_without_redis", reason=str(error))
    body, content_type = await asyncio.to_thread(metrics.exposition, request.headers.get("accept", ""), queue)
    return Response(body, headers={"content-type": content_type})
