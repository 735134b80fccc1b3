"""A running service for tests: API and worker as real processes, against a real server, with any settings."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis
from openai.types.chat import ChatCompletionChunk

from shared.connection import connect, connect_blocking
from shared.jobs import Status
from shared.keys import Keys
from shared.settings import Settings
from shared.store import JobStore
from tests.processes import Running, running
from tests.waiting import wait_until

KEY = "sk-test-key"
SCRIPTED = "tests.scripted_agent:agent"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployment:
    """One API process and any number of workers. Made by `deployed`."""

    def __init__(self, stack: ExitStack, folder: Path, redis_url: str, prefix: str, settings: dict[str, Any]) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.redis_url = redis_url
        self.keys = Keys(prefix)
        self.redis: redis.Redis = connect_blocking(Settings(redis_url=redis_url))
        self.workers: list[Running] = []
        self._stack = stack
        self._folder = folder
        self._environment = {
            "ENDMARK_REDIS_URL": redis_url,
            "ENDMARK_PREFIX": prefix,
            "ENDMARK_PORT": str(self.port),
            "ENDMARK_API_KEYS": KEY,
            "ENDMARK_AGENT": SCRIPTED,
            "ENDMARK_LOG_FORMAT": "json",
            **{f"ENDMARK_{name.upper()}": str(value) for name, value in settings.items() if name.islower()},
            **{name: str(value) for name, value in settings.items() if name.isupper()},
        }
        stack.callback(self.redis.close)
        self.api = self.start_api()

    def start_another_api(self) -> str:
        """A second API process; its base URL, once it answers."""
        port = free_port()
        api = self._start("-m", "cli.main", "api", "--port", str(port))
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_it_answers(base_url, api)
        return base_url

    def _start(self, *command: str) -> Running:
        number = len(list(self._folder.iterdir()))
        folder = self._folder / f"{number}-{command[-1]}"
        folder.mkdir()
        return self._stack.enter_context(running([sys.executable, *command], folder=folder, env=self._environment))

    def start_api(self) -> Running:
        return self._start("-m", "cli.main", "api")

    def start_worker(self) -> Running:
        """Another worker; returns once it holds a lease."""
        before = self.live_workers()
        worker = self._start("-m", "cli.main", "worker")

        def has_lease() -> bool:
            assert worker.process.poll() is None, f"the worker has ended:\n{worker.output}"
            return bool(self.live_workers() - before)

        wait_until(has_lease, timeout=30, description="lease of a new worker")
        self.workers.append(worker)
        return worker

    def wait_until_up(self) -> None:
        _wait_until_it_answers(self.base_url, self.api)

    # -- talking to it -------------------------------------------------------------------------------------------------

    def client(self, **options: Any) -> openai.OpenAI:
        """The SDK without its retries, unless they are asked for."""
        defaults: dict[str, Any] = {"base_url": f"{self.base_url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 30}
        return openai.OpenAI(**(defaults | options))

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        defaults: dict[str, Any] = {"base_url": f"{self.base_url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 30}
        return openai.AsyncOpenAI(**(defaults | options))

    def http(self, *, key: str = KEY, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=30, **options)

    # -- looking into it -----------------------------------------------------------------------------------------------

    def live_workers(self) -> set[bytes]:
        workers: list[bytes] = self.redis.zrange(self.keys.workers, 0, -1)  # type: ignore[assignment]  # redis-py types
        return set(workers)

    def job_field(self, job_id: str, name: str) -> str:
        value: bytes | None = self.redis.hget(self.keys.job(job_id), name)  # type: ignore[assignment]  # redis-py types
        return (value or b"").decode()

    def wait_for_status(self, job_id: str, status: Status, *, timeout: float = 10) -> None:
        wait_until(
            lambda: self.job_field(job_id, "status") == status.value,
            timeout=timeout,
            description=f"{job_id} to be {status.value}, is {self.job_field(job_id, 'status')}",
        )

    def store(self) -> JobStore:
        """The jobs, by a client of its own that the test closes."""
        settings = Settings(redis_url=self.redis_url, prefix=self.keys.prefix)
        return JobStore(connect(settings), settings)

    def job_ids(self) -> list[str]:
        """Of all jobs that Redis knows."""
        keys = self.redis.scan_iter(f"{self.keys.prefix}:*:job")
        return [key.decode().partition("{")[2].partition("}")[0] for key in keys]

    def wait_until_idle(self, *, timeout: float = 15) -> None:
        """No job is unfinished and no worker executes anything."""

        def idle() -> bool:
            busy = list(self.redis.scan_iter(self.keys.worker_jobs("*")))
            return self.redis.zcard(self.keys.deadlines) == 0 and not busy

        wait_until(idle, timeout=timeout, description="all jobs to end")

    def keys_without_ttl(self) -> list[str]:
        """What would stay in Redis for ever. The list of workers stays as long as there are any."""
        keys = [*self.redis.scan_iter(f"{self.keys.prefix}:*"), *self.redis.scan_iter("arq:*")]
        return [key.decode() for key in keys if self.redis.ttl(key) == -1 and key.decode() != self.keys.workers]


def _wait_until_it_answers(base_url: str, api: Running) -> None:
    def answers() -> bool:
        assert api.process.poll() is None, f"the API has ended:\n{api.output}"
        try:
            return httpx.get(f"{base_url}/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, timeout=30, description="an API that answers")


@contextmanager
def deployed(folder: Path, redis_url: str, prefix: str, *, workers: int = 1, **settings: Any) -> Iterator[Deployment]:
    """A running service. Lower-case settings are ENDMARK_ variables; upper-case ones are passed as they are."""
    with ExitStack() as stack:
        deployment = Deployment(stack, folder, redis_url, prefix, settings)
        for _ in range(workers):
            deployment.start_worker()
        deployment.wait_until_up()
        yield deployment


Start = Callable[..., Deployment]  # what the fixture `own_service` gives: the settings to a running service


def text_of(stream: Iterable[ChatCompletionChunk]) -> str:
    """All that a stream says, to its end."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def stream_until_error(service: Deployment, messages: list[Any], **options: Any) -> tuple[str, openai.APIError]:
    """The text that came, and the error that the SDK raised."""
    text = ""
    with service.client(max_retries=2) as client:
        stream = client.chat.completions.create(model="endmark", messages=messages, stream=True, **options)
        with pytest.raises(openai.APIError) as raised:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                assert chunk.choices[0].finish_reason is None
    return text, raised.value


def script(**steps: Any) -> list[Any]:
    """The messages of a request that makes the scripted agent do this."""
    return [{"role": "user", "content": json.dumps(steps)}]


def notes(path: Path) -> list[dict[str, str]]:
    """What runs have written to their log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def noted(path: Path, what: str) -> int:
    return sum(note["what"] == what for note in notes(path))
