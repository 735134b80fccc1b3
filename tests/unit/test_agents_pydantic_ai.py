"""A pydantic-ai agent behind our contract, with pydantic-ai's own test models."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError
from pydantic_ai.messages import BinaryContent, ModelMessage, ModelResponse, NativeToolCallPart, NativeToolReturnPart
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import DeferredToolRequests

from tests.speaking import RecordingVoice, a_turn
from tests.waiting import async_wait_until
from worker.agents.contract import AgentError, Outcome, ToolStatus, Usage
from worker.agents.pydantic_ai import PydanticAIAgent, content_of, finish_reason, history_of, is_from_openai_chat


async def run(agent: Agent[Any, Any], voice: RecordingVoice | None = None, **turn: Any) -> Outcome:
    return await PydanticAIAgent(agent, name="test").run(a_turn(**turn), voice or RecordingVoice())


def saying(*answers: Any, seen: list[list[ModelMessage]] | None = None) -> FunctionModel:
    """A model that gives these answers in turn: lists of what a stream function may yield, or of exceptions."""
    left = list(answers)

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        if seen is not None:
            seen.append(messages)
        for item in left.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item

    return FunctionModel(stream_function=stream)


def call(name: str, arguments: str = "{}", call_id: str = "call_1") -> dict[int, DeltaToolCall]:
    return {0: DeltaToolCall(name=name, json_args=arguments, tool_call_id=call_id)}


async def test_text_and_reasoning_arrive_as_the_model_writes_them() -> None:
    voice = RecordingVoice()

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        for said, fragment in enumerate([{0: DeltaThinkingPart(content="hm")}, "Hel", "lo"]):
            await async_wait_until(
                lambda: len([what for _, what in voice.said if what]) == said,  # noqa: B023 - waits inside of the loop
                timeout=5,
                description="what was written before to be said",
            )
            yield fragment

    outcome = await run(Agent(FunctionModel(stream_function=stream)), voice)
    assert [(kind, what) for kind, what in voice.said if what] == [
        ("reasoning", "hm"),
        ("text", "Hel"),
        ("text", "lo"),
    ]
    assert (outcome.finish_reason, outcome.text) == ("stop", None)


async def test_usage_is_that_of_the_run() -> None:
    outcome = await run(Agent(TestModel(custom_output_text="one two three")))
    assert outcome.usage == Usage(prompt_tokens=51, completion_tokens=3)


# -- tools -------------------------------------------------------------------------------------------------------------


async def test_a_tool_is_announced_before_it_runs() -> None:
    delivering, delivered, ran = asyncio.Event(), asyncio.Event(), []

    class SlowVoice(RecordingVoice):
        async def tool(self, name: str, status: ToolStatus, **details: Any) -> None:
            if status == "started":
                delivering.set()
                await delivered.wait()
            await super().tool(name, status, **details)

    agent = Agent(saying(["Let me see. ", call("look")], ["Done."]))

    @agent.tool_plain
    async def look() -> str:
        ran.append(True)
        return "something"

    voice = SlowVoice()
    task = asyncio.create_task(run(agent, voice))
    await asyncio.wait_for(delivering.wait(), 5)
    await asyncio.sleep(0)
    assert ran == []
    delivered.set()
    await task
    said = [(kind, what) for kind, what in voice.said if what]
    assert said == [
        ("text", "Let me see. "),
        ("tool", ("look", "started")),
        ("tool", ("look", "completed")),
        ("text", "Done."),
    ]
    assert voice.tool_details == [("call_1", None), ("call_1", None)]


async def test_a_tool_that_wants_to_be_asked_again_has_failed() -> None:
    agent = Agent(saying([call("look", call_id="a")], [call("look", call_id="b")], ["Done."]))
    tries = []

    @agent.tool_plain(retries=1)
    def look() -> str:
        tries.append(True)
        if len(tries) == 1:
            raise ModelRetry("not like that")
        return "something"

    voice = RecordingVoice()
    await run(agent, voice)
    assert voice.all_of("tool") == [("look", status) for status in ("started", "failed", "started", "completed")]


async def test_a_tool_that_raises_fails_the_turn() -> None:
    agent = Agent(saying([call("look")]))

    @agent.tool_plain
    def look() -> str:
        raise ZeroDivisionError

    voice = RecordingVoice()
    with pytest.raises(ZeroDivisionError):
        await run(agent, voice)
    assert voice.all_of("tool") == [("look", "started"), ("look", "failed")]


async def test_a_tool_of_the_provider_is_shown_too() -> None:
    used = NativeToolCallPart("web_search", {"query": "cats"}, tool_call_id="n1")
    found = NativeToolReturnPart("web_search", "cats", tool_call_id="n1")
    voice = RecordingVoice()
    await run(Agent(saying([{0: used}, {1: found}, "Cats."])), voice)
    assert voice.all_of("tool") == [("web_search", "started"), ("web_search", "completed")]
    assert voice.whole_text == "Cats."


async def test_a_tool_that_somebody_else_has_to_approve_is_no_answer() -> None:
    agent = Agent(saying([call("rm")]), output_type=[str, DeferredToolRequests])

    @agent.tool_plain(requires_approval=True)
    def rm() -> str:
        return "gone"

    with pytest.raises(AgentError, match="somebody else"):
        await run(agent)


# -- history -----------------------------------------------------------------------------------------------------------


async def test_a_session_goes_on_where_its_last_turn_ended() -> None:
    seen: list[list[ModelMessage]] = []
    agent = Agent(saying(["Hello Ann."], ["Ann."], seen=seen), system_prompt="Be brief.")
    first = await run(agent, question="I am Ann.")
    await run(agent, question="Who am I?", session_state=first.session_state)
    assert written(seen[1]) == ["Be brief.", "I am Ann.", "Hello Ann.", "Who am I?"]


def written(messages: list[ModelMessage]) -> list[Any]:
    return [part.content for message in messages for part in message.parts]  # type: ignore[union-attr]  # they have it


async def test_a_history_of_the_client_comes_behind_the_agents_own_prompt() -> None:
    seen: list[list[ModelMessage]] = []
    history = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "My name is Ann."},
        {"role": "assistant", "content": "Ahoy Ann."},
        {"role": "user", "content": "What is my name?"},
    ]
    agent = Agent(saying(["Ann."], seen=seen), system_prompt="Be brief.")
    outcome = await run(agent, messages=history, owns_history=True)
    assert written(seen[0]) == ["Be brief.", *(message["content"] for message in history)]
    assert outcome.session_state is None


async def test_any_text_and_any_file_can_be_remembered() -> None:
    seen: list[list[ModelMessage]] = []
    agent = Agent(saying(["é \ud800"], ["fine"], seen=seen))
    file = {"filename": "a.bin", "file_data": base64.b64encode(b"\x00\xff").decode()}
    first = await run(agent, question=[{"type": "text", "text": "\ud800"}, {"type": "file", "file": file}])
    await run(agent, session_state=first.session_state)
    asked, answer, _ = written(seen[1])
    assert asked == ["\ufffd", BinaryContent(b"\x00\xff", media_type="application/octet-stream")]
    assert answer == "é ?"


def test_tool_calls_of_a_history_keep_their_results() -> None:
    function = {"name": "look", "arguments": '{"at": 1}'}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "a cat"},
    ]
    asked, told = history_of(messages)
    assert isinstance(asked, ModelResponse)
    assert [(asked_part.tool_name, asked_part.tool_call_id) for asked_part in asked.tool_calls] == [("look", "c")]
    [part] = told.parts
    assert (part.part_kind, part.tool_name, part.content) == ("tool-return", "look", "a cat")  # type: ignore[union-attr]


def test_files_travel_inside_of_the_question() -> None:
    def url(media_type: str, data: bytes) -> str:
        return f"data:{media_type};base64,{base64.b64encode(data).decode()}"

    content = content_of(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": url("image/png", b"picture")}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": base64.b64encode(b"pages").decode()}},
            ],
        }
    )
    assert content == [
        "look",
        BinaryContent(b"picture", media_type="image/png"),
        BinaryContent(b"pages", media_type="application/pdf"),
    ]
    with pytest.raises(AgentError, match="remote URL"):
        content_of({"content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]})


@pytest.mark.parametrize("state", [b"not json", b'[{"type": "human", "data": {"content": "hi"}}]'])
async def test_a_session_of_another_agent_is_refused(state: bytes) -> None:
    with pytest.raises(AgentError, match="begun by another agent"):
        await run(Agent(TestModel()), session_state=state)


# -- endings -----------------------------------------------------------------------------------------------------------


def response(reason: str | None, **fields: Any) -> ModelResponse:
    """The last of a run, from a provider behind a connection unless `fields` say otherwise."""
    return ModelResponse(parts=[], **{"finish_reason": reason, "provider_url": "https://example.com"} | fields)


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter"])
def test_the_finish_reason_is_the_models(reason: str) -> None:
    assert finish_reason(response(reason), TestModel()) == reason


def test_a_model_without_a_connection_has_ended_when_it_returns() -> None:
    assert finish_reason(response(None, provider_url=None), TestModel()) == "stop"


def test_a_call_of_an_output_tool_is_an_end() -> None:
    assert finish_reason(response("tool_call"), TestModel(), output_by_tool=True) == "stop"


@pytest.mark.parametrize(
    ("ended", "message"),
    [
        (response(None), "in the middle"),
        (response("stop", state="incomplete"), "in the middle"),
        (response("stop", state="interrupted"), "in the middle"),
        (response("error"), "unknown reason"),
        (response("tool_call"), "unknown reason"),
    ],
    ids=lambda value: f"{value.finish_reason} {value.state}" if isinstance(value, ModelResponse) else "",
)
def test_an_answer_that_its_model_did_not_end_is_a_failure(ended: ModelResponse, message: str) -> None:
    with pytest.raises(AgentError, match=message):
        finish_reason(ended, TestModel())


def test_a_reason_that_pydantic_ai_made_up_is_none() -> None:
    openai = type("OpenAIChatModel", (), {"system": "openai"})()
    told = {"finish_reason": "stop"}
    assert finish_reason(response("stop", provider_name="openai", provider_details=told), openai) == "stop"
    with pytest.raises(AgentError, match="in the middle"):
        finish_reason(response("stop", provider_name="openai"), openai)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModelHTTPError(429, "test", "secret"), "The model behind the agent failed (HTTP 429)."),
        (ModelAPIError("test", "secret"), "The connection to the model behind the agent failed."),
    ],
)
async def test_a_failing_model_fails_the_turn(error: Exception, message: str) -> None:
    with pytest.raises(AgentError) as raised:
        await run(Agent(saying(["half", error])))
    assert raised.value.public_message == message


async def test_any_other_failure_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        await run(Agent(saying(["half", RuntimeError("broken")])))


async def test_an_answer_that_is_rejected_after_it_was_said_is_a_failure() -> None:
    agent: Agent[None, str] = Agent(saying(["first"], ["second"]))

    @agent.output_validator
    def picky(text: str) -> str:
        if text == "first":
            raise ModelRetry("try again")
        return text

    voice = RecordingVoice()
    with pytest.raises(AgentError, match="rejected its answer"):
        await run(agent, voice)
    assert voice.whole_text == "first"


class City(BaseModel):
    name: str


async def test_a_structured_answer_is_json_even_after_some_text() -> None:
    model = saying(["Thinking. ", call("final_result", '{"name": "Oslo"}')])
    voice = RecordingVoice()
    outcome = await run(Agent(model, output_type=City), voice)
    assert voice.whole_text == 'Thinking. {"name":"Oslo"}'
    assert outcome.finish_reason == "stop"


async def test_a_structured_answer_that_is_rejected_was_not_said_yet() -> None:
    model = saying([call("final_result", "{}", "a")], [call("final_result", '{"name": "Oslo"}', "b")])
    voice = RecordingVoice()
    await run(Agent(model, output_type=City), voice)
    assert voice.whole_text == '{"name":"Oslo"}'


@pytest.mark.parametrize("where", ["model", "tool"])
async def test_a_cancelled_run_stops_where_it_is(where: str) -> None:
    reached, stopped = asyncio.Event(), []

    async def hang() -> None:
        reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        if where == "tool":
            yield call("look")
        else:
            yield "half"
            await hang()

    agent = Agent(FunctionModel(stream_function=stream))

    @agent.tool_plain
    async def look() -> str:
        await hang()
        return "never"

    task = asyncio.create_task(run(agent))
    await asyncio.wait_for(reached.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped == [True]


def test_a_wrapped_openai_model_is_known() -> None:
    openai = type("OpenAIChatModel", (), {"system": "openai"})()
    wrapper = type("WrapperModel", (), {"wrapped": openai})()
    fallback = type("FallbackModel", (), {"models": [TestModel(), wrapper]})()
    models = (openai, wrapper, fallback, TestModel())
    theirs, others = ModelResponse([], provider_name="openai"), ModelResponse([], provider_name="xai")
    assert [is_from_openai_chat(theirs, model) for model in models] == [True, True, True, False]
    assert [is_from_openai_chat(others, model) for model in models] == [False] * 4


async def test_a_model_that_stands_in_for_another_is_not_judged_as_that_one() -> None:
    """It has ended when it returns; of OpenAI's it would be asked for the reason."""
    client = AsyncOpenAI(api_key="none", base_url="http://127.0.0.1:9/v1", max_retries=0)
    nobody = OpenAIChatModel("nobody", provider=OpenAIProvider(openai_client=client))
    voice = RecordingVoice()
    outcome = await run(Agent(FallbackModel(nobody, saying(["Come back ", "later."]))), voice)
    assert (outcome.finish_reason, voice.whole_text) == ("stop", "Come back later.")
