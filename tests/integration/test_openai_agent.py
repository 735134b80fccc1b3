"""The openai agent, with the real SDK, against a model that fails on request."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from tests.speaking import RecordingVoice, a_turn
from tests.upstream import ScriptedUpstream, scripted_upstream
from tests.waiting import async_wait_until
from worker.agents.contract import AgentError, Outcome, Usage, Voice
from worker.agents.openai import FORWARDED_PARAMS, EventData, OpenAIAgent, _parsed


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as running:
        yield running


@pytest.fixture
async def agent(upstream: ScriptedUpstream) -> AsyncIterator[OpenAIAgent]:
    """An agent that does not repeat failed requests."""
    made = OpenAIAgent(AsyncOpenAI(api_key="none", base_url=upstream.base_url, max_retries=0), model="mock")
    yield made
    await made.aclose()


async def test_an_answer(agent: OpenAIAgent) -> None:
    voice = RecordingVoice()
    outcome = await agent.run(a_turn("[[mock k=5 i=0 r=2]]"), voice)
    assert outcome == Outcome(usage=Usage(prompt_tokens=1, completion_tokens=5))
    assert voice.all_of("reasoning") == ["because 0 ", "because 1 "]
    assert [fragment.partition(".")[0] for fragment in voice.all_of("text")] == ["@0", "@1", "@2", "@3", "@4"]


@pytest.mark.parametrize("reason", ["length", "content_filter"])
async def test_an_answer_that_was_cut_says_so(agent: OpenAIAgent, reason: str) -> None:
    voice = RecordingVoice()
    outcome = await agent.run(a_turn(f"[[mock k=6 i=0 fail={reason} at=3]]"), voice)
    assert outcome.finish_reason == reason
    assert len(voice.all_of("text")) == 3


async def test_a_finish_reason_is_enough(agent: OpenAIAgent) -> None:
    """`[DONE]` after it may be missing."""
    assert (await agent.run(a_turn("[[mock k=6 i=0 fail=nodone at=6]]"), RecordingVoice())).finish_reason == "stop"


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("close", "The connection to the model behind the agent failed."),
        ("eof", "The model behind the agent stopped in the middle of its answer."),
        ("sse", "The model behind the agent reported an error."),
        ("badjson", "The model behind the agent sent an answer that cannot be read."),
    ],
)
async def test_a_broken_stream_is_an_error(agent: OpenAIAgent, fail: str, message: str, at: int) -> None:
    voice = RecordingVoice()
    with pytest.raises(AgentError) as raised:
        await agent.run(a_turn(f"[[mock k=6 i=1 fail={fail} at={at}]]"), voice)
    assert raised.value.public_message == message
    assert len(voice.all_of("text")) == at


@pytest.mark.parametrize("status", [400, 401, 429, 500])
async def test_an_http_error_shows_its_status_only(agent: OpenAIAgent, status: int) -> None:
    with pytest.raises(AgentError) as raised:
        await agent.run(a_turn(f"[[mock fail=status{status}]]"), RecordingVoice())
    assert raised.value.public_message == f"The model behind the agent failed (HTTP {status})."
    assert "scripted" in str(raised.value.__cause__)  # for the log


@pytest.mark.parametrize("reason", ["function_call", "surprise"])
async def test_an_unknown_finish_reason_is_an_error(agent: OpenAIAgent, reason: str) -> None:
    with pytest.raises(AgentError, match="unknown reason"):
        await agent.run(a_turn(f"[[mock k=2 i=0 reason={reason}]]"), RecordingVoice())


@given(
    events=st.lists(st.lists(st.binary(max_size=9).map(lambda b: b.translate(None, b"\r\n")), min_size=1, max_size=3)),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    space=st.sampled_from([b"", b" "]),
    cuts=st.lists(st.integers(min_value=0), max_size=9),
)
def test_events_are_read_as_the_sdk_reads_them(
    events: list[list[bytes]], line_end: bytes, space: bytes, cuts: list[int]
) -> None:
    """However the body is cut on its way."""
    body = b": a comment" + line_end * 2 + b"event: x" + line_end
    for lines in events:
        for line in lines:
            body += b"data:" + (b" " if line.startswith(b" ") else space) + line + line_end
        body += line_end
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    reader = EventData()
    read = [data for start, end in pairwise(places) for data in reader.feed(body[start:end])]
    assert read == [b"\n".join(lines) for lines in events]


def test_half_a_surrogate_pair_is_read() -> None:
    assert _parsed(b'{"a":"\\ud83d"}') == {"a": "\ud83d"}


async def test_connections_are_used_again(agent: OpenAIAgent, upstream: ScriptedUpstream) -> None:
    for _ in range(3):
        await agent.run(a_turn("[[mock k=3 i=0]]"), RecordingVoice())
    assert upstream.stats["connections"] == 1


async def test_nobody_listens() -> None:
    agent = OpenAIAgent(AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:9/v1", max_retries=0), model="mock")
    with pytest.raises(AgentError, match="connection"):
        await agent.run(a_turn(), RecordingVoice())
    await agent.aclose()


async def test_a_request_is_repeated_before_its_answer_began(upstream: ScriptedUpstream) -> None:
    agent = OpenAIAgent(AsyncOpenAI(api_key="none", base_url=upstream.base_url, max_retries=1), model="mock")
    voice = RecordingVoice()
    await agent.run(a_turn("[[mock k=3 i=0 fail=status500 times=1 id=a]]"), voice)
    assert upstream.stats["requests"] == 2
    assert len(voice.all_of("text")) == 3
    await agent.aclose()


async def test_a_request_is_not_repeated_once_its_answer_began(upstream: ScriptedUpstream) -> None:
    agent = OpenAIAgent(AsyncOpenAI(api_key="none", base_url=upstream.base_url, max_retries=5), model="mock")
    with pytest.raises(AgentError):
        await agent.run(a_turn("[[mock k=4 i=1 fail=close at=2 times=1 id=b]]"), RecordingVoice())
    assert upstream.stats["requests"] == 1
    await agent.aclose()


async def test_a_call_of_the_clients_tool(agent: OpenAIAgent) -> None:
    voice = RecordingVoice()
    outcome = await agent.run(a_turn('[[mock tool=weather args={"in":"Bonn"}]]'), voice)
    assert outcome.finish_reason == "tool_calls"
    assert voice.all_of("tool_call") == [
        {
            "index": 0,
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"in":"Bonn"}'},
        }
    ]


async def test_messages_pass_unchanged_and_only_known_parameters(
    agent: OpenAIAgent, upstream: ScriptedUpstream
) -> None:
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "[[mock k=1 i=0]]"}, file]},
    ]
    params = {"temperature": 0.5, "tools": [], "n": 3, "stream": False, "store": True, "model": "theirs"}
    await agent.run(a_turn(messages=messages, params=params), RecordingVoice())
    [request] = upstream.requests
    assert request == {
        "messages": messages,
        "model": "mock",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "tools": [],
    }


def test_the_sdk_knows_every_forwarded_parameter() -> None:
    client = AsyncOpenAI(api_key="none")
    assert set(inspect.signature(client.chat.completions.create).parameters) >= FORWARDED_PARAMS


async def test_parallel_turns_keep_their_own_usage(agent: OpenAIAgent) -> None:
    async def ask(tokens: int) -> Outcome:
        return await agent.run(a_turn(f"[[mock k={tokens} i=1]]"), RecordingVoice())

    outcomes = await asyncio.gather(*(ask(tokens) for tokens in range(1, 9)))
    assert [outcome.usage and outcome.usage.completion_tokens for outcome in outcomes] == list(range(1, 9))


@pytest.mark.parametrize("script", ["[[mock k=1000 i=20]]", "[[mock k=4 i=1 fail=hang at=2]]", "[[mock ttft=60000]]"])
async def test_cancelling_closes_the_connection(agent: OpenAIAgent, upstream: ScriptedUpstream, script: str) -> None:
    turn = asyncio.create_task(agent.run(a_turn(script), RecordingVoice()))
    await async_wait_until(lambda: upstream.stats["requests"], timeout=5, description="the model was asked")
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    await async_wait_until(
        lambda: upstream.stats["client_gone_midstream"], timeout=5, description="the connection was closed"
    )


async def test_a_voice_that_fails_closes_the_connection(agent: OpenAIAgent, upstream: ScriptedUpstream) -> None:
    class Broken(RecordingVoice):
        async def text(self, fragment: str) -> None:  # noqa: ARG002 - the voice's signature
            raise ConnectionError("Redis is away")

    voice: Voice = Broken()
    with pytest.raises(ConnectionError, match="Redis is away"):
        await agent.run(a_turn("[[mock k=1000 i=20]]"), voice)
    await async_wait_until(
        lambda: upstream.stats["client_gone_midstream"], timeout=5, description="the connection was closed"
    )


@pytest.mark.parametrize(
    ("environ", "key"), [({"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, "none"), ({"OPENAI_API_KEY": "k"}, "k")]
)
async def test_a_server_without_keys_gets_a_placeholder(environ: Mapping[str, str], key: str) -> None:
    agent = OpenAIAgent.from_environment(model="mock", environ=environ)
    client: Any = agent._client
    assert client.api_key == key
    await agent.aclose()


async def test_half_of_an_emoji_fails_no_turn(agent: OpenAIAgent, upstream: ScriptedUpstream) -> None:
    """A client may have cut its text in the middle of one; the halves of another belong together."""
    await agent.run(a_turn("\ud83d or \ud83d\ude00 [[mock k=2 i=0]]"), RecordingVoice())
    assert upstream.requests[-1]["messages"][-1]["content"].startswith("\ufffd or \U0001f600 ")
