"""What a client of the official SDK gets when all goes well."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from api.chunks import EMPTY_ANSWER
from tests.deployment import Deployment, noted, script
from tests.waiting import wait_until


def streamed_lines(service: Deployment, body: dict[str, Any]) -> list[str]:
    """The `data:` lines of a streamed answer, as they are on the wire."""
    with service.http() as http, http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.read().split(b"\n\n")
    assert blocks.pop() == b""
    return [block.decode() for block in blocks if not block.startswith(b":")]


def streamed_text(service: Deployment, messages: list[Any], **options: Any) -> str:
    with service.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=messages, stream=True, **options)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def whole_text(service: Deployment, messages: list[Any], **options: Any) -> str | None:
    with service.client() as client:
        answer: ChatCompletion = client.chat.completions.create(model="endmark", messages=messages, **options)
        return answer.choices[0].message.content


def test_the_sync_client_streams_an_answer(service: Deployment) -> None:
    assert streamed_text(service, script(say=["Hel", "lo"])) == "Hello"


async def test_the_async_client_streams_an_answer(service: Deployment) -> None:
    async with service.async_client() as client:
        stream = await client.chat.completions.create(
            model="endmark", messages=script(say=["Hel", "lo"]), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (1, 2)


def test_the_streaming_helper_of_the_sdk_accepts_the_stream(service: Deployment) -> None:
    with (
        service.client() as client,
        client.chat.completions.stream(model="endmark", messages=script(say=["a", "b"])) as stream,
    ):
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == "ab"


def test_a_token_arrives_before_the_agent_has_finished(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    messages = script(say=["first", "second"], every_s=0.3, log=str(log))
    with service.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=messages, stream=True)
        assert next(stream).choices[0].delta.content == "first"
        assert noted(log, "finished") == 0
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "second"


def test_the_chunks_have_the_shape_that_clients_expect(service: Deployment) -> None:
    *chunks, done = streamed_lines(service, {"messages": script(say=["Hello", " you"], every_s=0.05)})
    assert done == "data: [DONE]"
    parsed = [json.loads(line.removeprefix("data: ")) for line in chunks]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in parsed}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"].startswith("chatcmpl-") for chunk in parsed)
    assert not any("usage" in chunk for chunk in parsed)
    deltas = [chunk["choices"][0]["delta"] for chunk in parsed]
    assert deltas == [{"role": "assistant", "content": "Hello"}, {"content": " you"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed] == [None, None, "stop"]


def test_usage_is_the_last_chunk_when_it_is_asked_for(service: Deployment) -> None:
    body = {"messages": script(say=["a", "b", "c"]), "stream_options": {"include_usage": True}}
    *_, finish, usage, done = streamed_lines(service, body)
    assert json.loads(finish.removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
    last = json.loads(usage.removeprefix("data: "))
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert done == "data: [DONE]"


@pytest.mark.parametrize("options", [{}, {"stream": False}])
def test_an_answer_that_is_not_streamed_is_one_object(service: Deployment, options: dict[str, Any]) -> None:
    with service.client() as client:
        answer = client.chat.completions.create(
            model="endmark", messages=script(say=["Hel", "lo"]), metadata={"a": "b"}, **options
        )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 3
    assert answer._request_id


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_finish_reason_of_the_agent_is_passed_on(service: Deployment, reason: str) -> None:
    with service.client() as client:
        messages = script(say=["a"], finish_reason=reason)
        answer = client.chat.completions.create(model="endmark", messages=messages)
        assert answer.choices[0].finish_reason == reason
        chunks = list(client.chat.completions.create(model="endmark", messages=messages, stream=True))
        assert chunks[-1].choices[0].finish_reason == reason


def test_function_calls_for_the_client_arrive_whole(service: Deployment) -> None:
    deltas = [
        {"index": 0, "id": "call_7", "type": "function", "function": {"name": "look", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"at":'}},
        {"index": 0, "function": {"arguments": '"me"}'}},
    ]
    messages = script(tool_calls=deltas, finish_reason="tool_calls")
    with service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=messages)
        with client.chat.completions.stream(model="endmark", messages=messages) as stream:
            stream.until_done()
            streamed = stream.get_final_completion()
    for completion in (answer, streamed):
        assert completion.choices[0].finish_reason == "tool_calls"
        assert completion.choices[0].message.content is None
        (call,) = completion.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert (call.id, call.function.name, call.function.arguments) == ("call_7", "look", '{"at":"me"}')


def test_reasoning_is_told_apart_from_the_answer(service: Deployment) -> None:
    *chunks, _ = streamed_lines(service, {"messages": script(reasoning=["hm"], say=["Yes"])})
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in chunks]
    assert deltas == [{"role": "assistant", "reasoning_content": "hm"}, {"content": "Yes"}, {}]


def test_what_the_agents_own_tools_do_is_shown_to_those_who_ask(service: Deployment) -> None:
    body = {
        "messages": script(tools=["search"], say=["found"]),
        "stream_options": {"include_tool_events": True, "include_usage": True},
    }
    *lines, usage, _ = streamed_lines(service, body)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    events = [chunk["tool_event"] for chunk in chunks if "tool_event" in chunk]
    assert events == [
        {"name": "search", "status": "started", "call_id": "call_1", "detail": None},
        {"name": "search", "status": "completed", "call_id": "call_1", "detail": None},
    ]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant"}, {}, {"content": "found"}, {}]
    assert json.loads(usage.removeprefix("data: "))["choices"] == []


def test_clients_that_do_not_know_tool_events_are_not_disturbed(service: Deployment) -> None:
    messages, options = script(tools=["search"], say=["found"]), {"include_tool_events": True}
    with (
        service.client() as client,
        client.chat.completions.stream(
            model="endmark", messages=messages, extra_body={"stream_options": options}
        ) as stream,
    ):
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", "found")


def test_what_the_agents_own_tools_do_is_not_on_this_wire_unasked(service: Deployment) -> None:
    *chunks, _ = streamed_lines(service, {"messages": script(tools=["search"], say=["found"])})
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in chunks]
    assert deltas == [{"role": "assistant", "content": "found"}, {}]


def test_an_agent_that_only_returned_its_text_delivers_it(service: Deployment) -> None:
    assert streamed_text(service, script(returns="whole")) == "whole"
    assert whole_text(service, script(returns="whole")) == "whole"


def test_what_was_streamed_is_not_repeated_by_what_is_returned(service: Deployment) -> None:
    assert streamed_text(service, script(say=["said"], returns="returned")) == "said"


def test_an_empty_answer_gets_a_sentence_where_it_is_not_streamed(service: Deployment) -> None:
    assert whole_text(service, script(say=[])) == EMPTY_ANSWER
    assert streamed_text(service, script(say=[])) == ""


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a\x00b", id="NUL"),
        pytest.param("grüße 👩‍👩‍👧 \U0001f600", id="emoji"),
        pytest.param("שלום مرحبا", id="right to left"),
        pytest.param("half \ud83d of a pair", id="lone surrogate"),
        pytest.param("line\r\n\r\ndata: [DONE]\n\n: ping\n\nevent: error\u2028\u2029\x85", id="looks like SSE"),
        pytest.param("x" * 1_000_000, id="1 MB"),
    ],
)
def test_any_text_passes_unharmed(service: Deployment, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    body = json.dumps({"messages": messages})  # escapes lone surrogates; the SDK could not send them
    with service.http() as http:
        answer = http.post("/v1/chat/completions", content=body).json()
    assert answer["choices"][0]["message"]["content"] == text
    *chunks, _ = streamed_lines_of(service, json.dumps({"messages": messages, "stream": True}))
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in chunks) == text


def streamed_lines_of(service: Deployment, body: str) -> list[str]:
    with service.http() as http, http.stream("POST", "/v1/chat/completions", content=body) as response:
        blocks = response.read().split(b"\n\n")
    return [block.decode().removeprefix("data: ") for block in blocks if block.startswith(b"data: ")]


def test_a_whole_history_reaches_the_agent(service: Deployment) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "What is the weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": [{"type": "text", "text": "Sunny."}]},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}]},
    ]
    with service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=messages, user="me", store=False, seed=1)
    assert answer.choices[0].message.content == "And now?"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(messages)


def test_an_upload_is_answered(service: Deployment) -> None:
    files = [("files", ("notes.txt", b"some notes", "text/plain"))]
    with service.http() as http:
        answer = http.post("/v1/chat/completions", data={"message": "read it", "session_id": "up"}, files=files)
        streamed = http.post(
            "/v1/chat/completions", data={"message": "read it", "session_id": "up", "stream": "true"}, files=files
        )
        without_message = http.post("/v1/chat/completions", data={"model": "endmark"}, files=files)
    assert answer.json()["choices"][0]["message"]["content"] == "read it"
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert without_message.json()["choices"][0]["message"]["content"] == "Please analyze the uploaded files."


async def test_many_streams_at_once_are_all_whole(service: Deployment) -> None:
    words = [f"{number} " for number in range(40)]

    async def one(number: int) -> str:
        stream = await client.chat.completions.create(
            model="endmark",
            messages=script(say=words, every_s=0.005),
            stream=True,
            extra_body={"session_id": f"s{number}"},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with service.async_client() as client:
        answers = await asyncio.gather(*[one(number) for number in range(60)])
    assert answers == ["".join(words)] * 60


def test_turns_of_one_session_run_one_at_a_time_in_order(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = script(say=["slow"], every_s=0.5, log=str(log))
    quick = script(say=["quick"], log=str(log))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(whole_text, service, slow, extra_body={"session_id": "ordered"})
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the first turn to start")
        second = pool.submit(whole_text, service, quick, extra_body={"session_id": "ordered"})
        other = pool.submit(whole_text, service, script(say=["other"]), extra_body={"session_id": "another"})
        assert other.result() == "other"
        assert not first.done()
        assert (first.result(), second.result()) == ("slow", "quick")
    assert [note["what"] for note in _notes(log)] == ["started", "finished"] * 2
    assert {note["session"] for note in _notes(log)} == {"api:ordered"}


def _notes(log: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "session"),
    [({"session_id": "mine"}, "api:mine"), ({}, "api:default"), ({"session_id": ""}, "api:default")],
)
def test_the_session_key_is_nanobots(
    service: Deployment, tmp_path: Path, options: dict[str, str], session: str
) -> None:
    log = tmp_path / "log"
    whole_text(service, script(say=["a"], log=str(log)), extra_body=options)
    assert _notes(log)[0]["session"] == session


def test_a_history_without_session_belongs_to_no_session(service: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    messages = [{"role": "system", "content": "Be brief."}, *script(say=["a"], log=str(log))]
    with service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=messages)
    assert _notes(log)[0]["session"] == f"api:{answer.id}"
