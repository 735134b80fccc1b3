"""Entries as OpenAI chat completions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.chunks import DONE, EMPTY_ANSWER, ChunkEncoder, completion, error_frame
from api.sse import PING
from shared.entries import Entry, EntryId, ErrorMarker, Kind, OkMarker, Usage
from shared.text import json_bytes, text_bytes


def an_encoder(*, include_usage: bool = False) -> ChunkEncoder:
    return ChunkEncoder(completion_id="chatcmpl-1", created=17, model='a "model"', include_usage=include_usage)


def an_entry(kind: Kind, payload: str) -> Entry:
    return Entry(EntryId(1, 1), kind, text_bytes(payload))


def ok(usage: Usage | None = None, finish_reason: str = "stop") -> OkMarker:
    return OkMarker(0, "", finish_reason, usage)


def chunks_of(frames: bytes) -> list[Any]:
    """The JSON of every frame; each is one `data:` line and a blank one. Comments and `[DONE]` are left out."""
    assert frames.endswith(b"\n\n") or not frames
    blocks = frames.split(b"\n\n")[:-1]
    assert all(b"\n" not in block and b"\r" not in block for block in blocks)
    return [
        json.loads(block.removeprefix(b"data: ")) for block in blocks if block[:1] == b"d" and block[-6:] != b"[DONE]"
    ]


def test_a_streamed_answer_is_what_the_sdks_expect() -> None:
    encoder = an_encoder()
    frames = encoder.frames([an_entry(Kind.DELTA, "Hel"), an_entry(Kind.DELTA, "lo")]) + encoder.ending(ok())
    chunks = chunks_of(frames)
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 17, "model": 'a "model"'}
    assert all({name: chunk[name] for name in common} == common for chunk in chunks)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in [
            ({"role": "assistant", "content": "Hel"}, None),
            ({"content": "lo"}, None),
            ({}, "stop"),
        ]
    ]
    assert "usage" not in chunks[0]
    assert frames.endswith(DONE)
    assert frames.count(b"[DONE]") == 1


def test_usage_comes_last_and_only_if_it_was_asked_for() -> None:
    encoder = an_encoder(include_usage=True)
    frames = encoder.frames([an_entry(Kind.DELTA, "a")]) + encoder.ending(ok(Usage(3, 4)))
    *answer, usage = chunks_of(frames)
    assert [chunk["usage"] for chunk in answer] == [None, None]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_an_agent_that_does_not_know_its_usage_gives_zeros() -> None:
    (_, usage) = chunks_of(an_encoder(include_usage=True).ending(ok(None)))
    assert usage["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def test_an_empty_answer_still_names_its_role() -> None:
    (chunk,) = chunks_of(an_encoder().ending(ok(finish_reason="length")))
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunk["choices"][0]["finish_reason"] == "length"


def test_reasoning_and_tool_calls_have_fields_of_their_own() -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    encoder = an_encoder()
    entries = [an_entry(Kind.REASONING, "hm"), an_entry(Kind.TOOL_CALL, json.dumps(call))]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(encoder.frames(entries))]
    assert deltas == [{"role": "assistant", "reasoning_content": "hm"}, {"tool_calls": [call]}]


def test_the_agents_own_tools_are_not_shown() -> None:
    encoder = an_encoder()
    assert encoder.frames([an_entry(Kind.TOOL, "{}")]) == b""
    (chunk,) = chunks_of(encoder.frames([an_entry(Kind.DELTA, "a")]))
    assert chunk["choices"][0]["delta"]["role"] == "assistant", "the role still comes with the first content"


def test_a_heartbeat_takes_nothing_away() -> None:
    encoder = an_encoder()
    (chunk,) = chunks_of(encoder.heartbeat())
    assert chunk["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]
    (first,) = chunks_of(encoder.frames([an_entry(Kind.DELTA, "a")]))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}


def test_a_ping_is_a_comment() -> None:
    assert PING.startswith(b":")
    assert chunks_of(PING) == []


def test_an_error_frame_carries_nothing_else() -> None:
    (frame,) = chunks_of(error_frame(ErrorMarker("worker_lost", 'lost \ud83d "it"\n')))
    assert frame == {
        "error": {"message": 'lost \ud83d "it"\n', "type": "server_error", "param": None, "code": "worker_lost"}
    }


def whole(*entries: Entry, usage: Usage | None = None) -> Any:
    answer = completion(entries, ok(usage), completion_id="chatcmpl-1", created=17, model="m", metadata={"k": "v"})
    return json.loads(json_bytes(answer))


def test_a_whole_answer_is_one_object() -> None:
    answer = whole(
        an_entry(Kind.DELTA, "Hel"), an_entry(Kind.TOOL, "{}"), an_entry(Kind.DELTA, "lo"), usage=Usage(1, 2)
    )
    assert answer == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 17,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "service_tier": "default",
        "system_fingerprint": None,
        "metadata": {"k": "v"},
    }


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_whole_answer_gets_a_sentence(text: str) -> None:
    assert whole(an_entry(Kind.DELTA, text))["choices"][0]["message"]["content"] == EMPTY_ANSWER
    assert whole()["choices"][0]["message"]["content"] == EMPTY_ANSWER


def test_halves_of_a_pair_in_two_entries_are_one_character_in_a_whole_answer() -> None:
    answer = whole(an_entry(Kind.DELTA, "\ud83d"), an_entry(Kind.DELTA, "\ude42"))
    assert answer["choices"][0]["message"]["content"] == "🙂"


def test_fragments_of_tool_calls_are_joined_in_the_order_of_their_index() -> None:
    fragments = [
        {"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x'}},
        {"index": 0, "function": {"arguments": '":1}'}},
    ]
    message = whole(*(an_entry(Kind.TOOL_CALL, json.dumps(fragment)) for fragment in fragments))["choices"][0][
        "message"
    ]
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert message["content"] is None


def test_reasoning_is_kept_beside_a_whole_answer() -> None:
    message = whole(an_entry(Kind.REASONING, "hm"), an_entry(Kind.DELTA, "a"))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "a")
