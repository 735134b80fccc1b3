"""The processes of a chaos run, each with a proxy of its own to Redis, and what can be done to them."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx

from cli.environment import free_port
from shared.keys import Keys
from tests.chaos.agent import LOG_VARIABLE
from tests.chaos.faults import APIS, LEASE_S, WORKERS, Fault
from tests.deployment import KEY
from tests.durable_server import DurableServer
from tests.processes import Running, running
from tests.proxy import Proxy
from tests.waiting import POLL_S, async_wait_until

PREFIX = "chaos"
QUEUE_TIMEOUT_S = 15.0
RUN_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 8.0
PATIENCE_S = 8.0
MAX_ATTEMPTS = 2
# No job takes longer than all its deadlines together; the rest is for the machine.
LONGEST_JOB_S = MAX_ATTEMPTS * (QUEUE_TIMEOUT_S + RUN_TIMEOUT_S) + PATIENCE_S + 15.0


@dataclass
class Outage:
    """When an API process could not be reached, by `time.monotonic`."""

    since: float
    until: float = float("inf")
    abrupt: bool = False  # killed: open streams break, too

    def touches(self, start: float, end: float) -> bool:
        return self.since <= end and start <= self.until


@dataclass
class Member:
    """One process of ours, which is started again whenever it ends."""

    command: tuple[str, ...]
    folder: Path
    env: dict[str, str]
    proxy: Proxy
    port: int = 0  # of an API
    process: Running | None = None
    outages: list[Outage] = field(default_factory=list)
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)  # one fault at a time

    def send_signal(self, signum: signal.Signals) -> None:
        assert self.process is not None
        self.process.process.send_signal(signum)


class Cluster:
    """Two APIs, three workers, one Redis. A context manager; `start` before anything else."""

    def __init__(self, folder: Path, *, appendfsync: str) -> None:
        self.keys = Keys(PREFIX)
        self.log = folder / "said.jsonl"
        self._folder = folder
        self._stack = ExitStack()
        self.redis = DurableServer(folder / "redis", appendfsync=appendfsync)
        self.redis_deaths: list[float] = []
        self._redis_busy = asyncio.Lock()
        self.apis: list[Member] = []
        self.workers: list[Member] = []

    async def __aenter__(self) -> Cluster:
        self._stack.enter_context(self.redis)
        for number in range(APIS):
            port = free_port("127.0.0.1")
            member = self._member(f"api-{number}", "api", "--port", str(port))
            member.port = port
            self.apis.append(member)
        self.workers = [self._member(f"worker-{number}", "worker") for number in range(WORKERS)]
        for member in (*self.apis, *self.workers):
            self._start(member)
        for api in self.apis:
            await self._until_it_answers(api, "/health")
        await self._until_all_work()
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stack.close()

    def base_url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.apis[number].port}"

    def _member(self, name: str, *command: str) -> Member:
        folder = self._folder / name
        folder.mkdir()
        proxy = self._stack.enter_context(Proxy(self.redis.port))
        env = {
            "ENDMARK_REDIS_URL": proxy.url,
            "ENDMARK_PREFIX": PREFIX,
            "ENDMARK_API_KEYS": KEY,
            "ENDMARK_AGENT": "tests.chaos.agent:agent",
            "ENDMARK_LOG_FORMAT": "json",
            "ENDMARK_LEASE_S": str(LEASE_S),
            "ENDMARK_QUEUE_TIMEOUT_S": str(QUEUE_TIMEOUT_S),
            "ENDMARK_RUN_TIMEOUT_S": str(RUN_TIMEOUT_S),
            "ENDMARK_DRAIN_TIMEOUT_S": str(DRAIN_TIMEOUT_S),
            "ENDMARK_REDIS_PATIENCE_S": str(PATIENCE_S),
            "ENDMARK_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "ENDMARK_PING_INTERVAL_S": "1",
            "ENDMARK_SESSION_TTL_S": "3600",
            LOG_VARIABLE: str(self.log),
        }
        return Member((sys.executable, "-m", "cli.main", *command), folder, env, proxy)

    def _start(self, member: Member) -> None:
        member.process = self._stack.enter_context(running(member.command, folder=member.folder, env=member.env))

    # -- faults, by their names ----------------------------------------------------------------------------------------

    async def strike(self, fault: Fault) -> None:
        """Does it and undoes it."""
        method: Callable[[int, float], Awaitable[None]] = getattr(self, fault.name)
        await method(fault.target, fault.lasts_s)

    async def kill_worker(self, number: int, lasts_s: float) -> None:
        async with self.workers[number].busy:
            await self._restart(self.workers[number], signal.SIGKILL, lasts_s)

    async def stop_worker(self, number: int, lasts_s: float) -> None:
        async with self.workers[number].busy:
            await self._restart(self.workers[number], signal.SIGTERM, lasts_s)

    async def roll_workers(self, _: int, lasts_s: float) -> None:
        for number in range(WORKERS):
            await self.stop_worker(number, lasts_s)

    async def pause_worker(self, number: int, lasts_s: float) -> None:
        worker = self.workers[number]
        async with worker.busy:
            worker.send_signal(signal.SIGSTOP)
            await asyncio.sleep(lasts_s)
            worker.send_signal(signal.SIGCONT)

    async def cut_off_worker(self, number: int, lasts_s: float) -> None:
        await self._cut_off(self.workers[number], lasts_s)

    async def cut_off_api(self, number: int, lasts_s: float) -> None:
        await self._cut_off(self.apis[number], lasts_s)

    async def cut_worker(self, number: int, _: float) -> None:
        self.workers[number].proxy.cut()

    async def cut_api(self, number: int, _: float) -> None:
        self.apis[number].proxy.cut()

    async def kill_api(self, number: int, lasts_s: float) -> None:
        await self._restart_api(number, signal.SIGKILL, lasts_s)

    async def stop_api(self, number: int, lasts_s: float) -> None:
        await self._restart_api(number, signal.SIGTERM, lasts_s)

    async def kill_redis(self, _: int, lasts_s: float) -> None:
        async with self._redis_busy:
            self.redis_deaths.append(time.monotonic())
            self.redis.kill()
            await asyncio.sleep(lasts_s)
            self.redis.launch()
            await async_wait_until(self.redis.answers, timeout=20, description="Redis to be back")

    async def pause_redis(self, _: int, lasts_s: float) -> None:
        async with self._redis_busy:
            self.redis.send_signal(signal.SIGSTOP)
            await asyncio.sleep(lasts_s)
            self.redis.send_signal(signal.SIGCONT)

    async def kill_connections(self, _: int, __: float) -> None:
        async with self._redis_busy:
            await asyncio.to_thread(kill_all_connections, self.redis)

    @asynccontextmanager
    async def _outage(self, api: Member, *, abrupt: bool) -> AsyncIterator[None]:
        outage = Outage(since=time.monotonic(), abrupt=abrupt)
        api.outages.append(outage)
        yield
        outage.until = time.monotonic()

    async def _restart_api(self, number: int, signum: signal.Signals, lasts_s: float) -> None:
        api = self.apis[number]
        async with api.busy, self._outage(api, abrupt=signum is signal.SIGKILL):
            await self._restart(api, signum, lasts_s)
            await self._until_it_answers(api, "/health")

    async def _restart(self, member: Member, signum: signal.Signals, lasts_s: float) -> None:
        assert member.process is not None
        process = member.process.process
        member.send_signal(signum)
        deadline = time.monotonic() + DRAIN_TIMEOUT_S + 40
        while process.poll() is None:
            assert time.monotonic() < deadline, (
                f"{member.folder.name} does not end after {signum.name}:\n{member.process.output[-6000:]}"
            )
            await asyncio.sleep(POLL_S)
        await asyncio.sleep(lasts_s)
        self._start(member)

    async def _cut_off(self, member: Member, lasts_s: float) -> None:
        """A partition: nothing is passed on and nothing is refused; then the connections are gone."""
        async with member.busy:
            member.proxy.silence()
            await asyncio.sleep(lasts_s)
            member.proxy.cut()
            member.proxy.resume()

    # -- looking -------------------------------------------------------------------------------------------------------

    async def _until_it_answers(self, api: Member, path: str) -> None:
        async def answers() -> bool:
            assert api.process is not None
            assert api.process.process.poll() is None, f"the API has ended:\n{api.process.output}"
            try:
                async with httpx.AsyncClient() as client:
                    url = f"http://127.0.0.1:{api.port}{path}"
                    return (await client.get(url, headers={"authorization": f"Bearer {KEY}"})).status_code == 200
            except httpx.TransportError:
                return False

        deadline = time.monotonic() + 40
        while not await answers():
            assert time.monotonic() < deadline, f"waited in vain: {api.folder.name} to answer {path}"
            await asyncio.sleep(POLL_S)

    async def _until_all_work(self) -> None:
        def all_hold_a_lease() -> bool:
            for worker in self.workers:
                assert worker.process is not None
                assert worker.process.process.poll() is None, f"a worker has ended:\n{worker.process.output}"
            return self.redis.client.zcard(self.keys.workers) == WORKERS

        await async_wait_until(all_hold_a_lease, timeout=40, description="leases of all workers")

    def ended_by_themselves(self) -> list[str]:
        """Processes that ended though nobody made them, with the end of their output."""
        return [
            f"{member.folder.name} has ended by itself:\n{member.process.output[-2000:]}"
            for member in (*self.apis, *self.workers)
            if member.process is not None and member.process.process.poll() is not None
        ]

    def logs(self) -> str:
        """What our processes have logged as errors."""
        lines = [
            f"{path.parent.name}: {line}"
            for path in sorted(self._folder.glob("*/output-*"))
            for line in path.read_text(errors="replace").splitlines()
            if '"level": "error"' in line or '"level":"error"' in line or line.startswith("Traceback")
        ]
        return "\n".join(lines[-40:])


def kill_all_connections(server: DurableServer) -> None:
    """CLIENT KILL, for commands and for pub/sub; the one that asks is spared."""
    for kind in ("normal", "pubsub"):
        server.client.client_kill_filter(_type=kind, skipme=True)
