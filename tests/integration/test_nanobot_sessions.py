"""What becomes of a nanobot session: with the real nanobot, two workers' worth of it, and a scripted model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from nanobot.config import loader
from nanobot.providers.base import LLMProvider
from nanobot.session.manager import Session
from nanobot.session.model_selection import SESSION_MODEL_PRESET_METADATA_KEY

from shared.tasks import end_task
from tests.processes import is_running
from tests.speaking import RecordingVoice, a_turn, cancel_until_done
from tests.upstream import ScriptedUpstream, scripted_upstream
from tests.waiting import async_wait_until
from worker.agents.contract import AgentError, Outcome
from worker.agents.nanobot import NanobotAgent
from worker.agents.nanobot_sessions import TurnSessions, TurnSessionStore, decode, encode, turn_session

ODD_KEYS = [
    "api:",
    "api:../../etc/passwd",
    "api:a/b\\c:d",
    "api:{x}*?",
    "api:Ω 😀 '\"",
    "api:" + "x" * 256,
    "api:\ud800",
]


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as running:
        yield running


@pytest.fixture
def home(tmp_path: Path, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = {
        "agents": {"defaults": {"workspace": str(tmp_path / "workspace"), "model": "mock", "provider": "custom"}},
        "providers": {"custom": {"apiKey": "none", "apiBase": upstream.base_url}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(loader, "_current_config_path", None)
    monkeypatch.setattr(LLMProvider, "_CHAT_RETRY_DELAYS", (0, 0, 0))
    return tmp_path


@pytest.fixture
async def workers(home: Path) -> AsyncIterator[tuple[NanobotAgent, NanobotAgent]]:
    """Two agents that share a configuration, and nothing else."""
    made = NanobotAgent.from_config(home / "config.json"), NanobotAgent.from_config(home / "config.json")
    yield made
    for agent in made:
        await agent.aclose()


@pytest.fixture
def agent(workers: tuple[NanobotAgent, NanobotAgent]) -> NanobotAgent:
    return workers[0]


async def ask(
    agent: NanobotAgent, question: str, state: bytes | None = None, voice: RecordingVoice | None = None, **turn: Any
) -> Outcome:
    """One turn, in which the model says one token unless the question says otherwise."""
    if "[[" not in question and not question.startswith("/"):
        question += " [[mock k=1 i=0]]"
    return await agent.run(a_turn(question, session_state=state, **turn), voice or RecordingVoice())


def asked(upstream: ScriptedUpstream) -> list[str]:
    """What the user has said, as the model saw it in the latest request; one entry for each turn."""
    messages = [message for message in upstream.requests[-1]["messages"] if message["role"] == "user"]
    return [json.dumps(message["content"]).strip('"').split(" [[mock")[0] for message in messages]


# -- turns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ODD_KEYS)
async def test_turns_on_alternating_workers_remember_everything(
    workers: tuple[NanobotAgent, NanobotAgent], upstream: ScriptedUpstream, key: str
) -> None:
    state = None
    for number in range(4):
        outcome = await ask(workers[number % 2], f"question {number}", state, session_key=key)
        assert outcome.session_state is not None
        state = outcome.session_state
        assert asked(upstream) == [f"question {n}" for n in range(number + 1)]
        roles = [message["role"] for message in upstream.requests[-1]["messages"]]
        assert roles == ["system", *["user", "assistant"] * number, "user"]


async def test_tool_calls_and_their_results_are_remembered(
    workers: tuple[NanobotAgent, NanobotAgent], upstream: ScriptedUpstream
) -> None:
    first = await ask(workers[0], 'look [[mock k=1 i=0 tool=list_dir args={"path":"."}]]')
    await ask(workers[1], "and now?", first.session_state)
    roles = [message["role"] for message in upstream.requests[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]


async def test_a_failed_turn_leaves_no_trace(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    first = await ask(agent, "one")
    with pytest.raises(AgentError):
        await ask(agent, "two [[mock k=5 i=0 fail=close at=2]]", first.session_state)
    await ask(agent, "three", first.session_state)
    assert asked(upstream) == ["one", "three"]


async def test_a_cancelled_turn_leaves_no_trace(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    first = await ask(agent, "one")
    voice = RecordingVoice()
    turn = asyncio.create_task(ask(agent, "two [[mock k=1000 i=20]]", first.session_state, voice))
    await voice.changed.wait()
    await cancel_until_done(turn)
    await ask(agent, "three", first.session_state)
    assert asked(upstream) == ["one", "three"]


async def test_sessions_with_one_key_do_not_mix(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    """Two tenants may name their sessions alike. nanobot runs the turns one after the other."""
    mine, yours = await asyncio.gather(ask(agent, "mine"), ask(agent, "yours"))
    await asyncio.gather(ask(agent, "mine too", mine.session_state), ask(agent, "yours too", yours.session_state))
    users = [
        [json.dumps(message["content"]).split(" [[")[0].strip('"') for message in request["messages"][1:]][::2]
        for request in upstream.requests[-2:]
    ]
    assert sorted(users) == [["mine", "mine too"], ["yours", "yours too"]]


async def test_many_sessions_side_by_side_do_not_mix(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    names = [f"session {number}" for number in range(20)]
    first = await asyncio.gather(*(ask(agent, name, session_key=f"api:{name}") for name in names))
    upstream.requests.clear()
    states = [outcome.session_state for outcome in first]
    await asyncio.gather(
        *(ask(agent, name, state, session_key=f"api:{name}") for name, state in zip(names, states, strict=True))
    )
    for request in upstream.requests:
        said = {json.dumps(message["content"]).split(" [[")[0] for message in request["messages"][1::2]}
        assert len(said) == 1


async def test_nothing_is_written_to_files(agent: NanobotAgent, home: Path) -> None:
    before = {path for path in home.rglob("*") if path.is_file()}
    await ask(agent, 'one [[mock k=1 i=0 tool=list_dir args={"path":"."}]]')
    with suppress(AgentError):
        await ask(agent, "two [[mock k=1 i=0 fail=close at=0]]")
    after = {path for path in home.rglob("*") if path.is_file()}
    assert {path.name for path in after - before} <= {"llm-usage.sqlite"}


@pytest.mark.parametrize("tool", ["list_sessions", "search_sessions", "read_session", "send_session_message"])
async def test_tools_that_reach_other_sessions_are_not_offered(
    agent: NanobotAgent, upstream: ScriptedUpstream, tool: str
) -> None:
    other = asyncio.create_task(ask(agent, "my secret [[mock k=1000 i=20]]", session_key="api:other"))
    await async_wait_until(lambda: upstream.requests, timeout=5, description="the other's turn to run")
    arguments = json.dumps({"query": "secret", "session_key": "api:other", "to": "@other", "content": "x"})
    voice = RecordingVoice()
    await ask(agent, f"spy [[mock k=1 i=0 tool={tool} args={arguments.replace(' ', '')}]]", voice=voice)
    assert voice.all_of("tool") == [(tool, "started"), (tool, "failed")]
    assert tool not in {offered["function"]["name"] for offered in upstream.requests[-1]["tools"]}
    assert "my secret" not in json.dumps(upstream.requests[-1])
    await end_task(other)  # asks again, if nanobot or one of its libraries loses the cancellation


async def test_a_message_for_a_channel_is_not_said_into_the_void(
    agent: NanobotAgent, upstream: ScriptedUpstream
) -> None:
    """nanobot would take the message for the answer, and nobody would ever see it."""
    voice = RecordingVoice()
    await ask(agent, 'hello [[mock k=3 i=0 tool=message args={"content":"answer"}]]', voice=voice)
    assert voice.all_of("tool") == [("message", "started"), ("message", "failed")]
    assert voice.whole_text.count("@") == 3


# -- what nanobot does besides -----------------------------------------------------------------------------------------


async def test_a_choice_made_before_anything_was_said_is_kept(agent: NanobotAgent) -> None:
    """`/model` looks the session up a second time, before it was ever saved."""
    chosen = await ask(agent, "/model default")
    assert chosen.session_state is not None
    assert json.loads(chosen.session_state)["session"]["metadata"][SESSION_MODEL_PRESET_METADATA_KEY] == "default"


async def test_a_new_conversation_is_summarised_before_the_turn_ends(
    agent: NanobotAgent, home: Path, upstream: ScriptedUpstream
) -> None:
    """`/new` empties the session, and lets the model summarise the old conversation into nanobot's memory."""
    first = await ask(agent, "one")
    new = await ask(agent, "/new", first.session_state)
    assert new.text == "New session started."
    assert upstream.stats["requests"] == 2
    assert (home / "workspace" / "memory" / "history.jsonl").exists()
    await ask(agent, "two", new.session_state)
    assert asked(upstream) == ["two"]


async def test_a_compaction_is_kept(workers: tuple[NanobotAgent, NanobotAgent], upstream: ScriptedUpstream) -> None:
    """`/compact` replaces what was said by a summary, which the next turn gets on any worker."""
    first = await ask(workers[0], "one")
    compacted = await ask(workers[0], "/compact", first.session_state)
    assert compacted.session_state is not None
    assert "one" in json.dumps(json.loads(compacted.session_state)["session"]["messages"])  # nothing is lost
    await ask(workers[1], "two", compacted.session_state)
    assert "one" not in asked(upstream)
    assert "@0." in json.dumps(upstream.requests[-1]["messages"])  # the summary is what the scripted model says


async def test_a_subagent_answers_within_the_turn(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    """In the background it would report to nobody, after the turn."""
    await ask(agent, 'delegate [[mock k=1 i=0 tool=spawn args={"task":"help","wait":false}]]')
    [result] = [message for message in upstream.requests[-1]["messages"] if message["role"] == "tool"]
    assert "@19." in json.dumps(result), "the result of the subagent is there"
    assert not agent._bot._loop.subagents._running_tasks


async def test_a_process_ends_with_the_turn_that_started_it(agent: NanobotAgent, home: Path) -> None:
    """It yields to the model at once, and would go on for as long as nanobot does."""
    pid_file = home / "workspace" / "pid"
    arguments = '{"command":"echo${IFS}$$>pid;exec${IFS}sleep${IFS}1000","yield_time_ms":500}'
    await ask(agent, f"start [[mock k=1 i=0 tool=exec args={arguments}]]")
    assert pid_file.read_text().strip().isdigit()
    assert not is_running(int(pid_file.read_text()))


# -- the record --------------------------------------------------------------------------------------------------------


async def test_a_record_of_a_newer_version_fails_the_turn(agent: NanobotAgent, upstream: ScriptedUpstream) -> None:
    first = await ask(agent, "one")
    assert first.session_state is not None
    newer = json.dumps(json.loads(first.session_state) | {"version": 2}).encode()
    with pytest.raises(AgentError, match="newer version"):
        await ask(agent, "two", newer)
    assert upstream.stats["requests"] == 1


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\x80\x04",
        b"null",
        b"[1]",
        b"{}",
        b'{"version":1}',
        b'{"version":"2","session":{}}',
        b'{"version":0,"session":{}}',
        b'{"version":1,"session":{"messages":[]}}',
        b'{"version":1,"session":' + b"[" * 100_000,
    ],
)
async def test_a_record_that_cannot_be_read_fails_the_turn(
    agent: NanobotAgent, upstream: ScriptedUpstream, record: bytes
) -> None:
    with pytest.raises(AgentError, match="cannot be read"):
        await ask(agent, "two", record)
    assert upstream.stats["requests"] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", {}),
        ("messages", ["x"]),
        ("metadata", []),
        ("last_consolidated", 99),
        ("created_at", "yesterday"),
        ("updated_at", 7),
        ("provider_state", {"kind": 1}),
    ],
)
def test_a_field_that_does_not_fit_is_not_quietly_replaced(field: str, value: Any) -> None:
    document = json.loads(encode(Session(key="api:s")))
    document["session"][field] = value
    with pytest.raises(AgentError, match="cannot be read"):
        decode("api:s", json.dumps(document).encode())


def test_a_record_holds_all_of_a_session() -> None:
    from nanobot.providers.base import ProviderConversationState

    state = ProviderConversationState(kind="responses", provider="openai", model="m", version=1, payload={"id": "r1"})
    session = Session(key="api:s", metadata={"goal": {"n": 1}}, last_consolidated=1, provider_state=state)
    session.messages = [{"role": "user", "content": "half \ud83d"}, {"role": "assistant", "content": "é"}]
    assert decode("api:s", encode(session)) == Session(
        key="api:s",
        messages=session.messages,
        created_at=session.created_at,
        updated_at=session.updated_at,
        metadata=session.metadata,
        last_consolidated=0 if not session.messages else session.last_consolidated,
        provider_state=state,
    )


# -- the store ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sessions(home: Path) -> TurnSessions:
    return TurnSessions(home / "workspace", store=TurnSessionStore(), sessions_root=home / "sessions")


async def test_a_turn_sees_no_session_but_its_own(sessions: TurnSessions) -> None:
    async with turn_session("api:mine", None) as mine:
        session = sessions.get_or_create("api:mine")
        session.add_message("user", "hello")
        sessions.save(session)
        assert [row["key"] for row in sessions.list_sessions()] == ["api:mine"]
        assert sessions.read_session_file("api:mine")["messages"][0]["content"] == "hello"
        assert sessions.read_session_metadata("api:mine")["metadata"] == {}
        state = mine.record()
    async with turn_session("api:yours", None):
        assert sessions.list_sessions() == []
        assert sessions.read_session_file("api:mine") is None
        assert sessions.read_session_metadata("api:mine") is None
        assert sessions.update_session_metadata("api:mine", {"title": "x"}) is False
        assert sessions.delete_session("api:mine") is False
        assert sessions.get_or_create("api:mine").messages == []
    async with turn_session("api:mine", state):
        assert sessions.read_session_file("api:yours") is None
        assert sessions.get_or_create("api:mine").messages[0]["content"] == "hello"
    assert sessions.get_or_create("api:mine").messages == []  # no turn, no session


async def test_what_was_saved_last_is_kept(sessions: TurnSessions) -> None:
    async with turn_session("api:s", None) as turn:
        assert turn.record() is None
        session = sessions.get_or_create("api:s")
        for text in ("one", "two"):
            session.add_message("user", text)
            sessions.save_runtime_checkpoint(session)
        assert sessions.update_session_metadata("api:s", {"title": "numbers"})
        record = turn.record()
        assert record is not None
        kept = decode("api:s", record)
        assert [message["content"] for message in kept.messages] == ["one", "two"]
        assert kept.metadata == {"title": "numbers"}
        assert sessions.list_sessions()[0]["title"] == "numbers"
        assert sessions.delete_session("api:s")
        emptied = turn.record()
        assert emptied is not None
        assert decode("api:s", emptied).messages == []


async def test_what_a_turn_leaves_running_saves_nothing(sessions: TurnSessions) -> None:
    go = asyncio.Event()

    async def save_late() -> None:
        session = sessions.get_or_create("api:s")
        await go.wait()
        session.add_message("user", "too late")
        sessions.save(session)
        sessions.get_or_create("api:s").add_message("user", "far too late")

    async with turn_session("api:s", None):
        late = asyncio.create_task(save_late())
        await asyncio.sleep(0)  # it has its session
    async with turn_session("api:s", None) as following:
        go.set()
        await late
        assert following.record() is None
        assert sessions.get_or_create("api:s").messages == []


async def test_a_turn_that_fails_stops_its_background(sessions: TurnSessions) -> None:
    with pytest.raises(AgentError):
        async with turn_session("api:s", None) as turn:
            turn.spawn(asyncio.sleep(1000))
            raise AgentError("x")
    assert all(task.cancelled() for task in turn._background)


def test_a_session_of_a_megabyte_is_encoded_and_decoded_in_no_time() -> None:
    """Both happen on the event loop: 5 ms together, on a machine that is not slow."""
    session = Session(key="api:default", messages=[])
    for number in range(1800):
        session.add_message("user" if number % 2 == 0 else "assistant", "word " * 100)

    def there_and_back() -> float:
        started = time.perf_counter()
        record = encode(session)
        decode("api:default", record)
        assert len(record) > 1_000_000
        return time.perf_counter() - started

    assert min(there_and_back() for _ in range(5)) < 0.05
