"""POST /v1/chat/completions: submit the job, then relay its stream or answer with the whole."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from api.answer import Answer
from api.attachments import Detached, detach, media_parts
from api.body import read_chat_body
from api.chat_request import ChatRequest, StreamOptions, parse_chat_request, submission
from api.chunks import ChunkEncoder, completion
from api.errors import NotFoundError
from api.services import services_of
from api.sse import StreamedAnswer
from api.submit import check_uploaded, submit
from shared.jobs import new_job_id
from shared.text import json_bytes


async def create_completion(request: Request) -> Response:
    """Everything that can be refused is refused before anything is queued."""
    services = services_of(request)
    settings = services.settings
    body = await read_chat_body(request, settings)
    chat = parse_chat_request(body)
    if chat.model and chat.model != settings.model_name:
        raise NotFoundError(
            f"The model {chat.model!r} does not exist. This deployment serves {settings.model_name!r}.",
            code="model_not_found",
            param="model",
        )
    tenant: str = request.scope["tenant"]
    detached = Detached(messages=body["messages"])
    if parts := media_parts(chat):  # decoding and looking at megabytes would hold up the streams of others
        detached = await asyncio.to_thread(detach, body["messages"], parts, max_file_bytes=settings.max_file_bytes)
    await check_uploaded(services, tenant, detached)
    job = submission(
        chat,
        body | {"messages": detached.messages},
        job_id=new_job_id(),
        model=settings.model_name,
        default_session=settings.default_session,
        request_id=request.scope["request_id"],
        tenant=tenant,
    )
    accepted = await submit(services, job, detached.attachments)
    answer = Answer(services, job.job_id, cancels=chat.on_disconnect == "cancel")
    if chat.stream:
        return StreamedAnswer(answer, _encoder(chat, job.job_id, accepted.created_s, job.model))
    entries, ok = await answer.whole(request.receive)
    whole = completion(
        entries,
        ok,
        completion_id=job.job_id,
        created=accepted.created_s,
        model=job.model,
        metadata=job.metadata,
    )
    return Response(json_bytes(whole), media_type="application/json")


def _encoder(chat: ChatRequest, job_id: str, created_s: int, model: str) -> ChunkEncoder:
    options = chat.stream_options or StreamOptions()
    return ChunkEncoder(
        completion_id=job_id,
        created=created_s,
        model=model,
        include_usage=options.include_usage,
        include_tool_events=options.include_tool_events,
        include_sequence_numbers=options.include_sequence_numbers,
    )
