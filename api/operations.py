"""The operators' routes: the queue, the workers, and the trail of what operators did."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import structlog
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from api.body import read_json, validated
from api.errors import ForbiddenError, InvalidRequestError, NotFoundError
from api.paging import limit_of
from api.services import JSONResponse, reached, services_of
from shared.jobs import Status
from shared.operations import AuditEntry, Operations, QueueState, WorkerState

log = structlog.get_logger(__name__)

RATE_OVER_MS = 60_000
_STREAM_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")


class Pause(BaseModel):
    """What `POST /v1/queue/pause` may say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    for_s: Annotated[float, Field(ge=0.001, le=30 * 24 * 3600)] = 24 * 3600  # Redis counts in ms


def operator_of(request: Request) -> str:
    """Who acts. Raises ForbiddenError."""
    operator: str | None = request.scope["operator"]
    if operator is None:
        raise ForbiddenError("This needs an admin key, one of ENDMARK_ADMIN_KEYS.")
    return operator


def operations_of(request: Request) -> Operations:
    return Operations(services_of(request).store)


async def note(request: Request, action: str, target: str, **details: Any) -> None:
    """Leaves an audit entry, before the action: what was done and not noted would be worse than the reverse."""
    operator = operator_of(request)
    log.info("operator_acted", operator=operator, action=action, target=target, **details)
    await reached(lambda: operations_of(request).note(operator, action, target, details))


async def queue(request: Request) -> Response:
    """`GET /v1/queue`."""
    operator_of(request)
    return JSONResponse(await _queue_object(request))


async def pause(request: Request) -> Response:
    """`POST /v1/queue/pause`."""
    operator = operator_of(request)
    asked = validated(Pause, await read_json(request, services_of(request).settings.max_body_bytes, default={}))
    await note(request, "queue.pause", "queue", for_s=asked.for_s)
    await reached(lambda: operations_of(request).pause(operator, asked.for_s))
    return JSONResponse(await _queue_object(request))


async def resume(request: Request) -> Response:
    """`POST /v1/queue/resume`. A queue that is not paused stays as it is."""
    await note(request, "queue.resume", "queue")
    await reached(lambda: operations_of(request).resume())
    return JSONResponse(await _queue_object(request))


async def workers(request: Request) -> Response:
    """`GET /v1/workers`."""
    operator_of(request)
    states = await reached(lambda: operations_of(request).workers())
    return JSONResponse({"object": "list", "data": [worker_object(state) for state in states]})


async def drain(request: Request) -> Response:
    """`POST /v1/workers/{id}/drain`: it finishes what it runs, and leaves. Whoever started it may start another."""
    worker_id: str = request.path_params["id"]
    await note(request, "worker.drain", worker_id)
    heard = await reached(lambda: operations_of(request).drain(worker_id))
    if not heard:
        raise NotFoundError(f"No such worker: {worker_id[:100]!r}.")
    return JSONResponse({"id": worker_id, "object": "worker", "draining": True})


async def audit(request: Request) -> Response:
    """`GET /v1/audit?limit&before`: the latest first."""
    operator_of(request)
    limit, before = limit_of(request), request.query_params.get("before")
    if before is not None and not _is_stream_id(before):
        raise InvalidRequestError("before must be the id of an audit entry.", param="before")
    entries = await reached(lambda: operations_of(request).trail(limit + 1, before))
    page = entries[:limit]
    return JSONResponse(
        {
            "object": "list",
            "data": [audit_object(entry) for entry in page],
            "first_id": page[0].entry_id if page else None,
            "last_id": page[-1].entry_id if page else None,
            "has_more": len(entries) > len(page),
        }
    )


def _is_stream_id(given: str) -> bool:
    """Whether Redis may have given it: two numbers of 64 bits, not both of them 0. It refuses to read any other."""
    if not _STREAM_ID.fullmatch(given):
        return False
    numbers = [int(part) for part in given.split("-")]
    return any(numbers) and all(number < 2**64 for number in numbers)


async def _queue_object(request: Request) -> dict[str, Any]:
    state = await reached(operations_of(request).queue)
    since_ms = state.now_ms - RATE_OVER_MS
    shelves = await reached(lambda: services_of(request).index.counts(since_ms=since_ms))
    by_status = dict.fromkeys(Status, 0)
    for shelf, number in shelves.items():
        by_status[shelf.status] += number
    return queue_object(state, by_status)


def queue_object(state: QueueState, last_minute: Mapping[Status, int]) -> dict[str, Any]:
    """`last_minute`: the jobs that were accepted in it, by what has become of them."""
    return {
        "object": "queue",
        "claimable": state.claimable,
        "waiting_for_a_turn": max(0, state.unfinished - state.claimable - state.running),
        "running": state.running,
        "oldest_wait_ms": None if state.oldest_ms is None else max(0, state.now_ms - state.oldest_ms),
        "workers": state.workers,
        "slots": state.slots,
        "last_minute": {"accepted": sum(last_minute.values())}
        | {status.value: number for status, number in last_minute.items()},
        "paused": None if state.paused_by is None else {"by": state.paused_by, "for_ms": state.paused_for_ms},
    }


def worker_object(state: WorkerState) -> dict[str, Any]:
    return {
        "id": state.worker_id,
        "object": "worker",
        "host": state.host,
        "pid": state.pid,
        "version": state.version,
        "agent": state.agent,
        "max_jobs": state.max_jobs,
        "started_ms": state.started_ms,
        "last_beat_ms": state.last_beat_ms,
        "lease_ends_ms": state.lease_ends_ms,
        "draining": state.is_draining,
        "load": round(len(state.jobs) / state.max_jobs, 3) if state.max_jobs else None,
        "jobs": state.jobs,
    }


def audit_object(entry: AuditEntry) -> dict[str, Any]:
    return {"object": "audit_entry"} | entry._asdict()
