"""Entries as OpenAI chat completions: chunks of a stream, or one object. No I/O, no clock.

Rule 1: the first chunk carries `role` together with its content, and no later one repeats it.
Rule 2: `finish_reason` is null on every chunk but the last before usage; `id`, `created` and `model` never change.
Rule 3: a frame that carries an error carries nothing else, and nothing follows it.
Rule 4: a chunk's number is that of its entry, counted from 1, whatever the client asked to see.

The shapes are those of docs/protocol.md, measured against the SDKs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from api.errors import error_body
from shared.entries import Entry, ErrorMarker, Kind, OkMarker, Usage
from shared.text import bytes_text, json_bytes, parse_json

DONE = b"data: [DONE]\n\n"

EMPTY_ANSWER = "I completed the request but have no answer to show. Please try again or narrow the task."

_OPEN, _DELTA, _REASONING = Kind.OPEN, Kind.DELTA, Kind.REASONING  # looking a member up costs more than comparing it
_ROLE = b'"role":"assistant",'
_DELTA_BEGINS = b',"choices":[{"index":0,"delta":{'
_TEXT_BEGINS = b'"content":'
_ENDS = {  # of a chunk with a delta, of one with text and nothing else, and of the last one, with and without usage
    include_usage: (
        b'},"logprobs":null,"finish_reason":null}]' + usage,
        b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n",
        b'},"logprobs":null,"finish_reason":%b}]' + usage,
    )
    for include_usage, usage in ((True, b',"usage":null'), (False, b""))
}


class ChunkEncoder:
    """The frames of one streamed completion."""

    __slots__ = (
        "_delta_end",
        "_finish_end",
        "_include_sequence_numbers",
        "_include_tool_events",
        "_include_usage",
        "_role",
        "_starting_after",
        "_text_end",
        "_text_head",
        "number",
    )

    def __init__(
        self,
        *,
        completion_id: str,
        created: int,
        model: str,
        include_usage: bool,
        include_tool_events: bool = False,
        include_sequence_numbers: bool = False,
        starting_after: int = 0,
    ) -> None:
        """`created` is in seconds since the epoch. Chunks up to the number `starting_after` are left out."""
        self.number = 0
        self._starting_after = starting_after
        self._include_sequence_numbers = include_sequence_numbers
        head = json_bytes(
            {
                "id": completion_id,
                "object": "chat.completion.chunk",
                "created": created,
                "model": model,
                "system_fingerprint": None,
            }
        )[:-1]
        self._include_usage = include_usage
        self._include_tool_events = include_tool_events
        self._text_head = b"data: " + head + _DELTA_BEGINS + _TEXT_BEGINS
        self._delta_end, self._text_end, self._finish_end = _ENDS[include_usage]
        self._role = _ROLE

    def opening(self) -> bytes:
        """Nothing: the first chunk carries content."""
        return b""

    def frames(self, entries: Sequence[Entry]) -> bytes:
        """The chunks of entries that the relay has passed on."""
        if len(entries) == 1:
            return self._frame(entries[0])
        return b"".join([self._frame(entry) for entry in entries])

    def _frame(self, entry: Entry) -> bytes:
        kind = entry.kind
        if kind is _OPEN:
            return b""
        self.number += 1
        if self.number <= self._starting_after:
            return b""
        extra = b""
        if kind is _DELTA and not self._role and not self._include_sequence_numbers:  # the commonest by far
            return self._text_head + json_bytes(bytes_text(entry.payload)) + self._text_end
        if kind is _DELTA:
            field = _TEXT_BEGINS + json_bytes(bytes_text(entry.payload))
        elif kind is _REASONING:
            field = b'"reasoning_content":' + json_bytes(bytes_text(entry.payload))
        elif kind is Kind.TOOL_CALL:
            field = b'"tool_calls":[' + entry.payload + b"]"
        elif kind is Kind.TOOL and self._include_tool_events:
            field, extra = b"", b',"tool_event":' + entry.payload  # it is empty for clients that do not know the field
        else:
            return b""
        if self._role:
            field, self._role = self._role + field if field else self._role.rstrip(b","), b""
        return self._delta_head + field + self._delta_end + extra + self._chunk_tail()

    @property
    def _delta_head(self) -> bytes:
        return self._text_head.removesuffix(_TEXT_BEGINS)  # not kept beside it, in each open stream

    def _chunk_tail(self) -> bytes:
        return b',"sequence_number":%d}\n\n' % self.number if self._include_sequence_numbers else b"}\n\n"

    def heartbeat(self) -> bytes:
        """An empty chunk: clients that count parsed chunks, not comments, see that the stream lives."""
        return self._delta_head + self._delta_end + self._chunk_tail()

    def ending(self, ok: OkMarker) -> bytes:
        """The last frames of a whole answer."""
        role = _ROLE + b'"content":""' if self._role else b""
        frames = self._delta_head + role + self._finish_end % orjson.dumps(ok.finish_reason) + self._chunk_tail()
        if self._include_usage:
            head = self._delta_head.removesuffix(_DELTA_BEGINS)
            frames += head + b',"choices":[],"usage":' + orjson.dumps(_usage(ok.usage)) + self._chunk_tail()
        return frames + DONE

    def error(self, marker: ErrorMarker) -> bytes:
        return error_frame(marker)

    broken = error  # a client of chat completions has no use for the difference


def error_frame(marker: ErrorMarker) -> bytes:
    """The one ending of a broken answer that every client raises."""
    return b"data: " + error_body(marker.message, type_="server_error", code=marker.code) + b"\n\n"


def completion(
    entries: Iterable[Entry],
    ok: OkMarker,
    *,
    completion_id: str,
    created: int,
    model: str,
    metadata: dict[str, str],
) -> dict[str, Any]:
    """A whole answer as one `chat.completion` object. An empty one gets a sentence, as with nanobot."""
    text: list[bytes] = []
    reasoning: list[bytes] = []
    calls: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if entry.kind is Kind.DELTA:
            text.append(entry.payload)
        elif entry.kind is Kind.REASONING:
            reasoning.append(entry.payload)
        elif entry.kind is Kind.TOOL_CALL:
            _join_tool_call(calls, parse_json(entry.payload))
    content: str | None = bytes_text(b"".join(text))
    if not content or not content.strip():
        content = None if calls else EMPTY_ANSWER
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if reasoning:
        message["reasoning_content"] = bytes_text(b"".join(reasoning))
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": ok.finish_reason}],
        "usage": _usage(ok.usage),
        "service_tier": "default",
        "system_fingerprint": None,
        "metadata": metadata,
    }


def _join_tool_call(calls: dict[int, dict[str, Any]], delta: dict[str, Any]) -> None:
    """Adds a fragment to its call: ids and names come once, arguments in pieces."""
    call = calls.setdefault(delta["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    function = delta.get("function") or {}
    call["id"] = delta.get("id") or call["id"]
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _usage(usage: Usage | None) -> dict[str, int]:
    """Zeros where the agent does not know: clients read `usage.total_tokens` unasked."""
    prompt, completion = usage or (0, 0)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
