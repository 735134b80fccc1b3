"""A finished job's stream once more, with the pauses that it had: as fast as it was said, or faster, or slower.

Rule 1: it is the same stream, verified as ever. Only the time between its frames is made.
Rule 2: what is not timed, since too much was said before it, follows at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.answer import INTERRUPTED, Answer
from api.errors import ClientGoneError
from api.relay import INCOMPLETE
from api.sse import PING, SSE_HEADERS, FrameEncoder
from api.tail import Tail
from shared.entries import Entry, Kind, OkMarker

LONGEST_PAUSE_S = 60.0  # however long the pause was, and however slow the replay is


class ReplayedAnswer(Response):
    """A finished job's stream with its timing, as server-sent events."""

    def __init__(self, answer: Answer, encoder: FrameEncoder, offsets_ms: Sequence[int], speed: float) -> None:
        """`offsets_ms`: when each entry was said; `speed`: 2 is twice as fast as it was."""
        super().__init__()
        self._answer = answer
        self._encoder = encoder
        self._offsets_ms = offsets_ms
        self._speed = speed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer, encoder = self._answer, self._encoder
        try:
            async with answer.follow(scope, receive) as tail:
                await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
                if scope["method"] == "HEAD":  # for the client the answer ends here
                    await send({"type": "http.response.body", "body": b""})
                    return
                try:
                    await self._say(send, encoder.opening())
                    said_ms = 0
                    while not answer.has_ended():
                        for entry in await answer.entries(tail, answer.settings.ping_interval_s):
                            at_ms = self._offset_ms(entry, said_ms)
                            await self._pause(tail, send, (at_ms - said_ms) / 1000 / self._speed)
                            said_ms = at_ms
                            await self._say(send, encoder.frames([entry]))
                except asyncio.CancelledError:
                    await send({"type": "http.response.body", "body": encoder.broken(INTERRUPTED)})
                    raise
        except (ClientGoneError, OSError):
            return
        ending = answer.ending
        if isinstance(ending, OkMarker):
            last = encoder.ending(ending)
        elif ending is not None and answer.is_the_jobs:
            last = encoder.error(ending)
        else:
            last = encoder.broken(ending or INCOMPLETE)
        with suppress(TimeoutError):
            async with asyncio.timeout(answer.settings.stall_timeout_s):
                await send({"type": "http.response.body", "body": last})

    def _offset_ms(self, entry: Entry, said_ms: int) -> int:
        """When an entry was said; an opening, and what has no timing, with the one before it."""
        place = entry.id.sequence - 1
        return self._offsets_ms[place] if entry.kind is not Kind.OPEN and place < len(self._offsets_ms) else said_ms

    async def _pause(self, tail: Tail, send: Send, pause_s: float) -> None:
        """Raises ClientGoneError as soon as nobody listens any more."""
        left_s = min(pause_s, LONGEST_PAUSE_S)
        while left_s > 0:
            part_s = min(left_s, self._answer.settings.ping_interval_s)
            await self._answer.sleep(tail, part_s)
            left_s -= part_s
            if left_s > 0:
                await self._say(send, PING)

    async def _say(self, send: Send, frames: bytes) -> None:
        """Raises ClientGoneError if the client takes nothing for the stall timeout."""
        if not frames:
            return
        try:
            async with asyncio.timeout(self._answer.settings.stall_timeout_s):
                await send({"type": "http.response.body", "body": frames, "more_body": True})
        except TimeoutError as stalled:
            raise ClientGoneError from stalled
