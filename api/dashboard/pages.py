"""What the pages show. What they do is in actions.py."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api import jobs, operations
from api.dashboard import charts, statistics
from api.dashboard.curl import commands
from api.dashboard.filters import PERIODS, Filters
from api.dashboard.inspection import ask
from api.dashboard.rendering import now_ms, page
from api.errors import ForbiddenError, GoneError, InvalidRequestError
from api.operations import operations_of
from api.services import reached, services_of
from api.stored import find_job
from shared.entries import BEGINNING, EntryId, UnreadableEntryError
from shared.index import JobFilter
from shared.jobs import ErrorCode, Status
from shared.text import bytes_text

OVERVIEW_JOBS = 500  # that the overview is about: two looks into the index
WAITING_SHOWN = 50
ENTRIES_SHOWN, ENTRY_CHARACTERS = 200, 2000
_PART = re.compile(r"(\d{1,9})-(\d{1,9})")


async def overview(request: Request) -> Response:
    """How it goes, over the latest jobs."""
    index = services_of(request).index
    latest = await reached(lambda: index.page(JobFilter(), limit=OVERVIEW_JOBS))
    counts = await ask(request, jobs.count_jobs)
    queue = await ask(request, operations.queue)
    found = statistics.overview(latest.jobs, now_ms())
    drawn = found and [
        charts.throughput(found),
        charts.speed(found, "wait", "Waited for a worker"),
        charts.speed(found, "first_token", "Until the first token"),
    ]
    return page(
        request,
        "overview.html",
        title="Overview",
        found=found,
        charts=drawn,
        counts=counts,
        queue=queue,
        most=OVERVIEW_JOBS,
    )


async def job_list(request: Request) -> Response:
    """The jobs that the filters in the URL choose."""
    filters, at_ms = Filters.parse(request.query_params.multi_items()), now_ms()
    after = request.query_params.get("after")
    query = filters.query(at_ms) | {"limit": "50"} | ({"after": after} if after else {})
    found = await ask(request, jobs.list_jobs, query=query)
    counts = await ask(request, jobs.count_jobs, query=filters.counted(at_ms))
    return page(
        request,
        "jobs.html",
        title="Jobs",
        filters=filters,
        found=found,
        counts=counts,
        after=after,
        statuses=[status.value for status in Status],
        codes=sorted({code.value for code in ErrorCode} | set(counts["by_code"])),
        periods=PERIODS,
    )


async def job(request: Request) -> Response:
    """Everything about one job."""
    shown = await ask(request, jobs.retrieve, path=request.path_params)
    return page(
        request,
        "job.html",
        title=shown["id"],
        job=shown,
        is_over=shown["status"] not in (Status.QUEUED, Status.RUNNING),
        shows_content=services_of(request).settings.inspect_content,
        waits_because=await _reasons(request, [shown]),
        stretches=charts.stretches(shown, now_ms()),
        commands=commands(shown, str(request.base_url).rstrip("/")),
    )


async def events(request: Request) -> Response:
    """What the job says, live: the stream that `GET /v1/jobs/{id}/events` is."""
    _require_content(request)
    return await jobs.events(request)


async def entries(request: Request) -> Response:
    """What the job said, entry by entry."""
    _require_content(request)
    record = await find_job(request)
    asked = request.query_params.get("after", str(BEGINNING))
    part = _PART.fullmatch(asked) if asked.isascii() else None
    if part is None:
        raise InvalidRequestError("after must be the id of an entry, such as 1-20.", param="after")
    cursor = EntryId(int(part[1]), int(part[2]))
    store = services_of(request).store
    try:
        read = await reached(lambda: store.read_after(record.job_id, cursor, ENTRIES_SHOWN))
    except UnreadableEntryError as error:
        raise GoneError("What the job said cannot be read.", code="stream_incomplete") from error
    shown = [
        {"id": str(entry.id), "kind": entry.kind.value, "bytes": len(entry.payload), "text": _shortened(entry.payload)}
        for entry in read.entries
    ]
    return page(request, "entries.html", title="Entries", job_id=record.job_id, entries=shown, more=read.more)


async def queue(request: Request) -> Response:
    """What waits, and why."""
    state = await ask(request, operations.queue)
    query = {"status": "queued", "order": "asc", "limit": str(WAITING_SHOWN)}
    waiting = await ask(request, jobs.list_jobs, query=query)
    reasons = await _reasons(request, waiting["data"])
    return page(request, "queue.html", title="Queue", queue=state, waiting=waiting, reasons=reasons)


async def workers(request: Request) -> Response:
    """Who does what."""
    return page(request, "workers.html", title="Workers", workers=(await ask(request, operations.workers))["data"])


async def audit(request: Request) -> Response:
    """What operators did."""
    before = request.query_params.get("before")
    query = {"limit": "50"} | ({"before": before} if before else {})
    trail = await ask(request, operations.audit, query=query)
    return page(request, "audit.html", title="Audit trail", trail=trail, before=before)


async def _reasons(request: Request, listed: list[dict[str, Any]]) -> dict[str, str]:
    """Why each of the jobs that are queued waits, by its id."""
    waiting = [found["id"] for found in listed if found["status"] == Status.QUEUED]
    if not waiting:
        return {}
    state = await ask(request, operations.queue)
    claimable = await reached(lambda: operations_of(request).claimable(waiting))
    if state["paused"]:
        why = f"the queue is paused by {state['paused']['by']}"
    elif not state["workers"]:
        why = "no worker is there"
    elif state["running"] >= state["slots"]:
        why = f"all {state['slots']} slots of the workers are taken"
    else:
        why = "a worker is about to take it"
    return {
        job_id: why if job_id in claimable else "the turn before it in its session has not ended" for job_id in waiting
    }


def _require_content(request: Request) -> None:
    if not services_of(request).settings.inspect_content:
        raise ForbiddenError("This deployment does not show what was asked and answered (ENDMARK_INSPECT_CONTENT).")


def _shortened(payload: bytes) -> str:
    text = bytes_text(payload)
    return text if len(text) <= ENTRY_CHARACTERS else f"{text[:ENTRY_CHARACTERS]} …"
