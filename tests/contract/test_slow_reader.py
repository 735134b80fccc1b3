"""A client that does not read costs little memory and nobody else's time, and is not kept for ever."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.jobs import Status
from tests.deployment import KEY, Deployment, deployed, script
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

FRAGMENT = "x" * 64 * 1024
MEMORY_BOUND = 64 * 1024 * 1024  # what an API process may hold for one stalled reader, whatever is said

Start = Callable[..., Deployment]


@pytest.fixture
def own_service(tmp_path: Path, redis_url: str, prefix: str) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(**settings: Any) -> Deployment:
            folder = tmp_path / "service"
            folder.mkdir()
            settings = {"max_answer_bytes": 1024**3} | settings
            return stack.enter_context(deployed(folder, redis_url, prefix, **settings))

        yield start


class Reader:
    """A client with a small window that reads only when it is told to."""

    def __init__(self, service: Deployment, *, times: int, stream: bool, every_s: float) -> None:
        self._service = service
        before = set(service.job_ids())
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        self._socket.settimeout(30)
        self._socket.connect(("127.0.0.1", service.port))
        self._port: int = self._socket.getsockname()[1]
        body = json.dumps(
            {
                "model": "endmark",
                "stream": stream,
                "messages": [{"role": "system", "content": "s"}, *script(say=[FRAGMENT], times=times, every_s=every_s)],
            }
        )
        self._socket.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        )
        self.job_id = wait_until(
            lambda: next(iter(set(service.job_ids()) - before), ""), timeout=10, description="the job"
        )

    def close(self) -> None:
        self._socket.close()

    def read(self, size: int) -> bytes:
        return self._socket.recv(size)

    def read_to_the_end(self, *, pause_s: float = 0) -> bytes:
        """Everything up to the last chunk of the body, or to the end of the connection."""
        received = bytearray()
        while not received.endswith(b"\r\n0\r\n\r\n") and (part := self.read(256 * 1024)):
            received += part
            if pause_s:
                time.sleep(pause_s)
        return bytes(received)

    def is_connected(self) -> bool:
        """Whether the API still holds its end: a closed one is the kernel's, and has no inode."""
        wanted = (f"{self._service.port:04X}", f"{self._port:04X}")
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, *_, inode = line.split()[:10]
            if (local.partition(":")[2], remote.partition(":")[2]) == wanted:
                return inode != "0"
        return False


@contextmanager
def a_reader(service: Deployment, *, times: int, stream: bool = True, every_s: float = 0) -> Iterator[Reader]:
    reader = Reader(service, times=times, stream=stream, every_s=every_s)
    try:
        yield reader
    finally:
        reader.close()


def memory(service: Deployment) -> int:
    """What the API process holds, in bytes."""
    status = Path(f"/proc/{service.api.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def seconds_of_a_short_answer(service: Deployment) -> float:
    started = time.monotonic()
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=script(say=["a", "b"]), stream=True, extra_body={"session_id": "short"}
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "ab"
    return time.monotonic() - started


def test_a_reader_that_stops_costs_little_and_misses_nothing(own_service: Start) -> None:
    service = own_service()
    seconds_of_a_short_answer(service)  # whatever is loaded with the first request
    before, most, slowest = memory(service), 0, 0.0
    times = 3200  # 200 MB
    with a_reader(service, times=times) as reader:
        service.wait_for_status(reader.job_id, Status.RUNNING)
        while service.job_field(reader.job_id, "status") == Status.RUNNING:
            slowest = max(slowest, seconds_of_a_short_answer(service))
            most = max(most, memory(service) - before)
        service.wait_for_status(reader.job_id, Status.SUCCEEDED)
        for _ in range(5):
            slowest = max(slowest, seconds_of_a_short_answer(service))
        assert most < MEMORY_BOUND
        assert slowest < 1

        received = 0
        tail = b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            part = reader.read(1024 * 1024)
            assert part, "the connection ended before the answer"
            received += part.count(b"x")
            tail = (tail + part)[-200:]
            if received % 64 == 0:
                most = max(most, memory(service) - before)
        assert b"data: [DONE]" in tail
        assert received >= times * len(FRAGMENT)
        assert most < MEMORY_BOUND
    service.wait_until_idle()


def test_a_reader_that_stalls_is_cut_off_and_its_job_is_cancelled(own_service: Start) -> None:
    service = own_service(stall_timeout_s=1)
    with a_reader(service, times=6400, every_s=0.01) as reader:  # a minute: long after the cut
        service.wait_for_status(reader.job_id, Status.CANCELLED, timeout=20)
        wait_until(lambda: not reader.is_connected(), timeout=5, description="the API to let go of the connection")
        assert b"[DONE]" not in reader.read_to_the_end()
    service.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_reader_that_stalls_at_the_end_is_cut_off_too(own_service: Start, stream: bool) -> None:
    """The job has ended long before: what is left is the connection."""
    service = own_service(stall_timeout_s=1)
    with a_reader(service, times=100, stream=stream) as reader:
        service.wait_for_status(reader.job_id, Status.SUCCEEDED, timeout=20)
        assert reader.is_connected()
        wait_until(lambda: not reader.is_connected(), timeout=10, description="the API to let go of the connection")
    service.wait_until_idle()


def test_a_slow_reader_is_not_a_stalled_one(own_service: Start) -> None:
    """It takes far longer than the limit for all of it, and never that long for nothing."""
    service = own_service(stall_timeout_s=1)
    with a_reader(service, times=160) as reader:
        received = reader.read_to_the_end(pause_s=0.2)
        assert b"data: [DONE]" in received
        assert received.count(b"x") >= 160 * len(FRAGMENT)
    service.wait_until_idle()
