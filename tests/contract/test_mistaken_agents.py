"""Anybody can write an agent. Whatever it does wrong is its error, and its job can be looked at and acted on."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment, deployed

ADMIN = "sk-admin"
MISTAKES = [
    "arguments that are no string",
    "a call without an index",
    "what is no JSON",
    "a status that there is not",
    "a name that is no string",
    "usage of a kind of its own",
    "a text that is none",
    "a tool without a name",
    "a cancellation of its own",
    "a word that is no string, which it does not mind",
    "more words than it may say, which it does not mind",
    "an error without a message",
    "an error whose message is no string",
    "half an emoji in an exception",
    "half an emoji in a message",
]


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    folder, prefix = tmp_path_factory.mktemp("mistaken"), f"test-{secrets.token_hex(4)}"
    agent = "tests.mistaken_agent:agent"
    settings: dict[str, Any] = {"admin_keys": ADMIN, "max_answer_bytes": 2000}
    with deployed(folder, redis_url, prefix, agent=agent, **settings) as deployment:
        yield deployment


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_the_agents_error_and_its_job_is_like_any_other(mistaken: Deployment, mistake: str) -> None:
    before = set(mistaken.job_ids())
    request = {"messages": [{"role": "user", "content": mistake}], "store": True}
    with mistaken.http() as http, mistaken.http(key=ADMIN) as operator:
        answer = http.post("/v1/chat/completions", json=request)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "agent_error")
        [job_id] = set(mistaken.job_ids()) - before

        record = operator.get(f"/v1/jobs/{job_id}").json()
        assert (record["status"], record["error"]["code"]) == ("failed", "agent_error")
        assert "Traceback" in record["traceback"]
        for path in (f"/v1/jobs/{job_id}", "/v1/jobs", f"/v1/jobs/{job_id}/events"):
            assert http.get(path).status_code == 200, path
        assert http.get(f"/v1/chat/completions/{job_id}/stream").text.endswith("}}\n\n")
        assert http.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
        again = http.post(f"/v1/jobs/{job_id}/retry")
        assert again.status_code == 201
        assert shown_on_the_dashboard(mistaken, job_id)
        assert http.delete(f"/v1/jobs/{job_id}").status_code == 200
    mistaken.wait_until_idle()


def shown_on_the_dashboard(service: Deployment, job_id: str) -> bool:
    headers = {"origin": service.base_url}
    with httpx.Client(base_url=service.base_url, headers=headers, follow_redirects=True, timeout=30) as browser:
        browser.post("/dashboard/login", data={"key": ADMIN, "next": "/dashboard/queue"})
        page = browser.get(f"/dashboard/jobs/{job_id}")
    return page.status_code == 200 and 'id="traceback"' in page.text


@pytest.mark.parametrize("mistake", ["usage that no number holds", "usage below zero"])
def test_a_count_that_is_none_costs_no_answer(mistaken: Deployment, mistake: str) -> None:
    with mistaken.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=[{"role": "user", "content": mistake}])
    assert (answer.choices[0].message.content, answer.usage and answer.usage.total_tokens) == ("42", 0)
