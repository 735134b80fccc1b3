"""The parts started as their own frameworks start them, without our command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from tests.deployment import free_port
from tests.processes import ROOT, Running, running
from tests.waiting import wait_until

BIN = Path(sys.executable).parent
ARQ = [str(BIN / "arq"), "worker.settings.WorkerSettings"]


@pytest.fixture
def environment(redis_url: str, prefix: str) -> dict[str, str]:
    return {"ENDMARK_REDIS_URL": redis_url, "ENDMARK_PREFIX": prefix, "ENDMARK_AGENT": "echo"}


@pytest.fixture
def base_url(tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
    """An API that uvicorn's own command line has started."""
    port = free_port()
    command = [str(BIN / "uvicorn"), "--factory", "api.app:create_app", "--port", str(port)]
    with _running(command, tmp_path / "api", environment):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _status(f"{url}/health") == 200, timeout=30, description="the API")
        yield url


def _running(command: list[str], folder: Path, environment: dict[str, str]) -> ExitStack:
    folder.mkdir()
    stack = ExitStack()
    stack.enter_context(running(command, folder=folder, env=environment))
    return stack


def _status(url: str) -> int:
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return 0


def test_uvicorn_and_arq_run_the_service(base_url: str, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "worker").mkdir()
    with running(ARQ, folder=tmp_path / "worker", env=environment) as worker:
        wait_until(lambda: _status(f"{base_url}/ready") == 200, timeout=30, description="a worker")
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key="not-needed") as client:
            answer = client.chat.completions.create(
                model="endmark", messages=[{"role": "user", "content": "Hello you"}]
            )
        assert answer.choices[0].message.content == "Hello you"
        assert _arq_check(environment) == 0
        stop(worker)
    assert _status(f"{base_url}/ready") == 503, "a worker that stopped is not counted any more"


def stop(worker: Running) -> None:
    worker.process.terminate()
    assert worker.wait() == 0, worker.output


def _arq_check(environment: dict[str, str]) -> int:
    command = [*ARQ, "--check"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=False
    ).returncode


def test_arq_says_when_no_worker_runs(environment: dict[str, str]) -> None:
    assert _arq_check(environment) == 1


def test_a_burst_answers_what_waits_and_ends(base_url: str, tmp_path: Path, environment: dict[str, str]) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    (tmp_path / "worker").mkdir()
    with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body) as response:
        with running([*ARQ, "--burst"], folder=tmp_path / "worker", env=environment) as worker:
            assert worker.wait() == 0, worker.output
        assert response.read().endswith(b"data: [DONE]\n\n")
