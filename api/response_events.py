"""Entries as events of OpenAI's Responses API. No I/O, no clock.

Rule 1: every event has a number, counted from 0 without a gap. It depends on the entries alone, never on when or in
        which company they came: a live stream, a replay and a resumed stream are the same bytes, on every replica.
Rule 2: an item of the output opens once and ends once. Text and reasoning follow each other; tools and function calls
        may be open beside them.
Rule 3: what the reader itself finds wrong with the stream says nothing of how the response ends, and takes no number:
        it repeats the last one, so that the client resumes behind it and misses nothing.
Rule 4: only types of OpenAI's own, for items and events; openai-node fails on any other.

The shapes are those of docs/protocol.md, measured against the SDKs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from api.response_objects import ResponseHead, error_object, item_id, output_text, usage_object
from shared.entries import Entry, ErrorMarker, Kind, OkMarker
from shared.jobs import ErrorCode
from shared.text import bytes_text, json_bytes, parse_json, text_bytes

Event = tuple[str, dict[str, Any]]  # its type, and its fields without number

SERVER_LABEL = "agent"  # of the agent's own tools: they run behind us, and nobody else is to run them
TOOL_FAILED = "The tool failed."

_INCOMPLETE_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}  # by finish reason


@dataclass(slots=True)
class _Speech:
    """A message or a reasoning item that is open."""

    kind: Kind  # DELTA or REASONING
    place: int
    fragments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """A function call for the client; it stays open to the end, since fragments of several may alternate."""

    place: int
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Tool:
    """A tool of the agent that runs."""

    place: int
    call_id: str | None


class Output:
    """The output items of one response, as its entries make them; and the events that tell of it."""

    def __init__(self, job_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._job_id = job_id
        self._speech: _Speech | None = None
        self._calls: dict[int, _Call] = {}
        self._tools: list[_Tool] = []

    def take(self, entry: Entry) -> Iterator[Event]:
        match entry.kind:
            case Kind.DELTA | Kind.REASONING:
                yield from self._say(entry.kind, bytes_text(entry.payload))
            case Kind.TOOL_CALL:
                yield from self._call(parse_json(entry.payload))
            case Kind.TOOL:
                yield from self._tool(parse_json(entry.payload))

    def finish(self, *, cut_short: bool) -> Iterator[Event]:
        """Ends what is open. An answer has a message or a function call, if only an empty message.

        `cut_short`: the agent says that its answer is not the whole one.
        """
        if not self._calls and not any(item["type"] == "message" for item in self.items):
            yield from self._end_speech("completed")
            yield from self._begin_speech(Kind.DELTA)
        yield from self._end_speech("incomplete" if cut_short else "completed")
        for call in self._calls.values():
            yield from self._end_call(call, "incomplete" if cut_short else "completed")
        for tool in list(self._tools):
            yield from self._end_tool(tool, "completed", None)

    def so_far(self) -> list[dict[str, Any]]:
        """The items of an answer that is broken off. What was open stays without an end."""
        items = [
            item | {"status": "incomplete"} if item.get("status") == "in_progress" else dict(item)
            for item in self.items
        ]
        if self._speech is not None:
            items[self._speech.place] |= _speech_content(self._speech)
        for call in self._calls.values():
            items[call.place] |= {"arguments": "".join(call.arguments)}
        return items

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        yield "response.output_item.added", {"output_index": len(self.items), "item": item}
        self.items.append(item)

    def _end(self, place: int, **changes: Any) -> Iterator[Event]:
        self.items[place] = self.items[place] | changes
        yield "response.output_item.done", {"output_index": place, "item": self.items[place]}

    def _new_id(self, kind: str) -> str:
        return item_id(kind, self._job_id, len(self.items))

    # -- text and reasoning --------------------------------------------------------------------------------------------

    def _say(self, kind: Kind, fragment: str) -> Iterator[Event]:
        if self._speech is None or self._speech.kind is not kind:
            yield from self._end_speech("completed")
            yield from self._begin_speech(kind)
        if (speech := self._speech) is not None:
            speech.fragments.append(fragment)
            if kind is Kind.DELTA:
                yield "response.output_text.delta", self._part(speech) | {"delta": fragment, "logprobs": []}
            else:
                yield "response.reasoning_summary_text.delta", self._part(speech) | {"delta": fragment}

    def _part(self, speech: _Speech) -> dict[str, Any]:
        """Which part of which item an event is about: there is one in each."""
        index = "content_index" if speech.kind is Kind.DELTA else "summary_index"
        return {"item_id": self.items[speech.place]["id"], "output_index": speech.place, index: 0}

    def _begin_speech(self, kind: Kind) -> Iterator[Event]:
        self._speech = speech = _Speech(kind, len(self.items))
        if kind is Kind.DELTA:
            status = {"status": "in_progress", "role": "assistant"}
            yield from self._add({"id": self._new_id("msg"), "type": "message", **status, "content": []})
            yield "response.content_part.added", self._part(speech) | {"part": output_text("")}
        else:
            yield from self._add({"id": self._new_id("rs"), "type": "reasoning", "summary": []})
            part = {"type": "summary_text", "text": ""}
            yield "response.reasoning_summary_part.added", self._part(speech) | {"part": part}

    def _end_speech(self, status: str) -> Iterator[Event]:
        """Reasoning has no status."""
        speech, self._speech = self._speech, None
        if speech is None:
            return
        place, text, content = self._part(speech), "".join(speech.fragments), _speech_content(speech)
        if speech.kind is Kind.DELTA:
            yield "response.output_text.done", place | {"text": text, "logprobs": []}
            yield "response.content_part.done", place | {"part": content["content"][0]}
            yield from self._end(speech.place, status=status, **content)
        else:
            yield "response.reasoning_summary_text.done", place | {"text": text}
            yield "response.reasoning_summary_part.done", place | {"part": content["summary"][0]}
            yield from self._end(speech.place, **content)

    # -- function calls for the client ---------------------------------------------------------------------------------

    def _call(self, delta: dict[str, Any]) -> Iterator[Event]:
        """Ids and names come with a call's first fragment, arguments in pieces."""
        function = delta.get("function") or {}
        call = self._calls.get(delta["index"])
        if call is None:
            yield from self._end_speech("completed")
            self._calls[delta["index"]] = call = _Call(len(self.items))
            id_ = self._new_id("fc")
            yield from self._add(
                {
                    "id": id_,
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": _text(delta.get("id")) or id_.replace("fc_", "call_", 1),
                    "name": _text(function.get("name")),
                    "arguments": "",
                }
            )
        elif name := _text(function.get("name")):
            item = self.items[call.place]
            self.items[call.place] = item | {"name": item["name"] + name}
        if arguments := _text(function.get("arguments")):
            call.arguments.append(arguments)
            yield "response.function_call_arguments.delta", self._place(call.place) | {"delta": arguments}

    def _end_call(self, call: _Call, status: str) -> Iterator[Event]:
        arguments, name = "".join(call.arguments), self.items[call.place]["name"]
        place = self._place(call.place)
        yield "response.function_call_arguments.done", place | {"name": name, "arguments": arguments}
        yield from self._end(call.place, status=status, arguments=arguments)

    def _place(self, place: int) -> dict[str, Any]:
        return {"item_id": self.items[place]["id"], "output_index": place}

    # -- the agent's own tools -----------------------------------------------------------------------------------------

    def _tool(self, event: dict[str, Any]) -> Iterator[Event]:
        name, call_id = _text(event["name"]), event["call_id"]
        status, detail = event["status"], _text(event["detail"]) or None
        if status == "started":
            yield from self._begin_tool(name, call_id, _arguments(detail))
            return
        tool = self._running(name, call_id)
        if tool is None:  # an agent may tell of a tool only when it has run
            yield from self._begin_tool(name, call_id, "{}")
            tool = self._tools[-1]
        yield from self._end_tool(tool, status, detail)

    def _running(self, name: str, call_id: str | None) -> _Tool | None:
        """The first of the calls that an ending may belong to: agents do not tell all of them apart."""
        for tool in self._tools:
            if tool.call_id == call_id and (call_id is not None or self.items[tool.place]["name"] == name):
                return tool
        return None

    def _begin_tool(self, name: str, call_id: str | None, arguments: str) -> Iterator[Event]:
        yield from self._end_speech("completed")
        tool = _Tool(len(self.items), call_id)
        self._tools.append(tool)
        item = {
            "id": self._new_id("mcp"),
            "type": "mcp_call",
            "status": "in_progress",
            "server_label": SERVER_LABEL,
            "name": name,
            "arguments": "",
            "output": None,
            "error": None,
            "approval_request_id": None,
        }
        yield from self._add(item)
        self.items[tool.place] = item | {"arguments": arguments}
        place = self._place(tool.place)
        yield "response.mcp_call.in_progress", place
        yield "response.mcp_call_arguments.delta", place | {"delta": arguments}
        yield "response.mcp_call_arguments.done", place | {"arguments": arguments}

    def _end_tool(self, tool: _Tool, status: str, detail: str | None) -> Iterator[Event]:
        self._tools.remove(tool)
        yield f"response.mcp_call.{status}", self._place(tool.place)
        if status == "failed":
            said = [{"type": "text", "text": detail or TOOL_FAILED}]
            yield from self._end(tool.place, status=status, error={"type": "mcp_tool_execution_error", "content": said})
        else:
            yield from self._end(tool.place, status=status, output=detail)


def _speech_content(speech: _Speech) -> dict[str, Any]:
    text = "".join(speech.fragments)
    if speech.kind is Kind.DELTA:
        return {"content": [output_text(text)]}
    return {"summary": [{"type": "summary_text", "text": text}]}


def _text(value: object) -> str:
    """Anybody can write an agent: what should be text becomes it."""
    return value if isinstance(value, str) else "" if value is None else json_bytes(value).decode()


def _arguments(detail: str | None) -> str:
    """What a tool was asked for, as JSON: clients parse it."""
    if not detail:
        return "{}"
    try:
        if isinstance(parse_json(text_bytes(detail)), dict):
            return detail
    except ValueError:  # plain text
        pass
    return json_bytes({"detail": detail}).decode()


class ResponseEncoder:
    """The events of one response, as frames."""

    def __init__(self, head: ResponseHead, *, starting_after: int = -1) -> None:
        """Events up to the number `starting_after` are made, but left out."""
        self.number = -1
        self.response = head.response("queued")  # as the last event that carries one shows it
        self._head = head
        self._output = Output(head.job_id)
        self._starting_after = starting_after

    def opening(self) -> bytes:
        """The client learns at once what it may resume."""
        frames = self._frame("response.created", {"response": self.response})
        if self._head.background:
            frames += self._frame("response.queued", {"response": self.response})
        return frames

    def frames(self, entries: Iterable[Entry]) -> bytes:
        return b"".join([self._frame(type_, fields) for entry in entries for type_, fields in self._events(entry)])

    def _events(self, entry: Entry) -> Iterator[Event]:
        if entry.kind is not Kind.OPEN:
            yield from self._output.take(entry)
        elif self.response["status"] == "queued":  # later attempts go on with the same response
            self.response = self._head.response("in_progress")
            yield "response.in_progress", {"response": self.response}

    def heartbeat(self) -> bytes:
        """The last number once more: clients that count events see that the stream lives, and lose nothing."""
        return _event("response.in_progress", self.number, {"response": self.response})

    def ending(self, ok: OkMarker) -> bytes:
        reason = _INCOMPLETE_REASONS.get(ok.finish_reason)
        status = "incomplete" if reason else "completed"
        frames = [self._frame(type_, fields) for type_, fields in self._output.finish(cut_short=reason is not None)]
        self.response = self._head.response(
            status,
            self._output.items,
            completed_s=None if reason else ok.finished_ms // 1000 or None,
            usage=usage_object(ok.usage),
            incomplete_reason=reason,
        )
        return b"".join([*frames, self._frame(f"response.{status}", {"response": self.response})])

    def error(self, marker: ErrorMarker) -> bytes:
        """A cancelled response has no event of its own in the SDKs. All else is raised by them."""
        error = error_object(marker.code, marker.message)
        if marker.code == ErrorCode.CANCELLED:
            self.response = self._head.response("cancelled", self._output.so_far(), incomplete_reason="cancelled")
            return self._frame("response.incomplete", {"response": self.response})
        self.response = self._head.response("failed", self._output.so_far(), error=error)
        failed = self._frame("response.failed", {"response": self.response})
        return failed + self._frame("error", _error_fields(error))

    def broken(self, marker: ErrorMarker) -> bytes:
        """With the last number once more: whoever resumes behind it misses nothing."""
        return _event("error", self.number, _error_fields(error_object(marker.code, marker.message)))

    def _frame(self, type_: str, fields: dict[str, Any]) -> bytes:
        self.number += 1
        return b"" if self.number <= self._starting_after else _event(type_, self.number, fields)


def ended_response(head: ResponseHead, entries: Iterable[Entry], ending: OkMarker | ErrorMarker) -> dict[str, Any]:
    """The response object that the last event of its stream carries."""
    encoder = ResponseEncoder(head, starting_after=_NO_FRAMES)
    encoder.frames(entries)
    if isinstance(ending, OkMarker):
        encoder.ending(ending)
    else:
        encoder.error(ending)
    return encoder.response


_NO_FRAMES = 2**63


def _error_fields(error: dict[str, Any]) -> dict[str, Any]:
    """Both shapes of an error in one: each of the SDKs reads another."""
    return {"code": error["code"], "message": error["message"], "param": None, "error": error}


def _event(type_: str, number: int, fields: dict[str, Any]) -> bytes:
    data = json_bytes({"type": type_, "sequence_number": number} | fields)
    return b"event: %b\ndata: %b\n\n" % (type_.encode(), data)
