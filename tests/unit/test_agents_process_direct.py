"""Wrapping an object with nanobot's `process_direct`."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.speaking import RecordingVoice, a_turn
from worker.agents.contract import Outcome
from worker.agents.process_direct import ProcessDirectAgent

REPORT = {"type": "file", "file": {"filename": "r.txt", "file_data": base64.b64encode(b"figures").decode()}}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}, REPORT]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"in": "Bonn"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "Rain."},
    {"role": "user", "content": "And tomorrow?"},
]


class Scripted:
    """Keeps its calls; streams `tokens` in two segments and returns `answer`."""

    def __init__(self, answer: Any = None, tokens: tuple[str, ...] = ()) -> None:
        self.answer = answer
        self.tokens = tokens
        self.calls: list[dict[str, Any]] = []
        self.media_contents: list[bytes] = []

    async def process_direct(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        self.media_contents = [Path(path).read_bytes() for path in arguments["media"] or ()]
        for token in self.tokens:
            await arguments["on_stream"](token)
            await arguments["on_stream_end"](resuming=True)
        return self.answer


async def test_it_passes_nanobots_arguments() -> None:
    scripted = Scripted("fine")
    await ProcessDirectAgent(scripted).run(a_turn("How are you?", session_key="api:s"), RecordingVoice())
    [call] = scripted.calls
    assert set(call) == {"content", "media", "session_key", "channel", "chat_id", "on_stream", "on_stream_end"}
    assert (call["content"], call["media"], call["session_key"]) == ("How are you?", None, "api:s")
    assert (call["channel"], call["chat_id"]) == ("api", "default")


async def test_a_segment_end_is_not_the_end() -> None:
    voice = RecordingVoice()
    await ProcessDirectAgent(Scripted(tokens=("a", "b"))).run(a_turn(), voice)
    assert voice.all_of("text") == ["a", "b"]


@pytest.mark.parametrize("answer", ["text", SimpleNamespace(content="text")])
async def test_what_it_returns_is_the_outcome(answer: Any) -> None:
    assert await ProcessDirectAgent(Scripted(answer)).run(a_turn(), RecordingVoice()) == Outcome(text="text")


@pytest.mark.parametrize("answer", [None, SimpleNamespace(content=None)])
async def test_it_may_return_nothing(answer: Any) -> None:
    assert await ProcessDirectAgent(Scripted(answer)).run(a_turn(), RecordingVoice()) == Outcome()


async def test_files_exist_while_it_runs_and_not_after() -> None:
    scripted = Scripted()
    await ProcessDirectAgent(scripted).run(a_turn([REPORT]), RecordingVoice())
    assert scripted.media_contents == [b"figures"]
    assert not Path(scripted.calls[0]["media"][0]).parent.exists()


async def test_a_history_is_written_out_before_the_question() -> None:
    scripted = Scripted()
    await ProcessDirectAgent(scripted).run(a_turn(messages=HISTORY, owns_history=True), RecordingVoice())
    assert scripted.calls[0]["content"] == (
        "The conversation so far:\n\n"
        "[system]\nBe brief.\n\n"
        "[user]\nWeather?\n(a file: r.txt)\n\n"
        '[assistant]\n(called weather with "{\\"in\\": \\"Bonn\\"}")\n\n'
        "[tool weather]\nrain\n\n"
        "[assistant]\nRain.\n\n"
        "The user now says:\nAnd tomorrow?"
    )


async def test_a_history_goes_to_a_parameter_called_messages() -> None:
    class TakesMessages(Scripted):
        async def process_direct(self, *, messages: Any = None, **arguments: Any) -> Any:
            return await super().process_direct(messages=messages, **arguments)

    scripted = TakesMessages()
    await ProcessDirectAgent(scripted).run(a_turn(messages=HISTORY, owns_history=True), RecordingVoice())
    assert scripted.calls[0]["messages"] == HISTORY
    assert scripted.calls[0]["content"] == "And tomorrow?"


async def test_a_session_keeps_its_own_history() -> None:
    scripted = Scripted()
    await ProcessDirectAgent(scripted).run(a_turn(messages=HISTORY, owns_history=False), RecordingVoice())
    assert scripted.calls[0]["content"] == "And tomorrow?"


async def test_it_connects_once_while_concurrent_turns_wait() -> None:
    class Connecting(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.connections = 0
            self.may_connect = asyncio.Event()

        async def _connect_mcp(self) -> None:
            self.connections += 1
            await self.may_connect.wait()

    scripted = Connecting()
    agent = ProcessDirectAgent(scripted)
    async with asyncio.TaskGroup() as turns:
        for _ in range(3):
            turns.create_task(agent.run(a_turn(), RecordingVoice()))
        await asyncio.sleep(0)
        assert scripted.calls == []
        scripted.may_connect.set()
    assert scripted.connections == 1
    assert len(scripted.calls) == 3


async def test_a_failed_connection_fails_the_turn_and_is_tried_again() -> None:
    class Flaky(Scripted):
        tried = False

        async def _connect_mcp(self) -> None:
            if not self.tried:
                self.tried = True
                raise OSError("no server")

    agent = ProcessDirectAgent(Flaky("here"))
    with pytest.raises(OSError, match="no server"):
        await agent.run(a_turn(), RecordingVoice())
    assert await agent.run(a_turn(), RecordingVoice()) == Outcome(text="here")


async def test_closing_calls_what_there_is() -> None:
    closed: list[str] = []

    async def close_mcp() -> None:
        closed.append("mcp")

    async def process_direct(**_arguments: Any) -> None: ...

    both = SimpleNamespace(process_direct=process_direct, close_mcp=close_mcp, aclose=lambda: closed.append("all"))
    await ProcessDirectAgent(both).aclose()
    assert closed == ["mcp", "all"]
    await ProcessDirectAgent(SimpleNamespace(process_direct=process_direct)).aclose()
