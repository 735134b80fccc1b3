"""Responses: OpenAI's Responses API on jobs. Created, found again, followed, cancelled and deleted, on any replica."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog
from starlette.requests import Request
from starlette.responses import Response

from api.answer import Answer, submit_and_listen
from api.attachments import Detached, detach
from api.body import read_json
from api.errors import ApiError, InvalidRequestError
from api.jobs import cancel_job
from api.once import comes_back_within_s, once, patience_ms
from api.paging import limit_of, newest_first, page_object
from api.response_events import ResponseEncoder, ended_response
from api.response_history import (
    messages_before,
    referenced_items,
    stored_messages,
    stored_response,
)
from api.response_objects import Echo, ResponseHead, input_items
from api.response_request import (
    Message,
    NewMessages,
    ResponseRequest,
    new_messages,
    parse_response_request,
    submission,
    uploaded_files,
)
from api.services import JSONResponse, reachable, services_of
from api.sse import StreamedAnswer
from api.stored import find_job, starting_after
from api.submit import check_uploaded, submit, when_delivered
from api.system import check_model
from api.webhook_request import webhook_target
from shared.jobs import JobKind, Submission, new_job_id
from shared.store import Deletion

log = structlog.get_logger(__name__)

NOTHING_SEEN = -1  # events are counted from 0
DELETE_PATIENCE_S = 20.0  # longer than a cancelled job may keep its worker's slot
DELETE_AGAIN_S = 0.05


async def create(request: Request) -> Response:
    """`POST /v1/responses`. Everything that can be refused is refused before anything is queued."""
    services = services_of(request)
    settings = services.settings
    body = await read_json(request, settings.max_body_bytes)
    asked = parse_response_request(body)
    check_model(settings, asked.model)
    tenant: str = request.scope["tenant"]
    detached, history = await _messages(request, asked)
    is_waited_for = not asked.background and asked.on_disconnect == "cancel"
    job = submission(
        asked,
        body,
        new=detached.messages,
        history=history,
        job_id=new_job_id(JobKind.RESPONSE),
        tenant=tenant,
        model=settings.model_name,
        request_id=request.scope["request_id"],
        is_waited_for=is_waited_for,
        patience_ms=None if asked.stream or not is_waited_for else patience_ms(request),
        once=await once(request, body),
        webhook=webhook_target(asked.webhook, settings),
    )
    if asked.background and not asked.stream:
        return await _begun(request, job, detached)
    accepted, answer = await submit_and_listen(
        services, job, detached.attachments, waits=is_waited_for, comes_back_within_s=comes_back_within_s(request)
    )
    head = ResponseHead.of_submission(job, job_id=accepted.job_id, created_s=accepted.created_s)
    delivered = when_delivered(services, job, accepted.job_id)
    if asked.stream:
        return StreamedAnswer(answer, ResponseEncoder(head), background=delivered)
    entries, ok = await answer.whole(request)
    return JSONResponse(ended_response(head, entries, ok), background=delivered)


async def _begun(request: Request, job: Submission, detached: Detached) -> Response:
    """A response that runs in the background, and that nobody listens to yet."""
    services = services_of(request)
    accepted = await submit(services, job, detached.attachments)
    delivered = when_delivered(services, job, accepted.job_id)
    if accepted.is_new:
        head = ResponseHead.of_submission(job, job_id=accepted.job_id, created_s=accepted.created_s)
        return JSONResponse(head.response("queued"), background=delivered)
    return JSONResponse(
        await stored_response(request, await find_job(request, job_id=accepted.job_id)), background=delivered
    )


async def _messages(request: Request, asked: ResponseRequest) -> tuple[Detached, list[Message]]:
    """The new messages without their files, and those that earlier responses hold. Raises ApiError."""
    services = services_of(request)
    settings = services.settings
    history: list[Message] = []
    if asked.previous_response_id is not None:
        history = await messages_before(request, asked.previous_response_id, max_bytes=settings.max_body_bytes)
    referenced = await referenced_items(request, asked.references, max_bytes=settings.max_body_bytes)
    new = new_messages(asked, referenced)
    try:
        detached = await _without_files(new, settings.max_file_bytes)
        uploaded = [*detached.uploaded, *uploaded_files(history, param="previous_response_id")]
        await check_uploaded(services, request.scope["tenant"], replace(detached, uploaded=uploaded))
    except ApiError as error:
        raise new.name_input(error) from error.__cause__
    return detached, history


async def _without_files(new: NewMessages, max_file_bytes: int) -> Detached:
    if not new.parts:
        return Detached(messages=new.messages)
    # Decoding and looking at megabytes would hold up the streams of others.
    return await asyncio.to_thread(detach, new.messages, new.parts, max_file_bytes=max_file_bytes)


async def retrieve(request: Request) -> Response:
    """`GET /v1/responses/{id}`: as it is now; with `stream=true` its events from the first, or from behind
    `starting_after`, and on. Watching changes nothing: a response does not end with its watchers.
    """
    job = await find_job(request, JobKind.RESPONSE)
    if not _flag(request, "stream"):
        return JSONResponse(await stored_response(request, job))
    after = starting_after(request, default=NOTHING_SEEN)
    encoder = ResponseEncoder(ResponseHead.of_record(job), starting_after=after)
    return StreamedAnswer(Answer(services_of(request), job.job_id), encoder, starting_after=after)


async def cancel(request: Request) -> Response:
    """`POST /v1/responses/{id}/cancel`. A response that has ended stays as it is: what comes back tells how."""
    job = await find_job(request, JobKind.RESPONSE)
    if not job.background:
        raise InvalidRequestError("Only a background response can be cancelled. Close the connection of another.")
    await cancel_job(request, job.job_id)
    return JSONResponse(await stored_response(request, await find_job(request, JobKind.RESPONSE)))


async def delete(request: Request) -> Response:
    """`DELETE /v1/responses/{id}`. One that has not ended is cancelled first, whoever waits for it."""
    job = await find_job(request, JobKind.RESPONSE)
    if not job.is_terminal:
        await cancel_job(request, job.job_id)
    deadline = asyncio.get_running_loop().time() + DELETE_PATIENCE_S
    while await _delete(request, job.job_id) is Deletion.UNFINISHED:  # its worker still has to let it go
        if asyncio.get_running_loop().time() > deadline:
            raise ApiError("The response is cancelled, but its agent has not stopped. Try again.", status=503)
        await asyncio.sleep(DELETE_AGAIN_S)
    log.info("response_deleted", job=job.job_id, tenant=job.tenant)
    return JSONResponse({"id": job.job_id, "object": "response", "deleted": True})


async def _delete(request: Request, job_id: str) -> Deletion:
    with reachable():
        return await services_of(request).store.delete(job_id)


async def input_items_page(request: Request) -> Response:
    """`GET /v1/responses/{id}/input_items`: what the request itself brought, without the history behind it."""
    job = await find_job(request, JobKind.RESPONSE)
    limit, descending = limit_of(request), newest_first(request, default="desc")
    messages = await stored_messages(request, job)
    items = input_items(messages[Echo(**job.echo).before :], job.job_id)
    if descending:
        items.reverse()
    if after := request.query_params.get("after"):
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequestError("after must be the id of an input item of this response.", param="after")
        items = items[places[0] + 1 :]
    return JSONResponse(page_object(items[:limit], has_more=len(items) > limit))


def _flag(request: Request, name: str) -> bool:
    given = request.query_params.get(name, "false").lower()
    if given not in ("true", "false"):
        raise InvalidRequestError(f"{name} must be 'true' or 'false'.", param=name)
    return given == "true"
