"""An async generator of events as an agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.speaking import RecordingVoice, a_turn
from worker.agents.contract import Outcome, Turn, Usage
from worker.agents.events import (
    Done,
    EventsAgent,
    FunctionCall,
    Reasoning,
    Text,
    ToolCompleted,
    ToolFailed,
    ToolStarted,
)


async def run(generate: Any, voice: RecordingVoice | None = None, **turn: Any) -> Outcome:
    return await EventsAgent(generate, name="test").run(a_turn(**turn), voice or RecordingVoice())


async def test_everything_is_said_in_order() -> None:
    async def generate(turn: Turn) -> AsyncIterator[Any]:
        yield Reasoning("hm")
        yield ToolStarted("search", "1", "for cats")
        yield ToolCompleted("search", "1")
        yield ToolStarted("fetch")
        yield ToolFailed("fetch")
        yield "Hel"
        yield Text("lo")
        yield FunctionCall({"index": 0, "id": "call_1"})

    voice = RecordingVoice()
    assert await run(generate, voice) == Outcome()
    assert voice.said == [
        ("reasoning", "hm"),
        ("tool", ("search", "started")),
        ("tool", ("search", "completed")),
        ("tool", ("fetch", "started")),
        ("tool", ("fetch", "failed")),
        ("text", "Hel"),
        ("text", "lo"),
        ("tool_call", {"index": 0, "id": "call_1"}),
    ]
    assert voice.tool_details == [("1", "for cats"), ("1", None), (None, None), (None, None)]


async def test_the_turn_is_given_and_the_outcome_taken() -> None:
    async def generate(turn: Turn) -> AsyncIterator[Any]:
        yield str(turn.messages[-1]["content"])
        yield Done(finish_reason="length", usage=Usage(prompt_tokens=1), session_state=turn.session_state)

    outcome = await run(generate, question="Hi", session_state=b"state")
    assert outcome == Outcome(finish_reason="length", usage=Usage(prompt_tokens=1), session_state=b"state")


async def test_code_behind_done_still_runs() -> None:
    ran = []

    async def generate(turn: Turn) -> AsyncIterator[Any]:
        yield Done()
        ran.append("to its end")

    await run(generate)
    assert ran == ["to its end"]


@pytest.mark.parametrize("event", ["late", Done(), Text("late")])
async def test_nothing_may_follow_done(event: Any) -> None:
    async def generate(turn: Turn) -> AsyncIterator[Any]:
        yield Done()
        yield event

    with pytest.raises(TypeError, match="after Done"):
        await run(generate)


@pytest.mark.parametrize("thing", [None, 7, b"bytes", {"text": "x"}])
async def test_what_is_not_an_event_fails_the_turn(thing: Any) -> None:
    async def generate(turn: Turn) -> AsyncIterator[Any]:
        yield thing

    with pytest.raises(TypeError, match="is not an event"):
        await run(generate)


async def test_an_exception_fails_the_turn() -> None:
    async def generate(turn: Turn) -> AsyncIterator[Any]:
        yield "half"
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await run(generate)


async def test_the_generator_waits_until_its_tool_event_is_delivered() -> None:
    delivering, delivered, ran = asyncio.Event(), asyncio.Event(), []

    class SlowVoice(RecordingVoice):
        async def tool(self, *_: Any, **__: Any) -> None:
            delivering.set()
            await delivered.wait()

    async def generate(turn: Turn) -> AsyncIterator[Any]:
        yield ToolStarted("search")
        ran.append("the tool")

    task = asyncio.create_task(run(generate, SlowVoice()))
    await asyncio.wait_for(delivering.wait(), 5)
    assert ran == []
    delivered.set()
    await task
    assert ran == ["the tool"]


@pytest.mark.parametrize("where", ["in the generator", "in the voice"])
async def test_a_cancelled_generator_is_closed(where: str) -> None:
    reached, closed = asyncio.Event(), []

    class SlowVoice(RecordingVoice):
        async def text(self, _fragment: str) -> None:
            reached.set()
            await asyncio.Event().wait()

    async def generate(turn: Turn) -> AsyncIterator[Any]:
        try:
            if where == "in the voice":
                yield "said"
            reached.set()
            await asyncio.Event().wait()
            yield "never"
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    task = asyncio.create_task(run(generate, SlowVoice()))
    await asyncio.wait_for(reached.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [True]
