"""The schemas of what the inspection API and the operators' routes show. No I/O."""

from __future__ import annotations

from typing import Final

from api.openapi.shapes import (
    ANY_OBJECT,
    BOOLEAN,
    COUNT,
    DURATION_MS,
    INSTANT_MS,
    STRING,
    Schema,
    array,
    const,
    deleted,
    map_of,
    nullable,
    obj,
    one_of,
    page_of,
    ref,
    said,
)
from shared.jobs import Status
from shared.webhooks import DeliveryState

STATUSES: Final = tuple(status.value for status in Status)
KINDS: Final = ("chat", "response")

_JOB: Final[dict[str, Schema]] = {
    "id": STRING,
    "object": const("job"),
    "kind": one_of(*KINDS),
    "status": one_of(*STATUSES),
    "model": STRING,
    "session": nullable(STRING),
    "tenant": STRING,
    "attempt": said(COUNT, "The number of the last attempt; 0 before the first."),
    "worker": nullable(STRING),
    "accepted_ms": INSTANT_MS,
    "started_ms": nullable(INSTANT_MS),
    "first_token_ms": nullable(INSTANT_MS),
    "finished_ms": nullable(INSTANT_MS),
    "finish_reason": nullable(STRING),
    "usage": nullable(obj({"prompt_tokens": COUNT, "completion_tokens": COUNT})),
    "error": nullable(obj({"code": STRING, "message": STRING})),
    "metadata": map_of(STRING),
    "retry_of": said(nullable(STRING), "The job that this one asks for again."),
}

JOB_SCHEMAS: Final[dict[str, Schema]] = {
    "Job": obj(_JOB, description="A job, by whichever API it was asked for."),
    "JobDetails": obj(
        _JOB
        | {
            "timeline": array(
                obj({"at_ms": INSTANT_MS, "what": STRING, "attempt": nullable(COUNT), "worker": nullable(STRING)})
            ),
            "timings": obj(
                {name: nullable(DURATION_MS) for name in ("wait_ms", "first_token_ms", "run_ms", "tool_ms")}
            ),
            "attempts": array(
                obj(
                    {
                        "attempt": COUNT,
                        "worker": nullable(STRING),
                        "started_ms": nullable(INSTANT_MS),
                        "ended_ms": nullable(INSTANT_MS),
                        "outcome": nullable(STRING),
                    }
                )
            ),
            "request": said(
                nullable(obj({"messages": array(ANY_OBJECT), "params": ANY_OBJECT})),
                "Null if it is not stored any more, or if the deployment shows no content.",
            ),
            "answer": said(
                nullable(
                    obj(
                        {
                            "text": STRING,
                            "reasoning": STRING,
                            "tool_calls": array(ANY_OBJECT),
                            "tools": array(ANY_OBJECT),
                            "is_cut": said(BOOLEAN, "There is more than is shown."),
                        }
                    )
                ),
                "What the agent has said so far. Null if the deployment shows no content.",
            ),
            "traceback": said(nullable(STRING), "For operators only."),
        },
        description="A job with its history, its request and its answer.",
    ),
    "JobPage": obj(
        {
            "object": const("list"),
            "data": array(ref("Job")),
            "has_more": BOOLEAN,
            "next_cursor": said(nullable(STRING), "The `after` of the next page."),
        }
    ),
    "JobCounts": obj(
        {
            "object": const("job_counts"),
            "total": COUNT,
            "by_status": map_of(COUNT),
            "by_code": said(map_of(COUNT), "Of those that have failed or were cancelled."),
        }
    ),
    "JobDeleted": deleted("job.deleted"),
    "BulkResult": obj(
        {
            "object": const("bulk"),
            "action": one_of("cancel", "retry"),
            "dry_run": BOOLEAN,
            "matched": COUNT,
            "done": COUNT,
            "ids": array(STRING),
            "refused": array(obj({"id": STRING, "reason": STRING})),
        }
    ),
    "WebhookDelivery": obj(
        {
            "id": STRING,
            "object": const("webhook.delivery"),
            "job_id": STRING,
            "status": one_of(*(state.value for state in DeliveryState)),
            "type": said(nullable(STRING), "The event type; null before the end of the job."),
            "url": said(nullable(STRING), "Null for the deployment's own endpoint."),
            "next_attempt_ms": nullable(INSTANT_MS),
            "attempts": array(
                obj(
                    {
                        "attempt": COUNT,
                        "started_ms": INSTANT_MS,
                        "duration_ms": nullable(DURATION_MS),
                        "status_code": nullable(COUNT),
                        "error": nullable(STRING),
                    }
                )
            ),
        }
    ),
    "WebhookEvent": obj(
        {
            "id": STRING,
            "object": const("event"),
            "created_at": said(COUNT, "Seconds since the epoch."),
            "type": one_of(
                *(
                    f"{kind}.{ending}"
                    for kind in ("chat.completion", "response")
                    for ending in ("completed", "incomplete", "failed", "cancelled")
                )
            ),
            "data": obj({"id": said(STRING, "The id of the job.")}),
        },
        description="What a webhook carries, signed as Standard Webhooks say.",
    ),
    "Queue": obj(
        {
            "object": const("queue"),
            "claimable": COUNT,
            "waiting_for_a_turn": COUNT,
            "running": COUNT,
            "oldest_wait_ms": nullable(DURATION_MS),
            "workers": COUNT,
            "slots": COUNT,
            "last_minute": said(
                obj(dict.fromkeys(("accepted", *(status.value for status in Status)), COUNT)),
                "The jobs that were accepted in the last minute, by what has become of them.",
            ),
            "paused": nullable(obj({"by": STRING, "for_ms": COUNT})),
        }
    ),
    "Worker": obj(
        {
            "id": STRING,
            "object": const("worker"),
            "host": STRING,
            "pid": COUNT,
            "version": STRING,
            "agent": STRING,
            "max_jobs": COUNT,
            "started_ms": INSTANT_MS,
            "last_beat_ms": INSTANT_MS,
            "lease_ends_ms": INSTANT_MS,
            "draining": BOOLEAN,
            "load": nullable({"type": "number", "minimum": 0}),
            "jobs": array(STRING),
        }
    ),
    "WorkerList": obj({"object": const("list"), "data": array(ref("Worker"))}),
    "DrainedWorker": obj({"id": STRING, "object": const("worker"), "draining": {"type": "boolean", "const": True}}),
    "AuditPage": page_of(
        obj(
            {
                "object": const("audit_entry"),
                "entry_id": STRING,
                "at_ms": INSTANT_MS,
                "operator": STRING,
                "action": STRING,
                "target": STRING,
                "details": ANY_OBJECT,
            }
        ),
        "What operators did, the latest first.",
    ),
}
