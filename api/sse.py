"""A job's stream as server-sent events: live from its beginning, or from where a client has left it.

Rule 1: the frames that end an answer well are sent only for a verified `ok`; every other ending is the encoder's
        error frames and a clean close.
Rule 2: numbered frames are made from entries alone, so that a replay makes the same ones. A resumed stream makes all
        of them again, from the first entry, and sends those behind the client's number: so it is verified, too.
Rule 3: while the client takes what it is sent, frames are made and sent in the very turn of the event loop in which
        their entries were heard. As soon as it does not, its own task goes on, waits for it, and keeps the order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.answer import INTERRUPTED, Answer, Following
from api.bypass import SERVER_SEND, call_outside
from api.errors import ApiError, ClientGoneError, GoneError, InvalidRequestError, JobFailedError
from api.protocol import BodyWriter, body_writer
from api.relay import INCOMPLETE
from api.tail import Tail
from shared.entries import Entry, ErrorMarker, OkMarker
from shared.jobs import ErrorCode

SEND_BYTES = 64 * 1024  # of a stream that are handed over at a time, and waited for
PING = b": ping\n\n"
TOGETHER_S = 0.1  # silent streams are pinged at multiples of this: to wake up costs as much as several pings
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx buffers a response unless it is told not to
]


# Endings that tell that the stream could not be read, not how the job ended.
CANNOT_BE_READ: Mapping[str, Callable[[ErrorMarker], ApiError]] = {
    ErrorCode.STREAM_EXPIRED: lambda marker: GoneError(marker.message, code=marker.code),
    ErrorCode.STREAM_INCOMPLETE: lambda marker: GoneError(marker.message, code=marker.code),
    ErrorCode.STREAM_UNREACHABLE: JobFailedError,
}


class FrameEncoder(Protocol):
    """Makes the frames of one stream. Frames up to the number that the client has seen are made, but left out."""

    number: int  # of the last numbered frame that was made; what a client may resume behind

    def opening(self) -> bytes:
        """What is said before the first entry."""

    def frames(self, entries: Sequence[Entry]) -> bytes:
        """The next entries."""

    def heartbeat(self) -> bytes:
        """A frame that changes nothing."""

    def ending(self, ok: OkMarker) -> bytes:
        """The last frames of a whole answer."""

    def error(self, marker: ErrorMarker) -> bytes:
        """The last frames of one that ended in an error."""

    def broken(self, marker: ErrorMarker) -> bytes:
        """The last frames of a stream that cannot be followed any further, whatever becomes of its job."""


class StreamedAnswer(Response):
    """The answer as server-sent events."""

    def __init__(
        self,
        answer: Answer,
        encoder: FrameEncoder,
        *,
        starting_after: int | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        """`starting_after`: the number of the last frame that the client has seen; None: a live stream.

        `background`: what is to be done once everything was sent.
        """
        # Not what starlette's own has in `__init__`: status, headers and body of an answer that is there already.
        self.background = background
        self._answer = answer
        self._encoder = encoder
        self._starting_after = starting_after
        self._last: bytes | None = None  # the last frames, once they are made
        self._is_sending = False  # whether a part of some frames was sent, and another was not
        self._now = asyncio.get_running_loop().time
        self._said_at = self._sent_at = 0.0  # when a frame, and when anything, was last sent
        self._unsent = b""  # frames of a push that the client was too slow for
        self._writer: BodyWriter | None = None  # once the answer has begun, if there can be one

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises InvalidRequestError, GoneError or JobFailedError before anything is sent."""
        try:
            following = self._answer.follow(scope, receive)
            try:
                frames = self._encoder.opening()
                if self._starting_after is not None:
                    frames += await self._catch_up(following.tail, self._starting_after)
                await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            except BaseException:
                async with following:
                    raise
            if scope["method"] == "HEAD":  # for the client the answer ends here
                async with following:
                    await send({"type": "http.response.body", "body": b""})
                return
        except (ClientGoneError, OSError):
            return
        await call_outside(scope, partial(self._go_on, following, scope.get(SERVER_SEND, send), frames))

    async def _go_on(self, following: Following, send: Send, frames: bytes) -> None:
        """What comes behind the start."""
        self._writer = body_writer(send)
        try:
            async with following as tail:
                try:
                    if frames:
                        await self._send(send, frames)
                    frames = await self._relay_entries(tail, send)
                except asyncio.CancelledError:  # the server stops, and has waited long enough
                    if not self._is_sending and not self._unsent:  # a frame that was cut must not be gone on with
                        await send({"type": "http.response.body", "body": self._encoder.broken(INTERRUPTED)})
                    raise
        except (ClientGoneError, OSError):
            return
        with suppress(ClientGoneError):
            await self._send_piece(send, frames + self._last_frames(), more_body=False)
        if self.background is not None:
            await self.background()

    async def _catch_up(self, tail: Tail, starting_after: int) -> bytes:
        """Makes the frames that the client has seen; returns those of the last page that it has not."""
        answer, encoder = self._answer, self._encoder
        frames = b""
        while not answer.has_ended():
            entries = await answer.entries(tail, timeout_s=0)
            frames += encoder.frames(entries)
            if encoder.number >= starting_after or not (entries or answer.has_ended()):
                break
        if isinstance(answer.ending, ErrorMarker) and not answer.is_the_jobs and answer.ending.code in CANNOT_BE_READ:
            raise CANNOT_BE_READ[answer.ending.code](answer.ending)
        if answer.has_ended():
            self._last_frames()
        if encoder.number < starting_after:
            raise InvalidRequestError(
                f"starting_after={starting_after} is beyond the end of the stream, which is at {encoder.number} now.",
                param="starting_after",
            )
        return frames

    def _last_frames(self) -> bytes:
        if self._last is None:
            ending = self._answer.ending
            if isinstance(ending, OkMarker):
                self._last = self._encoder.ending(ending)
            elif ending is not None and self._answer.is_the_jobs:
                self._last = self._encoder.error(ending)
            else:
                self._last = self._encoder.broken(ending or INCOMPLETE)
        return self._last

    async def _relay_entries(self, tail: Tail, send: Send) -> bytes:
        """Returns the frames that were not sent, since they came together with the ending."""
        answer, encoder, now = self._answer, self._encoder, self._now
        ping_s, heartbeat_s = answer.settings.ping_interval_s, answer.settings.heartbeat_interval_s
        push = self._push if self._writer is not None else None
        self._said_at = self._sent_at = now()
        while not answer.has_ended():
            entries: list[Entry] = []
            frames = b""  # what was sent is not to be kept for as long as the next word takes
            due_at = min(self._sent_at + ping_s, self._said_at + heartbeat_s)
            due_at += -due_at % TOGETHER_S
            entries = await answer.entries(tail, max(0.0, due_at - now()), push)
            if self._unsent:
                await self._send(send, self._unsent)
                self._unsent = b""
            frames = encoder.frames(entries) if entries else b""
            if not frames and not answer.has_ended():
                if now() >= self._said_at + heartbeat_s:
                    frames = encoder.heartbeat()
                elif now() >= self._sent_at + ping_s:
                    self._sent_at = now()
                    await self._send(send, PING)
            if frames and answer.has_ended() and len(frames) <= SEND_BYTES:
                return frames
            if frames:
                self._said_at = self._sent_at = now()
                await self._send(send, frames)
        return b""

    def _push(self, entries: list[Entry]) -> bool:
        """See `Tail.next`: sends the frames of some entries now. False if the client does not take them now."""
        frames = self._encoder.frames(entries)
        if not frames:
            return True
        self._said_at = self._sent_at = self._now()
        self._answer.has_been_told = True
        if len(frames) > SEND_BYTES or not self._write(frames):
            self._unsent = frames
            return False
        return True

    def _write(self, piece: bytes) -> bool:
        """Sends it now, if the client takes it now."""
        if self._writer is None or not self._writer.takes_now:
            return False
        self._writer.write(piece)
        return True

    async def _send(self, send: Send, frames: bytes) -> None:
        """Raises ClientGoneError if the client takes nothing for the stall timeout.

        In pieces, so that a slow client is not taken for a stalled one, and only one piece waits in the server.
        """
        self._answer.has_been_told = True
        for start in range(0, len(frames), SEND_BYTES):
            await self._send_piece(send, frames[start : start + SEND_BYTES])

    async def _send_piece(self, send: Send, piece: bytes, *, more_body: bool = True) -> None:
        """Waits for a client that does not take at once what it is sent. Raises ClientGoneError."""
        if more_body and self._write(piece):
            return
        self._is_sending = True
        try:
            async with asyncio.timeout(self._answer.settings.stall_timeout_s):
                await send({"type": "http.response.body", "body": piece, "more_body": more_body})
        except TimeoutError as stalled:
            raise ClientGoneError from stalled
        self._is_sending = False
