"""What a chat completion request may say, and what it is told when it may not."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from api.chat_request import ChatRequest, parse_chat_request, submission
from api.errors import ApiError
from shared.jobs import Submission

MAX_FILE_BYTES = 30
USER = {"role": "user", "content": "Hello"}
DATA = base64.b64encode(b"content").decode()


def parse(body: object) -> ChatRequest:
    return parse_chat_request(body)


def asking(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def image(url: Any) -> dict[str, Any]:
    return asking([{"type": "image_url", "image_url": {"url": url}}])


def file(**fields: Any) -> dict[str, Any]:
    return asking([{"type": "file", "file": fields}])


def with_field(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], **fields}


CONTENT = "messages[0].content"

BAD: list[tuple[object, int, str, str | None]] = [
    # -- not a request
    (None, 400, "invalid_request", None),
    ([], 400, "invalid_request", None),
    ("Hello", 400, "invalid_request", None),
    (5, 400, "invalid_request", None),
    # -- messages
    ({}, 400, "invalid_request", "messages"),
    ({"messages": None}, 400, "invalid_request", "messages"),
    ({"messages": []}, 400, "invalid_request", "messages"),
    ({"messages": {}}, 400, "invalid_request", "messages"),
    ({"messages": "Hello"}, 400, "invalid_request", "messages"),
    ({"messages": ["Hello"]}, 400, "invalid_request", "messages[0]"),
    ({"messages": [{"content": "Hello"}]}, 400, "invalid_request", "messages[0].role"),
    ({"messages": [{"role": "oracle", "content": "x"}]}, 400, "invalid_request", "messages[0].role"),
    ({"messages": [{"role": 5, "content": "x"}]}, 400, "invalid_request", "messages[0].role"),
    ({"messages": [{"role": "\ud800", "content": "x"}]}, 400, "invalid_request", "messages[0].role"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request", "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_request", "messages"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, 400, "invalid_request", "messages[1].tool_call_id"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]},
        400,
        "invalid_request",
        "messages[1].tool_calls[0].id",
    ),
    # -- content
    ({"messages": [{"role": "user"}]}, 400, "invalid_request", CONTENT),
    (asking(None), 400, "invalid_request", CONTENT),
    (asking(5), 400, "invalid_request", CONTENT),
    (asking([]), 400, "invalid_request", CONTENT),
    (asking({"type": "text", "text": "x"}), 400, "invalid_request", CONTENT),
    ({"messages": [{"role": "user", "user": "x", "content": 5}]}, 400, "invalid_request", CONTENT),
    (asking(["Hello"]), 400, "invalid_request", f"{CONTENT}[0]"),
    (asking([{"text": "x"}]), 400, "invalid_request", f"{CONTENT}[0].type"),
    (asking([{"type": "video"}]), 400, "invalid_request", f"{CONTENT}[0].type"),
    (asking([{"type": "text"}]), 400, "invalid_request", f"{CONTENT}[0].text"),
    (asking([{"type": "text", "text": 5}]), 400, "invalid_request", f"{CONTENT}[0].text"),
    (
        {"messages": [USER, {"role": "system", "content": [{"type": "image_url"}]}]},
        400,
        "invalid_request",
        "messages[1].content[0].type",
    ),
    # -- media
    (asking([{"type": "image_url"}]), 400, "invalid_request", f"{CONTENT}[0].image_url"),
    (asking([{"type": "image_url", "image_url": DATA}]), 400, "invalid_request", f"{CONTENT}[0].image_url"),
    (image(5), 400, "invalid_request", f"{CONTENT}[0].image_url.url"),
    # -- other fields
    (with_field(stream="true"), 400, "invalid_request", "stream"),
    (with_field(stream=1), 400, "invalid_request", "stream"),
    (with_field(stream_options=True), 400, "invalid_request", "stream_options"),
    (with_field(stream_options={"include_usage": 1}), 400, "invalid_request", "stream_options.include_usage"),
    (with_field(model=5), 400, "invalid_request", "model"),
    (with_field(n=2), 400, "invalid_request", "n"),
    (with_field(n="1"), 400, "invalid_request", "n"),
    (with_field(store="yes"), 400, "invalid_request", "store"),
    (with_field(user=5), 400, "invalid_request", "user"),
    (with_field(user="\ud800"), 400, "invalid_request", "user"),
    (with_field(on_disconnect="explode"), 400, "invalid_request", "on_disconnect"),
    (with_field(metadata=[]), 400, "invalid_request", "metadata"),
    (with_field(metadata={str(number): "" for number in range(17)}), 400, "invalid_request", "metadata"),
    (with_field(metadata={"k" * 65: ""}), 400, "invalid_request", "metadata." + "k" * 65),
    (with_field(metadata={"k": "v" * 513}), 400, "invalid_request", "metadata.k"),
    (with_field(metadata={"k": 5}), 400, "invalid_request", "metadata.k"),
    (with_field(metadata={"k": None}), 400, "invalid_request", "metadata.k"),
    (with_field(session_id=5), 400, "invalid_request", "session_id"),
    (with_field(session_id="x" * 257), 400, "invalid_request", "session_id"),
    (with_field(session_id="a\nb"), 400, "invalid_request", "session_id"),
    (with_field(session_id="\x00"), 400, "invalid_request", "session_id"),
    (with_field(session_id="\x7f"), 400, "invalid_request", "session_id"),
    (with_field(session_id="\ud800"), 400, "invalid_request", "session_id"),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), BAD, ids=lambda value: ascii(value)[:60])
def test_a_bad_request_is_told_what_is_wrong_and_where(body: object, status: int, code: str, param: str | None) -> None:
    with pytest.raises(ApiError) as refusal:
        parse(body)
    error = refusal.value
    assert (error.status, error.code, error.param) == (status, code, param)
    assert error.message
    assert error.body()  # any text can be sent


GOOD_CONTENTS = [
    "",
    "Hello",
    "half a pair \ud83d, a NUL \x00, 🙂 and مرحبا",
    [{"type": "text", "text": "half \udc00"}],
    [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}],
    [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}", "detail": "low"}}],
    [{"type": "image_url", "image_url": {"url": f"DATA:image/svg+xml;charset=utf-8;BASE64,{DATA}"}}],
    [{"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}}],
    [{"type": "file", "file": {"filename": "a.txt", "file_data": f"data:text/plain;base64,{DATA}"}}],
    [{"type": "file", "file": {"filename": "a.txt", "file_data": DATA}}],
    [{"type": "file", "file": {"file_data": base64.b64encode(b"x" * MAX_FILE_BYTES).decode()}}],
]


@pytest.mark.parametrize("content", GOOD_CONTENTS, ids=lambda value: ascii(value)[:60])
def test_good_content_is_passed_on_as_it_came(content: Any) -> None:
    body = asking(content)
    assert submitted(body).messages == body["messages"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "x"},
        {"role": "system", "content": [{"type": "text", "text": "x"}]},
        {"role": "developer", "content": "x", "name": "d"},
        {"role": "assistant", "content": "x", "refusal": None},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_every_role_may_be_part_of_a_history(message: dict[str, Any]) -> None:
    body = {"messages": [message, USER]}
    assert submitted(body).messages == [message, USER]


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": None},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"n": 1},
        {"n": None},
        {"model": None},
        {"metadata": {str(number): "v" * 512 for number in range(16)}},
        {"metadata": {"k" * 64: ""}},
        {"metadata": None},
        {"session_id": "x" * 256},
        {"session_id": "é 🙂 مرحبا"},
        {"store": None},
        {"on_disconnect": "continue"},
        {"frobnicate": {"a": [1]}},
        {"temperature": 0.5, "tools": [], "seed": 2**70},
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_good_and_unknown_fields_are_taken(fields: dict[str, Any]) -> None:
    parse(with_field(**fields))


def submitted(body: dict[str, Any], *, default_session: str = "default") -> Submission:
    return submission(
        parse(body), body, job_id="chatcmpl-1", model="m", default_session=default_session, request_id="req_1"
    )


HISTORY = [{"role": "system", "content": "x"}, USER]


@pytest.mark.parametrize(
    ("body", "session", "owns_history"),
    [
        ({"messages": [USER]}, "api:default", False),
        ({"messages": [USER], "session_id": ""}, "api:default", False),
        ({"messages": [USER], "session_id": "s"}, "api:s", False),
        ({"messages": HISTORY}, "", True),
        ({"messages": HISTORY, "session_id": "s"}, "api:s", False),
    ],
)
def test_who_owns_the_history(body: dict[str, Any], session: str, owns_history: bool) -> None:
    job = submitted(body)
    assert (job.session, job.owns_history) == (session, owns_history)


def test_without_a_default_session_a_lone_message_is_a_history() -> None:
    job = submitted({"messages": [USER]}, default_session="")
    assert (job.session, job.owns_history) == ("", True)


def test_the_agent_gets_what_concerns_the_answer_and_not_what_concerns_its_delivery() -> None:
    body = with_field(temperature=0, tools=[{"type": "function"}], seed=None, stream=True, frobnicate=1, user="u")
    job = submitted(body)
    assert job.params == {"temperature": 0, "tools": [{"type": "function"}], "user": "u", "frobnicate": 1}
    assert (job.user, job.metadata, job.store) == ("u", {}, False)
