"""A job's webhook: what became of telling the job's end."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.errors import NotFoundError
from api.services import JSONResponse, reached, services_of
from shared.webhooks import AttemptRecord, WebhookRecord, event_id


async def retrieve(request: Request) -> Response:
    """`GET /v1/jobs/{id}/webhook`: whether it was delivered, and every attempt. It may outlive the job."""
    job_id: str = request.path_params["id"]
    record = await reached(lambda: services_of(request).webhooks.record(job_id))
    is_theirs = record is not None and (request.scope["operator"] or record.tenant == request.scope["tenant"])
    if record is None or not is_theirs:
        raise NotFoundError(f"No webhook of a job {job_id[:100]!r}. It may have expired.")
    return JSONResponse(webhook_object(record))


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
