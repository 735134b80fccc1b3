"""An async generator of events as an agent.

    async def agent(turn):
        yield ToolStarted("search", call_id="1")
        found = await search(text_of(divide(turn).question))
        yield ToolCompleted("search", call_id="1")
        yield "I have found "                               # a plain string is text
        yield Text(found)
        yield Done(usage=Usage(prompt_tokens=7, completion_tokens=3))   # not needed for a plain `stop`

Rule 1: the end of the generator is the end of the answer; an exception fails the turn.
Rule 2: the generator goes on when its event was said. A tool event is in Redis by then.
Rule 3: `Done` is the last event, and says how the answer ended. The code behind it still runs.
Rule 4: the generator is closed, however the turn ends: what it holds belongs into `async with` or `finally`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

from worker.agents.contract import FinishReason, Outcome, Turn, Usage, Voice


@dataclass(frozen=True, slots=True)
class Text:
    """A fragment of the answer."""

    fragment: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A fragment of the model's reasoning."""

    fragment: str


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A fragment of a function call that the client is to execute."""

    delta: Mapping[str, Any]  # an element of an OpenAI `tool_calls` delta, with `index`


@dataclass(frozen=True, slots=True)
class ToolStarted:
    """One of the agent's own tools is about to run."""

    name: str
    call_id: str | None = None  # tells the calls of one tool apart
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCompleted:
    """It has run."""

    name: str
    call_id: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class ToolFailed:
    """It could not do what it was asked for; the turn may go on."""

    name: str
    call_id: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How the answer ended. The fields are those of `Outcome`."""

    finish_reason: FinishReason = "stop"
    usage: Usage | None = None
    session_state: bytes | None = None


Event: TypeAlias = str | Text | Reasoning | FunctionCall | ToolStarted | ToolCompleted | ToolFailed | Done


class EventsAgent:
    """Says what a generator yields."""

    def __init__(self, generate: Callable[[Turn], AsyncGenerator[Event, None]], *, name: str) -> None:
        self.name = name
        self._generate = generate

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        done: Done | None = None
        async with aclosing(self._generate(turn)) as events:
            async for event in events:
                if done is not None:
                    raise TypeError(f"{type(event).__name__} after Done")
                if type(event) is str:  # the commonest by far: without a coroutine to choose
                    await voice.text(event)
                elif isinstance(event, Done):
                    done = event
                else:
                    await say(event, voice)
        ending = done or Done()
        return Outcome(finish_reason=ending.finish_reason, usage=ending.usage, session_state=ending.session_state)

    async def aclose(self) -> None:
        """A generator holds what it needs for its turn, and nothing beyond."""


async def say(event: Event, voice: Voice) -> None:
    """Raises TypeError for what is not an event."""
    match event:
        case str(fragment) | Text(fragment):
            await voice.text(fragment)
        case Reasoning(fragment):
            await voice.reasoning(fragment)
        case FunctionCall(delta):
            await voice.tool_call(delta)
        case ToolStarted(name, call_id, detail):
            await voice.tool(name, "started", call_id=call_id, detail=detail)
        case ToolCompleted(name, call_id, detail):
            await voice.tool(name, "completed", call_id=call_id, detail=detail)
        case ToolFailed(name, call_id, detail):
            await voice.tool(name, "failed", call_id=call_id, detail=detail)
        case _:
            raise TypeError(f"{type(event).__name__} is not an event")
