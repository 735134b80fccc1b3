"""A job's stream as server-sent events: live from its beginning, or from where a client has left it.

Rule 1: the frames that end an answer well are sent only for a verified `ok`; every other ending is the encoder's
        error frames and a clean close.
Rule 2: numbered frames are made from entries alone, so that a replay makes the same ones. A resumed stream makes all
        of them again, from the first entry, and sends those behind the client's number: so it is verified, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.answer import INTERRUPTED, Answer
from api.errors import ApiError, ClientGoneError, GoneError, InvalidRequestError, JobFailedError
from api.relay import INCOMPLETE
from api.tail import Tail
from shared.entries import Entry, ErrorMarker, OkMarker
from shared.jobs import ErrorCode

SEND_BYTES = 64 * 1024  # of a stream that are handed over at a time, and waited for
PING = b": ping\n\n"
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

    def frames(self, entries: Iterable[Entry]) -> bytes:
        """The next entries."""

    def heartbeat(self) -> bytes:
        """A frame that changes nothing."""

    def ending(self, ok: OkMarker) -> bytes:
        """The last frames of a whole answer."""

    def error(self, marker: ErrorMarker) -> bytes:
        """The last frames of a broken one."""


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
        super().__init__(background=background)
        self._answer = answer
        self._encoder = encoder
        self._starting_after = starting_after
        self._last: bytes | None = None  # the last frames, once they are made

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Raises InvalidRequestError, GoneError or JobFailedError before anything is sent."""
        try:
            async with self._answer.follow(receive) as tail:
                frames = self._encoder.opening()
                if self._starting_after is not None:
                    frames += await self._catch_up(tail, self._starting_after)
                await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
                try:
                    if frames:
                        await self._send(send, frames)
                    await self._relay_entries(tail, send)
                except asyncio.CancelledError:  # the server stops, and has waited long enough
                    await send({"type": "http.response.body", "body": self._encoder.error(INTERRUPTED)})
                    raise
        except (ClientGoneError, OSError):
            return
        await send({"type": "http.response.body", "body": self._last_frames()})
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
        if isinstance(answer.ending, ErrorMarker) and answer.ending.code in CANNOT_BE_READ:
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
            else:
                self._last = self._encoder.error(ending or INCOMPLETE)
        return self._last

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
        self._answer.has_been_told = True
        for start in range(0, len(frames), SEND_BYTES):
            try:
                async with asyncio.timeout(self._answer.settings.stall_timeout_s):
                    piece = frames[start : start + SEND_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError as stalled:
                raise ClientGoneError from stalled
