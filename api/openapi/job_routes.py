"""The routes of our own: jobs, operating, health. No I/O."""

from __future__ import annotations

from typing import Any, Final

from api.jobs import COUNT_FILTERS, FILTERS
from api.openapi.job_answers import KINDS, STATUSES
from api.openapi.operation import (
    BODY,
    EVENTS,
    INVALID,
    JSON,
    METADATA,
    MISSING,
    NOT_WHOLE,
    REDIS,
    STARTING_AFTER,
    Content,
    Key,
    Operation,
    after,
    all_of,
    header,
    limit,
    order,
    path,
    query,
)
from api.openapi.shapes import STRING, Schema, one_of, ref

JOBS, OPERATING, HEALTH = "Jobs", "Operating", "Health"

_INSTANT: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}
_FILTERS: Final[dict[str, dict[str, Any]]] = {
    "status": query("status", one_of(*STATUSES)),
    "kind": query("kind", one_of(*KINDS)),
    "model": query("model", STRING),
    "session": query("session", STRING, "A session key, as jobs show it."),
    "tenant": query("tenant", STRING, "Another one than the key's own needs an admin key."),
    "code": query("code", STRING, "The error code with which a job has ended."),
    "worker": query("worker", STRING, "The id of a worker."),
    "metadata[…]": METADATA,
    "since": query("since", _INSTANT, "Accepted at or after this instant, in milliseconds since the epoch."),
    "until": query("until", _INSTANT, "Accepted before this instant, in milliseconds since the epoch."),
}
_JOB_ID: Final = path(
    "id", "The id of a job: of a chat completion or a response.", "resp_0f8f2e6c1d5b4a39a7c0b1d2e3f40516"
)
_WORKER_ID: Final = path("id", "The id of a worker.", "host-1-0f8f2e6c")
_NO_JOB: Final = all_of(MISSING, REDIS)
_BULK: Final = {"filters": {"status": "failed", "code": "worker_lost"}, "dry_run": True}
_JOB_EVENTS: Final = (
    'event: open\ndata: {"attempt":1}\n\n'
    'id: 1\nevent: delta\ndata: {"text":"Hello!"}\n\n'
    'id: 2\nevent: end\ndata: {"status":"succeeded","finish_reason":"stop","usage":null,"error":null}\n\n'
)


def _json(name: str, example: Any = None) -> dict[str, Content]:
    return {JSON: Content(schema=ref(name), example=example)}


_JOB_OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/v1/jobs",
        name="listJobs",
        tag=JOBS,
        summary="Find jobs",
        description="Those of the key's tenant, or with an admin key of all tenants. A filter that does not exist is "
        "refused. A page may be short: `has_more` tells whether it is the last.",
        parameters=(
            *(_FILTERS[name] for name in FILTERS),
            limit(),
            after("The `next_cursor` of a page."),
            order("desc"),
        ),
        answer=_json("JobPage"),
        errors=all_of(INVALID, REDIS),
    ),
    Operation(
        method="GET",
        path="/v1/jobs/counts",
        name="countJobs",
        tag=JOBS,
        summary="Count jobs, by status and by error code",
        parameters=tuple(_FILTERS[name] for name in COUNT_FILTERS),
        answer=_json(
            "JobCounts",
            {"object": "job_counts", "total": 3, "by_status": {"succeeded": 2, "failed": 1}, "by_code": {"timeout": 1}},
        ),
        errors=all_of(INVALID, REDIS),
    ),
    Operation(
        method="POST",
        path="/v1/jobs/cancel",
        name="cancelJobs",
        tag=JOBS,
        summary="Cancel the unfinished ones of the jobs that filters choose",
        key=Key.ADMIN,
        body=_json("BulkRequest", {"filters": {"status": "queued"}, "dry_run": True}),
        answer=_json("BulkResult"),
        errors=all_of(BODY, REDIS),
    ),
    Operation(
        method="POST",
        path="/v1/jobs/retry",
        name="retryJobs",
        tag=JOBS,
        summary="Ask again for the ended ones of the jobs that filters choose",
        key=Key.ADMIN,
        body=_json("BulkRequest", _BULK),
        answer=_json("BulkResult"),
        errors=all_of(BODY, REDIS),
    ),
    Operation(
        method="GET",
        path="/v1/jobs/{id}",
        name="getJob",
        tag=JOBS,
        summary="Look at a job",
        parameters=(_JOB_ID,),
        answer=_json("JobDetails"),
        errors=all_of(_NO_JOB, {410: ("stream_incomplete",)}),
    ),
    Operation(
        method="DELETE",
        path="/v1/jobs/{id}",
        name="deleteJob",
        tag=JOBS,
        summary="Delete a job that has ended",
        parameters=(_JOB_ID,),
        answer=_json("JobDeleted"),
        errors=all_of(_NO_JOB, {409: ("not_finished",)}),
    ),
    Operation(
        method="GET",
        path="/v1/jobs/{id}/events",
        name="watchJob",
        tag=JOBS,
        summary="Watch a job as an EventSource",
        description="Events `open`, `delta`, `reasoning`, `tool_call`, `tool`, and `end`, whatever the ending. Each "
        "but `open` has a number as its id. Watching changes nothing.",
        parameters=(
            _JOB_ID,
            header(
                "Last-Event-ID",
                {"type": "string", "pattern": "^[0-9]{1,17}$"},
                "As `starting_after`; browsers send it.",
            ),
            STARTING_AFTER,
        ),
        answer={EVENTS: Content(schema=STRING, example=_JOB_EVENTS)},
        others={204: {"description": "Everything was seen. Browsers stop at it."}},
        errors=all_of(INVALID, _NO_JOB, NOT_WHOLE, {503: ("stream_unreachable",)}),
    ),
    Operation(
        method="GET",
        path="/v1/jobs/{id}/webhook",
        name="getJobWebhook",
        tag=JOBS,
        summary="See whether the job's end was told, and every attempt",
        parameters=(_JOB_ID,),
        answer=_json("WebhookDelivery"),
        errors=_NO_JOB,
    ),
    Operation(
        method="POST",
        path="/v1/jobs/{id}/cancel",
        name="cancelJob",
        tag=JOBS,
        summary="Cancel a job",
        description="One that has ended stays as it is: what comes back tells how.",
        parameters=(_JOB_ID,),
        answer=_json("Job"),
        errors=_NO_JOB,
    ),
    Operation(
        method="POST",
        path="/v1/jobs/{id}/retry",
        name="retryJob",
        tag=JOBS,
        summary="Ask for the same again, as a new job",
        parameters=(_JOB_ID,),
        status=201,
        answer=_json("Job"),
        errors=all_of(_NO_JOB, {409: ("not_finished",), 410: ("gone", "files_gone"), 429: ("queue_full",)}),
    ),
)

_OPERATOR_OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/v1/queue",
        name="getQueue",
        tag=OPERATING,
        summary="See what waits and what runs",
        key=Key.ADMIN,
        answer=_json("Queue"),
        errors=REDIS,
    ),
    Operation(
        method="POST",
        path="/v1/queue/pause",
        name="pauseQueue",
        tag=OPERATING,
        summary="Let no worker claim anything, for a time",
        description="What runs goes on; what waits may time out.",
        key=Key.ADMIN,
        body=_json("PauseRequest", {"for_s": 600}),
        body_required=False,
        answer=_json("Queue"),
        errors=all_of(BODY, REDIS),
    ),
    Operation(
        method="POST",
        path="/v1/queue/resume",
        name="resumeQueue",
        tag=OPERATING,
        summary="Let the workers claim again",
        key=Key.ADMIN,
        answer=_json("Queue"),
        errors=REDIS,
    ),
    Operation(
        method="GET",
        path="/v1/workers",
        name="listWorkers",
        tag=OPERATING,
        summary="List the workers that hold a lease",
        key=Key.ADMIN,
        answer=_json("WorkerList"),
        errors=REDIS,
    ),
    Operation(
        method="POST",
        path="/v1/workers/{id}/drain",
        name="drainWorker",
        tag=OPERATING,
        summary="Let a worker finish what it runs, and leave",
        key=Key.ADMIN,
        parameters=(_WORKER_ID,),
        answer=_json("DrainedWorker"),
        errors=_NO_JOB,
    ),
    Operation(
        method="GET",
        path="/v1/audit",
        name="listAudit",
        tag=OPERATING,
        summary="List what operators did, the latest first",
        key=Key.ADMIN,
        parameters=(
            limit(),
            query(
                "before",
                {"type": "string", "pattern": "^[0-9]{1,20}-[0-9]{1,20}$"},
                "The `entry_id` of the last one seen.",
            ),
        ),
        answer=_json("AuditPage"),
        errors=all_of(INVALID, REDIS),
    ),
)

_HEALTH_OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/health",
        name="getHealth",
        tag=HEALTH,
        summary="The process lives",
        key=Key.NONE,
        answer=_json("Health", {"status": "ok"}),
    ),
    Operation(
        method="GET",
        path="/ready",
        name="getReady",
        tag=HEALTH,
        summary="Redis answers and a worker is alive",
        key=Key.NONE,
        answer=_json("Ready", {"status": "ready", "workers": 2}),
        others={503: {"description": "Something is missing.", "content": {JSON: {"schema": ref("NotReady")}}}},
    ),
)

OPERATIONS: Final = (*_JOB_OPERATIONS, *_OPERATOR_OPERATIONS, *_HEALTH_OPERATIONS)
