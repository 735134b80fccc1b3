"""`endmark dev` as a person runs it: real API, worker and Valkey processes, and the echo agent."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import click
import httpx
import pytest

from cli import dev as cli_dev
from cli.dev import first_steps, wait_until_serving
from cli.environment import free_port
from cli.supervisor import StartFailed
from tests.processes import Running, is_running, running
from tests.prometheus import scraped
from tests.waiting import wait_until

LAST_LINE = 'print(chunk.choices[0].delta.content or "", end="", flush=True)'


@contextmanager
def dev(folder: Path, *options: str, ready: bool = True, **environ: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "cli.main", "dev", "--data-dir", str(folder / "data"), "--port", "0", *options]
    with running(command, folder=folder, env={"ENDMARK_AGENT": "echo", **environ}) as supervisor:
        if ready:
            supervisor.wait_for_output(LAST_LINE, timeout=60)
            supervisor.wait_for_output("worker_started")  # it is ready a moment before it says so
        yield supervisor


def base_url(supervisor: Running) -> str:
    found = re.search(r"^Endmark serves (\S+)$", supervisor.output, re.MULTILINE)
    assert found, supervisor.output
    return found[1]


def ask(supervisor: Running, text: str, *, stream: bool = False) -> HTTPResponse:
    body = {"model": "endmark", "stream": stream, "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        f"{base_url(supervisor)}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    answer = urllib.request.urlopen(request, timeout=60)
    assert isinstance(answer, HTTPResponse)
    return answer


def answer_text(answer: HTTPResponse) -> Any:
    with answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def worker_pids(supervisor: Running) -> list[int]:
    """The process ids of all workers so far, from their own log lines."""
    started = [line for line in supervisor.output.splitlines() if "worker_started" in line]
    return [int(match[1]) for line in started if (match := re.search(r'"worker":"[^"]*?-(\d+)-', line))]


@pytest.fixture(scope="module")
def shared_dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One `endmark dev` for the tests that do not disturb it."""
    with dev(tmp_path_factory.mktemp("dev"), "--workers", "2") as supervisor:
        yield supervisor
        supervisor.interrupt()
        assert supervisor.wait() == 0


def test_it_says_what_runs_and_where_the_data_is(shared_dev: Running) -> None:
    assert "agent   echo: named by ENDMARK_AGENT" in shared_dev.output
    assert re.search(
        r"^data    /.*/data/valkey \(embedded Valkey, redis://127\.0\.0\.1:\d+/0\)$", shared_dev.output, re.M
    )
    shared_dev.wait_for_output("worker-1 │ ")  # one worker is enough to be ready
    shared_dev.wait_for_output("worker-2 │ ")
    assert "api      │ " in shared_dev.output


def test_the_printed_python_runs(shared_dev: Running) -> None:
    lines = shared_dev.output.splitlines()
    begin = lines.index("from openai import OpenAI")
    completed = subprocess.run(
        [sys.executable, "-c", "\n".join(lines[begin : begin + 6])],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert completed.stdout.strip() == "Hello"


def test_the_printed_dashboard_opens(shared_dev: Running) -> None:
    shared_dev.wait_for_output("The dashboard: ")
    [line] = [line for line in shared_dev.output.splitlines() if line.startswith("The dashboard: ")]
    answer = httpx.get(line.removeprefix("The dashboard: "), follow_redirects=True)
    assert (answer.status_code, "Overview" in answer.text) == (200, True)


def test_the_printed_curl_line_runs(shared_dev: Running) -> None:
    [line] = [line for line in shared_dev.output.splitlines() if line.startswith("curl ")]
    completed = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert "Hello" in completed.stdout
    assert completed.stdout.rstrip().endswith("data: [DONE]")


def test_one_interrupt_lets_an_open_stream_end(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(100)]
    with dev(tmp_path) as supervisor:
        stream = ask(supervisor, " ".join(words), stream=True)
        first = stream.readline()
        supervisor.interrupt()
        rest = stream.read().decode()
        assert supervisor.wait() == 0

    assert first.startswith(b"data: ")
    assert words[-1] in rest
    assert rest.rstrip().endswith("data: [DONE]")
    assert supervisor.output.index("api_stopped") < supervisor.output.index("worker_stopped")
    assert supervisor.output.index("worker_stopped") < supervisor.output.index("Valkey is now ready to exit")


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    with dev(tmp_path) as supervisor:
        [first] = worker_pids(supervisor)
        os.kill(first, signal.SIGKILL)
        supervisor.wait_for_output(f"worker (pid {first}) was ended by SIGKILL; it starts again in 0.5 s")
        assert answer_text(ask(supervisor, "still there?")) == "still there?"
        assert len(worker_pids(supervisor)) == 2


def test_a_killed_supervisor_leaves_no_worker_and_no_server(tmp_path: Path) -> None:
    with dev(tmp_path) as supervisor:
        found = re.search(r"Started server process \[(\d+)\]", supervisor.output)
        assert found
        children = [int(found[1]), *worker_pids(supervisor)]
        supervisor.process.kill()
        wait_until(lambda: not any(map(is_running, children)), timeout=30, description="all children gone")
    with dev(tmp_path) as supervisor:  # nothing holds the data folder any more
        assert answer_text(ask(supervisor, "again")) == "again"


def test_with_keys_the_first_steps_carry_a_placeholder(tmp_path: Path) -> None:
    with dev(tmp_path, ENDMARK_API_KEYS="secret") as supervisor:
        assert 'api_key="YOUR_API_KEY"' in supervisor.output
        assert "-H 'Authorization: Bearer YOUR_API_KEY'" in supervisor.output
        assert "secret" not in supervisor.output


def test_a_redis_that_does_not_answer_ends_the_start(tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{free_port('127.0.0.1')}/0"
    with dev(tmp_path, "--redis-url", url, ready=False, ENDMARK_REDIS_PATIENCE_S="1") as supervisor:
        assert supervisor.wait(timeout=60) == 1
        assert f"data    Redis at {url}" in supervisor.output
        assert f"Error: Redis at {url} cannot be used" in supervisor.output
        assert "exited with code 1 before everything was ready" in supervisor.output


async def test_what_is_not_ready_in_time_is_told() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}/ready"
    began = time.monotonic()
    with pytest.raises(StartFailed, match=r"not ready after 0\.3 s: http://.*/ready says: .*refused"):
        await wait_until_serving(url, timeout_s=0.3)
    assert time.monotonic() - began < 5


def test_first_steps_survive_any_model_name() -> None:
    model = """it's "mine" $HOME"""
    steps = first_steps("http://127.0.0.1:8900/v1", model, keyed=False)
    [curl] = [line for line in steps if line.startswith("curl ")]
    printed = subprocess.run(
        ["sh", "-c", curl.replace("curl -N", "printf '%s\\n'", 1)], capture_output=True, check=True
    )
    assert json.loads(printed.stdout.splitlines()[-1])["model"] == model
    compile("\n".join(steps[steps.index("from openai import OpenAI") :]), "first steps", "exec")


def test_the_metrics_of_the_api_tell_of_all_workers(shared_dev: Running) -> None:
    for text in ("one", "two"):
        assert answer_text(ask(shared_dev, text)) == text
    url = f"{base_url(shared_dev).removesuffix('/v1')}/metrics"
    wait_until(
        lambda: scraped(url).value("endmark_jobs_ended_total", status="succeeded") >= 2,
        timeout=10,
        description="two jobs that have been counted",
    )
    wait_until(lambda: scraped(url).value("endmark_workers") == 2, timeout=10, description="two workers")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space left"), BrokenPipeError(), ValueError("closed file")]
)
def test_a_line_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The supervisor's callbacks: an exception of theirs would end its care for a child."""

    def echo(_line: str) -> None:
        raise error

    monkeypatch.setattr(click, "echo", echo)
    cli_dev._tell("worker │ a line")
