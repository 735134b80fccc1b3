"""Conversations with the real nanobot through the running service, with two workers and a scripted model."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from shared.jobs import Status
from shared.packs import entries_from_row
from tests.deployment import Deployment, deployed
from tests.processes import ROOT, is_running
from tests.transcripts import EXPECTED, TRANSCRIPTS
from tests.waiting import wait_until

ODD_IDS = ["../../etc/passwd", "a/b\\c:d", "{x}*?[", "Ω 😀 '\"", " ", "x" * 256]


class Conversations:
    """A service with nanobot behind it, and the model behind nanobot."""

    def __init__(self, service: Deployment, home: Path, upstream_url: str) -> None:
        self.service = service
        self.home = home  # of nanobot: its configuration, its media, its workspace
        self._upstream = upstream_url.removesuffix("/v1")

    def say(self, session: str, text: str, *, script: str = "k=1 i=0") -> ChatCompletion:
        with self.service.client() as client:
            return client.chat.completions.create(
                model="endmark",
                messages=[{"role": "user", "content": f"{text} [[mock {script}]]"}],
                extra_body={"session_id": session},
            )

    def fail(self, session: str, text: str, *, script: str = "k=1 i=0") -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as raised:
            self.say(session, text, script=script)
        return raised.value

    def worker_of(self, answer: ChatCompletion) -> str:
        return self.service.job_field(answer.id, "worker")

    def asked(self, containing: str) -> list[dict[str, Any]]:
        """The messages of the latest request to the model with this text in it, without the system prompt."""
        requests: list[dict[str, Any]] = httpx.get(f"{self._upstream}/requests").json()
        messages = next(r["messages"] for r in reversed(requests) if containing in json.dumps(r, ensure_ascii=False))
        return list(messages[1:])

    def record(self, session: str) -> bytes | None:
        """What the session's next turn will get."""
        record: bytes | None = self.service.redis.get(self.service.keys.session(f"api:{session}"))  # type: ignore[assignment]  # redis-py types
        return record

    def sessions(self) -> set[bytes]:
        return set(self.service.redis.scan_iter(self.service.keys.session("*")))

    def files(self) -> set[Path]:
        return {path for path in self.home.rglob("*") if path.is_file() and "llm-usage" not in path.name}


def texts(messages: Sequence[dict[str, Any]]) -> list[str]:
    """What the users among these messages say, without the script."""
    said = [json.dumps(m["content"], ensure_ascii=False) for m in messages if m["role"] == "user"]
    return [text.partition(" [[mock")[0].strip('"') for text in said]


def write_config(home: Path, upstream_url: str, **tools: Any) -> Path:
    config = {
        "agents": {"defaults": {"workspace": str(home / "workspace"), "model": "mock", "provider": "custom"}},
        "providers": {"custom": {"apiKey": "none", "apiBase": upstream_url}},
        "tools": tools,
    }
    (home / "config.json").write_text(json.dumps(config))
    return home / "config.json"


@contextmanager
def conversing(
    factory: pytest.TempPathFactory, redis_url: str, upstream_url: str, *, workers: int = 1, **settings: Any
) -> Iterator[Conversations]:
    home = factory.mktemp("home")
    defaults: dict[str, Any] = {
        "agent": "nanobot",
        "session_ttl_s": 3600,
        "NANOBOT_CONFIG": write_config(home, upstream_url),
    }
    folder, prefix = factory.mktemp("service"), f"test-{secrets.token_hex(4)}"
    with deployed(folder, redis_url, prefix, workers=workers, **(defaults | settings)) as service:
        yield Conversations(service, home, upstream_url)
        service.wait_until_idle()
        assert service.keys_without_ttl() == []


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, redis_url: str, upstream_url: str) -> Iterator[Conversations]:
    """Two workers."""
    with conversing(tmp_path_factory, redis_url, upstream_url, workers=2) as conversations:
        yield conversations


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, redis_url: str, upstream_url: str) -> Iterator[Conversations]:
    """One worker that allows little."""
    limits = {"max_session_bytes": 3000, "idle_timeout_s": 3}
    with conversing(tmp_path_factory, redis_url, upstream_url, **limits) as conversations:
        yield conversations


# -- turns -------------------------------------------------------------------------------------------------------------


def test_a_conversation_on_alternating_workers_remembers_everything(two: Conversations) -> None:
    """Until a worker has had a turn, another one the next, and the first one a later turn again."""
    name = secrets.token_hex(8)
    ran_on: list[str] = []
    said: list[str] = []
    while not any(worker in ran_on[:index] for index, worker in enumerate(ran_on) if worker != ran_on[index - 1]):
        assert len(ran_on) < 30, "two workers take turns"
        said.append(f"{name} question {len(said)}")
        ran_on.append(two.worker_of(two.say(name, said[-1])))
        assert texts(two.asked(said[-1])) == said
    roles = [message["role"] for message in two.asked(said[-1])]
    assert roles == ["user", "assistant"] * (len(said) - 1) + ["user"]


@pytest.mark.parametrize("session", ODD_IDS)
def test_a_session_may_have_any_name(two: Conversations, session: str) -> None:
    name = secrets.token_hex(8)
    for text in (f"{name} one", f"{name} two"):
        two.say(session, text)
    assert texts(two.asked(f"{name} two")) == [f"{name} one", f"{name} two"]
    assert two.record(session) is not None


def test_sessions_side_by_side_do_not_mix(two: Conversations) -> None:
    names = [secrets.token_hex(8) for _ in range(10)]
    with ThreadPoolExecutor(len(names)) as pool:
        for text in ("one", "two", "three"):
            list(pool.map(lambda name, text=text: two.say(name, f"{name} {text}"), names))
    for name in names:
        assert texts(two.asked(f"{name} three")) == [f"{name} one", f"{name} two", f"{name} three"]


@pytest.mark.parametrize(
    "script",
    [
        "k=9 i=1 fail=close at=4",
        "k=9 i=1 fail=sse at=4",
        "fail=status401",
        'tool=list_dir args={"path":"."} fail=eof at=0',
    ],
)
def test_a_turn_that_fails_leaves_no_trace(two: Conversations, script: str) -> None:
    name = secrets.token_hex(8)
    two.say(name, f"{name} one")
    before = two.record(name)
    assert two.fail(name, f"{name} two", script=script).code == "agent_error"
    assert two.record(name) == before
    two.say(name, f"{name} three")
    assert texts(two.asked(f"{name} three")) == [f"{name} one", f"{name} three"]


def test_a_turn_that_its_client_leaves_leaves_no_trace(two: Conversations) -> None:
    name = secrets.token_hex(8)
    two.say(name, f"{name} one")
    before = two.record(name)
    with two.service.client() as client:
        stream = client.chat.completions.create(
            model="endmark",
            messages=[{"role": "user", "content": f"{name} two [[mock k=1000 i=20]]"}],
            extra_body={"session_id": name},
            stream=True,
        )
        job_id = next(iter(stream)).id
        stream.close()
    two.service.wait_for_status(job_id, Status.CANCELLED)
    two.say(name, f"{name} three")
    assert before != two.record(name)
    assert texts(two.asked(f"{name} three")) == [f"{name} one", f"{name} three"]


def test_a_worker_that_is_killed_leaves_the_session_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, redis_url: str, upstream_url: str
) -> None:
    with conversing(tmp_path_factory, redis_url, upstream_url, workers=2) as two:
        name = secrets.token_hex(8)
        two.say(name, f"{name} one")
        before = two.record(name)
        with two.service.client() as client:
            stream = client.chat.completions.create(
                model="endmark",
                messages=[{"role": "user", "content": f"{name} two [[mock k=1000 i=20]]"}],
                extra_body={"session_id": name},
                stream=True,
            )
            with pytest.raises(openai.APIError) as raised:
                for chunk in stream:
                    if chunk.choices[0].delta.content:
                        pid = int(two.service.job_field(chunk.id, "worker").split("-")[-2])
                        os.kill(pid, signal.SIGKILL)
        assert raised.value.code == "worker_lost"
        assert two.record(name) == before
        two.say(name, f"{name} three")
        assert texts(two.asked(f"{name} three")) == [f"{name} one", f"{name} three"]


def test_a_model_that_hangs_ends_at_the_idle_deadline(narrow: Conversations) -> None:
    name = secrets.token_hex(8)
    narrow.say(name, f"{name} one")
    before = narrow.record(name)
    for script in ("k=9 i=1 fail=hang at=0", 'k=9 i=1 tool=list_dir args={"path":"."} fail=hang at=3'):
        assert narrow.fail(name, f"{name} two", script=script).code == "timeout"
    assert narrow.record(name) == before


# -- histories of the client -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_name", list(TRANSCRIPTS))
def test_a_history_of_the_client_reaches_the_model_and_leaves_nothing(two: Conversations, client_name: str) -> None:
    two.say("warm up", "hello")  # nanobot makes some files of its own at first
    sessions, files = two.sessions(), two.files()
    name = secrets.token_hex(8)
    messages: list[Any] = [dict(message) for message in TRANSCRIPTS[client_name]]
    last = messages[-1]["content"]
    text = last if isinstance(last, str) else last[0]["text"]
    messages[-1]["content"] = f"{text} {name} [[mock k=3 i=0]]"
    with two.service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=messages)
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.choices[0].message.content or "").count("@") == 3

    asked = json.dumps(two.asked(name), ensure_ascii=False)
    positions = [asked.find(expected) for expected in EXPECTED[client_name]]
    assert -1 not in positions, f"{EXPECTED[client_name][positions.index(-1)]!r} did not reach the model"
    assert positions == sorted(positions)
    assert two.sessions() == sessions
    assert two.files() == files


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [(b'{"version":2,"session":{"anything":1}}', "newer version"), (b"\x80\x04broken", "cannot be read")],
)
def test_a_record_that_cannot_be_used_is_an_error_and_untouched(
    two: Conversations, record: bytes, message: str
) -> None:
    name = secrets.token_hex(8)
    two.service.redis.set(two.service.keys.session(f"api:{name}"), record, ex=3600)
    error = two.fail(name, "hello")
    assert error.code == "agent_error"
    assert message in error.message
    assert two.record(name) == record


def test_a_session_that_would_grow_too_large_stays_as_it_was(narrow: Conversations) -> None:
    name = secrets.token_hex(8)
    narrow.say(name, f"{name} one")
    before = narrow.record(name)
    error = narrow.fail(name, f"{name} two {'x' * 3000}")
    assert error.code == "agent_error"
    assert "too large" in error.message
    assert narrow.record(name) == before
    narrow.say(name, f"{name} three")
    assert texts(narrow.asked(f"{name} three")) == [f"{name} one", f"{name} three"]


# -- tools -------------------------------------------------------------------------------------------------------------


def test_a_tool_that_runs_is_in_redis_already(two: Conversations) -> None:
    """The tool is a program that looks into Redis."""
    service, seen = two.service, two.home / "seen.txt"
    look = f"""
        import redis
        client = redis.Redis.from_url({service.redis_url!r})
        streams = {{key: client.xrange(key) for key in client.scan_iter({service.keys.stream("*")!r})}}
        open({str(seen)!r}, "w").write(repr(streams))
    """
    script = two.home / "workspace" / "look.py"
    script.write_text(textwrap.dedent(look))
    command = json.dumps(
        {"command": f"{sys.executable}${{IFS}}{script}"}, separators=(",", ":")
    )  # a script without spaces
    answer = two.say(secrets.token_hex(8), "look", script=f"k=1 i=0 tool=exec args={command}")
    [stream] = re.findall(rf"{answer.id}.*?(?=b'{service.keys.prefix}|$)", seen.read_text())
    assert "started" in stream
    assert "completed" not in stream
    rows: Any = service.redis.xrange(service.keys.stream(answer.id))
    kinds = [entry.kind for raw_id, fields in rows for entry in entries_from_row(raw_id, fields)]
    assert kinds == ["open", "tool", "tool", "delta", "ok"]


def test_a_worker_that_stops_stops_its_tool_servers(
    tmp_path_factory: pytest.TempPathFactory, redis_url: str, upstream_url: str
) -> None:
    home = tmp_path_factory.mktemp("home")
    journal = home / "loud.txt"
    server = {"command": sys.executable, "args": ["-m", "tests.mcp_server", str(journal)], "cwd": str(ROOT)}
    config = write_config(home, upstream_url, mcpServers={"loud": server})
    with conversing(tmp_path_factory, redis_url, upstream_url, NANOBOT_CONFIG=config) as one:
        one.say("s", "shout", script='k=1 i=0 tool=mcp_loud_shout args={"text":"hey"}')
        assert "HEY" in json.dumps(one.asked("shout"))
        pid = int(journal.read_text().split()[1])
        worker = one.service.workers[0]
        worker.process.terminate()
        assert worker.wait() == 0
        wait_until(lambda: not is_running(pid), timeout=5, description="the tool server to end")
