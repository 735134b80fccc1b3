"""Requests for responses: what is accepted, what is refused and where, and what the agent sees of them."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest

from api.attachments import detach
from api.errors import InvalidRequestError
from api.response_objects import Echo, input_items
from api.response_request import (
    answer_message,
    new_messages,
    parse_response_request,
    submission,
    without_files,
)
from shared.jobs import JobKind, Submission
from shared.text import json_bytes, parse_json
from tests.media_samples import png

HEX = "0123456789abcdef" * 2
JOB_ID = f"resp_{HEX}"
PNG_URL = f"data:image/png;base64,{b64encode(png()).decode()}"


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def submitted(
    body: dict[str, Any], *, referenced: Any = None, history: Any = (), tenant: str = "default"
) -> Submission:
    """The job that the API makes of a body."""
    request = parse_response_request(body)
    new = new_messages(request, referenced or {})
    messages = new.messages
    if new.parts:
        messages = detach(messages, new.parts, max_file_bytes=1000).messages
    return submission(
        request,
        body,
        new=messages,
        history=history,
        job_id=JOB_ID,
        tenant=tenant,
        model="endmark",
        request_id="req_1",
        is_waited_for=True,
        patience_ms=None,
        once=None,
        webhook=None,
    )


def messages_of(input_: Any, **fields: Any) -> list[dict[str, Any]]:
    return submitted({"input": input_, **fields}).messages


# -- the input ---------------------------------------------------------------------------------------------------------


def test_a_string_is_a_message_of_the_user() -> None:
    assert messages_of("Hello") == [user("Hello")]


@pytest.mark.parametrize("message", [user("Hello"), user("Hello", type="message"), user("Hello", type=None)])
def test_a_message_needs_no_type(message: dict[str, Any]) -> None:
    assert messages_of([message]) == [user("Hello")]


def test_instructions_come_first_and_history_before_the_input() -> None:
    job = submitted({"input": "And?", "instructions": "Be brief."}, history=[user("Hi")])
    assert job.messages == [{"role": "system", "content": "Be brief."}, user("Hi"), user("And?")]
    assert Echo(**job.echo).before == 2
    assert Echo(**job.echo).has_instructions


def test_a_history_in_the_dialect_of_the_sdks_becomes_chat_messages() -> None:
    assert messages_of(
        [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            user([{"type": "input_text", "text": "The weather?"}], id="msg_1", status="completed"),
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
            },
            {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "b", "name": "time", "arguments": "{}"},
            {"type": "mcp_call", "id": "mcp_1", "name": "search", "arguments": "{}", "server_label": "agent"},
            {"type": "function_call_output", "call_id": "a", "output": "rain"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "nine"}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            user("Why?"),
        ]
    ) == [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        user([{"type": "text", "text": "The weather?"}]),
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Let me see."}],
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
                {"id": "b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "nine"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        user("Why?"),
    ]


def test_a_reference_is_what_it_refers_to() -> None:
    body = {"input": [user("Hi"), {"type": "item_reference", "id": "msg_1"}, {"id": "fc_1"}, user("And?")]}
    referenced = {
        "msg_1": {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]},
        "fc_1": {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
    }
    assert parse_response_request(body).references == {1: "msg_1", 2: "fc_1"}
    assert submitted(body, referenced=referenced).messages[1] == {
        "role": "assistant",
        "content": "Hello",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }


def test_files_are_taken_out_or_named() -> None:
    job = submitted(
        {
            "input": [
                user(
                    [
                        {"type": "input_text", "text": "What is this?"},
                        {"type": "input_image", "image_url": PNG_URL, "detail": "low"},
                        {"type": "input_image", "file_id": "file-1"},
                        {"type": "input_file", "file_data": "aGVsbG8=", "filename": "a.txt"},
                    ]
                )
            ]
        }
    )
    content = job.messages[0]["content"]
    assert content[1:] == [
        {"type": "image_url", "image_url": {"url": {"attachment": 0, "media_type": "image/png"}, "detail": "low"}},
        {"type": "file", "file": {"file_id": "file-1"}, "detail": "auto"},
        {
            "type": "file",
            "file": {"filename": "a.txt", "file_data": {"attachment": 1, "media_type": "text/plain"}},
        },
    ]
    [item] = input_items(job.messages, JOB_ID)
    assert [part["type"] for part in item["content"]] == ["input_text", "input_image", "input_image", "input_file"]
    assert (item["content"][2]["file_id"], item["content"][3]["filename"]) == ("file-1", "a.txt")


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "input_image", "image_url": "https://example.org/a.png"}, "input[1].content[0].image_url"),
        ({"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, "input[1].content[0].image_url"),
        ({"type": "input_file", "file_data": "%%%", "filename": "a.txt"}, "input[1].content[0].file_data"),
        ({"type": "input_file", "filename": "a.txt"}, "input[1].content[0]"),
        ({"type": "input_file", "file_data": "aGVsbG8=", "filename": "../a"}, "input[1].content[0].filename"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_words_of_the_input(part: dict[str, Any], param: str) -> None:
    request = parse_response_request({"input": [{"type": "reasoning"}, user([part])]})
    new = new_messages(request, {})
    with pytest.raises(InvalidRequestError) as raised:
        detach(new.messages, new.parts, max_file_bytes=1000)
    error = new.name_input(raised.value)
    assert error.param == param
    assert "messages[" not in error.message


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": 1}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0].type"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"type": 1}]}, "input[0].type"),
        ({"input": [{"type": "message", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [user(1)]}, "input[0].content"),
        ({"input": [user([])]}, "input[0].content"),
        ({"input": [user([{"type": "input_audio"}])]}, "input[0].content[0].type"),
        ({"input": [user([{"type": "input_text"}])]}, "input[0].content[0].text"),
        ({"input": [user([{"type": "input_image"}])]}, "input[0].content[0]"),
        ({"input": [user([{"type": "input_image", "image_url": "a", "file_id": "b"}])]}, "input[0].content[0]"),
        (
            {"input": [user([{"type": "input_file", "file_url": "https://example.org"}])]},
            "input[0].content[0].file_url",
        ),
        ({"input": [user("a"), {"type": "function_call", "call_id": "a", "name": "f"}]}, "input[1].arguments"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": 1}]}, "input[0].output"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": "a", "model": 1}, "model"),
        ({"input": "a", "stream": "yes"}, "stream"),
        ({"input": "a", "background": 1}, "background"),
        ({"input": "a", "background": True, "store": False}, "store"),
        ({"input": "a", "instructions": ["a"]}, "instructions"),
        ({"input": "a", "previous_response_id": 1}, "previous_response_id"),
        ({"input": "a", "previous_response_id": "resp_1", "conversation": "c"}, "previous_response_id"),
        ({"input": "a", "conversation": 1}, "conversation"),
        ({"input": "a", "conversation": "a\x00"}, "conversation"),
        ({"input": "a", "conversation": {"id": 1}}, "conversation.id"),
        ({"input": "a", "conversation": "a" * 257}, "conversation"),
        ({"input": "a", "metadata": {"a": 1}}, "metadata.a"),
        ({"input": "a", "metadata": {"a" * 65: "b"}}, "metadata." + "a" * 65),
        ({"input": "a", "metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"input": "a", "metadata": {str(n): "b" for n in range(17)}}, "metadata"),
        ({"input": "a", "temperature": "hot"}, "temperature"),
        ({"input": "a", "temperature": 3}, "temperature"),
        ({"input": "a", "top_p": True}, "top_p"),
        ({"input": "a", "max_output_tokens": 1.5}, "max_output_tokens"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "tools": {}}, "tools"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
        ({"input": "a", "tool_choice": "sometimes"}, "tool_choice"),
        ({"input": "a", "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"input": "a", "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"input": "a", "reasoning": "high"}, "reasoning"),
        ({"input": "a", "reasoning": {"effort": 1}}, "reasoning.effort"),
        ({"input": "a", "user": "a" * 513}, "user"),
        ({"input": "a", "include": "everything"}, "include"),
        ({"input": "a", "prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": "a", "on_disconnect": "stay"}, "on_disconnect"),
        ({"input": [user("a")] * 10_001}, "input"),
        ({"input": [user([{"type": "input_text", "text": ""}] * 6000)] * 2}, "input[1].content"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        parse_response_request(body)
    assert raised.value.param == param
    assert raised.value.message


def test_a_body_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        parse_response_request([])


def test_somebody_has_to_ask() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        submitted({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]})
    assert raised.value.param == "input"
    submitted({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, history=[user("Hi")])


# -- the job -----------------------------------------------------------------------------------------------------------


def test_the_agent_sees_the_parameters_of_chat_completions() -> None:
    body = {
        "input": "a",
        "model": "endmark",
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "session_id": "not of this API",
        "temperature": 1,
        "top_p": 0.5,
        "max_output_tokens": 7,
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {
            "format": {"type": "json_schema", "name": "s", "schema": {"type": "object"}, "strict": True},
            "verbosity": "low",
        },
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}],
        "tool_choice": {"type": "function", "name": "f"},
        "user": "ann",
        "safety_identifier": "s",
        "something_new": {"a": 1},
    }
    assert submitted(body).params == {
        "temperature": 1.0,
        "top_p": 0.5,
        "max_completion_tokens": 7,
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "verbosity": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True},
        },
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "user": "ann",
        "safety_identifier": "s",
        "something_new": {"a": 1},
    }


def test_the_response_repeats_what_was_asked() -> None:
    tools = [{"type": "function", "name": "f", "parameters": {}, "strict": True}]
    job = submitted(
        {"input": "a", "tools": tools, "temperature": 0.5, "metadata": {"a": "b"}, "text": {"verbosity": "low"}}
    )
    fields = Echo(**parse_json(json_bytes(job.echo))).fields
    assert (fields["tools"], fields["temperature"], fields["top_p"]) == (tools, 0.5, 1.0)
    assert fields["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert fields["reasoning"] == {"effort": None, "summary": None}
    assert job.metadata == {"a": "b"}


def test_a_response_has_a_session_only_in_a_conversation() -> None:
    alone = submitted({"input": "a"})
    assert (alone.session, alone.owns_history, alone.kind) == ("", True, JobKind.RESPONSE)
    for conversation in ("c", {"id": "c"}):
        job = submitted({"input": "a", "conversation": conversation}, tenant="acme")
        assert (job.session, job.owns_history) == ("api@acme:c", False)
        assert Echo(**job.echo).fields["conversation"] == {"id": "c"}


@pytest.mark.parametrize(
    ("fields", "stored", "background"),
    [({}, True, False), ({"store": False}, False, False), ({"background": True, "store": None}, True, True)],
)
def test_a_response_is_stored_unless_the_client_does_not_want_it(
    fields: dict[str, Any], stored: bool, background: bool
) -> None:
    job = submitted({"input": "a", **fields})
    assert (job.store, job.background) == (stored, background)


# -- chains ------------------------------------------------------------------------------------------------------------


def test_files_of_an_earlier_request_leave_a_note_behind() -> None:
    held = {"attachment": 0, "media_type": "image/png"}
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": held}},
        {"type": "file", "file": {"filename": "a.txt", "file_data": held}},
        {"type": "file", "file": {"file_id": "file-1"}},
    ]
    [message] = without_files([user(parts)])
    texts = [part.get("text", "") for part in message["content"]]
    assert "no longer stored" in texts[1]
    assert texts[2].startswith("[a.txt of")
    assert message["content"][3] == parts[3]
    assert without_files([user("a")]) == [user("a")]


def test_the_answer_of_an_earlier_response_is_one_message() -> None:
    def message(text: str) -> dict[str, Any]:
        return {"type": "message", "content": [{"type": "output_text", "text": text}]}

    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    chat_call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert answer_message([message("Hel"), {"type": "mcp_call"}, message("lo"), call]) == {
        "role": "assistant",
        "content": "Hello",
        "tool_calls": [chat_call],
    }
    assert answer_message([call]) == {"role": "assistant", "content": None, "tool_calls": [chat_call]}
    assert answer_message([message("")]) == {"role": "assistant", "content": ""}


def test_the_input_is_told_again_as_it_came() -> None:
    items = [
        user([{"type": "input_text", "text": "a"}]),
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "c"},
    ]
    told = input_items(submitted({"input": items}).messages, JOB_ID)
    assert [item["type"] for item in told] == ["message", "message", "function_call", "function_call_output"]
    assert [item["id"] for item in told] == [
        f"{kind}_{HEX}_in{n}" for n, kind in enumerate(["msg", "msg", "fc", "fco"])
    ]
    assert told[0]["content"] == [{"type": "input_text", "text": "a"}]
    assert told[1]["content"] == [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]
    assert told[3]["output"] == "c"
