"""An endpoint for webhooks: a real HTTP server in a thread, which keeps what it gets and answers as the path says.

/                 200, at once
/status/500/2     500 to the first two requests, then 200; without the second number, always
/hang             reads the request and never answers
/hang-once        the same to the first request only
/redirect         307 to /
/endless          200 and a body that never ends
/half             200 and the beginning of a body
/refuse           closes the connection without an answer
/garbage          answers what is not HTTP
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import openai

from tests.waiting import wait_until


class Received(NamedTuple):
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    def unwrap(self, secret: str) -> Any:
        """The event, as OpenAI's SDK makes it. Raises openai.InvalidWebhookSignatureError."""
        with openai.OpenAI(api_key="not-needed") as client:
            return client.webhooks.unwrap(self.body, self.headers, secret=secret)


class Endpoint:
    """What has come so far, and where to send it."""

    def __init__(self, server: ThreadingHTTPServer, scheme: str) -> None:
        self.host, self.port = str(server.server_address[0]), int(server.server_address[1])
        self.scheme = scheme
        self.received: list[Received] = []
        self.stopping = threading.Event()

    def url(self, path: str = "/") -> str:
        return f"{self.scheme}://{self.host}:{self.port}{path}"

    def at(self, path: str) -> list[Received]:
        return [received for received in self.received if received.path == path]

    def wait_for(self, path: str = "/", *, count: int = 1, timeout: float = 20) -> list[Received]:
        wait_until(lambda: len(self.at(path)) >= count, timeout=timeout, description=f"{count} requests for {path}")
        return self.at(path)


class _Server(ThreadingHTTPServer):
    endpoint: Endpoint

    def handle_error(self, *_: Any) -> None:
        """A client that closes its connection is no defect of the test."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        endpoint = self.server.endpoint
        body = self.rfile.read(int(self.headers["content-length"]))
        endpoint.received.append(Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        seen = len(endpoint.at(self.path))
        match self.path.strip("/").split("/"):
            case ["hang"] | ["hang-once"] if self.path == "/hang" or seen == 1:
                endpoint.stopping.wait()
            case ["status", status]:
                self._answer(int(status))
            case ["status", status, times]:
                self._answer(int(status) if seen <= int(times) else 200)
            case ["redirect"]:
                self._answer(307, location=endpoint.url("/"))
            case ["endless"]:
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):
                    while not endpoint.stopping.is_set():
                        self.wfile.write(b"x" * 65536)
            case ["half"]:
                self.send_response(200)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"o")
                endpoint.stopping.wait()
            case ["refuse"]:
                self.connection.shutdown(socket.SHUT_RDWR)
            case ["garbage"]:
                self.wfile.write(b"220 mail.example ESMTP\r\n\r\n")
            case _:
                self._answer(200)

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: Any) -> None:
        """The tests look at what was received."""


@contextmanager
def serving(host: str = "127.0.0.1", *, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Endpoint]:
    """An endpoint, until the end of the block."""
    server = _Server((host, port), _Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.endpoint = Endpoint(server, "https" if tls else "http")
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.endpoint
    finally:
        server.endpoint.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
