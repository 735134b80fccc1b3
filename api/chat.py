"""Chat completions: submit the job, then relay its stream or answer with the whole."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from api.answer import Answer, submit_and_listen
from api.attachments import Detached, detach, media_parts
from api.body import read_chat_body
from api.chat_request import StreamOptions, parse_chat_request, submission
from api.chunks import ChunkEncoder, completion
from api.once import comes_back_within_s, once, patience_ms
from api.services import services_of
from api.sse import StreamedAnswer
from api.stored import find_job, starting_after
from api.submit import check_uploaded, when_delivered
from api.system import check_model
from api.webhook_request import webhook_target
from shared.jobs import JobKind, new_job_id
from shared.text import json_bytes


async def create_completion(request: Request) -> Response:
    """`POST /v1/chat/completions`. Everything that can be refused is refused before anything is queued."""
    services = services_of(request)
    settings = services.settings
    body = await read_chat_body(request, settings)
    chat = parse_chat_request(body)
    check_model(settings, chat.model)
    tenant: str = request.scope["tenant"]
    detached = Detached(messages=body["messages"])
    if parts := media_parts(chat):  # decoding and looking at megabytes would hold up the streams of others
        detached = await asyncio.to_thread(detach, body["messages"], parts, max_file_bytes=settings.max_file_bytes)
    await check_uploaded(services, tenant, detached)
    is_waited_for = chat.on_disconnect == "cancel"
    job = submission(
        chat,
        body | {"messages": detached.messages},
        job_id=new_job_id(),
        model=settings.model_name,
        default_session=settings.default_session,
        request_id=request.scope["request_id"],
        tenant=tenant,
        is_waited_for=is_waited_for,
        patience_ms=None if chat.stream or not is_waited_for else patience_ms(request),
        once=await once(request, body),
        webhook=webhook_target(chat.webhook, settings),
    )
    accepted, answer = await submit_and_listen(
        services, job, detached.attachments, waits=is_waited_for, comes_back_within_s=comes_back_within_s(request)
    )
    delivered = when_delivered(services, job, accepted.job_id)
    if chat.stream:
        encoder = _encoder(chat.stream_options, accepted.job_id, accepted.created_s, job.model)
        return StreamedAnswer(answer, encoder, background=delivered)
    entries, ok = await answer.whole(request)
    whole = completion(
        entries,
        ok,
        completion_id=accepted.job_id,
        created=accepted.created_s,
        model=job.model,
        metadata=job.metadata,
    )
    return Response(json_bytes(whole), media_type="application/json", background=delivered)


async def watch_completion(request: Request) -> Response:
    """`GET /v1/chat/completions/{id}/stream`: the chunks from the beginning, or behind `starting_after`, and on.

    Every chunk has its `sequence_number`. Watching changes nothing: the job does not end with its watchers.
    """
    job = await find_job(request, JobKind.CHAT)
    after = starting_after(request)
    encoder = ChunkEncoder(
        completion_id=job.job_id,
        created=job.created_s,
        model=job.model,
        include_usage=True,
        include_tool_events=True,
        include_sequence_numbers=True,
        starting_after=after,
    )
    return StreamedAnswer(Answer(services_of(request), job.job_id), encoder, starting_after=after)


def _encoder(options: StreamOptions | None, job_id: str, created_s: int, model: str) -> ChunkEncoder:
    options = options or StreamOptions()
    return ChunkEncoder(
        completion_id=job_id,
        created=created_s,
        model=model,
        include_usage=options.include_usage,
        include_tool_events=options.include_tool_events,
        include_sequence_numbers=options.include_sequence_numbers,
    )
