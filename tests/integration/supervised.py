"""A supervisor with stand-in children, as a program: `python -m tests.integration.supervised <folder> [behaviour]`.

The folder tells what happens: `<name>.pids` gets a line for each life of a stand-in, `stopped` the names of the
stand-ins in the order in which they stopped, `ready` appears when all is up. The embedded Valkey is the real one.

    missing    there is no program for the worker
    doomed     the supervisor is killed when the worker has been forked and the guard does not know of it yet
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import click

from cli.embedded import claim
from cli.supervisor import Child, Supervisor
from tests.waiting import async_wait_until

STAND_IN = """
import os, pathlib, signal, subprocess, sys
folder, name, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def stop(number, frame):
    if behaviour == "stubborn":
        return
    with (folder / "stopped").open("a") as stopped:
        stopped.write(name + "\\n")
    sys.exit()

signal.signal(signal.SIGTERM, stop)
if behaviour == "broken":
    sys.exit(3)
if behaviour == "parent":
    tool = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    (folder / (name + ".tool")).write_text(str(tool.pid) + "\\n")
with (folder / (name + ".pids")).open("a") as pids:
    pids.write(str(os.getpid()) + "\\n")
print("hello from", name)
while True:
    signal.pause()
"""


def stand_in(folder: Path, name: str, behaviour: str = "polite") -> Child:
    """A child that says hello and waits for SIGTERM."""
    program = "no-such-program" if behaviour == "missing" else sys.executable
    return Child(
        name=name,
        command=(program, "-u", "-c", STAND_IN, str(folder), name, behaviour),
        stop_timeout_s=1.0 if behaviour == "stubborn" else 30.0,
    )


async def supervise(folder: Path, stages: list[list[Child]], behaviour: str) -> None:
    async def ready() -> None:
        await async_wait_until(
            lambda: all((folder / f"{name}.pids").exists() for name in ("worker", "api")),
            timeout=30,
            description="all stand-ins up",
        )
        (folder / "ready").touch()

    if behaviour == "doomed":
        tell_guard = Supervisor._tell_guard

        def die(self: Supervisor) -> None:
            if any(life.child.name == "worker" and life.process is not None for life in self._stages[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            tell_guard(self)

        Supervisor._tell_guard = die  # type: ignore[method-assign]
    supervisor = Supervisor(stages, say=click.echo, relay=lambda name, line: click.echo(f"{name}: {line}"))
    await supervisor.run(ready)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("behaviour", default="polite")
def main(folder: Path, behaviour: str) -> None:
    with claim(folder / "valkey") as valkey:
        stages = [[valkey.child()], [stand_in(folder, "worker", behaviour)], [stand_in(folder, "api")]]
        asyncio.run(supervise(folder, stages, behaviour))


if __name__ == "__main__":
    main()
