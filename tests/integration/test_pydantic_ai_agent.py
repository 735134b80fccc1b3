"""A pydantic-ai agent with its real OpenAI client, against a model that fails on request."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.speaking import RecordingVoice, a_turn
from tests.upstream import scripted_upstream
from worker.agents.contract import AgentError, Outcome, Usage
from worker.agents.pydantic_ai import PydanticAIAgent


@pytest.fixture
async def agent() -> AsyncIterator[PydanticAIAgent]:
    async with (
        scripted_upstream() as upstream,
        AsyncOpenAI(api_key="none", base_url=upstream.base_url, max_retries=0) as client,
    ):
        model = OpenAIChatModel("mock", provider=OpenAIProvider(openai_client=client))
        wrapped: Agent[None, str] = Agent(model)

        @wrapped.tool_plain
        def list_dir(path: str) -> str:
            return f"nothing in {path}"

        yield PydanticAIAgent(wrapped, name="test")


async def test_an_answer(agent: PydanticAIAgent) -> None:
    voice = RecordingVoice()
    outcome = await agent.run(a_turn("[[mock k=5 i=0 r=2]]"), voice)
    assert (outcome.finish_reason, outcome.usage) == ("stop", Usage(prompt_tokens=1, completion_tokens=5))
    assert "".join(voice.all_of("reasoning")) == "because 0 because 1 "
    assert [token.partition(".")[0] for token in voice.whole_text.split("; ")] == ["@0", "@1", "@2", "@3", "@4", ""]


async def test_a_tool(agent: PydanticAIAgent) -> None:
    voice = RecordingVoice()
    outcome: Outcome = await agent.run(a_turn('[[mock k=2 i=0 tool=list_dir args={"path":"."}]]'), voice)
    assert outcome.finish_reason == "stop"
    assert voice.all_of("tool") == [("list_dir", "started"), ("list_dir", "completed")]


@pytest.mark.parametrize("args", ['{"path":"."}', '{"path":"/srv/da'], ids=["whole arguments", "half of them"])
async def test_no_tool_runs_that_was_asked_for_in_a_response_that_was_cut(agent: PydanticAIAgent, args: str) -> None:
    """It might be asked for with the half of a path, and the sentence before it is a half one, too."""
    voice = RecordingVoice()
    with pytest.raises(AgentError, match="stopped in the middle"):
        await agent.run(a_turn(f"[[mock k=2 i=0 say=2 tool=list_dir args={args} fail=toolcut]]"), voice)
    assert ("list_dir", "completed") not in voice.all_of("tool")


@pytest.mark.parametrize("reason", ["length", "content_filter"])
async def test_an_answer_that_was_cut_says_so(agent: PydanticAIAgent, reason: str) -> None:
    outcome = await agent.run(a_turn(f"[[mock k=6 i=0 fail={reason} at=3]]"), RecordingVoice())
    assert outcome.finish_reason == reason


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("close", "The connection to the model behind the agent failed."),
        ("eof", "The model behind the agent stopped in the middle of its answer."),
        ("status401", "The model behind the agent failed (HTTP 401)."),
        ("status500", "The model behind the agent failed (HTTP 500)."),
    ],
)
async def test_a_model_that_fails_is_a_failure(agent: PydanticAIAgent, fail: str, message: str) -> None:
    voice = RecordingVoice()
    with pytest.raises(AgentError) as raised:
        await agent.run(a_turn(f"[[mock k=6 i=0 fail={fail} at=3]]"), voice)
    assert raised.value.public_message == message
    assert voice.whole_text.count("@") <= 3


@pytest.mark.parametrize("fail", ["sse", "badjson"])
async def test_what_cannot_be_read_is_a_failure(agent: PydanticAIAgent, fail: str) -> None:
    with pytest.raises(Exception) as raised:
        await agent.run(a_turn(f"[[mock k=6 i=0 fail={fail} at=3]]"), RecordingVoice())
    assert not isinstance(raised.value, AssertionError)


async def test_half_of_an_emoji_fails_no_turn(agent: PydanticAIAgent) -> None:
    """A client may have cut its text in the middle of one."""
    assert (await agent.run(a_turn("\ud83d [[mock k=2 i=0]]"), RecordingVoice())).finish_reason == "stop"
