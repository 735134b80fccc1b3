"""What is refused, how, and that nothing is queued then; and the routes that are not completions."""

from __future__ import annotations

import base64
import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.deployment import KEY, Deployment, deployed, free_port, script
from tests.waiting import wait_until

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def http(service: Deployment) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


def assert_refused(response: httpx.Response, status: int, *, code: str | None = None, param: str | None = None) -> None:
    """An error in the OpenAI shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"not json", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}'],
    ids=["empty", "cut", "text", "list", "null", "string", "bytes", "deep", "NaN"],
)
def test_a_body_that_is_no_json_object_is_refused(service: Deployment, http: httpx.Client, body: bytes) -> None:
    before = len(service.job_ids())
    assert_refused(http.post("/v1/chat/completions", content=body), 400)
    assert len(service.job_ids()) == before


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"session_id": "a\nb"}, "session_id"),
        ({"session_id": "s" * 257}, "session_id"),
    ],
)
def test_bad_fields_are_named(service: Deployment, http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    before = len(service.job_ids())
    assert_refused(http.post("/v1/chat/completions", json={"messages": HELLO} | changes), 400, param=param)
    assert len(service.job_ids()) == before


def user_parts(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def test_a_remote_image_is_refused(http: httpx.Client) -> None:
    body = user_parts({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})
    response = http.post("/v1/chat/completions", json=body)
    assert_refused(response, 400, param="messages[0].content[0].image_url.url")
    assert "Remote image URLs are not supported" in response.json()["error"]["message"]


def test_broken_base64_is_refused(http: httpx.Client) -> None:
    body = user_parts({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}})
    assert_refused(http.post("/v1/chat/completions", json=body), 400)


def test_a_file_over_10_mb_is_refused(http: httpx.Client) -> None:
    content = b"x" * (10 * 1024 * 1024 + 1)
    url = "data:text/plain;base64," + base64.b64encode(content).decode()
    part = {"type": "file", "file": {"filename": "big.txt", "file_data": url}}
    assert_refused(http.post("/v1/chat/completions", json=user_parts(part)), 413, code="file_too_large")
    files = [("files", ("big.txt", content, "text/plain"))]
    assert_refused(http.post("/v1/chat/completions", data={}, files=files), 413, code="file_too_large")


def test_a_body_over_20_mb_is_refused(service: Deployment) -> None:
    big: list[Any] = [{"role": "user", "content": "x" * (20 * 1024 * 1024)}]
    with service.client() as client, pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="endmark", messages=big)
    assert raised.value.status_code == 413


def test_an_endless_body_is_refused_before_it_has_ended(service: Deployment) -> None:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(head.encode())
        megabyte = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        for _ in range(21):
            connection.sendall(megabyte)
        assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_a_declared_length_over_the_limit_is_refused_unread(service: Deployment) -> None:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 30000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_an_unknown_model_is_refused(service: Deployment) -> None:
    with service.client() as client, pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-unknown", messages=HELLO)
    assert raised.value.code == "model_not_found"
    assert "'endmark'" in raised.value.message


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic abc", f"Bearer {KEY}x"])
def test_a_missing_or_wrong_key_is_refused(service: Deployment, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    for path in ("/v1/models", "/v1/chat/completions", "/nowhere"):
        response = httpx.request("GET", service.base_url + path, headers=headers)
        assert_refused(response, 401, code="invalid_api_key")


def test_unknown_routes_and_methods_are_refused(http: httpx.Client) -> None:
    assert_refused(http.get("/v1/nowhere"), 404, code="not_found")
    response = http.delete("/v1/chat/completions")
    assert_refused(response, 405, code="method_not_allowed")
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"messages": [1] * 1_000_000}, id="messages"),
        pytest.param({"messages": [{"role": "user", "content": [{}] * 1_000_000}]}, id="parts"),
        pytest.param({"messages": HELLO, "metadata": {str(number): 1 for number in range(200_000)}}, id="metadata"),
    ],
)
def test_a_body_of_very_many_elements_is_refused_without_looking_at_each(http: httpx.Client, body: Any) -> None:
    response = http.post("/v1/chat/completions", json=body)
    assert_refused(response, 400)
    assert re.search("more than 10000|too many lists and objects|too many values", response.json()["error"]["message"])


def test_deep_json_is_refused(http: httpx.Client) -> None:
    body = json.dumps({"messages": HELLO, "odd": 0}).replace("0}", "[" * 990 + "]" * 990 + "}")
    assert_refused(http.post("/v1/chat/completions", content=body), 400, code="invalid_json")


def test_a_form_in_an_odd_encoding_is_refused(http: httpx.Client) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x; charset=punycode"}
    body = b'--x\r\nContent-Disposition: form-data; name="message"\r\n\r\n' + b"a" * 1000 + b"\r\n--x--\r\n"
    assert_refused(http.post("/v1/chat/completions", content=body, headers=headers), 400, code="invalid_form")


def test_endless_headers_are_refused(service: Deployment) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with suppress(ConnectionError):  # it may be closed while we still send
            for _ in range(1024):
                connection.sendall(b"X-Odd: " + b"y" * 4000 + b"\r\n")
        answer = b""
        with suppress(ConnectionError):
            answer = connection.recv(64)
        assert answer.startswith(b"HTTP/1.1 400") or answer == b""
    assert httpx.get(f"{service.base_url}/health").status_code == 200


def test_a_malformed_form_is_refused(http: httpx.Client) -> None:
    headers = {"content-type": "multipart/form-data"}
    assert_refused(http.post("/v1/chat/completions", content=b"x", headers=headers), 400, code="invalid_form")


def test_the_models_are_listed(service: Deployment) -> None:
    with service.client() as client:
        assert [model.id for model in client.models.list()] == ["endmark"]
        assert client.models.retrieve("endmark").owned_by == "endmark"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("some/other")


def test_health_and_readiness_need_no_key(service: Deployment) -> None:
    assert httpx.get(f"{service.base_url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{service.base_url}/ready").json() == {"status": "ready", "workers": 1}


def test_readiness_names_what_is_missing(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, workers=0) as service:
        response = httpx.get(f"{service.base_url}/ready")
        assert (response.status_code, response.json()["missing"]) == (503, ["worker"])


def test_an_unreachable_queue_is_a_503_that_says_when_to_try_again(tmp_path: Path, prefix: str) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with deployed(tmp_path, nowhere, prefix, workers=0) as service:
        response = httpx.get(f"{service.base_url}/ready")
        assert (response.status_code, response.json()["missing"]) == (503, ["redis"])
        with service.http() as http:
            response = http.post("/v1/chat/completions", json={"messages": HELLO})
        assert_refused(response, 503, code="queue_unreachable")
        assert 1 <= int(response.headers["retry-after"]) <= 60


def test_a_full_queue_is_a_429(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, workers=0, max_unfinished=1, queue_timeout_s=2) as service:
        with (
            service.http() as http,
            http.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}),
        ):
            body = {"messages": HELLO, "session_id": "other"}
            assert_refused(http.post("/v1/chat/completions", json=body), 429, code="queue_full")

            def listened_to() -> int:
                return len(service.redis.pubsub_channels(f"{prefix}:*:stream"))  # type: ignore[arg-type]  # redis-py types both its clients at once

            wait_until(lambda: listened_to() == 1, timeout=5, description="nobody listens to what was refused")
        service.wait_until_idle()


def test_a_full_session_is_a_429(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, workers=0, max_session_turns=1, queue_timeout_s=2) as service:
        body = {"messages": HELLO, "session_id": "busy", "stream": True}
        with service.http() as http, http.stream("POST", "/v1/chat/completions", json=body):
            assert_refused(http.post("/v1/chat/completions", json=body), 429, code="queue_full")
        service.wait_until_idle()


@pytest.mark.parametrize(("sent", "kept"), [("req-7", True), ("a b", False), ("x" * 200, False), ("", False)])
def test_a_sane_request_id_is_kept(http: httpx.Client, sent: str, kept: bool) -> None:
    response = http.get("/v1/models", headers={"x-request-id": sent})
    assert (response.headers["x-request-id"] == sent) is kept
    assert response.headers["x-request-id"]


def test_browsers_may_call_only_from_the_configured_origins(
    service: Deployment, tmp_path: Path, redis_url: str, prefix: str
) -> None:
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert (
        "access-control-allow-origin"
        not in httpx.options(f"{service.base_url}/v1/chat/completions", headers=preflight).headers
    )
    with deployed(
        tmp_path, redis_url, prefix, workers=0, cors_origins="https://app.example, https://other.example"
    ) as open_service:
        url = f"{open_service.base_url}/v1/chat/completions"
        allowed = httpx.options(url, headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        refused = httpx.options(url, headers=preflight | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
        error = httpx.post(url, headers={"origin": "https://app.example"})
        assert error.status_code == 401
        assert error.headers["access-control-allow-origin"] == "https://app.example", "errors must be readable too"


def test_without_keys_only_this_machine_is_served(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with (
        deployed(tmp_path, redis_url, prefix, workers=1, api_keys="") as service,
        service.client(api_key="any") as client,
    ):
        answer = client.chat.completions.create(model="endmark", messages=script(say=["hi"]))
        assert answer.choices[0].message.content == "hi"


def test_prompts_and_answers_are_in_no_log(service: Deployment, http: httpx.Client) -> None:
    text = "a-very-private-question"
    http.post("/v1/chat/completions", content=json.dumps({"messages": [{"role": "user", "content": text}]}))
    wait_until(lambda: "job_ended" in service.workers[0].output, timeout=5, description="the worker's log")
    assert text not in service.workers[0].output
    assert text not in service.api.output
