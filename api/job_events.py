"""Entries as events for a browser's EventSource. No I/O, no clock.

Rule 1: every event but `open` carries an SSE id: a whole number, counted from 1 without a gap. A browser sends the last
        one back in `Last-Event-ID` when it connects again.
Rule 2: `end` is the last event, whatever the ending. Behind it there is nothing: the route answers 204, and the browser
        stays away.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shared.entries import Entry, ErrorMarker, Kind, OkMarker
from shared.jobs import ErrorCode, Status
from shared.text import bytes_text, json_bytes


class JobEventEncoder:
    """The events of one job's stream, behind a number."""

    def __init__(self, *, starting_after: int = 0) -> None:
        self.number = 0
        self._starting_after = starting_after

    def opening(self) -> bytes:
        return b""

    def frames(self, entries: Iterable[Entry]) -> bytes:
        return b"".join([self._frame(entry) for entry in entries])

    def _frame(self, entry: Entry) -> bytes:
        if entry.kind is Kind.OPEN:
            seen = self._starting_after > 0
            return b"" if seen else _event("open", {"attempt": entry.id.attempt})
        if entry.kind in (Kind.DELTA, Kind.REASONING):
            return self._numbered(entry.kind.value, json_bytes({"text": bytes_text(entry.payload)}))
        return self._numbered(entry.kind.value, entry.payload)  # a JSON object already

    def _numbered(self, name: str, data: bytes) -> bytes:
        self.number += 1
        if self.number <= self._starting_after:
            return b""
        return b"id: %d\nevent: %b\ndata: %b\n\n" % (self.number, name.encode(), data)

    def heartbeat(self) -> bytes:
        """A comment is enough for an EventSource."""
        return b": heartbeat\n\n"

    def ending(self, ok: OkMarker) -> bytes:
        usage = ok.usage and ok.usage._asdict()
        return self._end({"status": Status.SUCCEEDED, "finish_reason": ok.finish_reason, "usage": usage, "error": None})

    def error(self, marker: ErrorMarker) -> bytes:
        status = Status.CANCELLED if marker.code == ErrorCode.CANCELLED else Status.FAILED
        error = {"code": marker.code, "message": marker.message}
        return self._end({"status": status, "finish_reason": None, "usage": None, "error": error})

    def broken(self, marker: ErrorMarker) -> bytes:
        """The stream ends here, the job does not: a browser asks for it again, unless there is nothing more to read."""
        if marker.code in _MAY_BE_ASKED_FOR_AGAIN:
            return _event("interrupted", {"error": {"code": marker.code, "message": marker.message}})
        return self.error(marker)

    def _end(self, data: dict[str, Any]) -> bytes:
        return self._numbered("end", json_bytes(data))


_MAY_BE_ASKED_FOR_AGAIN = (ErrorCode.STREAM_INTERRUPTED, ErrorCode.STREAM_UNREACHABLE)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), json_bytes(data))
