"""A LangGraph graph behind our contract, with a scripted chat model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import ToolException, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import RetryPolicy, interrupt

from tests.chat_models import ScriptedChatModel, call_of
from tests.speaking import RecordingVoice, a_turn
from tests.waiting import async_wait_until
from worker.agents.contract import AgentError, Outcome, ToolStatus, Usage
from worker.agents.langgraph import LangGraphAgent, finish_reason

Graph = Any  # their types do not matter here


async def run(graph: Graph, voice: RecordingVoice | None = None, **turn: Any) -> Outcome:
    return await LangGraphAgent(graph, name="test").run(a_turn(**turn), voice or RecordingVoice())


def chatting(model: ScriptedChatModel, *tools: Any, **compiled: Any) -> Graph:
    """The usual loop of a model and its tools."""

    async def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState).add_node("answer", answer).add_edge(START, "answer")
    if tools:
        builder.add_node("tools", ToolNode(tools)).add_edge("tools", "answer")
        builder.add_conditional_edges("answer", tools_condition)
    return builder.compile(**compiled)


def scripted(*answers: list[Any]) -> ScriptedChatModel:
    return ScriptedChatModel(answers=list(answers))


def one_node(node: Any) -> Graph:
    return StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile()


# -- text --------------------------------------------------------------------------------------------------------------


async def test_text_and_reasoning_arrive_as_the_model_writes_them() -> None:
    voice = RecordingVoice()

    async def until_said(count: int) -> None:
        await async_wait_until(lambda: len(voice.said) == count, timeout=5, description="what came before to be said")

    thought = AIMessageChunk(content=[{"type": "reasoning", "reasoning": "hm", "index": 0}])
    steps = [thought, lambda: until_said(1), "Hel", lambda: until_said(2), "lo"]
    outcome = await run(chatting(scripted(steps)), voice)
    assert voice.said == [("reasoning", "hm"), ("text", "Hel"), ("text", "lo")]
    assert outcome.finish_reason == "stop"


async def test_usage_is_the_sum_over_the_turn() -> None:
    @tool
    async def look() -> str:
        """Looks."""
        return "something"

    def counted(tokens_in: int, tokens_out: int) -> AIMessageChunk:
        usage: Any = {"input_tokens": tokens_in, "output_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
        return AIMessageChunk(content="", usage_metadata=usage)

    model = scripted([call_of("look"), counted(5, 1)], ["Done.", counted(7, 2)])
    assert (await run(chatting(model, look))).usage == Usage(prompt_tokens=12, completion_tokens=3)
    assert (await run(chatting(scripted(["Hi"])))).usage is None


async def test_what_the_graphs_own_code_answers_is_said_too() -> None:
    model = scripted(["From the model. "])

    async def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def add(state: MessagesState) -> dict[str, Any]:
        return {"messages": [AIMessage("From code.")]}

    builder = StateGraph(MessagesState).add_sequence([("answer", answer), ("add", add)]).add_edge(START, "answer")
    voice = RecordingVoice()
    await run(builder.compile(), voice)
    assert voice.whole_text == "From the model. From code."


async def test_what_a_model_said_is_not_repeated_if_the_node_makes_another_message_of_it() -> None:
    model = scripted(["Hello"])

    async def node(state: MessagesState) -> dict[str, Any]:
        said = await model.ainvoke(state["messages"])
        return {"messages": [AIMessage(said.text)]}

    voice = RecordingVoice()
    await run(one_node(node), voice)
    assert voice.whole_text == "Hello"


async def test_a_subgraph_is_heard_when_its_step_is_over() -> None:
    inner = chatting(scripted(["From ", "inside. "]))
    outer = scripted(["From outside."])

    async def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await outer.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState).add_sequence([("inner", inner), ("answer", answer)]).add_edge(START, "inner")
    voice = RecordingVoice()
    await run(builder.compile(), voice)
    assert voice.all_of("text") == ["From inside. ", "From outside."]


async def test_a_model_with_the_tag_nostream_and_one_inside_a_tool_are_not_the_answer() -> None:
    quiet, inside, model = scripted(["yes"]), scripted(["a cat"]), scripted([call_of("look")], ["A cat."])

    @tool
    async def look() -> str:
        """Looks."""
        return str((await inside.ainvoke("What is there?")).text)

    async def route(state: MessagesState) -> dict[str, Any]:
        await quiet.with_config(tags=["nostream"]).ainvoke("Is it safe?")
        return {}

    builder = StateGraph(MessagesState).add_sequence([("route", route), ("chat", chatting(model, look))])
    voice = RecordingVoice()
    await run(builder.add_edge(START, "route").compile(), voice)
    assert voice.whole_text == "A cat."
    assert voice.all_of("tool") == [("look", "started"), ("look", "completed")]


# -- tools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async tool", "tool in a thread", "node in a thread"])
async def test_a_tool_is_announced_before_it_runs(kind: str) -> None:
    delivering, delivered, ran = asyncio.Event(), asyncio.Event(), []

    class SlowVoice(RecordingVoice):
        async def tool(self, name: str, status: ToolStatus, **details: Any) -> None:
            if status == "started":
                delivering.set()
                await delivered.wait()
            await super().tool(name, status, **details)

    if kind == "async tool":

        @tool
        async def look() -> str:
            """Looks."""
            ran.append(True)
            return "something"

    else:

        @tool
        def look() -> str:
            """Looks."""
            ran.append(True)
            return "something"

    if kind == "node in a thread":

        def node(state: MessagesState) -> dict[str, Any]:
            found = look.invoke({"type": "tool_call", "name": "look", "args": {}, "id": "call_1"})
            return {"messages": [found, AIMessage("Done.")]}

        graph = one_node(node)
    else:
        graph = chatting(scripted([call_of("look")], ["Done."]), look)

    voice = SlowVoice()
    task = asyncio.create_task(run(graph, voice))
    await asyncio.wait_for(delivering.wait(), 5)
    await asyncio.sleep(0)
    assert ran == []
    delivered.set()
    await task
    assert voice.said == [("tool", ("look", "started")), ("tool", ("look", "completed")), ("text", "Done.")]
    assert voice.tool_details == [("call_1", None), ("call_1", None)]


async def test_a_tool_that_fails_is_told_from_one_that_does_not() -> None:
    @tool
    async def refuse() -> str:
        """Refuses."""
        raise ToolException("no")

    refuse.handle_tool_error = True

    @tool
    async def need(number: int) -> str:
        """Needs a number."""
        return "something"

    model = scripted([call_of("refuse", call_id="a")], [call_of("need", call_id="b")], ["Done."])
    voice = RecordingVoice()
    await run(chatting(model, refuse, need), voice)
    assert voice.said == [
        ("tool", ("refuse", "started")),
        ("tool", ("refuse", "failed")),
        ("tool", ("need", "started")),
        ("tool", ("need", "failed")),
        ("text", "Done."),
    ]


async def test_a_tool_that_raises_fails_the_turn() -> None:
    @tool
    async def look() -> str:
        """Looks."""
        raise ZeroDivisionError

    voice = RecordingVoice()
    with pytest.raises(ZeroDivisionError):
        await run(chatting(scripted([call_of("look")]), look), voice)
    assert voice.all_of("tool") == [("look", "started"), ("look", "failed")]


# -- history -----------------------------------------------------------------------------------------------------------


async def test_a_session_goes_on_where_its_last_turn_ended() -> None:
    @tool(response_format="content_and_artifact")
    async def look() -> tuple[str, object]:
        """Looks."""
        return "something", object()

    model = scripted([call_of("look")], ["Hello Ann."], ["Ann."])
    graph = chatting(model, look, checkpointer=InMemorySaver())
    voice = RecordingVoice()
    first = await run(graph, question="I am Ann.")
    await run(graph, voice, question="Who am I?", session_state=first.session_state)
    assert [message.type for message in model.asked[-1]] == ["human", "ai", "tool", "ai", "human"]
    assert [message.text for message in model.asked[-1] if message.text] == [
        "I am Ann.",
        "something",
        "Hello Ann.",
        "Who am I?",
    ]
    assert voice.whole_text == "Ann.", "only the new answer"


async def test_a_history_of_the_client_is_passed_on() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    history: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": [{"type": "text", "text": "My name is Ann."}, picture]},
        {"role": "assistant", "content": "Ahoy Ann."},
        {"role": "user", "content": "What is my name?"},
    ]
    model, voice = scripted(["Ann."]), RecordingVoice()
    outcome = await run(chatting(model), voice, messages=history, owns_history=True)
    assert [(message.type, message.content) for message in model.asked[0]] == [
        (kind, message["content"]) for kind, message in zip(("system", "human", "ai", "human"), history, strict=True)
    ]
    assert voice.whole_text == "Ann."
    assert outcome.session_state is None


@pytest.mark.parametrize("state", [b"not json", b'{"a": 1}', b'[{"kind": "request", "parts": []}]'])
async def test_a_session_of_another_agent_is_refused(state: bytes) -> None:
    with pytest.raises(AgentError, match="begun by another agent"):
        await run(chatting(scripted(["never"])), session_state=state)


async def test_any_text_can_be_remembered() -> None:
    """Without what UTF-8 cannot say: a model that is asked over HTTP could not be told it."""
    model = scripted(["é \ud800"], ["fine"])
    first = await run(chatting(model), question="\ud800")
    await run(chatting(model), session_state=first.session_state)
    assert [message.text for message in model.asked[1][:2]] == ["\ufffd", "é \ufffd"]


async def test_the_state_is_json() -> None:
    outcome = await run(chatting(scripted(["Hello"])))
    question, answer = json.loads(outcome.session_state or b"")
    assert (question["type"], answer["type"], answer["data"]["content"]) == ("human", "ai", "Hello")


# -- endings -----------------------------------------------------------------------------------------------------------


def ended(**told: Any) -> list[BaseMessage]:
    return [HumanMessage("?"), AIMessage("text", response_metadata=told)]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({}, "stop"),
        ({"finish_reason": "stop", "model_provider": "openai"}, "stop"),
        ({"finish_reason": "STOP"}, "stop"),
        ({"stop_reason": "end_turn"}, "stop"),
        ({"stopReason": "max_tokens"}, "length"),
        ({"finish_reason": "length"}, "length"),
        ({"done_reason": "length"}, "length"),
        ({"finish_reason": "content_filter"}, "content_filter"),
        ({"stop_reason": "refusal"}, "content_filter"),
        ({"status": "completed", "model_provider": "openai"}, "stop"),
    ],
)
def test_the_finish_reason_is_the_models(told: dict[str, str], reason: str) -> None:
    assert finish_reason(ended(**told)) == reason


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (ended(model_provider="openai"), "in the middle"),
        (ended(finish_reason="made_up"), "unknown reason"),
        ([AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "1"}])], "before it had run its tools"),
    ],
)
def test_an_answer_that_its_model_did_not_end_is_a_failure(messages: list[BaseMessage], message: str) -> None:
    with pytest.raises(AgentError, match=message):
        finish_reason(messages)


def test_code_may_have_the_last_word() -> None:
    assert finish_reason([AIMessage("a"), ToolMessage("b", tool_call_id="1")]) == "stop"
    assert finish_reason([]) == "stop"


def of_a_provider(content: str = "", **told: str) -> AIMessageChunk:
    return AIMessageChunk(content=content, response_metadata={"model_provider": "openai", **told})


async def test_no_tool_runs_that_was_asked_for_in_an_answer_that_was_cut() -> None:
    """LangChain completes the JSON of the arguments: here the tool would get the half of a path."""
    ran: list[str] = []

    @tool
    async def delete(path: str) -> str:
        """Deletes."""
        ran.append(path)
        return "deleted"

    cut = [of_a_provider("I will remove the te"), call_of("delete", '{"path": "/srv/da')]
    model = scripted(cut, ["Done.", of_a_provider(finish_reason="stop")])
    with pytest.raises(AgentError, match="in the middle"):
        await run(chatting(model, delete))
    assert ran == []


async def test_a_graph_may_ask_again_if_a_model_has_said_nothing() -> None:
    """As Gemini does that gives no candidates: a message without text, tools and finish reason."""
    model = scripted([of_a_provider()], ["Hello.", of_a_provider(finish_reason="stop")])

    async def insist(state: MessagesState) -> dict[str, Any]:
        answer = await model.ainvoke(state["messages"])
        return {"messages": [answer if answer.text else await model.ainvoke(state["messages"])]}

    voice = RecordingVoice()
    assert (await run(one_node(insist), voice)).finish_reason == "stop"
    assert voice.whole_text == "Hello."


async def test_any_part_of_an_answer_that_was_cut_fails_it() -> None:
    model = scripted([of_a_provider("The result is 4")], ["Anything else?", of_a_provider(finish_reason="stop")])

    async def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState).add_node("a", ask).add_node("b", ask).add_edge(START, "a").add_edge("a", "b")
    with pytest.raises(AgentError, match="in the middle"):
        await run(builder.compile())


async def test_code_that_makes_another_message_of_it_does_not_make_a_cut_answer_whole() -> None:
    model = scripted([of_a_provider("The result is 4")])

    async def strip(state: MessagesState) -> dict[str, Any]:
        return {"messages": [AIMessage((await model.ainvoke(state["messages"])).text.strip())]}

    with pytest.raises(AgentError, match="in the middle"):
        await run(one_node(strip))


async def test_a_failing_model_fails_the_turn() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        await run(chatting(scripted([RuntimeError("broken")])))


@pytest.mark.parametrize("said", [True, False])
async def test_a_model_that_is_asked_again_may_not_have_said_anything(said: bool) -> None:
    model = scripted([*(["half"] if said else []), ConnectionError("broken")], ["whole"])

    async def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    again = RetryPolicy(max_attempts=2, initial_interval=0.01)
    builder = StateGraph(MessagesState).add_node("answer", answer, retry_policy=again).add_edge(START, "answer")
    voice = RecordingVoice()
    if said:
        with pytest.raises(AgentError, match="in the middle"):
            await run(builder.compile(), voice)
        assert voice.whole_text == "half"
    else:
        await run(builder.compile(), voice)
        assert voice.whole_text == "whole"


async def test_a_graph_that_waits_for_a_person_is_no_answer() -> None:
    def ask(state: MessagesState) -> dict[str, Any]:
        interrupt("May I?")
        return {}

    with pytest.raises(AgentError, match="waits for an answer"):
        await run(one_node(ask))


async def test_a_graph_that_never_ends_is_a_failure() -> None:
    builder = StateGraph(MessagesState).add_node("again", lambda _: {}).add_edge(START, "again")
    with pytest.raises(AgentError, match="limit of steps"):
        await run(builder.add_edge("again", "again").compile().with_config(recursion_limit=5))


@pytest.mark.parametrize("where", ["model", "tool"])
async def test_a_cancelled_run_stops_where_it_is(where: str) -> None:
    reached, stopped = asyncio.Event(), []

    async def hang() -> None:
        reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)

    @tool
    async def look() -> str:
        """Looks."""
        await hang()
        return "never"

    steps = [call_of("look")] if where == "tool" else ["half", hang]
    task = asyncio.create_task(run(chatting(scripted(steps), look)))
    await asyncio.wait_for(reached.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped == [True]
