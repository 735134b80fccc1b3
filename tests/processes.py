"""Real processes in tests: started in a session of their own, watched, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody has reaped yet."""
    if not Path("/proc").is_dir():  # macOS reaps orphans at once
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


class Running:
    """A started program and what it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT for the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, *, timeout: float = 30) -> int:
        """Its return code, once it has ended."""
        wait_until(lambda: self.process.poll() is not None, timeout=timeout, description=f"end of\n{self.output}")
        return self.process.wait()

    def wait_for_output(self, text: str, *, timeout: float = 30) -> None:
        def seen() -> bool:
            assert self.process.poll() is None or text in self.output, f"ended without {text!r}:\n{self.output}"
            return text in self.output

        wait_until(seen, timeout=timeout, description=f"output {text!r}")


@contextmanager
def running(command: Sequence[str], *, folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Run a program from the project's root, its output in `folder`. It is killed if it outlives the block."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="output-", delete=False) as sink:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Running(process, Path(sink.name))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
