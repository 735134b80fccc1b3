"""What a client may send on one connection, beyond what the SDKs do: the limits and deadlines of api/protocol.py."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.jobs import Status
from tests.deployment import KEY, Deployment, Start, noted, script
from tests.waiting import wait_until

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
AUTHORIZED = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def connected(service: Deployment) -> Iterator[socket.socket]:
    with closing(socket.create_connection(("127.0.0.1", service.port), timeout=20)) as connection:
        yield connection


def to_its_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            received += data
    return received


def answer_on(connection: socket.socket) -> bytes:
    """The next answer, whole, of those whose length is told."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head_bytes = received.index(b"\r\n\r\n") + 4
    [length] = re.findall(rb"content-length: (\d+)", received[:head_bytes])
    while len(received) < head_bytes + int(length):
        received += connection.recv(65536)
    return received


def posted(body: Any, headers: bytes = b"") -> bytes:
    """A whole request."""
    content = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(content)
        + AUTHORIZED
        + headers
        + b"\r\n"
        + content
    )


# -- around a body -----------------------------------------------------------------------------------------------------

CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
)


@pytest.mark.parametrize(
    ("beginning", "endless"),
    [
        (b"0\r\n", b"X-Odd: " + b"y" * 4000 + b"\r\n"),
        (b"0\r\nX-Odd: ", b"y" * 4000),
        (b"1;odd=", b"y" * 4000),
    ],
    ids=["trailers", "a trailer", "a chunk's extension"],
)
def test_endless_bytes_around_a_body_are_refused(service: Deployment, beginning: bytes, endless: bytes) -> None:
    """Also of somebody without a key, whose answer is complete long before."""
    with connected(service) as connection:
        connection.sendall(CHUNKED + b"\r\n" + beginning)
        with pytest.raises(ConnectionError):
            for _ in range(4096):
                connection.sendall(endless)
    assert httpx.get(f"{service.base_url}/health").status_code == 200


def test_a_trailer_is_no_header(service: Deployment) -> None:
    """A proxy in front of the API checks headers, and may pass trailers on."""
    body = json.dumps({"messages": HELLO}).encode()
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    key = f"Authorization: Bearer {KEY}\r\n".encode()

    def ask(head: bytes, trailer: bytes) -> bytes:
        with connected(service) as connection:
            connection.sendall(CHUNKED + b"Connection: close\r\n" + head + b"\r\n" + chunk + trailer + b"\r\n")
            return to_its_end(connection)

    assert ask(b"", key).startswith(b"HTTP/1.1 401 ")
    answer = ask(key, b"X-Request-Id: from-a-trailer\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"from-a-trailer" not in answer


# -- upgrades ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packets", [1, 2])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_upgrade_is_ignored_and_the_body_is_a_body(service: Deployment, protocol: bytes, packets: int) -> None:
    """Java's own client asks for HTTP/2 with every POST. A body that is left out would be the next request."""
    headers = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AAEAAEAA\r\n" % protocol
    request = posted({"messages": HELLO}, headers)
    head_bytes = request.index(b"\r\n\r\n") + 4
    with connected(service) as connection:
        if packets == 2:
            connection.sendall(request[:head_bytes])
            connection.sendall(request[head_bytes:])
        else:
            connection.sendall(request)
        assert answer_on(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(HEALTH)
        assert answer_on(connection).startswith(b"HTTP/1.1 200 "), "the connection goes on"


def test_a_request_inside_of_an_upgrades_body_is_none(service: Deployment) -> None:
    inner = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: smuggled\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n" % len(
        inner
    )
    with connected(service) as connection:
        connection.sendall(head + AUTHORIZED + b"\r\n")
        connection.sendall(inner + b"GET /none HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = to_its_end(connection)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"smuggled" not in received


def test_a_tunnel_is_refused(service: Deployment) -> None:
    with connected(service) as connection:
        connection.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
        assert connection.recv(65536).split(b" ", 2)[1] in (b"400", b"404", b"405")


# -- requests that follow each other -----------------------------------------------------------------------------------


def test_an_empty_line_between_requests_begins_none(own_service: Start) -> None:
    """Some send one behind a body. What is not begun is not answered with a 408."""
    service = own_service(stall_timeout_s=1)
    with connected(service) as connection:
        connection.sendall(HEALTH + b"\r\n")
        assert answer_on(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"\r\n" + HEALTH)
        assert answer_on(connection).startswith(b"HTTP/1.1 200 ")
        assert to_its_end(connection) == b""


def test_a_connection_whose_request_ended_behind_its_answer_is_closed_when_it_is_idle(own_service: Start) -> None:
    service = own_service(stall_timeout_s=1)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    with connected(service) as connection:
        connection.sendall(head)
        assert answer_on(connection).startswith(b"HTTP/1.1 401 ")
        connection.sendall(b"{}")
        assert to_its_end(connection) == b""


def test_a_stream_that_is_asked_for_its_head_only_ends_there(service: Deployment, tmp_path: Path) -> None:
    """The next request on the connection follows at once, however long the job runs."""
    gate = tmp_path / "gate"
    body = {"messages": script(say=["a"], waits_for=str(gate)), "stream": True, "on_disconnect": "continue"}
    before = set(service.job_ids())
    with service.http() as http, http.stream("POST", "/v1/chat/completions", json=body):
        [job_id] = wait_until(lambda: set(service.job_ids()) - before, timeout=10, description="the job")
        with connected(service) as connection:
            connection.sendall(f"HEAD /v1/jobs/{job_id}/events HTTP/1.1\r\n".encode() + AUTHORIZED + b"\r\n")
            head = connection.recv(65536)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"text/event-stream" in head
            connection.sendall(HEALTH)
            assert answer_on(connection).startswith(b"HTTP/1.1 200 ")
        gate.touch()
    service.wait_for_status(job_id, Status.SUCCEEDED)


# -- one request at a time ---------------------------------------------------------------------------------------------


def test_what_comes_behind_a_request_that_is_not_answered_is_dropped(service: Deployment) -> None:
    """And not kept: it may be any number of requests."""
    body = {"messages": script(say=["a", "b", "c"], every_s=0.2), "stream": True}
    with connected(service) as connection:
        connection.sendall(posted(body) + 10_000 * HEALTH)
        received = to_its_end(connection)
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), "the answer does not suffer from it"


def test_garbage_behind_a_request_does_not_get_into_its_answer(service: Deployment) -> None:
    body = {"messages": script(say=["a", "b", "c"], every_s=0.2), "stream": True}
    with connected(service) as connection:
        connection.sendall(posted(body) + b"\x00\x01 no request\r\n\r\n")
        received = to_its_end(connection)
    assert received.count(b"HTTP/1.1 ") == 1
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_client_that_leaves_behind_a_second_request_takes_its_job_with_it(
    service: Deployment, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with connected(service) as connection:
        connection.sendall(posted({"messages": script(say=["a"], then="hang", log=str(log)), "stream": True}) + HEALTH)
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=10, description="the agent to be cancelled")
    assert "never retrieved" not in service.api.output


# -- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (HEALTH[:20], b"408"),
        (posted({"messages": HELLO})[:-5], b"408"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b"401"),
    ],
    ids=["nothing", "half a head", "half a body", "half a body without a key"],
)
def test_a_request_that_does_not_arrive_is_given_up(own_service: Start, sent: bytes, status: bytes | None) -> None:
    service = own_service(stall_timeout_s=1)
    with connected(service) as connection:
        connection.sendall(sent)
        received = to_its_end(connection)
    assert received.split(b" ", 2)[1:2] == ([] if status is None else [status])
    assert received.count(b"HTTP/1.1 ") <= 1


def test_a_head_has_its_time_as_a_whole(own_service: Start) -> None:
    """Who sends a byte now and then would hold a connection for as long as it likes."""
    service = own_service(stall_timeout_s=1)
    with connected(service) as connection:
        connection.settimeout(0.2)
        received = b""
        for byte in HEALTH[:-4] + b"\r\nX-Odd: " + 1000 * b"y":
            connection.sendall(bytes([byte]))
            with suppress(TimeoutError):
                received = connection.recv(65536)
                break
        assert received.startswith(b"HTTP/1.1 408 ")


def test_a_body_may_take_longer_if_it_goes_on(own_service: Start) -> None:
    service = own_service(stall_timeout_s=1)
    request = posted({"messages": HELLO})
    with connected(service) as connection:
        connection.sendall(request[:-4])
        for byte in request[-4:]:
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connection.recv(65536)
            connection.sendall(bytes([byte]))
        connection.settimeout(20)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_silent_answer_is_no_stalled_request(own_service: Start, tmp_path: Path) -> None:
    service, gate = own_service(stall_timeout_s=0.5), tmp_path / "gate"
    with service.http() as http, connected(service) as connection:
        connection.sendall(posted({"messages": script(waits_for=str(gate), say=["a"])}))
        wait_until(service.job_ids, timeout=10, description="a job")
        connection.settimeout(1.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        gate.touch()
        connection.settimeout(20)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert http.get("/v1/jobs").status_code == 200
    [job_id] = service.job_ids()
    service.wait_for_status(job_id, Status.SUCCEEDED)
