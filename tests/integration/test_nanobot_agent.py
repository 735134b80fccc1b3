"""The nanobot agent, with the real nanobot, against a model that fails on request."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from nanobot.config import loader
from nanobot.providers.base import LLMProvider

from tests.speaking import RecordingVoice, a_turn, cancel_until_done
from tests.upstream import ScriptedUpstream, scripted_upstream
from tests.waiting import async_wait_until
from worker.agents.contract import AgentError, Outcome, Usage
from worker.agents.nanobot import NanobotAgent

PNG = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
    )
).decode()
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
REPORT = {"type": "file", "file": {"filename": "r.txt", "file_data": base64.b64encode(b"figures").decode()}}


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as running:
        yield running


@pytest.fixture
def home(tmp_path: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A nanobot configuration of its own; failed requests are repeated without a pause."""
    config = {
        "agents": {"defaults": {"workspace": str(tmp_path / "workspace"), "model": "mock", "provider": "custom"}},
        "providers": {"custom": {"apiKey": "none", "apiBase": upstream.base_url}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(loader, "_current_config_path", None)
    monkeypatch.setattr(LLMProvider, "_CHAT_RETRY_DELAYS", (0, 0, 0))
    return tmp_path


@pytest.fixture
async def agent(home: Path) -> AsyncIterator[NanobotAgent]:
    made = NanobotAgent.from_config(home / "config.json")
    yield made
    await made.aclose()


def files_under(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


def session_files(home: Path) -> set[str]:
    """What nanobot would keep of sessions on the disk."""
    return {path.name for path in files_under(home) if path.suffix in (".jsonl", ".json")} - {"config.json"}


def asked_messages(upstream: ScriptedUpstream) -> list[dict[str, Any]]:
    """The conversation of the latest request, without nanobot's own system prompt."""
    messages: list[dict[str, Any]] = upstream.requests[-1]["messages"]
    assert messages[0]["role"] == "system"
    return messages[1:]


async def test_an_answer(agent: NanobotAgent) -> None:
    voice = RecordingVoice()
    outcome = await agent.run(a_turn("[[mock k=5 i=1 r=2]]"), voice)
    assert outcome.finish_reason == "stop"
    assert outcome.usage == Usage(prompt_tokens=1, completion_tokens=5)
    assert "".join(voice.all_of("reasoning")) == "because 0 because 1"
    assert voice.whole_text.count("@") == 5


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("fail=close at=0", "The connection to the model behind the agent failed."),
        ("fail=close at=3", "The connection to the model behind the agent failed."),
        ("fail=eof at=0", "The connection to the model behind the agent failed."),
        ("fail=eof at=3", "The connection to the model behind the agent failed."),
        ("fail=sse at=0", "The model behind the agent failed."),
        ("fail=sse at=3", "The model behind the agent failed."),
        ("fail=badjson at=0", "The model behind the agent failed."),
        ("fail=badjson at=3", "The model behind the agent failed."),
        ("fail=length at=0", "The model behind the agent gave no answer."),
        ("fail=content_filter at=0", "The model behind the agent gave no answer."),
        ("fail=empty at=0", "The model behind the agent gave no answer."),
        ("fail=status500", "The model behind the agent failed (HTTP 500)."),
        ("fail=status429", "The model behind the agent failed (HTTP 429)."),
        ("fail=status401", "The model behind the agent failed (HTTP 401)."),
        ("fail=status503", "The model behind the agent failed (HTTP 503)."),
        ("reason=function_call", "The model behind the agent failed."),
        ("reason=surprise", "The model behind the agent failed."),
    ],
)
async def test_a_failure_that_nanobot_returns_normally_is_an_error(
    agent: NanobotAgent, script: str, message: str
) -> None:
    voice = RecordingVoice()
    with pytest.raises(AgentError) as raised:
        await agent.run(a_turn(f"[[mock k=6 i=1 {script}]]"), voice)
    assert raised.value.public_message == message
    assert "stop_reason=" in str(raised.value.__cause__)  # for the log
    said = voice.all_of("text")
    assert all(fragment.strip().startswith("@") for fragment in said), "an error sentence was streamed as the answer"
    if "at=" in script:
        assert len(said) == int(script.rpartition("=")[2])


@pytest.mark.parametrize(
    "fault",
    [
        *("close at=0", "close at=2", "eof at=0", "eof at=2", "sse at=0", "sse at=2", "badjson at=0", "badjson at=2"),
        *("length at=0", "content_filter at=0", "empty at=0", "status500", "status429", "status401"),
    ],
)
async def test_a_failure_after_a_tool_is_an_error(agent: NanobotAgent, upstream: ScriptedUpstream, fault: str) -> None:
    """The first request to the model calls a tool, the second one fails, and so do its repetitions."""
    voice = RecordingVoice()
    with pytest.raises(AgentError):
        await agent.run(a_turn(f'[[mock k=6 i=1 say=2 tool=list_dir args={{"path":"."}} fail={fault}]]'), voice)
    assert voice.all_of("tool") == [("list_dir", "started"), ("list_dir", "completed")]
    assert upstream.stats["requests"] >= 2
    assert all(fragment.strip().startswith("@") for fragment in voice.all_of("text"))


async def test_a_model_that_hangs_after_a_tool_hangs_the_turn(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    """Which is then ended by the worker's idle deadline: the turn is cancelled, and closes the connection."""
    voice = RecordingVoice()
    script = '[[mock k=6 i=1 tool=list_dir args={"path":"."} fail=hang at=0]]'
    turn = asyncio.create_task(agent.run(a_turn(script), voice))
    await async_wait_until(lambda: upstream.stats["failures_acted"], timeout=5, description="a model that hangs")
    await cancel_until_done(turn)
    await async_wait_until(
        lambda: upstream.stats["client_gone_midstream"], timeout=5, description="the connection was closed"
    )


async def test_a_cancellation_that_comes_together_with_a_token_ends_the_turn(
    agent: NanobotAgent, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`asyncio.wait_for` returns the token then and forgets the cancellation, on Python 3.11; here it does on any.

    A worker cancels an agent again that has not ended.
    """
    real = asyncio.wait_for
    forgotten = False

    async def wait_for(awaitable: Any, timeout: float | None) -> Any:
        nonlocal forgotten
        token = await real(awaitable, timeout)
        if hasattr(token, "choices") and not forgotten:
            turn.cancel()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                forgotten = True
        return token

    monkeypatch.setattr(asyncio, "wait_for", wait_for)
    turn = asyncio.create_task(agent.run(a_turn("[[mock k=6 i=1 fail=hang at=3]]"), RecordingVoice()))
    await async_wait_until(lambda: forgotten, timeout=5, description="a cancellation that is forgotten")
    await cancel_until_done(turn)
    await async_wait_until(
        lambda: upstream.stats["client_gone_midstream"], timeout=5, description="the connection was closed"
    )


async def test_an_answer_that_was_filtered_says_so(agent: NanobotAgent) -> None:
    outcome = await agent.run(a_turn("[[mock k=6 i=1 fail=content_filter at=3]]"), RecordingVoice())
    assert outcome.finish_reason == "content_filter"


async def test_an_answer_that_stayed_too_long_says_so(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    """nanobot asks for a continuation three times; what it has then is the answer."""
    voice = RecordingVoice()
    outcome = await agent.run(a_turn("[[mock k=6 i=1 fail=length at=3]]"), voice)
    assert outcome.finish_reason == "length"
    assert upstream.stats["requests"] == 4
    assert voice.whole_text.count("@") == 12


async def test_an_answer_that_was_continued_is_whole(agent: NanobotAgent) -> None:
    outcome = await agent.run(a_turn("[[mock k=6 i=1 fail=length at=3 times=1 id=l]]"), RecordingVoice())
    assert outcome.finish_reason == "stop"


async def test_a_request_is_repeated_before_its_answer_began(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    voice = RecordingVoice()
    await agent.run(a_turn("[[mock k=6 i=1 fail=close at=0 times=1 id=a]]"), voice)
    assert upstream.stats["requests"] == 2
    assert voice.whole_text.count("@") == 6


async def test_a_stalled_answer_that_nanobot_starts_over_is_an_error(
    agent: NanobotAgent, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOBOT_STREAM_IDLE_TIMEOUT_S", "1")
    voice = RecordingVoice()
    with pytest.raises(AgentError, match="stopped in the middle"):
        await agent.run(a_turn("[[mock k=6 i=1 fail=hang at=3 times=1 id=h]]"), voice)
    assert voice.whole_text.count("@") == 3
    assert upstream.stats["requests"] == 1


async def test_a_tool_is_announced_before_it_runs(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    class Slow(RecordingVoice):
        """Takes its time over announcements, and looks whether nanobot went on meanwhile."""

        requests_at_delivery = 0

        async def tool(self, name: str, status: Any, **more: Any) -> None:
            await asyncio.sleep(0.05)
            self.requests_at_delivery = self.requests_at_delivery or upstream.stats["requests"]
            await super().tool(name, status, **more)

    voice = Slow()
    outcome = await agent.run(a_turn('[[mock k=2 i=1 tool=list_dir args={"path":"."}]]'), voice)
    assert [kind for kind, _ in voice.said] == ["tool", "tool", "text", "text"]
    assert voice.all_of("tool") == [("list_dir", "started"), ("list_dir", "completed")]
    assert {call_id for call_id, _ in voice.tool_details} == {"call_1"}
    assert voice.requests_at_delivery == 1  # the tool's result was not yet on its way to the model
    assert outcome.usage == Usage(prompt_tokens=2, completion_tokens=2)  # of both requests


async def test_an_answer_in_one_piece_after_a_tool_is_not_lost(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    """The model says something, calls a tool, then twice nothing; nanobot's last question to it is not streamed."""
    voice = RecordingVoice()
    script = '[[mock k=3 i=1 say=2 tool=list_dir args={"path":"."} fail=empty at=0 times=3 id=t]]'
    await agent.run(a_turn(script), voice)
    assert upstream.stats["requests"] == 4
    assert voice.whole_text.count("@") == 5


async def test_nothing_piles_up_for_chat_channels_that_do_not_run(agent: NanobotAgent) -> None:
    await agent.run(a_turn('[[mock k=1 i=1 tool=list_dir args={"path":"."}]]'), RecordingVoice())
    assert agent._bot._loop.bus.outbound.empty()


async def test_a_tool_that_fails_is_said_to_have_failed(agent: NanobotAgent) -> None:
    voice = RecordingVoice()
    await agent.run(a_turn("[[mock k=2 i=1 tool=no_such_tool]]"), voice)
    assert voice.all_of("tool") == [("no_such_tool", "started"), ("no_such_tool", "failed")]


async def test_a_slash_command_is_answered_without_a_model(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    outcome = await agent.run(a_turn("/model"), RecordingVoice())
    assert outcome.text is not None
    assert "mock" in outcome.text
    assert upstream.stats["requests"] == 0


@pytest.mark.parametrize("command", ["/pairing list", "/dream-log", "/trigger foo", "/restart", "/evaluator-prompt"])
async def test_commands_that_operate_nanobot_are_not_for_its_clients(
    agent: NanobotAgent, upstream: ScriptedUpstream, home: Path, command: str
) -> None:
    before = files_under(home)
    outcome = await agent.run(a_turn(command), RecordingVoice())
    assert "Unknown command" in (outcome.text or "") or upstream.stats["requests"] == 1
    assert files_under(home) == before


async def test_a_tenant_with_a_name_is_not_served(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    with pytest.raises(AgentError, match="one tenant only"):
        await agent.run(a_turn("[[mock k=1]]", tenant="acme"), RecordingVoice())
    assert upstream.stats["requests"] == 0


async def test_a_long_result_of_a_tool_leaves_no_file(
    agent: NanobotAgent, upstream: ScriptedUpstream, home: Path
) -> None:
    long = home / "workspace" / "long.txt"
    long.write_text("\n".join(f"line {number}" for number in range(20_000)))
    before = files_under(home)
    script = json.dumps({"path": "long.txt"}).replace(" ", "")
    await agent.run(a_turn(f"[[mock k=1 i=1 tool=read_file args={script}]]"), RecordingVoice())
    result = next(message for message in asked_messages(upstream) if message["role"] == "tool")
    assert len(result["content"]) < 200_000
    assert {path for path in files_under(home) if "tool-results" in str(path)} == set()
    assert files_under(home) >= before


async def test_parallel_turns_keep_their_own_usage(agent: NanobotAgent) -> None:
    async def ask(tokens: int) -> Outcome:
        return await agent.run(a_turn(f"[[mock k={tokens} i=1]]", session_key=f"api:{tokens}"), RecordingVoice())

    outcomes = await asyncio.gather(*(ask(tokens) for tokens in range(1, 21)))
    assert [outcome.usage and outcome.usage.completion_tokens for outcome in outcomes] == list(range(1, 21))


@pytest.mark.parametrize("owns_history", [True, False])
async def test_cancelling_closes_the_connection(
    agent: NanobotAgent, home: Path, upstream: ScriptedUpstream, owns_history: bool
) -> None:
    voice = RecordingVoice()
    parts = [{"type": "text", "text": "[[mock k=1000 i=20]]"}, REPORT]
    turn = asyncio.create_task(agent.run(a_turn(parts, owns_history=owns_history), voice))
    await voice.changed.wait()
    await cancel_until_done(turn)
    await async_wait_until(
        lambda: upstream.stats["client_gone_midstream"], timeout=5, description="the connection was closed"
    )
    assert files_under(home / "media") == set()
    assert session_files(home) == set()


async def test_a_voice_that_fails_ends_the_run(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    class Broken(RecordingVoice):
        async def text(self, fragment: str) -> None:  # noqa: ARG002 - the voice's signature
            raise ConnectionError("Redis is away")

    with pytest.raises(ConnectionError, match="Redis is away"):
        await agent.run(a_turn("[[mock k=1000 i=20]]"), Broken())
    await async_wait_until(
        lambda: upstream.stats["client_gone_midstream"], timeout=5, description="the connection was closed"
    )


async def test_a_history_of_the_request_is_seeded_and_leaves_nothing(
    agent: NanobotAgent, home: Path, upstream: ScriptedUpstream
) -> None:
    await agent.run(a_turn("[[mock k=1 i=1]]", session_key="api:other"), RecordingVoice())
    before = files_under(home)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Speak like a pirate."},
        {"role": "assistant", "content": "Ahoy!"},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE, REPORT]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "And now? [[mock k=1 i=1]]"},
    ]
    await agent.run(a_turn(messages=messages, owns_history=True), RecordingVoice())

    asked = asked_messages(upstream)
    assert [message["role"] for message in asked] == [
        "user", "assistant", "user", "assistant", "tool", "assistant", "user",
    ]  # fmt: skip
    assert "Speak like a pirate.\n\nBe brief." in asked[0]["content"]
    assert asked[1]["content"] == "Ahoy!"
    assert asked[2]["content"][0] == {"type": "text", "text": "What is this?"}
    assert asked[2]["content"][1]["image_url"]["url"] == IMAGE["image_url"]["url"]  # type: ignore[index]
    assert asked[2]["content"][2]["text"].startswith("[Attachment: ")
    assert asked[2]["content"][2]["text"].endswith("r.txt]")
    assert asked[4]["content"] == "rain"
    assert "And now?" in json.dumps(asked[6]["content"])
    assert files_under(home) == before


async def test_a_history_of_the_request_does_not_touch_the_session(
    agent: NanobotAgent, upstream: ScriptedUpstream
) -> None:
    first = await agent.run(a_turn("[[mock k=1 i=1]]", session_key="api:s"), RecordingVoice())
    again = a_turn("[[mock k=1 i=1]]", session_key="api:s", session_state=first.session_state, owns_history=True)
    assert (await agent.run(again, RecordingVoice())).session_state is None
    assert len(asked_messages(upstream)) == 1


async def test_files_of_the_question_reach_the_model(
    agent: NanobotAgent, home: Path, upstream: ScriptedUpstream
) -> None:
    parts = [{"type": "text", "text": "[[mock k=1 i=1]]"}, IMAGE, REPORT]
    await agent.run(a_turn(parts), RecordingVoice())
    [asked] = asked_messages(upstream)
    image, text = asked["content"]
    assert image["image_url"]["url"] == f"data:image/png;base64,{PNG}"
    assert f"[Attachment: {home / 'media' / 'api'}" in text["text"]
    assert files_under(home / "media") == set()


async def test_half_of_an_emoji_fails_no_turn(agent: NanobotAgent) -> None:
    """A client may have cut its text in the middle of one."""
    assert (await agent.run(a_turn("\ud83d [[mock k=2 i=1]]"), RecordingVoice())).finish_reason == "stop"
