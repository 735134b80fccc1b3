"""Entries as events of the Responses API: the same events, with the same numbers, for every reader."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai._models import construct_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from api.response_events import ResponseEncoder, ended_response
from api.response_objects import ResponseHead, job_of_item
from shared.entries import Entry, EntryId, ErrorMarker, Kind, OkMarker, Usage
from shared.jobs import ErrorCode
from shared.text import json_bytes, text_bytes

HEX = "0123456789abcdef" * 2
JOB_ID = f"resp_{HEX}"
OPEN = Entry(EntryId(1, 0), Kind.OPEN, b"worker")
FAILED = ErrorMarker("agent_error", "The agent failed.")
CANCELLED = ErrorMarker("cancelled", "The request was cancelled.")
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

Ending = OkMarker | ErrorMarker


def a_head(*, background: bool = False) -> ResponseHead:
    return ResponseHead(
        job_id=JOB_ID,
        created_s=17,
        model="endmark",
        background=background,
        store=True,
        metadata={"a": "b"},
        fields={"instructions": "Be brief.", "tools": [], "temperature": 1.0, "tool_choice": "auto", "top_p": 1.0}
        | {"parallel_tool_calls": True},
    )


def said(text: str) -> tuple[Kind, bytes]:
    return Kind.DELTA, text_bytes(text)


def thought(text: str) -> tuple[Kind, bytes]:
    return Kind.REASONING, text_bytes(text)


def tool(name: str, status: str, call_id: str | None = None, detail: str | None = None) -> tuple[Kind, bytes]:
    return Kind.TOOL, json_bytes({"name": name, "status": status, "call_id": call_id, "detail": detail})


def call(index: int, **fields: Any) -> tuple[Kind, bytes]:
    return Kind.TOOL_CALL, json_bytes({"index": index, **fields})


def entries(*contents: tuple[Kind, bytes]) -> list[Entry]:
    return [OPEN, *(Entry(EntryId(1, number), kind, payload) for number, (kind, payload) in enumerate(contents, 1))]


def ok(finish_reason: str = "stop", usage: Usage | None = None) -> OkMarker:
    return OkMarker(0, "", finish_reason, usage, 23_456)


OK = ok()


def end(encoder: ResponseEncoder, ending: Ending) -> bytes:
    return encoder.ending(ending) if isinstance(ending, OkMarker) else encoder.error(ending)


def frames(
    of: Iterable[Entry], ending: Ending = OK, *, starting_after: int = -1, background: bool = False
) -> list[bytes]:
    """The frames of a whole stream."""
    encoder = ResponseEncoder(a_head(background=background), starting_after=starting_after)
    stream = encoder.opening() + b"".join(encoder.frames([entry]) for entry in of) + end(encoder, ending)
    assert stream.endswith(b"\n\n") or not stream
    return [frame + b"\n\n" for frame in stream.split(b"\n\n")[:-1]]


def events(of: Iterable[Entry], ending: Ending = OK, *, background: bool = False) -> list[dict[str, Any]]:
    parsed = []
    for frame in frames(of, ending, background=background):
        name, data = frame.removesuffix(b"\n\n").split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert name.removeprefix(b"event: ").decode() == event["type"]
        parsed.append(event)
    return parsed


def types(of: Iterable[Entry], ending: Ending = OK) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events(of, ending)]


MESSAGE = ["output_item.added", "content_part.added"]
MESSAGE_DONE = ["output_text.done", "content_part.done", "output_item.done"]


# -- what is said ------------------------------------------------------------------------------------------------------


def test_an_answer_has_the_events_that_the_sdks_expect() -> None:
    stream = events(entries(said("Hel"), said("lo")), ok(usage=Usage(3, 4)))
    item_id = f"msg_{HEX}_0"
    place = {"item_id": item_id, "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "annotations": [], "logprobs": []}
    done = {"id": item_id, "type": "message", "role": "assistant", "status": "completed"} | {
        "content": [part | {"text": "Hello"}]
    }
    bare = [
        {name: value for name, value in event.items() if name not in ("sequence_number", "response")}
        for event in stream
    ]
    assert bare == [
        {"type": "response.created"},
        {"type": "response.in_progress"},
        {"type": "response.output_item.added", "output_index": 0}
        | {"item": done | {"status": "in_progress", "content": []}},
        {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
        {"type": "response.output_text.delta", **place, "delta": "Hel", "logprobs": []},
        {"type": "response.output_text.delta", **place, "delta": "lo", "logprobs": []},
        {"type": "response.output_text.done", **place, "text": "Hello", "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part | {"text": "Hello"}},
        {"type": "response.output_item.done", "output_index": 0, "item": done},
        {"type": "response.completed"},
    ]
    final = stream[-1]["response"]
    assert (final["status"], final["output"], final["created_at"], final["completed_at"]) == (
        *("completed", [done], 17, 23),
    )
    assert final["usage"]["total_tokens"] == 7
    assert stream[0]["response"] == final | {"status": "queued", "output": [], "completed_at": None, "usage": None}


def test_only_a_background_response_says_that_it_is_queued() -> None:
    assert [event["type"] for event in events([], CANCELLED, background=True)][1] == "response.queued"
    assert "queued" not in types([OPEN])


def test_a_second_attempt_goes_on_with_the_same_response() -> None:
    again = Entry(EntryId(2, 0), Kind.OPEN, b"another")
    assert types([OPEN, again]).count("in_progress") == 1


def test_text_and_reasoning_are_items_that_follow_each_other() -> None:
    stream = entries(thought("hm"), thought(" so"), said("Hello"))
    reasoning = ["output_item.added", "reasoning_summary_part.added", *["reasoning_summary_text.delta"] * 2]
    reasoning += ["reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done"]
    assert types(stream) == [
        *("created", "in_progress", *reasoning),
        *(*MESSAGE, "output_text.delta", *MESSAGE_DONE, "completed"),
    ]
    summary, message = ended_response(a_head(), stream, ok())["output"]
    assert summary == {"id": f"rs_{HEX}_0", "type": "reasoning", "summary": [{"type": "summary_text", "text": "hm so"}]}
    assert message["content"][0]["text"] == "Hello"


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    for of in (entries(), entries(thought("hm")), entries(tool("search", "started", "1"))):
        output = ended_response(a_head(), of, ok())["output"]
        [message] = [item for item in output if item["type"] == "message"]
        assert message["content"][0]["text"] == ""


# -- tools -------------------------------------------------------------------------------------------------------------


def test_a_tool_of_the_agent_is_a_call_that_no_client_runs() -> None:
    stream = entries(
        said("Let me see. "), tool("search", "started", "1", '{"q":"x"}'), tool("search", "completed", "1", "3 hits")
    )
    assert types(stream) == [
        *("created", "in_progress", *MESSAGE, "output_text.delta", *MESSAGE_DONE),
        *("output_item.added", "mcp_call.in_progress", "mcp_call_arguments.delta", "mcp_call_arguments.done"),
        *("mcp_call.completed", "output_item.done", "completed"),
    ]
    assert ended_response(a_head(), stream, ok())["output"][1] == {
        "id": f"mcp_{HEX}_1",
        "type": "mcp_call",
        "status": "completed",
        "server_label": "agent",
        "name": "search",
        "arguments": '{"q":"x"}',
        "output": "3 hits",
        "error": None,
        "approval_request_id": None,
    }


@pytest.mark.parametrize(
    ("said_of_tools", "expected"),
    [
        pytest.param([tool("a", "started", "1"), tool("a", "failed", "1", "no")], [("a", "failed", "no")], id="failed"),
        pytest.param([tool("a", "failed", "1")], [("a", "failed", "The tool failed.")], id="told of afterwards"),
        pytest.param([tool("a", "started", "1")], [("a", "completed", None)], id="left open"),
        pytest.param(
            [
                tool("a", "started", "1"),
                tool("b", "started", "2"),
                tool("b", "failed", "2"),
                tool("a", "completed", "1"),
            ],
            [("a", "completed", None), ("b", "failed", "The tool failed.")],
            id="at the same time",
        ),
        pytest.param(
            [tool("a", "started"), tool("b", "started"), tool("b", "failed"), tool("a", "completed")],
            [("a", "completed", None), ("b", "failed", "The tool failed.")],
            id="without call ids",
        ),
    ],
)
def test_tools_end_as_they_did(said_of_tools: list[tuple[Kind, bytes]], expected: list[tuple[str, str, Any]]) -> None:
    output = ended_response(a_head(), entries(*said_of_tools), ok())["output"]
    tools = [
        (item["name"], item["status"], item["error"] and item["error"]["content"][0]["text"])
        for item in output
        if item["type"] == "mcp_call"
    ]
    assert tools == expected


def test_text_flows_while_a_tool_runs() -> None:
    stream = entries(tool("a", "started", "1"), said("Wait"), tool("a", "completed", "1"), said(" for it."))
    output = ended_response(a_head(), stream, ok())["output"]
    assert [item["type"] for item in output] == ["mcp_call", "message"]
    assert output[1]["content"][0]["text"] == "Wait for it."


def test_function_calls_for_the_client_come_in_fragments() -> None:
    stream = entries(
        call(0, id="call_a", function={"name": "weather", "arguments": '{"city"'}),
        call(1, id="call_b", function={"name": "time", "arguments": ""}),
        call(0, function={"arguments": ':"Paris"}'}),
        call(1, function={"arguments": "{}"}),
    )
    assert types(stream)[2:] == [
        *("output_item.added", "function_call_arguments.delta", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    output = ended_response(a_head(), stream, ok("tool_calls"))["output"]
    assert [(item["call_id"], item["name"], item["arguments"], item["status"]) for item in output] == [
        ("call_a", "weather", '{"city":"Paris"}', "completed"),
        ("call_b", "time", "{}", "completed"),
    ]


# -- endings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finish_reason", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_that_was_cut_short_is_incomplete(finish_reason: str, reason: str) -> None:
    last = events(entries(said("Hel")), ok(finish_reason))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": reason}
    assert last["response"]["completed_at"] is None
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_a_failed_response_ends_in_what_every_client_raises() -> None:
    *_, failed, error = events(entries(said("Hel"), tool("a", "started")), FAILED)
    fields = {"code": "agent_error", "message": "The agent failed.", "param": None}
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == fields | {"type": "server_error"}
    assert [item["status"] for item in failed["response"]["output"]] == ["completed", "incomplete"]
    number = failed["sequence_number"] + 1
    assert error == {"type": "error", "sequence_number": number, **fields, "error": fields | {"type": "server_error"}}


def test_a_cancelled_response_ends_in_an_event_that_the_sdks_know() -> None:
    last = events(entries(said("Hel")), CANCELLED)[-1]
    assert last["type"] == "response.incomplete"
    response = last["response"]
    assert (response["status"], response["incomplete_details"]) == ("cancelled", {"reason": "cancelled"})
    assert response["output"][0]["content"][0]["text"] == "Hel"
    assert response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("code", [code for code in ErrorCode if code.startswith("stream_")])
def test_what_is_wrong_with_the_stream_takes_no_number_from_what_is_to_come(code: ErrorCode) -> None:
    encoder = ResponseEncoder(a_head())
    encoder.opening()
    encoder.frames(entries(said("Hel")))
    before = encoder.number
    name, data = encoder.broken(ErrorMarker(code, "gone")).split(b"\n")[:2]
    assert name == b"event: error"
    last = json.loads(data.removeprefix(b"data: "))
    assert (last["error"]["code"], last["sequence_number"]) == (code, before)


@pytest.mark.parametrize("code", [code for code in ErrorCode if code.startswith("stream_")])
def test_a_job_that_has_ended_so_is_a_failed_response_whatever_its_code(code: ErrorCode) -> None:
    assert types(entries(said("Hel")), ErrorMarker(code, "gone"))[-2:] == ["failed", "error"]
    failed = ended_response(a_head(), entries(said("Hel")), ErrorMarker(code, "gone"))
    assert (failed["status"], failed["error"]["code"]) == ("failed", code)


def test_a_heartbeat_repeats_the_last_number() -> None:
    encoder = ResponseEncoder(a_head())
    encoder.opening()
    encoder.frames(entries(said("a")))
    number = encoder.number
    name, data = encoder.heartbeat().split(b"\n")[:2]
    assert name == b"event: response.in_progress"
    assert json.loads(data.removeprefix(b"data: "))["sequence_number"] == number == encoder.number


# -- for any entries ---------------------------------------------------------------------------------------------------

details = st.none() | st.text(max_size=5) | st.just('{"a":1}')
names = st.sampled_from(["search", "fetch"])
contents = st.one_of(
    st.builds(said, st.text(st.characters(), max_size=8)),
    st.builds(thought, st.text(max_size=8)),
    st.builds(
        tool,
        names,
        st.sampled_from(["started", "completed", "failed"]),
        st.none() | st.sampled_from(["1", "2"]),
        details,
    ),
    st.builds(
        lambda index, arguments: call(index, id=f"call_{index}", function={"name": "f", "arguments": arguments}),
        st.integers(0, 2),
        st.text(max_size=4),
    ),
)
streams = st.lists(contents, max_size=12).map(lambda drawn: entries(*drawn))
endings = st.sampled_from([ok(), ok("length"), ok("tool_calls", Usage(1, 2)), FAILED, CANCELLED])


@given(streams, endings, st.booleans())
def test_the_numbers_have_no_gap_and_every_cut_point_gives_exactly_the_rest(
    of: list[Entry], ending: Ending, background: bool
) -> None:
    whole = frames(of, ending, background=background)
    numbers = [json.loads(frame.split(b"\ndata: ")[1])["sequence_number"] for frame in whole]
    assert numbers == list(range(len(whole)))
    for seen in range(-1, len(whole)):
        assert frames(of, ending, starting_after=seen, background=background) == whole[seen + 1 :]


@given(streams, endings, st.lists(st.integers(1, 4)))
def test_it_does_not_matter_in_which_company_entries_come(of: list[Entry], ending: Ending, sizes: list[int]) -> None:
    encoder = ResponseEncoder(a_head())
    stream, rest = encoder.opening(), of
    for size in sizes:
        stream, rest = stream + encoder.frames(rest[:size]), rest[size:]
    stream += encoder.frames(rest) + end(encoder, ending)
    assert stream == b"".join(frames(of, ending))


@given(streams, endings)
def test_every_item_opens_once_ends_once_and_is_in_the_response(of: list[Entry], ending: Ending) -> None:
    stream = events(of, ending)
    added = {e["output_index"]: e["item"] for e in stream if e["type"] == "response.output_item.added"}
    done = {e["output_index"]: e["item"] for e in stream if e["type"] == "response.output_item.done"}
    final = next(e["response"] for e in reversed(stream) if "response" in e)
    assert list(added) == list(range(len(final["output"])))
    assert [item["id"] for item in added.values()] == [item["id"] for item in final["output"]]
    assert all(job_of_item(item["id"]) == JOB_ID for item in final["output"])
    assert all(item == final["output"][index] for index, item in done.items())
    if isinstance(ending, OkMarker):
        assert sorted(done) == list(added)
    text = "".join(e["delta"] for e in stream if e["type"] == "response.output_text.delta")
    messages = [item for item in final["output"] if item["type"] == "message"]
    assert text == "".join(part["text"] for item in messages for part in item["content"])
    assert ended_response(a_head(), of, ending) == final


@given(streams, endings)
def test_the_sdk_follows_any_stream(of: list[Entry], ending: Ending) -> None:
    """The helper of openai-python raises where items change their identity, or stay open."""
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    for event in events(of, ending):
        if event["type"] != "error":
            state.handle_event(construct_type(value=event, type_=ResponseStreamEvent))  # without validation, as the SDK
    if isinstance(ending, OkMarker) and ending.finish_reason != "length":
        assert state._completed_response is not None


def test_the_objects_are_valid_for_the_sdks_types() -> None:
    stream = entries(
        thought("hm"),
        tool("search", "started", "1"),
        tool("search", "failed", "1"),
        said("Hello"),
        call(0, id="call_a", function={"name": "f", "arguments": "{}"}),
    )
    for event in events(stream):
        EVENTS.validate_python(event)
    Response.model_validate(ended_response(a_head(), stream, ok()))
