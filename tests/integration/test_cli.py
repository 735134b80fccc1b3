"""What `endmark` says when something is wrong, as a person sees it: the message, the exit code, and no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from cli.environment import free_port
from tests.processes import ROOT

LOOPBACK = "127.0.0.1"


def endmark(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with the ENDMARK_ variables given and no other."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ENDMARK_")}
    completed = subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=ROOT,
        env={**env, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in completed.stderr, completed.stderr
    return completed


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_version() -> None:
    assert endmark("--version").stdout == f"endmark {version('endmark')}\n"


@pytest.mark.parametrize("command", ["dev", "api", "worker"])
def test_a_wrong_setting_names_its_variable(command: str) -> None:
    completed = endmark(command, ENDMARK_MAX_JOBS="many", ENDMARK_PREFIX="a b")
    assert completed.returncode == 2
    assert "ENDMARK_MAX_JOBS=many: Input should be a valid integer" in completed.stderr
    assert "Jobs that one worker runs at a time." in completed.stderr
    assert "ENDMARK_PREFIX=a b: String should match pattern" in completed.stderr
    assert "docs/settings.md" in completed.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ENDMARK_API_KEYS", "Not a tenant:hunter2"),
        ("ENDMARK_REDIS_URL", "http://user:hunter2@127.0.0.1"),
        ("ENDMARK_WEBHOOK_URL", "ftp://user:hunter2@127.0.0.1/"),
        ("ENDMARK_WEBHOOK_SECRET", "whsec_hunter2"),
    ],
)
def test_a_wrong_secret_is_not_shown(variable: str, value: str) -> None:
    completed = endmark("api", **{variable: value})
    assert completed.returncode == 2
    assert f"{variable}: " in completed.stderr
    assert "hunter2" not in completed.stdout + completed.stderr


def test_a_host_beyond_loopback_needs_keys() -> None:
    completed = endmark("api", "--host", "0.0.0.0")
    assert completed.returncode == 2
    assert "ENDMARK_HOST=0.0.0.0 is reachable from other machines: set ENDMARK_API_KEYS" in completed.stderr
    assert "Value error" not in completed.stderr


def test_an_option_wins_over_its_variable() -> None:
    with taken_port() as port:
        completed = endmark("api", "--port", str(port), ENDMARK_PORT=str(free_port(LOOPBACK)))
    assert f"port {port} on {LOOPBACK} is taken" in completed.stderr


@pytest.mark.parametrize("command", ["dev", "api"])
def test_a_taken_port_is_named_before_anything_starts(command: str) -> None:
    with taken_port() as port:
        completed = endmark(command, ENDMARK_PORT=str(port))
    assert completed.returncode == 1
    assert completed.stdout == ""
    assert completed.stderr == (
        f"Error: port {port} on {LOOPBACK} is taken by another process. "
        "Stop that process, or choose another port with --port or ENDMARK_PORT.\n"
    )


def test_a_worker_without_redis_says_where_it_looked() -> None:
    url = f"redis://:secret@{LOOPBACK}:{free_port(LOOPBACK)}/0"
    completed = endmark("worker", "--redis-url", url, ENDMARK_AGENT="echo", ENDMARK_REDIS_PATIENCE_S="1")
    assert completed.returncode == 1
    assert f"Error: Redis at {url.replace(':secret@', '')} cannot be used" in completed.stderr
    assert "ENDMARK_REDIS_URL" in completed.stderr
    assert "secret" not in completed.stderr


def test_an_agent_that_cannot_be_built_is_explained() -> None:
    completed = endmark("worker", ENDMARK_AGENT="no_such_module:agent")
    assert completed.returncode == 2
    assert "Error: ENDMARK_AGENT=no_such_module:agent: there is no module 'no_such_module'" in completed.stderr


def test_the_api_may_have_more_connections_than_the_usual_limit() -> None:
    """The limit of many systems, 1,024, would be reached by as many open streams."""
    program = (
        "import resource as r; from cli.environment import allow_many_connections as allow;"
        "most = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (256, most)); allow();"
        "print(r.getrlimit(r.RLIMIT_NOFILE) == (most, most))"
    )
    completed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert completed.stdout == "True\n"


def test_a_misspelt_setting_is_named_with_what_was_meant() -> None:
    completed = endmark("api", ENDMARK_API_KEY="k", ENDMARK_FROBNICATE="1", ENDMARK_MAX_JOBS="many", ENDMARK_URL="u")
    assert "ENDMARK_API_KEY " not in completed.stderr, "what is wrong comes first"
    with taken_port() as port:
        completed = endmark("api", "--port", str(port), ENDMARK_API_KEY="k", ENDMARK_FROBNICATE="1", ENDMARK_URL="u")
    assert "ENDMARK_API_KEY is no setting and is ignored; did you mean ENDMARK_API_KEYS?" in completed.stderr
    assert "ENDMARK_FROBNICATE is no setting and is ignored; docs/settings.md" in completed.stderr
    assert "ENDMARK_URL" not in completed.stderr


def test_an_agent_that_cannot_be_imported_is_told_with_its_own_lines(tmp_path: Path) -> None:
    (tmp_path / "broken_agent.py").write_text("def make():\n    raise RuntimeError('boom')\n\nagent = make()\n")
    completed = endmark("worker", ENDMARK_AGENT="broken_agent:agent", PYTHONPATH=str(tmp_path))
    assert completed.returncode == 2
    assert "Error: ENDMARK_AGENT=broken_agent:agent cannot be imported" in completed.stderr
    assert "line 2, in make" in completed.stderr
    assert completed.stderr.rstrip().endswith("RuntimeError: boom")


def test_the_address_of_the_deployment_itself_is_no_model() -> None:
    port = free_port(LOOPBACK)
    own = {"OPENAI_BASE_URL": f"http://localhost:{port}/v1", "OPENAI_API_KEY": "not-needed", "NANOBOT_CONFIG": "/none"}
    completed = endmark("dev", "--port", str(port), **own)
    assert completed.returncode == 2
    assert "would ask itself" in completed.stderr


@pytest.mark.parametrize(("url", "code"), [("127.0.0.1:8900", 2), (f"http://{LOOPBACK}:1/v1", 4)])
def test_the_url_of_an_api_is_checked(url: str, code: int) -> None:
    completed = endmark("jobs", "list", ENDMARK_URL=url)
    assert completed.returncode == code, completed.stderr
    assert ("http://" if code == 2 else f"http://{LOOPBACK}:1:") in completed.stderr
