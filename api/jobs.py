"""Jobs as such, whatever API they were asked for by: find them, look at one, watch it, act on it.

A tenant's key reaches its own jobs, an admin key all of them. What an operator does leaves an audit entry.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from api.answer import Answer
from api.body import read_json, validated
from api.chat_request import MAX_METADATA_PAIRS
from api.errors import (
    ApiError,
    ForbiddenError,
    GoneError,
    InvalidRequestError,
    NotFinishedError,
    NotFoundError,
)
from api.job_events import JobEventEncoder
from api.job_objects import answer_object, attempts, job_object, timeline, timings
from api.operations import note, operator_of
from api.paging import limit_of, newest_first
from api.replay import ReplayedAnswer
from api.services import JSONResponse, reached, services_of
from api.sse import StreamedAnswer
from api.stored import find_job, starting_after
from api.submit import submit
from shared.entries import BEGINNING, Entry, UnreadableEntryError
from shared.index import BadCursorError, JobFilter, Place
from shared.jobs import Attachment, JobKind, JobRecord, Status, Submission, new_job_id
from shared.store import Deletion, Ending
from shared.timing import UnreadableTimingError, decode

log = structlog.get_logger(__name__)

FILTERS = ("status", "kind", "model", "session", "tenant", "code", "worker", "metadata[…]", "since", "until")
COUNT_FILTERS = ("status", "kind", "model", "tenant", "code", "since", "until")
SHOWN_BYTES = 1024 * 1024  # of an answer, in one response
PAGE_ENTRIES = 200
SLOWEST, FASTEST = 0.01, 1000  # speeds of a replay
_PAIR = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_INSTANT = re.compile(r"\d{1,15}")
_KINDS = {kind.name.lower(): kind for kind in JobKind}


Text = Annotated[str, StringConstraints(max_length=1000)]  # a bound makes pydantic refuse lone surrogates, too


class Chosen(BaseModel):
    """The jobs that a bulk action is for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] | None = None
    kind: Literal["chat", "response"] | None = None
    model: Text | None = None
    session: Text | None = None
    tenant: Text | None = None
    code: Text | None = None
    worker: Text | None = None
    metadata: dict[Text, Text] = Field(default_factory=dict, max_length=MAX_METADATA_PAIRS)
    since: Annotated[int, Field(ge=0, lt=10**15)] | None = None
    until: Annotated[int, Field(ge=0, lt=10**15)] | None = None

    def filter(self) -> JobFilter:
        return JobFilter(
            statuses=frozenset({Status(self.status)}) if self.status else frozenset(),
            kind=_KINDS[self.kind] if self.kind else None,
            model=self.model,
            session=self.session,
            tenant=self.tenant,
            error_code=self.code,
            worker=self.worker,
            metadata=self.metadata,
            since_ms=self.since,
            until_ms=self.until,
        )


class Bulk(BaseModel):
    """What `POST /v1/jobs/cancel` and `POST /v1/jobs/retry` may say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    filters: Chosen
    dry_run: bool = False
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


# -- finding -----------------------------------------------------------------------------------------------------------


async def list_jobs(request: Request) -> Response:
    """`GET /v1/jobs`: a page of the jobs that the filters choose, the latest first unless `order=asc`."""
    asked = _chosen(request, FILTERS, ("limit", "after", "order"))
    limit, descending = limit_of(request), newest_first(request, default="desc")
    cursor = request.query_params.get("after")
    try:
        after = Place.parse(cursor) if cursor else None
    except BadCursorError as error:
        raise InvalidRequestError("after must be the next_cursor of a page.", param="after") from error
    index = services_of(request).index
    page = await reached(lambda: index.page(asked, after=after, limit=limit, newest_first=descending))
    return JSONResponse(
        {
            "object": "list",
            "data": [job_object(job) for job in page.jobs],
            "has_more": page.next is not None,
            "next_cursor": page.next and page.next.cursor(),
        }
    )


async def count_jobs(request: Request) -> Response:
    """`GET /v1/jobs/counts`: how many jobs there are, by status and by error code."""
    asked = _chosen(request, COUNT_FILTERS, ())
    index = services_of(request).index
    shelves = await reached(lambda: index.counts(since_ms=asked.since_ms, until_ms=asked.until_ms))
    by_status: dict[str, int] = {}
    by_code: dict[str, int] = {}
    for shelf, number in shelves.items():
        wanted = (
            asked.tenant in (None, shelf.tenant)
            and asked.kind in (None, shelf.kind)
            and asked.model in (None, shelf.model)
            and asked.error_code in (None, shelf.error_code)
            and (not asked.statuses or shelf.status in asked.statuses)
        )
        if wanted:
            by_status[shelf.status.value] = by_status.get(shelf.status.value, 0) + number
            if shelf.error_code:
                by_code[shelf.error_code] = by_code.get(shelf.error_code, 0) + number
    return JSONResponse(
        {"object": "job_counts", "total": sum(by_status.values()), "by_status": by_status, "by_code": by_code}
    )


def _chosen(request: Request, filters: tuple[str, ...], others: tuple[str, ...]) -> JobFilter:
    """The jobs that the query asks for, of those that the key may see. Raises InvalidRequestError or ForbiddenError."""
    fields: dict[str, Any] = {"metadata": {}}
    for name, value in request.query_params.multi_items():
        pair = _PAIR.fullmatch(name)
        if pair and "metadata[…]" in filters:
            fields["metadata"][pair[1]] = value
        elif name in filters:
            if name in ("since", "until") and not (value.isascii() and _INSTANT.fullmatch(value)):
                raise InvalidRequestError(f"{name} must be an instant in ms since the epoch.", param=name)
            fields[name] = int(value) if name in ("since", "until") else value
        elif name not in others:
            known = ", ".join((*filters, *others))
            raise InvalidRequestError(f"There is no filter {name[:50]!r}. There are: {known}.", param=name[:50])
    return _of_ones_own(request, validated(Chosen, fields))


def _of_ones_own(request: Request, chosen: Chosen) -> JobFilter:
    if request.scope["operator"] is None:
        own: str = request.scope["tenant"]
        if chosen.tenant not in (None, own):
            raise ForbiddenError("Another tenant's jobs need an admin key, one of ENDMARK_ADMIN_KEYS.")
        chosen = chosen.model_copy(update={"tenant": own})
    return chosen.filter()


# -- one job -----------------------------------------------------------------------------------------------------------


async def retrieve(request: Request) -> Response:
    """`GET /v1/jobs/{id}`: everything about one job."""
    services = services_of(request)
    job = await find_job(request)
    asked = answered = None
    if services.settings.inspect_content:
        stored = await reached(lambda: services.store.request(job.job_id))
        asked = stored and {name: stored[name] for name in ("messages", "params")}
        entries, is_cut = await _said(request, job)
        answered = answer_object(entries, is_cut=is_cut)
    return JSONResponse(
        job_object(job)
        | {
            "timeline": timeline(job),
            "timings": timings(job),
            "attempts": attempts(job),
            "request": asked,
            "answer": answered,
            "traceback": (job.traceback or None) if request.scope["operator"] else None,
        }
    )


async def _said(request: Request, job: JobRecord) -> tuple[list[Entry], bool]:
    """What the agent said so far, and whether that is cut."""
    store = services_of(request).store
    entries: list[Entry] = []
    cursor, shown_bytes, rows = BEGINNING, 0, PAGE_ENTRIES
    while shown_bytes <= SHOWN_BYTES:
        try:
            read = await reached(lambda cursor=cursor, rows=rows: store.read_after(job.job_id, cursor, rows))  # type: ignore[misc]  # a lambda's default has no type
        except UnreadableEntryError as error:
            raise GoneError("What the job said cannot be read.", code="stream_incomplete") from error
        if not read.entries:
            return entries, False
        entries += read.entries
        cursor = read.entries[-1].id
        rows = max(1, PAGE_ENTRIES * read.rows // len(read.entries))  # packs hold many entries each
        shown_bytes += sum(len(entry.payload) for entry in read.entries)
    return entries, True


async def events(request: Request) -> Response:
    """`GET /v1/jobs/{id}/events`: the job's stream for a browser's EventSource, from `Last-Event-ID` on."""
    job = await find_job(request)
    if request.scope["operator"] is not None and not services_of(request).settings.inspect_content:
        raise ForbiddenError("ENDMARK_INSPECT_CONTENT is off: what jobs say is their clients' own.")
    after = _last_event_id(request) or starting_after(request)
    # Everything was seen: a browser connects again whenever a stream ends, until it gets a 204.
    if job.is_terminal and after == (job.entries or 0) + 1:
        return Response(status_code=204)
    encoder = JobEventEncoder(starting_after=after)
    if "speed" in request.query_params:
        return await _replay(request, job, encoder)
    return StreamedAnswer(Answer(services_of(request), job.job_id), encoder, starting_after=after)


async def _replay(request: Request, job: JobRecord, encoder: JobEventEncoder) -> Response:
    """The events with the pauses that they had. Raises InvalidRequestError, NotFinishedError or GoneError."""
    services = services_of(request)
    try:
        speed = float(request.query_params["speed"])
    except ValueError:
        speed = 0.0
    if not SLOWEST <= speed <= FASTEST:
        raise InvalidRequestError(f"speed must be a number from {SLOWEST} to {FASTEST}.", param="speed")
    if not job.is_terminal:
        raise NotFinishedError(f"The job {job.job_id} is {job.status.value}: only what has ended has a timing.")
    timing = await reached(lambda: services.store.timing(job.job_id))
    try:
        offsets_ms = decode(timing or b"")
    except UnreadableTimingError as error:
        raise GoneError("When the job said what was not noted.", code="no_timing") from error
    return ReplayedAnswer(Answer(services, job.job_id), encoder, offsets_ms, speed)


def _last_event_id(request: Request) -> int | None:
    given = request.headers.get("last-event-id")
    if not given:
        return None
    if not (given.isascii() and given.isdigit() and len(given) < 18):
        raise InvalidRequestError("Last-Event-ID must be the id of an event of this stream.", param="last-event-id")
    return int(given)


# -- acting ------------------------------------------------------------------------------------------------------------


async def cancel(request: Request) -> Response:
    """`POST /v1/jobs/{id}/cancel`. A job that has ended stays as it is: what comes back tells how."""
    job = await find_job(request)
    await _note_operator(request, "job.cancel", job)
    await cancel_job(request, job.job_id)
    return JSONResponse(job_object(await find_job(request)))


async def cancel_job(request: Request, job_id: str) -> None:
    """Ends the job, unless it has ended. Raises NotFoundError or QueueUnreachableError."""
    store = services_of(request).store
    ending = await reached(lambda: store.cancel(job_id, "The request was cancelled."))
    if ending is Ending.GONE:
        raise NotFoundError(f"No such job: {job_id!r}. It has just expired.")
    log.info("job_cancelled", job=job_id, why="by the API", ending=ending.value)


async def retry(request: Request) -> Response:
    """`POST /v1/jobs/{id}/retry`: a new job that asks for the same. Raises NotFinishedError."""
    job = await find_job(request)
    await _note_operator(request, "job.retry", job)
    again = await _retry_job(request, job)
    return JSONResponse(again, 201)


async def _retry_job(request: Request, job: JobRecord) -> dict[str, Any]:
    services = services_of(request)
    if not job.is_terminal:
        raise NotFinishedError(f"The job {job.job_id} is {job.status.value}. Cancel it, or wait for its end.")
    stored = await reached(lambda: services.store.request(job.job_id))
    if stored is None:
        raise GoneError("The request of the job is no longer stored. Send it again.")
    if _has_attachments(stored["messages"]):
        raise GoneError("The files inside of the request are no longer stored. Send it again.", code="files_gone")
    again = Submission(
        job_id=new_job_id(job.kind),
        tenant=job.tenant,
        session=job.session,
        model=job.model,
        messages=stored["messages"],
        owns_history=stored["owns_history"],
        params=stored["params"],
        metadata=job.metadata,
        user=job.user,
        request_id=request.scope["request_id"],
        kind=job.kind,
        store=job.store,
        background=job.kind is JobKind.RESPONSE,
        echo=job.echo,
        retry_of=job.job_id,
    )
    await submit(services, again, [])
    record = await reached(lambda: services.store.record(again.job_id))
    if record is None:
        raise GoneError("The new job is gone already.")
    return job_object(record)


def _has_attachments(messages: list[dict[str, Any]]) -> bool:
    """Whether a file came inside of the request: it is deleted with the end of its job."""

    def holds(value: object) -> bool:
        if isinstance(value, Mapping):
            is_one = set(value) == {"attachment", "media_type"} and Attachment.from_json(value) is not None
            return is_one or any(holds(part) for part in value.values())
        return isinstance(value, list) and any(holds(part) for part in value)

    return any(holds(message.get("content")) for message in messages if message["role"] == "user")


async def delete(request: Request) -> Response:
    """`DELETE /v1/jobs/{id}`. Raises NotFinishedError for one that has not ended."""
    job = await find_job(request)
    await _note_operator(request, "job.delete", job)
    deletion = await reached(lambda: services_of(request).store.delete(job.job_id))
    if deletion is Deletion.UNFINISHED:
        raise NotFinishedError(f"The job {job.job_id} has not ended, or its worker has not stopped. Cancel it first.")
    return JSONResponse({"id": job.job_id, "object": "job.deleted", "deleted": True})


async def bulk_cancel(request: Request) -> Response:
    """`POST /v1/jobs/cancel`: cancels the unfinished ones of the jobs that the filters choose."""

    async def act(job: JobRecord) -> None:
        await cancel_job(request, job.job_id)

    return await _bulk(request, "cancel", act, lambda job: not job.is_terminal)


async def bulk_retry(request: Request) -> Response:
    """`POST /v1/jobs/retry`: asks again for the ended ones of the jobs that the filters choose."""

    async def act(job: JobRecord) -> None:
        await _retry_job(request, await find_job(request, job_id=job.job_id))  # a list does not hold all of it

    return await _bulk(request, "retry", act, lambda job: job.is_terminal)


async def _bulk(
    request: Request,
    action: str,
    act: Callable[[JobRecord], Awaitable[None]],
    concerns: Callable[[JobRecord], bool],
) -> Response:
    operator_of(request)
    services = services_of(request)
    asked = validated(Bulk, await read_json(request, services.settings.max_body_bytes, default={}))
    jobs: list[JobRecord] = []
    after: Place | None = None
    index = services.index
    while len(jobs) < asked.limit:
        page = await reached(lambda after=after: index.page(asked.filters.filter(), after=after, limit=100))  # type: ignore[misc]  # a lambda's default has no type
        jobs += [job for job in page.jobs if concerns(job)]
        after = page.next
        if after is None:
            break
    jobs = jobs[: asked.limit]
    refused: list[dict[str, str]] = []
    if not asked.dry_run:
        chosen = asked.filters.model_dump(exclude_none=True)
        await note(request, f"jobs.{action}", f"{len(jobs)} jobs", filters=chosen)
        for job in jobs:
            try:
                await act(job)
            except ApiError as error:
                refused.append({"id": job.job_id, "reason": error.message})
    return JSONResponse(
        {
            "object": "bulk",
            "action": action,
            "dry_run": asked.dry_run,
            "matched": len(jobs),
            "done": 0 if asked.dry_run else len(jobs) - len(refused),
            "ids": [job.job_id for job in jobs],
            "refused": refused,
        }
    )


async def _note_operator(request: Request, action: str, job: JobRecord) -> None:
    """What a tenant does with its own job is its own affair."""
    if request.scope["operator"] is not None:
        await note(request, action, job.job_id, tenant=job.tenant)
