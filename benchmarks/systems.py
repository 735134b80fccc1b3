"""The systems under test, as real processes of this machine: started, known by their process ids, never left behind.

    endmark      API processes and workers as users run them, and the Valkey server with the options of `endmark dev`
    seam         the same agent in one process, without a queue, behind Starlette (benchmarks/seam.py)
    bare seam    the same without a framework, on raw ASGI (benchmarks/bare_seam.py)
    bare relay   API, Redis and worker with nothing but the way of a token (benchmarks/bare_relay.py), on that server
    naive arq    the first version that anyone writes with arq (benchmarks/naive_arq.py), on the same server

and, for benchmarks/nanobot_serve.py alone, `nanobot serve`, the server that nanobot brings along.

Endmark runs with its default settings, but for `ENDMARK_MAX_JOBS`: the others have no limit of their own either.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import redis

from cli import embedded
from tests.deployment import free_port
from tests.processes import Running, running
from tests.waiting import wait_until

AGENT = "benchmarks.agent:agent"
PREFIX = "endmark"
MAX_JOBS = 10_000  # the most that the settings allow
START_TIMEOUT_S = 60
ONE_TOKEN = {"model": "endmark", "stream": True, "messages": [{"role": "user", "content": "[[mock k=1 i=0]]"}]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A system that answers."""

    name: str
    base_urls: tuple[str, ...]  # one for each API process
    processes: Mapping[str, tuple[int, ...]]  # process ids by role; all of them are part of the price
    redis_url: str | None = None  # None: it has no Redis
    tools: tuple[int, ...] = ()  # process ids of what only measures; not part of the price


Start = Callable[[Path], AbstractContextManager[Serving]]


class _Processes:
    """Starts processes, each with its output in a file of its own."""

    def __init__(self, stack: ExitStack, folder: Path, environment: Mapping[str, str]) -> None:
        self._stack = stack
        self._folder = folder
        self._environment = environment

    def start(self, name: str, *command: str, **environment: str) -> Running:
        folder = self._folder / name
        folder.mkdir()
        return self._stack.enter_context(running(command, folder=folder, env={**self._environment, **environment}))

    def python(self, name: str, *command: str, **environment: str) -> Running:
        return self.start(name, sys.executable, "-m", *command, **environment)

    def arq(self, name: str, settings: str) -> Running:
        return self.start(name, str(Path(sys.executable).parent / "arq"), settings)


@contextmanager
def valkey(folder: Path) -> Iterator[tuple[str, int]]:
    """The server with the options of `endmark dev`: its URL and its process id."""
    (folder / "output").mkdir(parents=True)
    with embedded.claim(folder / "data") as claimed:
        child = claimed.child()
        with running(child.command, folder=folder / "output", env=child.env) as server:
            with redis.Redis.from_url(claimed.redis_url) as client:
                wait_until(lambda: _answers_ping(client), timeout=START_TIMEOUT_S, description="Valkey")
            yield claimed.redis_url, server.process.pid


def _answers_ping(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@contextmanager
def endmark(
    folder: Path,
    *,
    apis: int = 1,
    workers: int = 1,
    agent: str = AGENT,
    environment: Mapping[str, str] | None = None,
    before_workers: Callable[[str], None] | None = None,
) -> Iterator[Serving]:
    """Some API processes and some workers. `environment` is theirs, beside the settings above.

    `before_workers` is called with the URL of the server, when the workers have not been started yet.
    """
    with ExitStack() as stack:
        redis_url, valkey_pid = stack.enter_context(valkey(folder / "valkey"))
        settings = {
            "ENDMARK_REDIS_URL": redis_url,
            "ENDMARK_AGENT": agent,
            "ENDMARK_PREFIX": PREFIX,
            "ENDMARK_MAX_JOBS": str(MAX_JOBS),
        }
        if before_workers is not None:
            before_workers(redis_url)
        processes = _Processes(stack, folder, settings | dict(environment or {}))
        ports = [free_port() for _ in range(apis)]
        served = [processes.python(f"api-{port}", "cli.main", "api", "--port", str(port)) for port in ports]
        executing = [processes.arq(f"worker-{n}", "worker.settings.WorkerSettings") for n in range(workers)]
        base_urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        for base_url, api in zip(base_urls, served, strict=True):
            _wait_until_it_answers(f"{base_url}/health", api)
        _wait_for_workers(redis_url, executing)
        yield Serving(
            name="endmark",
            base_urls=base_urls,
            processes={
                "api": tuple(api.process.pid for api in served),
                "worker": tuple(worker.process.pid for worker in executing),
                "valkey": (valkey_pid,),
            },
            redis_url=redis_url,
        )


@contextmanager
def _in_process(
    folder: Path, *, name: str, app: str, apis: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    """Some processes without a queue."""
    with ExitStack() as stack:
        processes = _Processes(stack, folder, environment or {})
        ports = [free_port() for _ in range(apis)]
        served = [processes.python(f"app-{port}", *_uvicorn(app, port), "--lifespan", "off") for port in ports]
        base_urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        for base_url, server in zip(base_urls, served, strict=True):
            _wait_until_it_answers(base_url, server)
        yield Serving(name=name, base_urls=base_urls, processes={"app": tuple(server.process.pid for server in served)})


seam = partial(_in_process, name="seam", app="benchmarks.seam:app")
bare_seam = partial(_in_process, name="bare seam", app="benchmarks.bare_seam:app")


@contextmanager
def naive_arq(
    folder: Path, *, apis: int = 1, workers: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    """Some API processes and some workers."""
    with ExitStack() as stack:
        redis_url, valkey_pid = stack.enter_context(valkey(folder / "valkey"))
        processes = _Processes(stack, folder, {"ENDMARK_REDIS_URL": redis_url} | dict(environment or {}))
        ports = [free_port() for _ in range(apis)]
        served = [processes.python(f"api-{port}", *_uvicorn("benchmarks.naive_arq:app", port)) for port in ports]
        executing = [processes.arq(f"worker-{n}", "benchmarks.naive_arq.WorkerSettings") for n in range(workers)]
        base_urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        for base_url, api in zip(base_urls, served, strict=True):
            _wait_until_it_answers(f"{base_url}/health", api)
            httpx.post(f"{base_url}/v1/chat/completions", json=ONE_TOKEN, timeout=START_TIMEOUT_S).raise_for_status()
        for worker in executing:
            worker.wait_for_output("Starting worker", timeout=START_TIMEOUT_S)
        yield Serving(
            name="naive arq",
            base_urls=base_urls,
            processes={
                "api": tuple(api.process.pid for api in served),
                "worker": tuple(worker.process.pid for worker in executing),
                "valkey": (valkey_pid,),
            },
            redis_url=redis_url,
        )


@contextmanager
def bare_relay(folder: Path) -> Iterator[Serving]:
    """One API process and one worker."""
    with ExitStack() as stack:
        redis_url, valkey_pid = stack.enter_context(valkey(folder / "valkey"))
        processes, port, redis_port = _Processes(stack, folder, {}), free_port(), str(urlsplit(redis_url).port)
        module = "benchmarks.bare_relay"
        worker = processes.python("worker", module, "worker", "--redis-port", redis_port)
        api = processes.python("api", module, "api", "--redis-port", redis_port, "--port", str(port))
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_it_answers(base_url, api)
        httpx.post(f"{base_url}/v1/chat/completions", json=ONE_TOKEN, timeout=START_TIMEOUT_S).raise_for_status()
        yield Serving(
            name="bare relay",
            base_urls=(base_url,),
            processes={"api": (api.process.pid,), "worker": (worker.process.pid,), "valkey": (valkey_pid,)},
            redis_url=redis_url,
        )


@contextmanager
def nanobot_serve(folder: Path, *, environment: Mapping[str, str]) -> Iterator[Serving]:
    """One process, with the configuration that `NANOBOT_CONFIG` names."""
    with ExitStack() as stack:
        processes, port = _Processes(stack, folder, {}), free_port()
        command = str(Path(sys.executable).parent / "nanobot")
        server = processes.start(
            "app", command, "serve", "--port", str(port), "--config", environment["NANOBOT_CONFIG"]
        )
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_it_answers(f"{base_url}/health", server)
        yield Serving(name="nanobot serve", base_urls=(base_url,), processes={"app": (server.process.pid,)})


SYSTEMS: Mapping[str, Start] = {
    "endmark": endmark,
    "seam": seam,
    "bare seam": bare_seam,
    "bare relay": bare_relay,
    "naive arq": naive_arq,
}


def _uvicorn(app: str, port: int) -> tuple[str, ...]:
    options = ("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning")
    return ("uvicorn", app, "--port", str(port), "--backlog", "2048", *options)


def _wait_until_it_answers(url: str, server: Running) -> None:
    def answers() -> bool:
        if server.process.poll() is not None:
            raise RuntimeError(f"it has ended:\n{server.output}")
        try:
            return httpx.get(url).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, timeout=START_TIMEOUT_S, description=url)


def _wait_for_workers(redis_url: str, workers: list[Running]) -> None:
    """Until each holds a lease."""
    with redis.Redis.from_url(redis_url) as client:

        def all_live() -> bool:
            for worker in workers:
                if worker.process.poll() is not None:
                    raise RuntimeError(f"a worker has ended:\n{worker.output}")
            return bool(client.zcard(f"{PREFIX}:workers") == len(workers))

        wait_until(all_live, timeout=START_TIMEOUT_S, description=f"{len(workers)} workers")


def without_developer_settings() -> None:
    """No ENDMARK_ variable of the shell reaches a system under test."""
    for name in [name for name in os.environ if name.startswith("ENDMARK_")]:
        del os.environ[name]
