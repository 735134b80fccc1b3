"""Redis fails over through Sentinel: every stream ends well or in an error, and the service goes on elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import redis

from shared.connection import connect, connect_blocking
from shared.sentinel import address_of_primary, look_for_primary
from shared.settings import Settings
from tests.conftest import leaks
from tests.contract.test_redis_faults import Crowd, Heard, idle
from tests.deployment import Deployment, deployed, script
from tests.durable_server import DurableServer
from tests.processes import ROOT
from tests.sentinels import SERVICE, SentinelCluster, role
from tests.waiting import async_wait_until

Start = Callable[..., Deployment]
FRAGMENTS = [f"<{number}>" for number in range(40)]
WHOLE = "".join(FRAGMENTS)
OURS = {"evalsha", "blpop", "subscribe", "xadd", "publish", "xrange"}  # what only our processes send to a server


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SentinelCluster]:
    with SentinelCluster(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture
def start(tmp_path: Path, cluster: SentinelCluster, prefix: str) -> Iterator[Start]:
    """`start(**settings)` gives a running service; afterwards nothing may be left on the primary."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Deployment:
            folder = tmp_path / "service"
            folder.mkdir()
            return stack.enter_context(deployed(folder, cluster.url, prefix, **settings))

        yield start
        assert leaks(cluster.primary.client, prefix) == []


async def assert_all_end(crowd: Crowd) -> None:
    """Each stream is whole, or ended in an error after what had been said."""
    async with asyncio.timeout(60):
        for heard in await crowd.heard():
            assert heard.text == WHOLE if heard.code is None else WHOLE.startswith(heard.text), heard


async def assert_served_by(service: Deployment, primary: DurableServer) -> None:
    """Also the sessions of the streams that were cut."""
    look_for_primary(service.redis)  # the test's own client must not wait for one that hangs
    info: Any = primary.client.info("server")

    def all_are_present_here() -> bool:
        workers = [service.keys.worker(worker.decode()) for worker in service.live_workers()]
        seen: list[Any] = [primary.client.hget(worker, "present_on") for worker in workers]
        return seen == [info["run_id"].encode()] * len(service.workers)

    await async_wait_until(all_are_present_here, timeout=20, description="the heartbeats on the new primary")
    await idle(service)
    after = await Crowd(service, script(say=["again"]), size=5).heard()
    assert after == [Heard("again", None)] * 5
    await idle(service)


def our_connections(server: DurableServer) -> list[str]:
    """What our processes did there last."""
    clients: Any = server.client.client_list()
    return [client["cmd"] for client in clients if client["cmd"] in OURS and not client["name"].startswith("sentinel")]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_streams_outlive_the_loss_of_the_primary_or_end_in_an_error(
    start: Start, cluster: SentinelCluster, signum: signal.Signals
) -> None:
    service = start(workers=2)
    crowd = Crowd(service, script(say=FRAGMENTS, every_s=0.1), size=5)
    await crowd.has_begun()
    await asyncio.to_thread(cluster.fail, signum)
    await assert_all_end(crowd)
    await assert_served_by(service, cluster.primary)


@pytest.mark.parametrize("coordinated", [True, False], ids=["coordinated", "two primaries"])
async def test_a_planned_failover_moves_everything_to_the_new_primary(
    start: Start, cluster: SentinelCluster, coordinated: bool
) -> None:
    """The old primary is read-only, or goes on as a primary that breaks no connection. Nobody may stay there."""
    if coordinated and not cluster.can_coordinate:
        pytest.skip("this server has no coordinated failover")
    service = start(workers=2)
    crowd = Crowd(service, script(say=FRAGMENTS, every_s=0.1), size=5)
    await crowd.has_begun()
    before = await asyncio.to_thread(cluster.plan_failover, coordinated=coordinated)
    await async_wait_until(lambda: not our_connections(before), timeout=20, description="nobody on the old primary")
    if coordinated:
        assert await crowd.heard() == [Heard(WHOLE, None)] * 5, "nothing is lost"
    await assert_all_end(crowd)
    await assert_served_by(service, cluster.primary)
    assert await asyncio.to_thread(arq_check, service) == 0
    assert role(before) == (b"slave" if coordinated else b"master")


def arq_check(service: Deployment) -> int:
    environment = {"ENDMARK_REDIS_URL": service.redis_url, "ENDMARK_PREFIX": service.keys.prefix}
    command = [str(Path(sys.executable).parent / "arq"), "worker.settings.WorkerSettings", "--check"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode


async def test_without_its_sentinels_what_is_connected_goes_on(start: Start, cluster: SentinelCluster) -> None:
    service = start()
    crowd = Crowd(service, script(say=FRAGMENTS, every_s=0.05), size=3)
    await crowd.has_begun()
    cluster.kill_sentinels()
    assert await crowd.heard() == [Heard(WHOLE, None)] * 3
    assert await Crowd(service, script(say=["a"]), size=3).heard() == [Heard("a", None)] * 3
    await idle(service)


def mistaken_about(replica: DurableServer) -> dict[str, Any]:
    """What a sentinel says that takes a replica for the primary."""
    state = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 2}
    return {SERVICE: state | {"ip": "127.0.0.1", "port": replica.port}}


async def test_nobody_stays_with_a_replica_that_a_sentinel_takes_for_the_primary(
    cluster: SentinelCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription there would be silent for ever."""
    [replica] = [server for server in cluster.servers if server is not cluster.primary]
    settings = Settings(redis_url=cluster.url)
    client, blocking = connect(settings), connect_blocking(settings)
    pools: list[Any] = [client.connection_pool, blocking.connection_pool]
    in_async, in_thread = (pool.sentinel_manager.sentinels[0] for pool in pools)
    monkeypatch.setattr(in_async, "sentinel_masters", AsyncMock(return_value=mistaken_about(replica)))
    monkeypatch.setattr(in_thread, "sentinel_masters", Mock(return_value=mistaken_about(replica)))

    with pytest.raises(redis.ConnectionError, match="not the primary"):
        await client.ping()
    with pytest.raises(redis.ConnectionError, match="not the primary"):
        blocking.ping()

    assert await client.ping()
    assert blocking.ping()
    assert address_of_primary(client) == address_of_primary(blocking) == ("127.0.0.1", cluster.primary.port)
    await client.aclose(close_connection_pool=True)
    blocking.close()
