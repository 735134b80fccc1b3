"""Choosing and building the agent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.settings import Settings
from tests.processes import ROOT
from tests.speaking import RecordingVoice, a_turn
from worker.agents import load
from worker.agents.echo import EchoAgent
from worker.agents.events import EventsAgent
from worker.agents.langgraph import LangGraphAgent
from worker.agents.load import AgentLoadError, choose_agent, load_agent
from worker.agents.openai import OpenAIAgent
from worker.agents.pydantic_ai import PydanticAIAgent

CONFIGURED = {
    "agents": {"defaults": {"model": "mock", "provider": "custom"}},
    "providers": {"custom": {"apiKey": "none", "apiBase": "http://127.0.0.1:1/v1"}},
}


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """An environment without any agent."""
    return {"NANOBOT_CONFIG": str(tmp_path / "config.json")}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory that holds one of each kind."""
    (tmp_path / "their_agents.py").write_text(
        "class Direct:\n"
        "    async def process_direct(self, **arguments): return 'direct'\n"
        "instance = Direct()\n"
        "def factory(): return Direct()\n"
        "def wants(argument): return Direct()\n"
        "async def eventually(): return Direct()\n"
        "number = 7\n"
        "async def events(turn): yield 'event'\n"
        "def makes_events(): return events\n"
        "async def wants_more(turn, more): yield 'event'\n"
        "from pydantic_ai import Agent\n"
        "from pydantic_ai.models.test import TestModel\n"
        "pydantic = Agent(TestModel())\n"
        "from langgraph.graph import END, MessagesState, StateGraph\n"
        "builder = StateGraph(MessagesState).add_node('answer', lambda state: {}).set_entry_point('answer')\n"
        "graph = builder.compile()\n"
        "no_messages = StateGraph(dict).add_node('a', lambda state: {}).set_entry_point('a').compile()\n"
        "class Own:\n"
        "    name = 'own'\n"
        "    async def run(self, turn, voice): ...\n"
        "    async def aclose(self): ...\n"
        "async def coroutine(turn): return 'text'\n"
        "def generator(turn): yield 'text'\n"
        "class Unclosable:\n"
        "    async def run(self, turn, voice): ...\n"
        "def broken_factory(): raise RuntimeError('boom')\n"
    )
    (tmp_path / "their_broken.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "their_agents"
    sys.modules.pop("their_agents", None)


def test_auto_is_echo_when_there_is_nothing_else(nowhere: dict[str, str]) -> None:
    choice = choose_agent(Settings(), nowhere)
    assert choice.name == "echo"
    assert "does not exist" in choice.reason
    assert choice.reason.endswith("neither OPENAI_API_KEY nor OPENAI_BASE_URL is set")
    assert isinstance(load_agent(Settings(), nowhere), EchoAgent)


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "OPENAI_BASE_URL"])
async def test_auto_is_openai_when_it_is_configured(nowhere: dict[str, str], variable: str) -> None:
    environ = nowhere | {variable: "http://127.0.0.1:1/v1"}
    assert choose_agent(Settings(), environ).reason.startswith(f"{variable} is set")
    agent = load_agent(Settings(), environ)
    assert isinstance(agent, OpenAIAgent)
    await agent.aclose()


def test_auto_is_nanobot_when_it_is_configured(nowhere: dict[str, str]) -> None:
    Path(nowhere["NANOBOT_CONFIG"]).write_text(json.dumps(CONFIGURED))
    choice = choose_agent(Settings(), nowhere | {"OPENAI_API_KEY": "k"})
    assert str(choice) == "nanobot: nanobot is installed and configured"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("{", "JSON syntax error"),
        ("{}", "No "),
        (json.dumps({"agents": CONFIGURED["agents"], "providers": {}}), "api_base"),
    ],
)
def test_auto_passes_over_a_nanobot_that_cannot_run(nowhere: dict[str, str], config: str, problem: str) -> None:
    Path(nowhere["NANOBOT_CONFIG"]).write_text(config)
    choice = choose_agent(Settings(), nowhere)
    assert choice.name == "echo"
    assert problem in choice.reason
    with pytest.raises(AgentLoadError, match="nanobot onboard"):
        load_agent(Settings(agent="nanobot"), nowhere)


def test_a_missing_nanobot_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, nowhere: dict[str, str]) -> None:
    monkeypatch.setattr(load, "find_spec", lambda _name: None)
    assert choose_agent(Settings(), nowhere).name == "echo"
    with pytest.raises(AgentLoadError, match="make install EXTRA=nanobot"):
        load_agent(Settings(agent="nanobot"), nowhere)


def test_openai_without_a_key_says_what_to_set(nowhere: dict[str, str]) -> None:
    with pytest.raises(AgentLoadError, match="OPENAI_API_KEY"):
        load_agent(Settings(agent="openai"), nowhere)


@pytest.mark.parametrize("attribute", ["instance", "factory", "Direct"])
async def test_an_object_with_process_direct_or_a_callable_that_makes_one(module: str, attribute: str) -> None:
    agent = load_agent(Settings(agent=f"{module}:{attribute}"))
    assert agent.name == f"{module}:{attribute}"
    assert (await agent.run(a_turn(), RecordingVoice())).text == "direct"


@pytest.mark.parametrize(
    ("attribute", "kind"),
    [
        ("events", EventsAgent),
        ("makes_events", EventsAgent),
        ("pydantic", PydanticAIAgent),
        ("graph", LangGraphAgent),
    ],
)
def test_what_it_is_decides_how_it_is_run(module: str, attribute: str, kind: type) -> None:
    agent = load_agent(Settings(agent=f"{module}:{attribute}"))
    assert isinstance(agent, kind)
    assert agent.name == f"{module}:{attribute}"


def test_no_library_is_imported_for_an_agent_that_does_not_come_from_it() -> None:
    program = (
        "import sys; from worker.agents.load import adapt; from examples.my_agent import agent; adapt(agent, 'x');"
        "print(sorted({'pydantic_ai', 'langgraph', 'langchain_core'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == "[]\n"


def test_an_agent_of_our_own_contract(module: str) -> None:
    assert load_agent(Settings(agent=f"{module}:Own")).name == "own"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("their_missing:agent", "there is no module 'their_missing'"),
        ("their_missing.sub:agent", "there is no module 'their_missing'"),
        ("their_agents:missing", "has no 'missing'"),
        ("their_agents:number", "is a int; it must be an async generator function"),
        ("their_agents:wants", "callable without arguments"),
        ("their_agents:eventually", "async function"),
        ("their_agents:wants_more", "must take the turn as its one argument"),
        ("their_agents:builder", "a compiled LangGraph graph"),
        ("their_agents:coroutine", "must be an async generator function"),
        ("their_agents:generator", "must be an async generator function"),
        ("their_agents:Unclosable", "has `run`, but no `name` and no `aclose`"),
        ("their_agents:broken_factory", "(?s)cannot be made.*RuntimeError: boom"),
        ("their_agents:no_messages", "has no `messages`"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(module: str, name: str, message: str) -> None:
    with pytest.raises(AgentLoadError, match=message):
        load_agent(Settings(agent=name))


def test_an_import_that_is_missing_inside_the_module_is_not_hidden(module: str) -> None:
    with pytest.raises(AgentLoadError, match="cannot be imported") as raised:
        load_agent(Settings(agent="their_broken:agent"))
    assert str(raised.value).endswith("ModuleNotFoundError: No module named 'a_module_that_is_missing'")
    assert "importlib" not in str(raised.value)
