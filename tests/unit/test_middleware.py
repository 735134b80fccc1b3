"""What happens to every request before a route sees it, and to every error after it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from api.errors import ApiError, InvalidRequestError, PayloadTooLargeError
from api.middleware import AuthMiddleware, ErrorMiddleware, RequestIdMiddleware
from shared.settings import Settings

App = Callable[[Scope, Receive, Send], Awaitable[None]]


def a_scope(*, path: str = "/v1/models", server: tuple[str, int | None] | None = None, **headers: str | bytes) -> Scope:
    raw = [
        (name.replace("_", "-").encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in headers.items()
    ]
    return {"type": "http", "method": "GET", "path": path, "headers": raw, "server": server or ("127.0.0.1", 80)}


class Exchange:
    """One request, and what was sent back."""

    def __init__(self, *received: Message) -> None:
        self.sent: list[Message] = []
        self._received = list(received) or [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive(self) -> Message:
        return self._received.pop(0) if self._received else {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self, app: App, scope: Scope) -> Exchange:
        await app(scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def error(self) -> Any:
        body = json.loads(b"".join(message.get("body", b"") for message in self.sent))
        assert list(body) == ["error"]
        return body["error"]


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"fine"})


def raising(error: BaseException, *, after_start: bool = False) -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if after_start:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    return app


# -- request ids -------------------------------------------------------------------------------------------------------


async def test_every_response_names_its_request() -> None:
    scope = a_scope()
    exchange = await Exchange().run(RequestIdMiddleware(fine), scope)
    request_id = exchange.headers[b"x-request-id"].decode()
    assert request_id.startswith("req_")
    assert scope["request_id"] == request_id
    other = await Exchange().run(RequestIdMiddleware(fine), a_scope())
    assert other.headers[b"x-request-id"].decode() != request_id


async def test_a_sane_request_id_of_the_client_is_kept() -> None:
    exchange = await Exchange().run(RequestIdMiddleware(fine), a_scope(x_request_id="trace-1.2:3"))
    assert exchange.headers[b"x-request-id"] == b"trace-1.2:3"


@pytest.mark.parametrize("asked", ["", "a b", "x" * 129, "a\x00", "é", '"'], ids=ascii)
async def test_another_request_id_is_replaced(asked: str) -> None:
    exchange = await Exchange().run(RequestIdMiddleware(fine), a_scope(x_request_id=asked))
    assert exchange.headers[b"x-request-id"].startswith(b"req_")


# -- keys --------------------------------------------------------------------------------------------------------------


def guarded(*keys: str) -> App:
    settings = Settings(api_keys=",".join(keys))
    return ErrorMiddleware(AuthMiddleware(fine, settings))


@pytest.mark.parametrize("authorization", ["Bearer one", "bearer two", "BEARER  two "])
async def test_any_of_the_keys_opens(authorization: str) -> None:
    exchange = await Exchange().run(guarded("one", "two"), a_scope(authorization=authorization))
    assert exchange.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer three"},
        {"authorization": "Bearer on"},
        {"authorization": "Bearer one two"},
        {"authorization": "Basic one"},
        {"authorization": "one"},
        {"authorization": b"Bearer \xff"},
        {"x_api_key": "one"},
    ],
    ids=repr,
)
async def test_without_a_key_nothing_opens(headers: dict[str, Any]) -> None:
    exchange = await Exchange().run(guarded("one", "two"), a_scope(**headers))
    assert exchange.status == 401
    assert exchange.headers[b"www-authenticate"] == b"Bearer"
    assert (exchange.error["code"], exchange.error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert "one" not in exchange.error["message"].split()


async def test_a_key_beyond_ascii_is_compared_byte_by_byte() -> None:
    """A header arrives as bytes; clients send UTF-8."""
    exchange = await Exchange().run(guarded("clé"), a_scope(authorization="Bearer clé".encode()))
    assert exchange.status == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_load_balancers_need_no_key(path: str) -> None:
    assert (await Exchange().run(guarded("one"), a_scope(path=path, server=("10.0.0.1", 80)))).status == 200


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
async def test_browsers_that_read_about_the_api_need_no_key(path: str) -> None:
    for keys in ("one", ""):
        assert (await Exchange().run(guarded(keys), a_scope(path=path, server=("10.0.0.1", 80)))).status == 200


@pytest.mark.parametrize("path", ["/health/", "//health", "/healthy", "/v1/models"])
async def test_everything_else_needs_one(path: str) -> None:
    assert (await Exchange().run(guarded("one"), a_scope(path=path))).status == 401


@pytest.mark.parametrize(
    ("server", "status"),
    [(("127.0.0.1", 80), 200), (("::1", 80), 200), (("/run/endmark.sock", None), 200), (("10.0.0.1", 80), 403)],
)
async def test_without_configured_keys_only_this_machine_is_served(server: tuple[str, int | None], status: int) -> None:
    scope = a_scope(server=server, host="localhost:8900")
    assert (await Exchange().run(guarded(), scope)).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8900"}, 200),
        ({"host": "[::1]:8900"}, 200),
        ({"host": "localhost", "origin": "http://localhost:3000"}, 200),
        ({"host": "evil.example"}, 403),  # a name that somebody made point at 127.0.0.1
        ({}, 403),
        ({"host": "127.0.0.1", "origin": "https://evil.example"}, 403),
        ({"host": "127.0.0.1", "origin": "null"}, 403),
        ({"host": "[", "origin": "["}, 403),
    ],
)
async def test_without_configured_keys_no_web_page_is_served(headers: dict[str, str], status: int) -> None:
    scope = a_scope(server=("127.0.0.1", 8900), **headers)
    assert (await Exchange().run(guarded(), scope)).status == status


# -- errors ------------------------------------------------------------------------------------------------------------


async def test_a_refusal_is_sent_in_the_openai_shape() -> None:
    error = InvalidRequestError("wrong", param="messages", code="odd", headers={"x-should-retry": "false"})
    exchange = await Exchange().run(ErrorMiddleware(raising(error)), a_scope())
    assert exchange.status == 400
    assert exchange.headers[b"content-type"] == b"application/json"
    assert exchange.headers[b"x-should-retry"] == b"false"
    assert exchange.error == {"message": "wrong", "type": "invalid_request_error", "param": "messages", "code": "odd"}


async def test_what_nobody_expected_is_a_500_that_tells_no_secret() -> None:
    exchange = await Exchange().run(ErrorMiddleware(raising(RuntimeError("secret"))), a_scope())
    assert exchange.status == 500
    assert exchange.error["type"] == "server_error"
    assert "secret" not in exchange.error["message"]


@pytest.mark.parametrize("error", [RuntimeError("x"), ApiError("x")], ids=repr)
async def test_an_answer_that_has_begun_is_not_answered_again(error: Exception) -> None:
    exchange = Exchange()
    with pytest.raises(type(error)):
        await exchange.run(ErrorMiddleware(raising(error, after_start=True)), a_scope())
    assert [message["type"] for message in exchange.sent] == ["http.response.start"]


async def test_a_refused_upload_is_read_to_its_end() -> None:
    """Many clients read the answer only after their last byte."""
    received = [{"type": "http.request", "body": b"x" * 1000, "more_body": number < 4} for number in range(5)]
    exchange = Exchange(*received)
    await exchange.run(ErrorMiddleware(raising(PayloadTooLargeError("too large"))), a_scope())
    assert exchange.status == 413
    assert exchange.headers[b"connection"] == b"close"
    assert exchange.error["code"] == "payload_too_large"
    assert (await exchange.receive())["type"] == "http.disconnect", "nothing is left to be read"
    assert not exchange.sent[-1].get("more_body")
