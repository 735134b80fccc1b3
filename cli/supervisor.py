"""Several processes run as one: started in order, restarted when they die, stopped in the reverse order.

Rule 1: every child has a session of its own: the terminal's Ctrl-C reaches the supervisor alone, which keeps the order.
Rule 2: the stages start one after the other and stop in the reverse order; the children of one stage go together.
Rule 3: a child that dies before everything is ready ends the start, by name; after that it is restarted, with back-off.
Rule 4: SIGINT, SIGTERM and SIGHUP stop in order; a second one kills at once.
Rule 5: no child outlives the supervisor, not even when that is killed: `cli/guard.py` sees to it. So a child's program
        begins when the guard knows of it, and not at all if the supervisor is killed before.

    click.ClickException
    └── StartFailed    a child died, or did not get ready in time, while everything was starting (exit code 1)
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

from cli import guard

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 10.0
HEALTHY_AFTER_S = 30.0  # a child that lived this long starts its next life without back-off from the past
_OUTPUT_PATIENCE_S = 1.0  # what a dead child's last output gets to arrive; its own children may hold the pipe open
_SAME_SIGNAL_S = 0.3  # `uv run` and `timeout` pass a signal on that the terminal has sent to the whole group already
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# A shell that becomes the child's program once it is let through; at the end of its input it ends.
_AT_THE_GATE = ("/bin/sh", "-c", 'read -r _ && exec "$@" < /dev/null', "sh")

Ready = Callable[[], Awaitable[None]]
"""Returns once it is ready; raises `StartFailed` at its deadline."""


class StartFailed(click.ClickException):
    """Something did not start. The message says what, and what to do."""


async def _ready_at_once() -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A process to keep running."""

    name: str  # short; prefixes its output and names it in messages
    command: Sequence[str]
    stop_timeout_s: float  # what it gets between SIGTERM and SIGKILL
    env: Mapping[str, str] = field(default_factory=dict)  # on top of the supervisor's own environment
    inherited_fds: tuple[int, ...] = ()  # open files that live at least as long as the child
    ready: Ready = _ready_at_once  # what the next stage waits for


class Supervisor:
    """Runs stages of children until it is told to stop.

    `say` gets the supervisor's own messages, `relay(name, line)` each line that a child writes, from a thread for each
    child. Neither may raise.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Child]],
        *,
        say: Callable[[str], None],
        relay: Callable[[str, str], None],
    ) -> None:
        self._stages = [[_Life(child) for child in stage] for stage in stages]
        self._say = say
        self._relay = relay
        self._all_ready = False
        self._stopping = asyncio.Event()
        self._first_signal_at = -math.inf  # of the event loop's clock
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, ready: Ready) -> None:
        """Start everything, wait for `ready`, keep it running until a signal, and stop it in order.

        Returns when all children have ended; the process should end then too, and ignores further signals to stop.
        Raises `StartFailed`, after stopping the children, if the start did not succeed.
        """
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            with _Guard() as self._guard:
                start = asyncio.create_task(self._start(ready))
                stopping = asyncio.create_task(self._stopping.wait())
                ends: set[asyncio.Future[Any]] = {stopping, self._failure}
                try:
                    await asyncio.wait({start, *ends}, return_when=asyncio.FIRST_COMPLETED)
                    if start.done():
                        start.result()  # raises why it is not ready
                        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    if self._failure.done():
                        self._failure.result()  # raises which child died
                finally:
                    start.cancel()
                    stopping.cancel()
                    await asyncio.gather(start, stopping, return_exceptions=True)
                    await self._stop()
        finally:
            self._failure.cancel()
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # all has ended: an impatient Ctrl-C must not spoil the exit code

    async def _start(self, ready: Ready) -> None:
        for stage in self._stages:
            for life in stage:
                life.task = asyncio.create_task(self._keep_running(life))
            for life in stage:
                await life.child.ready()
        await ready()
        self._all_ready = True

    async def _stop(self) -> None:
        self._stopping.set()
        for stage in reversed(self._stages):
            await asyncio.gather(*(self._stop_one(life) for life in stage))

    async def _stop_one(self, life: _Life) -> None:
        if life.task is None:
            return
        if life.process is None:  # between two lives, or not yet born
            life.task.cancel()
        else:
            with suppress(ProcessLookupError):
                life.process.terminate()
        done, _ = await asyncio.wait({life.task}, timeout=life.child.stop_timeout_s)
        if not done:
            self._say(f"{life.child.name} did not stop within {life.child.stop_timeout_s:g} s; it is killed")
            life.kill()
        await asyncio.gather(life.task, return_exceptions=True)

    def _on_signal(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._stopping.is_set():
            self._first_signal_at = now
            self._stopping.set()
            self._say("stopping in order; press Ctrl-C again to stop at once")
            return
        if now - self._first_signal_at < _SAME_SIGNAL_S:
            return
        self._say("stopping at once")
        for stage in self._stages:
            for life in stage:
                life.kill()

    async def _keep_running(self, life: _Life) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while not self._stopping.is_set():
            born_at = loop.time()
            try:
                pid, returncode = await self._live_once(life)
            except OSError as error:
                self._fail(f"{life.child.name} cannot be started: {error}")
                return
            if self._stopping.is_set():
                return
            death = f"{life.child.name} (pid {pid}) {describe_exit(returncode)}"
            if not self._all_ready:
                self._fail(f"{death} before everything was ready. Its own output above says why.")
                return
            if loop.time() - born_at >= HEALTHY_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            self._say(f"{death}; it starts again in {backoff_s:g} s")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    def _fail(self, why: str) -> None:
        if not self._failure.done():
            self._failure.set_exception(StartFailed(why))

    async def _live_once(self, life: _Life) -> tuple[int, int]:
        """Run the child to its end and everything that it started with it; its process id and return code."""
        if shutil.which(life.child.command[0]) is None:
            raise FileNotFoundError(f"there is no program {life.child.command[0]}")
        output, child_output = os.pipe()
        gate, gatekeeper = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *_AT_THE_GATE,
                *life.child.command,
                stdin=gate,
                stdout=child_output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **life.child.env},
                pass_fds=life.child.inherited_fds,
                start_new_session=True,
            )
        except BaseException:
            os.close(output)
            os.close(gatekeeper)
            raise
        finally:
            os.close(child_output)
            os.close(gate)
        life.process = process
        self._tell_guard()
        with suppress(BrokenPipeError):  # somebody has killed it at the gate
            os.write(gatekeeper, b"\n")
        os.close(gatekeeper)
        # A thread, because a terminal that does not read (Ctrl-S) must not hold up the supervisor, and because with a
        # pipe of asyncio's own, `wait` may wait for grandchildren that hold it open.
        relay = threading.Thread(target=self._relay_output, args=(life.child.name, output), daemon=True)
        relay.start()
        try:
            returncode = await process.wait()
        finally:
            life.kill()  # what it started itself, say the servers of an agent's tools
            life.process = None
            self._tell_guard()
        await asyncio.to_thread(relay.join, _OUTPUT_PATIENCE_S)
        return process.pid, returncode

    def _relay_output(self, name: str, output: int) -> None:
        with open(output, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._relay(name, line.rstrip("\n"))

    def _tell_guard(self) -> None:
        self._guard.watch(life.process.pid for stage in self._stages for life in stage if life.process is not None)


@dataclass(slots=True)
class _Life:
    """A child and its current process, if it has one."""

    child: Child
    process: asyncio.subprocess.Process | None = None
    task: asyncio.Task[None] | None = None

    def kill(self) -> None:
        """End the process group of the child, whatever is left of it."""
        if self.process is not None:
            guard.signal_group(self.process.pid, signal.SIGKILL)


class _Guard:
    """The supervisor's end of `cli/guard.py`: tells it which process groups to end if the supervisor cannot."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-I", "-S", str(Path(guard.__file__))],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()  # ends its input; it ends what it still watches, then itself

    def watch(self, groups: Iterable[int]) -> None:
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        with suppress(BrokenPipeError):  # somebody killed the guard; that is no reason to stop serving
            self._process.stdin.write(" ".join(map(str, groups)) + "\n")
            self._process.stdin.flush()


def describe_exit(returncode: int) -> str:
    """How a process ended, in words, from the return code that `subprocess` gives."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal has no name
        return f"was ended by signal {-returncode}"
