"""POST /v1/chat/completions: submit the job, then relay its stream or answer with the whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog
from redis.exceptions import ResponseError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.attachments import Detached, detach, media_parts
from api.body import read_chat_body
from api.chat_request import ChatRequest, parse_chat_request, submission
from api.chunks import PING, ChunkEncoder, completion, error_frame
from api.errors import (
    ClientGoneError,
    FilesUnavailableError,
    JobFailedError,
    NotFoundError,
    PayloadTooLargeError,
    QueueFullError,
    QueueUnreachableError,
)
from api.relay import INCOMPLETE, Relay
from api.services import Services, services_of
from api.tail import StreamExpiredError, StreamUnreachableError, Tail, TailError
from shared.connection import FAILURES, FIRST_RETRY_S, passes
from shared.entries import Entry, ErrorMarker, OkMarker
from shared.files import FileStoreFullError
from shared.jobs import ErrorCode, Submission, new_job_id
from shared.store import QueueFullError as StoreQueueFullError
from shared.text import json_bytes

log = structlog.get_logger(__name__)

SUBMIT_PATIENCE_S = 3.0  # how long a submission without an answer is repeated
SEND_BYTES = 64 * 1024  # of a stream that are handed over at a time, and waited for
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx buffers a response unless it is told not to
]

INTERRUPTED = ErrorMarker(ErrorCode.STREAM_INTERRUPTED, "The server was stopped before the answer was complete.")


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
    await _check_uploaded(services, tenant, detached)
    job = submission(
        chat,
        body | {"messages": detached.messages},
        job_id=new_job_id(),
        model=settings.model_name,
        default_session=settings.default_session,
        request_id=request.scope["request_id"],
        tenant=tenant,
    )
    await _submit(services, job, detached.attachments)
    answer = Answer(services, job, chat)
    if chat.stream:
        return StreamedAnswer(answer)
    return await answer.whole(request.receive)


async def _check_uploaded(services: Services, tenant: str, detached: Detached) -> None:
    """Raises NotFoundError, naming the parameter, for a file that the tenant does not have, and PayloadTooLargeError.

    A worker holds all files of a turn at once, so together they may be as large as a body that carries them.
    """
    if not detached.uploaded:
        return
    try:
        files = await services.files.find(tenant, [uploaded.file_id for uploaded in detached.uploaded])
    except FAILURES as error:
        if not passes(error):
            raise
        raise FilesUnavailableError from error
    size = sum(len(attachment) for attachment in detached.attachments)
    for uploaded, file in zip(detached.uploaded, files, strict=True):
        if file is None:
            raise NotFoundError(f"No such file: {uploaded.file_id[:50]!r}", code="file_not_found", param=uploaded.param)
        size += file.size
    if size > services.settings.max_body_bytes:
        raise PayloadTooLargeError(
            f"The files of the request are larger than {services.settings.max_body_bytes} bytes together.",
            param="messages",
        )


async def _submit(services: Services, job: Submission, attachments: list[bytes]) -> None:
    """Raises FilesUnavailableError, QueueFullError or QueueUnreachableError."""
    await _attach(services, job, attachments)
    try:
        await _submit_once(services, job)
    except StoreQueueFullError as error:
        if attachments:
            with suppress(*FAILURES):  # they expire by themselves, only later
                await services.files.discard(job.job_id)
        message = "The session has too many unfinished turns." if error.of_session else "Too many requests are waiting."
        raise QueueFullError(message) from error
    except FAILURES as error:
        if not passes(error):
            raise
        log.warning("submit_failed", job=job.job_id, reason=str(error))
        raise QueueUnreachableError(may_have_started=not _was_never_sent(error)) from error
    log.info("job_accepted", job=job.job_id, tenant=job.tenant, session=job.session or None)


async def _attach(services: Services, job: Submission, attachments: list[bytes]) -> None:
    """Raises FilesUnavailableError."""
    if not attachments:
        return
    try:
        await services.files.attach(job.job_id, attachments)
    except FileStoreFullError as error:
        raise FilesUnavailableError("The files of the request cannot be stored now.") from error
    except FAILURES as error:
        if not passes(error):
            raise
        log.warning("attach_failed", job=job.job_id, reason=str(error))
        raise FilesUnavailableError from error


async def _submit_once(services: Services, job: Submission) -> None:
    """A submission whose answer is lost is sent again under its id, so that it is accepted once."""
    deadline = asyncio.get_running_loop().time() + SUBMIT_PATIENCE_S
    while True:
        try:
            await services.store.submit(job)
        except FAILURES as error:
            if not passes(error) or _was_never_sent(error) or asyncio.get_running_loop().time() > deadline:
                raise
            log.warning("submit_repeated", job=job.job_id, reason=str(error))
            await asyncio.sleep(FIRST_RETRY_S)
        else:
            return


def _was_never_sent(error: BaseException) -> bool:
    """Whether Redis cannot have got the command: nobody listened, or it says that it is full or not the primary."""
    return isinstance(error.__context__, ConnectionRefusedError) or isinstance(error, ResponseError)


class Answer:
    """One client's way through one job, from submission to its ending."""

    def __init__(self, services: Services, job: Submission, chat: ChatRequest) -> None:
        self.job = job
        self.chat = chat
        self.created = int(time.time())
        self.settings = services.settings
        self._services = services
        self._relay = Relay()
        self._client_gone = False

    async def entries(self, tail: Tail, timeout_s: float) -> list[Entry]:
        """The next entries to pass on; none after the timeout, or when `ending` is set. Raises ClientGoneError."""
        try:
            entries = await tail.next(timeout_s)
        except TailError as error:
            self._relay.ending = _explain(error)
            log.warning("relay_failed", job=self.job.job_id, code=self._relay.ending.code, reason=repr(error))
            return []
        if self._client_gone:
            raise ClientGoneError
        return self._relay.accept(entries)

    @property
    def ending(self) -> OkMarker | ErrorMarker | None:
        return self._relay.ending

    def has_ended(self) -> bool:
        return self._relay.ending is not None

    @asynccontextmanager
    async def follow(self, receive: Receive) -> AsyncIterator[Tail]:
        """The job's tail, watched over: if the client goes away before the ending, its job is cancelled."""
        async with self._services.switchboard.follow(self.job.job_id) as tail:
            watch = asyncio.create_task(self._watch_client(receive, tail))
            try:
                yield tail
            except asyncio.CancelledError:
                await asyncio.shield(self._cancel_job("The server was stopped while the client waited."))
                raise
            except (ClientGoneError, OSError):
                await self._cancel_job("The client went away.")
                raise
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)

    async def _watch_client(self, receive: Receive, tail: Tail) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_gone = True
        tail.interrupt()

    async def _cancel_job(self, why: str) -> None:
        if self.chat.on_disconnect == "continue" or self.ending is not None:
            return
        try:
            ending = await self._services.store.cancel(self.job.job_id, why)
        except FAILURES as error:  # the job's deadline will end it
            log.warning("cancel_failed", job=self.job.job_id, reason=str(error))
        else:
            log.info("job_cancelled", job=self.job.job_id, why=why, ending=ending.value)

    async def whole(self, receive: Receive) -> Response:
        """The answer as one object. Raises JobFailedError for every ending but a verified `ok`, or ClientGoneError."""
        entries: list[Entry] = []
        try:
            async with self.follow(receive) as tail:
                while not self.has_ended():
                    entries += await self.entries(tail, self.settings.ping_interval_s)
        except asyncio.CancelledError as stopped:  # the server stops, and has waited long enough
            raise JobFailedError(INTERRUPTED) from stopped
        if isinstance(self.ending, ErrorMarker):
            raise JobFailedError(self.ending)
        if self.ending is None:
            raise AssertionError("an answer that has ended has an ending")
        answer = completion(
            entries,
            self.ending,
            completion_id=self.job.job_id,
            created=self.created,
            model=self.job.model,
            metadata=self.job.metadata,
        )
        return Response(json_bytes(answer), media_type="application/json")


class StreamedAnswer(Response):
    """The answer as server-sent events.

    `finish_reason` and `[DONE]` are sent only for a verified `ok`; every other ending is one error frame and a clean
    close.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer
        options = answer.chat.stream_options
        self._encoder = ChunkEncoder(
            completion_id=answer.job.job_id,
            created=answer.created,
            model=answer.job.model,
            include_usage=options is not None and options.include_usage,
            include_tool_events=options is not None and options.include_tool_events,
        )

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        try:
            async with self._answer.follow(receive) as tail:
                try:
                    await self._relay_entries(tail, send)
                except asyncio.CancelledError:  # the server stops, and has waited long enough
                    await send({"type": "http.response.body", "body": error_frame(INTERRUPTED)})
                    raise
        except (ClientGoneError, OSError):
            return
        ending = self._answer.ending
        body = self._encoder.ending(ending) if isinstance(ending, OkMarker) else error_frame(ending or INCOMPLETE)
        await send({"type": "http.response.body", "body": body})

    async def _relay_entries(self, tail: Tail, send: Send) -> None:
        answer, encoder, settings = self._answer, self._encoder, self._answer.settings
        now = asyncio.get_running_loop().time
        ping_at = now() + settings.ping_interval_s
        heartbeat_at = now() + settings.heartbeat_interval_s
        while not answer.has_ended():
            entries = await answer.entries(tail, max(0.0, min(ping_at, heartbeat_at) - now()))
            frames = encoder.frames(entries)
            if not frames and now() >= heartbeat_at and not answer.has_ended():
                frames = encoder.heartbeat()
            if frames:
                heartbeat_at = now() + settings.heartbeat_interval_s
            elif now() >= ping_at and not answer.has_ended():
                frames = PING
            if frames:
                ping_at = now() + settings.ping_interval_s
                await self._send(send, frames)

    async def _send(self, send: Send, frames: bytes) -> None:
        """Raises ClientGoneError if the client takes nothing for the stall timeout.

        In pieces, so that a slow client is not taken for a stalled one, and only one piece waits in the server.
        """
        for start in range(0, len(frames), SEND_BYTES):
            try:
                async with asyncio.timeout(self._answer.settings.stall_timeout_s):
                    piece = frames[start : start + SEND_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError as stalled:
                raise ClientGoneError from stalled


def _explain(error: TailError) -> ErrorMarker:
    """What the client may know of why its stream cannot be followed."""
    if isinstance(error, StreamExpiredError):
        return ErrorMarker(ErrorCode.STREAM_EXPIRED, "The stream of the answer has expired.")
    if isinstance(error, StreamUnreachableError):
        return ErrorMarker(ErrorCode.STREAM_UNREACHABLE, "The stream of the answer cannot be reached.")
    return INCOMPLETE
