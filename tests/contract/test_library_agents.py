"""What agents of other libraries, and generators, have in common behind the service; see tests/same_agent/."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from shared.entries import Kind
from shared.jobs import Status
from shared.packs import entries_from_row
from shared.text import parse_json
from tests.deployment import Deployment, deployed
from tests.waiting import wait_until


@pytest.fixture(scope="module", params=["generator", "pydantic", "graph"])
def library_service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_url: str
) -> Iterator[Deployment]:
    """Two workers, so that a session moves between them."""
    folder, prefix = tmp_path_factory.mktemp("service"), f"test-{secrets.token_hex(4)}"
    agent = f"tests.same_agent.{request.param}:agent"
    with deployed(folder, redis_url, prefix, workers=2, agent=agent, session_ttl_s=60, max_jobs=2) as deployment:
        yield deployment
        deployment.wait_until_idle()
        assert deployment.keys_without_ttl() == []


def ask(service: Deployment, text: str, *, session: str | None = None, **options: Any) -> ChatCompletion:
    session = session or secrets.token_hex(4)
    with service.client() as client:
        answer: ChatCompletion = client.chat.completions.create(
            model="endmark",
            messages=[{"role": "user", "content": text}],
            extra_body={"session_id": session},
            **options,
        )
    return answer


def test_a_session_is_remembered_and_a_failed_turn_is_not(library_service: Deployment) -> None:
    def content(text: str, session: str) -> str | None:
        return ask(library_service, text, session=session).choices[0].message.content

    assert content("one", "mine") == "one"
    with pytest.raises(openai.InternalServerError):
        content("fail", "mine")
    assert content("two", "mine") == "one, two"
    assert content("three", "mine") == "one, two, three"
    assert content("four", "yours") == "four"


def test_a_history_of_the_client_takes_the_place_of_the_session(library_service: Deployment) -> None:
    history: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
    ]
    with library_service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=history)
    assert answer.choices[0].message.content == "one, two"


def test_a_model_that_breaks_is_an_error(library_service: Deployment) -> None:
    body = {"model": "endmark", "stream": True, "messages": [{"role": "user", "content": "fail"}]}
    with library_service.http() as http:
        answer = http.post("/v1/chat/completions", json=body).text
    assert '"content":"half"' in answer
    assert '"code":"agent_error"' in answer
    assert '"finish_reason":"' not in answer
    assert "[DONE]" not in answer
    assert "the model broke" not in answer


def test_what_a_tool_does_is_in_the_stream(library_service: Deployment) -> None:
    answer = ask(library_service, "tool")
    assert answer.choices[0].message.content == "tool"
    assert answer.choices[0].finish_reason == "stop"
    rows: Any = library_service.redis.xrange(library_service.keys.stream(answer.id))
    entries = [entry for raw_id, fields in rows for entry in entries_from_row(raw_id, fields)]
    tools = [parse_json(entry.payload) for entry in entries if entry.kind is Kind.TOOL]
    assert [(event["name"], event["status"], event["call_id"]) for event in tools] == [
        ("look", "started", "call_1"),
        ("look", "completed", "call_1"),
    ]
    kinds = [entry.kind for entry in entries]
    assert kinds[:3] == [Kind.OPEN, Kind.TOOL, Kind.TOOL]
    assert set(kinds[3:-1]) == {Kind.DELTA}


def test_a_client_that_goes_away_stops_the_tool(library_service: Deployment, tmp_path: Path) -> None:
    note = tmp_path / "note"
    body = {"model": "endmark", "stream": True, "messages": [{"role": "user", "content": f"hang {note}"}]}
    with library_service.http() as http, http.stream("POST", "/v1/chat/completions", json=body):
        wait_until(note.exists, timeout=10, description="the tool to run")
        [job_id] = [job for job in library_service.job_ids() if library_service.job_field(job, "status") == "running"]
    library_service.wait_for_status(job_id, Status.CANCELLED)
    wait_until(lambda: note.read_text() == "cancelled", timeout=5, description="the tool to be cancelled")
