"""Stored chat completions: those that were asked for with `store: true`, for as long as any job is kept.

Rule 1: a completion is shown only if its job has succeeded and its stream is verified, as for the client that waited.
        It is the same object.
Rule 2: what is not whole is an error that says why: 409 while the job is unfinished, the job's own error after it has
        failed, 410 if what it said cannot be read any more. A list leaves it out.
Rule 3: a completion that was not to be stored does not exist here, nor does another tenant's.
"""

from __future__ import annotations

import re
from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import Response

from api.answer import Answer
from api.body import read_json
from api.chat_request import MAX_METADATA_PAIRS, parse_completion_update
from api.chunks import completion
from api.errors import (
    GoneError,
    InvalidRequestError,
    JobFailedError,
    NotFinishedError,
    NotFoundError,
)
from api.paging import limit_of, newest_first, page_object
from api.services import JSONResponse, reachable, services_of
from api.sse import CANNOT_BE_READ
from api.stored import find_job
from shared.index import JobFilter, Place
from shared.jobs import JobKind, JobRecord, Status
from shared.store import Deletion

log = structlog.get_logger(__name__)

_METADATA_FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_MESSAGE_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


async def retrieve(request: Request) -> Response:
    """`GET /v1/chat/completions/{id}`."""
    whole, _ = await _completion(request, await _find(request))
    return JSONResponse(whole)


async def list_page(request: Request) -> Response:
    """`GET /v1/chat/completions`: those that have succeeded, oldest first unless `order` says otherwise.

    A page may be shorter than `limit`, since answers may be long; `has_more` tells whether it is the last.
    """
    services, query = services_of(request), request.query_params
    limit, descending = limit_of(request), newest_first(request, default="asc")
    asked = JobFilter(
        statuses=frozenset({Status.SUCCEEDED}),
        tenant=request.scope["tenant"],
        kind=JobKind.CHAT,
        stored=True,
        model=query.get("model"),
        metadata=_metadata_asked_for(request),
    )
    place = await _place(request, query["after"]) if "after" in query else None
    rows: list[dict[str, Any]] = []
    row_bytes, has_more = 0, True
    while has_more and not rows:  # an empty page ends a list, so there is none as long as there is more
        with reachable():
            page = await services.index.page(asked, after=place, limit=limit, newest_first=descending)
        place, has_more = page.next, page.next is not None
        for number, job in enumerate(page.jobs, start=1):
            try:
                whole, said_bytes = await _completion(request, job)
            except GoneError as error:  # it has just expired
                log.warning("completion_left_out", job=job.job_id, reason=str(error))
                continue
            rows.append(whole)
            row_bytes += said_bytes
            if row_bytes > services.settings.max_answer_bytes:
                has_more = has_more or number < len(page.jobs)
                break
    return JSONResponse(page_object(rows, has_more=has_more))


async def update(request: Request) -> Response:
    """`POST /v1/chat/completions/{id}`: other metadata, in the place of all that there was."""
    services = services_of(request)
    metadata = parse_completion_update(await read_json(request, services.settings.max_body_bytes))
    job = await _find(request)
    whole, _ = await _completion(request, job)
    with reachable():
        if not await services.index.describe(job.job_id, metadata):
            raise _not_found(job.job_id)
    return JSONResponse(whole | {"metadata": metadata})


async def delete(request: Request) -> Response:
    """`DELETE /v1/chat/completions/{id}`: the job with all that it said, however it has ended."""
    job = await _find(request)
    _check_finished(job)
    with reachable():
        deletion = await services_of(request).store.delete(job.job_id)
    if deletion is Deletion.GONE:
        raise _not_found(job.job_id)
    if deletion is Deletion.UNFINISHED:
        raise NotFinishedError("The agent has not stopped yet. Try again in some seconds.")
    log.info("completion_deleted", job=job.job_id)
    return JSONResponse({"id": job.job_id, "object": "chat.completion.deleted", "deleted": True})


async def list_messages(request: Request) -> Response:
    """`GET /v1/chat/completions/{id}/messages`: what the client sent, without the files in it: those are not kept."""
    limit, descending = limit_of(request), newest_first(request, default="asc")
    job = await _find(request)
    _check_succeeded(job)
    with reachable():
        stored = await services_of(request).store.request(job.job_id)
    if stored is None:
        raise GoneError("The messages of this chat completion have expired.", code="request_expired")
    rows = [_message_object(f"{job.job_id}-{number}", message) for number, message in enumerate(stored["messages"])]
    if descending:
        rows.reverse()
    if "after" in request.query_params:
        rows = rows[_row_behind(request.query_params["after"], job.job_id, len(rows), descending=descending) :]
    return JSONResponse(page_object(rows[:limit], has_more=len(rows) > limit))


async def _find(request: Request, after: str | None = None) -> JobRecord:
    """The stored completion of the path, or the one that `after` names. Raises NotFoundError."""
    job = await find_job(request, JobKind.CHAT, job_id=after)
    if not job.store:
        raise _not_found(job.job_id)
    return job


async def _place(request: Request, after: str) -> Place:
    """Where the completion `after` stands in the list, or stood before it was deleted. Raises NotFoundError."""
    try:
        return Place.of(await _find(request, after))
    except NotFoundError:
        with reachable():
            place = await services_of(request).index.place_of_deleted(request.scope["tenant"], after)
        if place is None:
            raise
        return place


def _not_found(job_id: str) -> NotFoundError:
    return NotFoundError(f"No such chat completion: {job_id[:100]!r}. It may have expired, or was not to be stored.")


def _check_finished(job: JobRecord) -> None:
    if job.status in (Status.QUEUED, Status.RUNNING):
        raise NotFinishedError(
            f"This chat completion is {job.status.value}. Its chunks are at /v1/chat/completions/{job.job_id}/stream."
        )


def _check_succeeded(job: JobRecord) -> None:
    _check_finished(job)
    if job.error is not None:
        raise JobFailedError(job.error)


async def _completion(request: Request, job: JobRecord) -> tuple[dict[str, Any], int]:
    """The verified answer of a job, and its size in bytes. Raises NotFinishedError, JobFailedError or GoneError."""
    _check_succeeded(job)
    try:
        entries, ok = await Answer(services_of(request), job.job_id).whole(request)
    except JobFailedError as error:
        raise CANNOT_BE_READ.get(error.marker.code, JobFailedError)(error.marker) from error
    whole = completion(
        entries,
        ok,
        completion_id=job.job_id,
        created=job.created_s,
        model=job.model,
        metadata=job.metadata,
    )
    return whole, sum(len(entry.payload) for entry in entries)


def _metadata_asked_for(request: Request) -> dict[str, str]:
    """`metadata[key]=value`. Raises InvalidRequestError."""
    pairs: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if key := _METADATA_FILTER.fullmatch(name):
            if pairs.setdefault(key[1], value) != value:
                raise InvalidRequestError("A key of `metadata` has one value.", param="metadata")
            if len(pairs) > MAX_METADATA_PAIRS:
                raise InvalidRequestError(f"`metadata` has at most {MAX_METADATA_PAIRS} pairs.", param="metadata")
    return pairs


def _message_object(message_id: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message of the request as OpenAI's clients know stored ones."""
    content, parts = message.get("content"), None
    if isinstance(content, list):
        parts = [part for part in content if _is_kept(part)]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        content = "".join(texts) if texts else None
    shown = {"id": message_id, "role": message["role"], "content": content, "content_parts": parts}
    return (
        shown
        | {"name": message.get("name")}
        | {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}
    )


def _is_kept(part: dict[str, Any]) -> bool:
    """Whether a part is text, or an image that is more than a reference to a file that is gone."""
    return part["type"] == "text" or (part["type"] == "image_url" and isinstance(part["image_url"]["url"], str))


def _row_behind(after: str, job_id: str, count: int, *, descending: bool) -> int:
    """Where in the list the message after this one is. Raises NotFoundError."""
    number = after.removeprefix(f"{job_id}-")
    if number == after or not _MESSAGE_NUMBER.fullmatch(number) or int(number) >= count:
        raise NotFoundError(f"No such message: {after[:100]!r}", param="after")
    return count - int(number) if descending else int(number) + 1
