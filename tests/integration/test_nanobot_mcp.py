"""MCP servers behind nanobot: real processes that are connected, lost and found again."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from nanobot.config import loader

from tests.processes import ROOT, is_running
from tests.speaking import RecordingVoice, a_turn
from tests.upstream import ScriptedUpstream, scripted_upstream
from tests.waiting import async_wait_until
from worker.agents import nanobot_mcp
from worker.agents.contract import AgentError
from worker.agents.nanobot import NanobotAgent

SHOUT = '[[mock k=1 i=0 tool=mcp_loud_shout args={"text":"hey"}]]'
DIE = "[[mock k=1 i=0 tool=mcp_loud_die]]"


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as running:
        yield running


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """What the server has done, and what it is to do; see tests/mcp_server.py."""
    return tmp_path / "loud.txt"


@pytest.fixture
async def agent(
    tmp_path: Path, journal: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[NanobotAgent]:
    """An agent with two servers, `loud` and `quiet`. One that is down is tried again by every turn."""

    def server(path: Path) -> dict[str, Any]:
        return {"command": sys.executable, "args": ["-m", "tests.mcp_server", str(path)], "cwd": str(ROOT)}

    config = {
        "agents": {"defaults": {"workspace": str(tmp_path / "workspace"), "model": "mock", "provider": "custom"}},
        "providers": {"custom": {"apiKey": "none", "apiBase": upstream.base_url}},
        "tools": {"mcpServers": {"loud": server(journal), "quiet": server(tmp_path / "quiet.txt")}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(loader, "_current_config_path", None)
    monkeypatch.setattr(nanobot_mcp, "RETRY_PAUSE_S", 0.0)
    made = NanobotAgent.from_config(tmp_path / "config.json")
    yield made
    await made.aclose()


async def ask(agent: NanobotAgent, question: str) -> RecordingVoice:
    voice = RecordingVoice()
    await agent.run(a_turn(question, owns_history=True), voice)
    return voice


def done(journal: Path, what: str) -> list[int]:
    """The processes that have noted this, in order."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [int(line.split()[1]) for line in lines if line.split()[0] == what]


def offered(upstream: ScriptedUpstream) -> set[str]:
    """The MCP tools that the model was told of in the latest request."""
    names = {tool["function"]["name"] for tool in upstream.requests[-1]["tools"]}
    return {name for name in names if name.startswith("mcp_")}


async def test_servers_are_connected_once_and_closed_at_the_end(
    agent: NanobotAgent, journal: Path, upstream: ScriptedUpstream
) -> None:
    voices = await asyncio.gather(*(ask(agent, SHOUT) for _ in range(5)))
    voices.append(await ask(agent, SHOUT))
    for voice in voices:
        assert voice.all_of("tool") == [("mcp_loud_shout", "started"), ("mcp_loud_shout", "completed")]
    assert "HEY" in json.dumps(upstream.requests[-1]["messages"])
    [pid] = done(journal, "start")
    assert len(done(journal, "shout")) == 6
    await agent.aclose()
    assert not is_running(pid)


async def test_a_server_that_is_down_is_an_error_of_the_turns_that_call_it(
    agent: NanobotAgent, journal: Path, upstream: ScriptedUpstream
) -> None:
    journal.with_suffix(".down").touch()
    assert (await ask(agent, "[[mock k=2 i=0]]")).whole_text.count("@") == 2
    assert offered(upstream) == {"mcp_quiet_shout", "mcp_quiet_die"}
    voice = RecordingVoice()
    with pytest.raises(AgentError, match="tool server 'loud', which is not available"):
        await agent.run(a_turn(SHOUT), voice)
    assert voice.all_of("tool") == [("mcp_loud_shout", "started"), ("mcp_loud_shout", "failed")]
    await ask(agent, SHOUT.replace("loud", "quiet"))  # the other one is not affected

    journal.with_suffix(".down").unlink()
    voice = await ask(agent, SHOUT)
    assert voice.all_of("tool") == [("mcp_loud_shout", "started"), ("mcp_loud_shout", "completed")]


async def test_a_server_that_is_down_is_not_tried_again_at_once(
    agent: NanobotAgent, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanobot_mcp, "RETRY_PAUSE_S", 1000.0)
    journal.with_suffix(".down").touch()
    for _ in range(3):
        await ask(agent, "[[mock k=1 i=0]]")
    assert len(done(journal, "start")) == 1


async def test_a_server_that_hangs_holds_up_nothing_for_long(
    agent: NanobotAgent, journal: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanobot_mcp, "CONNECT_TIMEOUT_S", 3.0)
    monkeypatch.setattr(nanobot_mcp, "RETRY_PATIENCE_S", 0.0)
    journal.with_suffix(".hangs").touch()
    await ask(agent, SHOUT.replace("loud", "quiet"))
    assert offered(upstream) == {"mcp_quiet_shout", "mcp_quiet_die"}
    async with asyncio.timeout(20):
        while len(done(journal, "start")) < 2:
            with pytest.raises(AgentError, match="'loud'"):  # no turn waits for another attempt
                await ask(agent, SHOUT)
    await asyncio.wait_for(agent.aclose(), 10)
    await async_wait_until(
        lambda: not any(is_running(pid) for pid in done(journal, "start")), timeout=10, description="no process left"
    )


async def test_a_server_that_dies_is_started_again(agent: NanobotAgent, journal: Path) -> None:
    await ask(agent, SHOUT)
    [pid] = done(journal, "start")
    os.kill(pid, 9)
    await async_wait_until(lambda: not is_running(pid), timeout=5, description="the server to be gone")
    voice = await ask(agent, SHOUT)
    assert voice.all_of("tool") == [("mcp_loud_shout", "started"), ("mcp_loud_shout", "completed")]
    assert len(done(journal, "start")) == 2


async def test_a_server_that_dies_and_stays_down_is_an_error(agent: NanobotAgent, journal: Path) -> None:
    await ask(agent, SHOUT)
    journal.with_suffix(".down").touch()
    voice = RecordingVoice()
    with pytest.raises(AgentError, match="'loud'"):
        await agent.run(a_turn(DIE), voice)
    assert voice.all_of("tool") == [("mcp_loud_die", "started"), ("mcp_loud_die", "failed")]
    journal.with_suffix(".down").unlink()
    await ask(agent, SHOUT)


async def test_a_turn_that_is_cancelled_does_not_cancel_the_connecting(agent: NanobotAgent, journal: Path) -> None:
    turn = asyncio.create_task(ask(agent, SHOUT))
    await async_wait_until(lambda: done(journal, "start"), timeout=10, description="the server to start")
    turn.cancel()
    await asyncio.wait({turn})
    await ask(agent, SHOUT)
    assert len(done(journal, "start")) == 1
