"""Running services that the tests of a module share, and what must hold after each test."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import Deployment, Start, deployed, free_port
from tests.processes import running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    """The service with its default settings and the scripted agent."""
    folder = tmp_path_factory.mktemp("service")
    with deployed(folder, redis_url, f"test-{secrets.token_hex(4)}") as deployment:
        yield deployment


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    """The same with deadlines and intervals short enough to wait for."""
    folder = tmp_path_factory.mktemp("impatient")
    with deployed(
        folder,
        redis_url,
        f"test-{secrets.token_hex(4)}",
        idle_timeout_s=1,
        run_timeout_s=4,
        ping_interval_s=0.2,
        heartbeat_interval_s=0.5,
    ) as deployment:
        yield deployment


@pytest.fixture
def own_service(tmp_path: Path, redis_url: str, prefix: str) -> Iterator[Start]:
    """Starts a service that one test has for itself, to break it."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Deployment:
            folder = tmp_path / "service"
            folder.mkdir()
            settings = {"redis_url": redis_url} | settings
            return stack.enter_context(deployed(folder, settings.pop("redis_url"), prefix, **settings))

        yield start


@pytest.fixture(scope="module")
def upstream_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scripted model, see tests/upstream.py."""
    port = free_port()
    command = [sys.executable, "-m", "tests.upstream", "--port", str(port)]
    with running(command, folder=tmp_path_factory.mktemp("upstream")) as upstream:
        upstream.wait_for_output("scripted model on")
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: all jobs are terminal, and every key that is left has a time to live."""
    yield
    for name in ("service", "impatient"):
        if name in request.fixturenames:
            deployment: Deployment = request.getfixturevalue(name)
            deployment.wait_until_idle()
            assert deployment.keys_without_ttl() == []
