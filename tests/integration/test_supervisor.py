"""The supervisor of `endmark dev`, with stand-in children and the real embedded Valkey, each as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError

from cli.embedded import HOST
from cli.supervisor import describe_exit
from tests.processes import Running, is_running, running
from tests.waiting import wait_until


def processes_of(folder: Path) -> list[bytes]:
    """The command lines that name this folder."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout.splitlines()
    return [line for line in lines if bytes(folder) in line]


@contextmanager
def supervised(folder: Path, behaviour: str = "polite", *, until_ready: bool = True) -> Iterator[Running]:
    command = [sys.executable, "-m", "tests.integration.supervised", str(folder), behaviour]
    (folder / "ready").unlink(missing_ok=True)
    with running(command, folder=folder) as supervisor:
        if until_ready:
            wait_until((folder / "ready").exists, timeout=30, description="all children up")
        yield supervisor


def pids(folder: Path, name: str) -> list[int]:
    """The process ids of all lives of a stand-in, the last one last."""
    path = folder / f"{name}.pids"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def valkey(folder: Path) -> Redis:
    port = int((folder / "valkey" / "port").read_text())
    return Redis(host=HOST, port=port, decode_responses=True)


def valkey_pid(folder: Path) -> int:
    with closing(valkey(folder)) as client:
        info: Any = client.info("server")
        return int(info["process_id"])


def all_pids(folder: Path) -> list[int]:
    return [valkey_pid(folder), *pids(folder, "worker"), *pids(folder, "api")]


def test_one_interrupt_stops_the_api_then_the_worker_then_valkey(tmp_path: Path) -> None:
    with supervised(tmp_path) as supervisor:
        children = all_pids(tmp_path)
        with closing(valkey(tmp_path)) as client:
            client.set("answer", "kept")
        supervisor.interrupt()
        assert supervisor.wait() == 0

    assert (tmp_path / "stopped").read_text().split() == ["api", "worker"]
    assert not any(map(is_running, children))
    with supervised(tmp_path), closing(valkey(tmp_path)) as client:
        assert client.get("answer") == "kept"


def test_the_childrens_output_is_passed_on_under_their_names(tmp_path: Path) -> None:
    with supervised(tmp_path) as supervisor:
        supervisor.wait_for_output("worker: hello from worker\n")
        supervisor.wait_for_output("api: hello from api\n")


def test_a_killed_child_is_named_and_started_again(tmp_path: Path) -> None:
    with supervised(tmp_path) as supervisor:
        [first] = pids(tmp_path, "worker")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(pids(tmp_path, "worker")) == 2, timeout=30, description="a second life of the worker")
        supervisor.wait_for_output(f"worker (pid {first}) was ended by SIGKILL; it starts again in 0.5 s")

        second = pids(tmp_path, "worker")[-1]
        os.kill(second, signal.SIGKILL)
        supervisor.wait_for_output(f"worker (pid {second}) was ended by SIGKILL; it starts again in 1 s")


def test_a_killed_valkey_comes_back_on_its_port_with_its_data(tmp_path: Path) -> None:
    with supervised(tmp_path):
        with closing(valkey(tmp_path)) as client:
            client.set("answer", "kept")
        first = valkey_pid(tmp_path)
        os.kill(first, signal.SIGKILL)

        def answer() -> object:
            with closing(valkey(tmp_path)) as client, suppress(ConnectionError):
                return client.get("answer")
            return None

        answered = wait_until(answer, timeout=30, description="Valkey on its port again")
        assert answered == "kept"
        assert valkey_pid(tmp_path) != first


def test_a_killed_supervisor_leaves_nothing_behind(tmp_path: Path) -> None:
    with supervised(tmp_path, "parent") as supervisor:
        children = [*all_pids(tmp_path), int((tmp_path / "worker.tool").read_text())]
        supervisor.process.kill()
        wait_until(lambda: not any(map(is_running, children)), timeout=30, description="all children gone")


def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    with supervised(tmp_path, "parent"):
        tool = int((tmp_path / "worker.tool").read_text())
        os.kill(pids(tmp_path, "worker")[-1], signal.SIGKILL)
        wait_until(lambda: not is_running(tool), timeout=30, description="the tool of the dead worker gone")


def test_a_program_that_is_missing_ends_the_start_by_name(tmp_path: Path) -> None:
    with supervised(tmp_path, "missing", until_ready=False) as supervisor:
        assert supervisor.wait() == 1
        assert "worker cannot be started: there is no program no-such-program" in supervisor.output


def test_a_child_that_the_guard_does_not_know_of_never_runs(tmp_path: Path) -> None:
    with supervised(tmp_path, "doomed", until_ready=False) as supervisor:
        assert supervisor.wait() == -signal.SIGKILL
    wait_until(lambda: not processes_of(tmp_path), timeout=30, description="end of all that the supervisor has started")
    assert pids(tmp_path, "worker") == []


def test_a_child_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    with supervised(tmp_path, "stubborn") as supervisor:
        children = all_pids(tmp_path)
        supervisor.interrupt()
        assert supervisor.wait() == 0
        assert "worker did not stop within 1 s; it is killed" in supervisor.output
    assert not any(map(is_running, children))


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    with supervised(tmp_path) as supervisor:
        children = all_pids(tmp_path)
        os.kill(pids(tmp_path, "api")[0], signal.SIGSTOP)  # it cannot stop in order: the supervisor waits for it
        supervisor.interrupt()
        supervisor.wait_for_output("stopping in order")
        assert is_running(children[0])

        def interrupted() -> bool:
            supervisor.interrupt()  # one that comes at the heels of the first counts as the same one
            return "stopping at once" in supervisor.output

        wait_until(interrupted, timeout=10, description="the second interrupt noticed")
        assert supervisor.wait(timeout=10) == 0
    assert not any(map(is_running, children))
    assert not (tmp_path / "stopped").exists()


def test_a_child_that_dies_during_the_start_ends_it(tmp_path: Path) -> None:
    with supervised(tmp_path, "broken", until_ready=False) as supervisor:
        assert supervisor.wait() == 1
        assert "Error: worker (pid " in supervisor.output
        assert "exited with code 3 before everything was ready" in supervisor.output


def test_a_data_folder_has_one_owner(tmp_path: Path) -> None:
    with supervised(tmp_path) as first, supervised(tmp_path, until_ready=False) as second:
        assert second.wait() == 1
        assert f"another `endmark dev` (pid {first.process.pid}) uses {tmp_path / 'valkey'}" in second.output
        assert first.process.poll() is None


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was ended by SIGKILL"),
        (-60, "was ended by signal 60"),
    ],
)
def test_an_exit_is_told_in_words(returncode: int, words: str) -> None:
    assert describe_exit(returncode) == words
