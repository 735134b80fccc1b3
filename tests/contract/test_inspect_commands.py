"""`endmark jobs | workers | queue | top` against a running service, as a person and as a script see them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.deployment import KEY, Deployment, Start, script
from tests.integration.test_cli import endmark
from tests.waiting import wait_until

ADMIN = "sk-admin"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def operated(own_service: Start) -> Deployment:
    return own_service(admin_keys=ADMIN)


@pytest.fixture
def command(operated: Deployment) -> Command:
    """Runs the command against the service, as an operator."""

    def run(*arguments: str, key: str = ADMIN) -> subprocess.CompletedProcess[str]:
        return endmark(*arguments, ENDMARK_URL=operated.base_url, ENDMARK_KEY=key, COLUMNS="200")

    return run


def as_json(completed: subprocess.CompletedProcess[str]) -> Any:
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


def succeed(service: Deployment, **steps: Any) -> str:
    with service.client() as client:
        return client.chat.completions.create(model="endmark", messages=script(**steps)).id


def fail(service: Deployment) -> str:
    before = set(service.job_ids())
    with service.client() as client, pytest.raises(openai.APIError):
        client.chat.completions.create(model="endmark", messages=script(say=["a"], then="raise"))
    (job_id,) = set(service.job_ids()) - before
    return job_id


def test_a_tail_shows_every_line_end_that_unicode_has(operated: Deployment, command: Command) -> None:
    """In JSON they need no escape, and for some readers of lines they end a line."""
    said = "a\u2028b\u2029c\u0085d"
    watched = command("jobs", "tail", succeed(operated, say=[said]))
    assert (watched.returncode, "d" in watched.stdout) == (0, True), watched.stderr


def test_jobs_are_listed_and_counted(operated: Deployment, command: Command) -> None:
    succeeded, failed = succeed(operated, say=["a"]), fail(operated)
    table = command("jobs", "list").stdout
    assert table.index(failed) < table.index(succeeded)
    assert "agent_error" in table
    assert [job["id"] for job in as_json(command("jobs", "list", "--status", "failed", "--json"))["data"]] == [failed]
    assert as_json(command("jobs", "list", "--since", "1h", "--limit", "1", "--json"))["data"][0]["id"] == failed
    assert as_json(command("jobs", "count", "--json"))["by_status"] == {"succeeded": 1, "failed": 1}
    assert "agent_error" in command("jobs", "count").stdout


def test_one_job_is_shown_and_watched(operated: Deployment, command: Command) -> None:
    job_id = succeed(operated, say=["said ", "aloud"], tools=["search"])
    shown = command("jobs", "show", job_id).stdout
    assert "said aloud" in shown
    assert "first token" in shown
    watched = command("jobs", "tail", job_id)
    assert (watched.returncode, "said aloud" in watched.stdout) == (0, True)
    assert "[search started]" in watched.stdout
    assert "succeeded (stop)" in watched.stdout
    events = [json.loads(line) for line in command("jobs", "tail", job_id, "--json").stdout.splitlines()]
    assert events[-1]["event"] == "end"


def test_a_watched_job_that_fails_is_an_error(operated: Deployment, command: Command) -> None:
    watched = command("jobs", "tail", fail(operated))
    assert watched.returncode == 1
    assert "agent_error" in watched.stdout


def test_a_job_is_retried_and_deleted(operated: Deployment, command: Command) -> None:
    job_id = succeed(operated, say=["a"])
    (again,) = as_json(command("jobs", "retry", job_id, "--json"))
    assert again["retry_of"] == job_id
    operated.wait_until_idle()
    assert "deleted" in command("jobs", "delete", job_id, again["id"]).stdout
    assert command("jobs", "show", job_id).returncode == 3


def test_running_jobs_are_cancelled_together(operated: Deployment, command: Command) -> None:
    with operated.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        job_id = next(stream).id
        assert command("jobs", "bulk", "cancel", "--status", "running", "--dry-run").stdout.split() == [job_id]
        refused = command("jobs", "bulk", "cancel", "--status", "running")
        assert refused.returncode == 1  # nobody answered the question
        assert as_json(command("jobs", "bulk", "cancel", "--status", "running", "--yes", "--json"))["done"] == 1
        with pytest.raises(openai.APIError):
            list(stream)
    assert "cancelled" in command("jobs", "cancel", job_id).stdout


def test_queue_and_workers_are_operated(operated: Deployment, command: Command) -> None:
    assert "0 of 50 slots on 1 workers" in command("queue").stdout
    assert as_json(command("queue", "pause", "--for", "60", "--json"))["paused"]["by"].startswith("key-")
    assert as_json(command("queue", "resume", "--json"))["paused"] is None
    (worker,) = as_json(command("workers", "--json"))["data"]
    assert worker["id"] in command("workers").stdout
    assert worker["id"] in command("top", "--once").stdout
    assert set(as_json(command("top", "--json"))) == {"queue", "workers", "running", "latest"}
    assert command("workers", "drain", worker["id"]).returncode == 0
    wait_until(lambda: not operated.live_workers(), timeout=20, description="the worker to leave")


def test_what_is_not_there_and_what_is_refused_is_said_plainly(operated: Deployment, command: Command) -> None:
    missing = command("jobs", "show", "chatcmpl-nobody")
    assert (missing.returncode, "No such job" in missing.stderr) == (3, True)
    forbidden = command("queue", key=KEY)
    assert (forbidden.returncode, "admin key" in forbidden.stderr) == (1, True)
    wrong = command("jobs", "list", key="sk-wrong")
    assert (wrong.returncode, "ENDMARK_KEY" in wrong.stderr) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [("jobs", "list", "--status", "done"), ("jobs", "list", "--since", "soon"), ("jobs", "list", "--metadata", "x")],
)
def test_wrong_usage_is_explained(arguments: tuple[str, ...]) -> None:
    assert endmark(*arguments).returncode == 2


def test_an_api_that_is_not_there_is_said_plainly(tmp_path: Path) -> None:
    completed = endmark("jobs", "list", "--url", "http://127.0.0.1:9")
    assert (completed.returncode, "no Endmark API answers at http://127.0.0.1:9" in completed.stderr) == (4, True)
