"""Background jobs as such, whatever API they were asked for by: look at one, watch it, cancel it; and its webhook."""

from __future__ import annotations

from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.answer import Answer
from api.errors import InvalidRequestError, NotFoundError, QueueUnreachableError
from api.job_events import JobEventEncoder
from api.services import services_of
from api.sse import StreamedAnswer
from api.stored import find_job, starting_after
from shared.connection import FAILURES, passes
from shared.jobs import JobRecord, Status
from shared.store import Ending
from shared.webhooks import AttemptRecord, WebhookRecord, event_id

log = structlog.get_logger(__name__)

TERMINAL = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


async def retrieve(request: Request) -> Response:
    """`GET /v1/jobs/{id}`."""
    return JSONResponse(job_object(await find_job(request)))


async def cancel(request: Request) -> Response:
    """`POST /v1/jobs/{id}/cancel`. A job that has ended stays as it is: what comes back tells how."""
    job = await find_job(request)
    await cancel_job(request, job.job_id)
    return JSONResponse(job_object(await find_job(request)))


async def cancel_job(request: Request, job_id: str) -> None:
    """Ends the job, unless it has ended. Raises NotFoundError or QueueUnreachableError."""
    try:
        ending = await services_of(request).store.cancel(job_id, "The request was cancelled.")
    except FAILURES as error:
        if not passes(error):
            raise
        raise QueueUnreachableError(may_have_started=False) from error
    if ending is Ending.GONE:
        raise NotFoundError(f"No such job: {job_id!r}. It has just expired.")
    log.info("job_cancelled", job=job_id, why="by the API", ending=ending.value)


async def events(request: Request) -> Response:
    """`GET /v1/jobs/{id}/events`: the job's stream for a browser's EventSource, from `Last-Event-ID` on."""
    job = await find_job(request)
    after = _last_event_id(request) or starting_after(request)
    # Everything was seen: a browser connects again whenever a stream ends, until it gets a 204.
    if job.status in TERMINAL and job.entries is not None and after == job.entries + 1:
        return Response(status_code=204)
    encoder = JobEventEncoder(starting_after=after)
    return StreamedAnswer(Answer(services_of(request), job.job_id), encoder, starting_after=after)


async def webhook(request: Request) -> Response:
    """`GET /v1/jobs/{id}/webhook`: what became of telling the job's end. It may outlive the job."""
    job_id: str = request.path_params["id"]
    try:
        record = await services_of(request).webhooks.record(job_id)
    except FAILURES as error:
        if not passes(error):
            raise
        raise QueueUnreachableError(may_have_started=False) from error
    if record is None or record.tenant != request.scope["tenant"]:
        raise NotFoundError(f"No webhook of a job {job_id[:100]!r}. It may have expired.")
    return JSONResponse(webhook_object(record))


def _last_event_id(request: Request) -> int | None:
    given = request.headers.get("last-event-id")
    if not given:
        return None
    if not (given.isascii() and given.isdigit() and len(given) < 18):
        raise InvalidRequestError("Last-Event-ID must be the id of an event of this stream.", param="last-event-id")
    return int(given)


def job_object(job: JobRecord) -> dict[str, Any]:
    """A job as the API shows it. Instants are in ms since the epoch, on Redis's clock."""
    return {
        "id": job.job_id,
        "object": "job",
        "kind": job.kind.name.lower(),
        "status": job.status.value,
        "model": job.model,
        "session": job.session or None,
        "attempt": job.attempt,
        "accepted_ms": job.accepted_ms,
        "started_ms": job.started_ms,
        "first_token_ms": job.first_token_ms,
        "finished_ms": job.finished_ms,
        "finish_reason": job.finish_reason,
        "usage": job.usage and job.usage._asdict(),
        "error": job.error and job.error._asdict(),
        "metadata": job.metadata,
    }


def webhook_object(webhook: WebhookRecord) -> dict[str, Any]:
    """A job's webhook as the API shows it: never its secret, and the URL only if the request has named it."""
    return {
        "id": event_id(webhook.job_id),
        "object": "webhook.delivery",
        "job_id": webhook.job_id,
        "status": webhook.state.value,
        "type": webhook.event_type,
        "url": webhook.url,
        "next_attempt_ms": webhook.due_ms,
        "attempts": [_attempt_object(attempt) for attempt in webhook.attempts],
    }


def _attempt_object(attempt: AttemptRecord) -> dict[str, Any]:
    result = attempt.result
    return {
        "attempt": attempt.attempt,
        "started_ms": attempt.started_ms,
        "duration_ms": result and result.duration_ms,
        "status_code": result and result.status_code,
        "error": result and result.error,
    }
