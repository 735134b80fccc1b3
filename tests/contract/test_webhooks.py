"""The end of every job is told, whatever ends it, and OpenAI's SDK takes it for what it is."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from shared.jobs import JobKind, WebhookTarget, new_job_id
from tests.deployment import KEY, Deployment, Start, deployed, free_port, script, stream_until_error
from tests.endpoints import Endpoint, serving
from tests.jobs import a_submission
from tests.waiting import wait_until
from worker.webhooks import MAX_PER_HOST

SECRET = "whsec_" + base64.b64encode(b"the secret of the deployment").decode()
OLD_SECRET = "whsec_" + base64.b64encode(b"what it was before it changed").decode()
OWN_SECRET = "whsec_" + base64.b64encode(b"the secret of one request ...").decode()
QUICK: dict[str, Any] = {"webhook_secret": SECRET, "webhook_retry_s": 0.05, "webhook_timeout_s": 1, "lease_s": 1}
HELLO: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    """A service whose requests may have their webhooks sent to the endpoints of these tests."""
    folder = tmp_path_factory.mktemp("hooked")
    settings = QUICK | {"webhook_allow_private": True, "webhook_max_attempts": 3, "log_level": "DEBUG"}
    settings["api_keys"] = f"{KEY},acme:key-of-acme,other:key-of-other"
    with deployed(folder, redis_url, f"test-{secrets.token_hex(4)}", **settings) as deployment:
        yield deployment


def ask(service: Deployment, messages: list[Any], *, key: str = KEY, **webhook: str) -> httpx.Response:
    with service.http(key=key) as http:
        return http.post("/v1/chat/completions", json={"messages": messages, "webhook": webhook})


def webhook_of(service: Deployment, job_id: str, *, key: str = KEY) -> dict[str, Any]:
    with service.http(key=key) as http:
        answer = http.get(f"/v1/jobs/{job_id}/webhook")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def wait_for_state(service: Deployment, job_id: str, state: str) -> dict[str, Any]:
    wait_until(
        lambda: webhook_of(service, job_id)["status"] == state,
        timeout=30,
        description=f"{state}, is {webhook_of(service, job_id)}",
    )
    return webhook_of(service, job_id)


# -- what ends a job, tells it -----------------------------------------------------------------------------------------


def test_the_end_of_every_job_is_told_and_the_sdk_believes_it(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(**QUICK, webhook_url=endpoint.url())
    with service.client() as client:  # one job after the other: webhooks of two may overtake one another
        whole = client.chat.completions.create(model="endmark", messages=HELLO)
        endpoint.wait_for(count=1)
        cut = client.chat.completions.create(model="endmark", messages=script(say=["a"], finish_reason="length"))
        endpoint.wait_for(count=2)
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model="endmark", messages=script(then="raise"))
    events = [received.unwrap(SECRET) for received in endpoint.wait_for(count=3)]
    assert [(event.type, event.data.id) for event in events[:2]] == [
        ("chat.completion.completed", whole.id),
        ("chat.completion.incomplete", cut.id),
    ]
    assert events[2].type == "chat.completion.failed"
    assert [event.object for event in events] == ["event"] * 3
    assert all(received.webhook_id == received.unwrap(SECRET).id for received in endpoint.received)
    assert len({event.id for event in events}) == 3
    assert events[0].created_at == int(service.job_field(whole.id, "finished_ms")) // 1000
    told = wait_for_state(service, whole.id, "delivered")
    [attempt] = told.pop("attempts")
    assert told == {
        "id": events[0].id,
        "object": "webhook.delivery",
        "job_id": whole.id,
        "status": "delivered",
        "type": "chat.completion.completed",
        "url": None,
        "next_attempt_ms": None,
    }
    assert (attempt["attempt"], attempt["status_code"], attempt["error"]) == (1, 200, None)


def test_a_receiver_with_another_secret_does_not_believe_it(hooked: Deployment, endpoint: Endpoint) -> None:
    ask(hooked, HELLO, url=endpoint.url())
    [received] = endpoint.wait_for()
    with pytest.raises(openai.InvalidWebhookSignatureError):
        received.unwrap(OWN_SECRET)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        received._replace(body=received.body.replace(b"completed", b"cancelled")).unwrap(SECRET)


def test_a_changed_secret_is_known_to_receivers_with_the_old_one_and_the_new_one(
    own_service: Start, endpoint: Endpoint
) -> None:
    service = own_service(**QUICK | {"webhook_secret": f"{SECRET},{OLD_SECRET}"}, webhook_url=endpoint.url())
    with service.client() as client:
        client.chat.completions.create(model="endmark", messages=HELLO)
    [received] = endpoint.wait_for()
    assert received.unwrap(SECRET) == received.unwrap(OLD_SECRET)


def test_a_cancelled_job_is_told(hooked: Deployment, endpoint: Endpoint) -> None:
    with hooked.client() as client, hooked.http() as http:
        stream = client.chat.completions.create(
            model="endmark",
            messages=script(say=["a"], then="hang"),
            stream=True,
            extra_body={"webhook": {"url": endpoint.url()}},
        )
        job_id = next(stream).id
        assert http.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
        stream.close()
    [received] = endpoint.wait_for()
    event = received.unwrap(SECRET)
    assert (event.type, event.data.id) == ("chat.completion.cancelled", job_id)


def test_a_job_that_killed_its_worker_is_told_by_another(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(**QUICK, webhook_url=endpoint.url(), workers=2, max_attempts=1)
    _, error = stream_until_error(service, script(then="die"))
    assert error.code == "worker_lost"
    [received] = endpoint.wait_for()
    assert received.unwrap(SECRET).type == "chat.completion.failed"


def test_a_job_that_nobody_took_is_told_as_soon_as_there_is_a_worker(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(**QUICK, webhook_url=endpoint.url(), workers=0, queue_timeout_s=0.5)
    with service.client() as client, pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="endmark", messages=HELLO)
    assert raised.value.code == "no_worker"
    [job_id] = service.job_ids()
    assert webhook_of(service, job_id)["status"] == "pending"
    service.start_worker()
    [received] = endpoint.wait_for()
    assert received.unwrap(SECRET).data.id == job_id


@pytest.mark.parametrize(
    ("steps", "event"),
    [
        ({"say": ["a"]}, "completed"),
        ({"say": ["a"], "finish_reason": "length"}, "incomplete"),
        ({"say": ["a"], "finish_reason": "content_filter"}, "incomplete"),
        ({"then": "raise"}, "failed"),
        ({"then": "hang"}, "cancelled"),
    ],
)
async def test_a_response_is_told_as_openai_tells_it(
    hooked: Deployment, endpoint: Endpoint, steps: dict[str, Any], event: str
) -> None:
    store = hooked.store()
    job = a_submission(
        new_job_id(JobKind.RESPONSE),
        kind=JobKind.RESPONSE,
        background=True,
        messages=script(**steps),
        webhook=WebhookTarget(url=endpoint.url()),
    )
    await store.submit(job)
    if event == "cancelled":
        await store.cancel(job.job_id, "Not wanted.")
    await store.redis.aclose(close_connection_pool=True)
    [received] = await asyncio.to_thread(endpoint.wait_for)
    told = received.unwrap(SECRET)
    assert (told.type, told.data.id) == (f"response.{event}", job.job_id)
    assert type(told).__name__ == f"Response{event.capitalize()}WebhookEvent"


# -- at least once -----------------------------------------------------------------------------------------------------


def test_an_endpoint_that_fails_gets_the_same_event_again(hooked: Deployment, endpoint: Endpoint) -> None:
    job_id = ask(hooked, HELLO, url=endpoint.url("/status/500/2")).json()["id"]
    received = endpoint.wait_for("/status/500/2", count=3)
    assert len({(one.webhook_id, one.body) for one in received}) == 1
    assert {one.unwrap(SECRET).data.id for one in received} == {job_id}
    told = wait_for_state(hooked, job_id, "delivered")
    assert [attempt["status_code"] for attempt in told["attempts"]] == [500, 500, 200]
    assert [attempt["attempt"] for attempt in told["attempts"]] == [1, 2, 3]


def test_an_endpoint_that_hangs_or_is_not_there_yet_gets_it_later(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(**QUICK, webhook_allow_private=True)
    port = free_port()
    hung = ask(service, HELLO, url=endpoint.url("/hang-once")).json()["id"]
    refused = ask(service, HELLO, url=f"http://127.0.0.1:{port}/").json()["id"]
    assert len(endpoint.wait_for("/hang-once", count=2)) == 2
    wait_until(lambda: webhook_of(service, refused)["attempts"], timeout=10, description="a first attempt")
    with serving(port=port) as late:
        [received, *_] = late.wait_for()
        assert received.unwrap(SECRET).data.id == refused
    attempts = wait_for_state(service, hung, "delivered")["attempts"]
    assert [(attempt["status_code"], attempt["error"]) for attempt in attempts] == [(None, "timeout"), (200, None)]
    attempts = wait_for_state(service, refused, "delivered")["attempts"]
    assert (attempts[0]["error"], attempts[-1]["status_code"]) == ("not_connected", 200)


@pytest.mark.parametrize(("path", "attempts"), [("/status/410", 1), ("/status/404", 3), ("/redirect", 3)])
def test_an_event_that_nobody_takes_is_given_up(
    hooked: Deployment, endpoint: Endpoint, path: str, attempts: int
) -> None:
    job_id = ask(hooked, HELLO, url=endpoint.url(path)).json()["id"]
    assert len(wait_for_state(hooked, job_id, "given_up")["attempts"]) == attempts
    assert len(endpoint.at(path)) == attempts
    assert endpoint.at("/") == [], "a redirect is not followed"
    assert hooked.redis.zscore(hooked.keys.webhooks, job_id) is None


def test_a_worker_killed_in_mid_delivery_leaves_it_to_another(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(**QUICK, webhook_url=endpoint.url("/hang-once"))
    with service.client() as client:
        job_id = client.chat.completions.create(model="endmark", messages=HELLO).id
    [first] = endpoint.wait_for("/hang-once")
    service.workers[0].process.kill()
    service.start_worker()
    _, second = endpoint.wait_for("/hang-once", count=2)
    assert (second.webhook_id, second.body) == (first.webhook_id, first.body)
    assert second.unwrap(SECRET).data.id == job_id
    attempts = wait_for_state(service, job_id, "delivered")["attempts"]
    assert [attempt["status_code"] for attempt in attempts] == [None, 200]


def test_a_stopping_worker_leaves_it_to_another_at_once(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(**QUICK | {"webhook_timeout_s": 300}, webhook_url=endpoint.url("/hang-once"))
    with service.client() as client:
        job_id = client.chat.completions.create(model="endmark", messages=HELLO).id
    endpoint.wait_for("/hang-once")
    service.workers[0].process.send_signal(signal.SIGTERM)
    assert service.workers[0].wait() == 0
    service.start_worker()
    endpoint.wait_for("/hang-once", count=2)
    attempts = wait_for_state(service, job_id, "delivered")["attempts"]
    assert [attempt["error"] for attempt in attempts] == ["worker_stopped", None]


def test_an_endpoint_that_hangs_holds_up_nobody_else(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(**QUICK | {"webhook_timeout_s": 300}, webhook_allow_private=True)
    with serving("127.0.0.2") as other:
        for _ in range(2 * MAX_PER_HOST):
            assert ask(service, HELLO, url=endpoint.url("/hang")).status_code == 200
        endpoint.wait_for("/hang", count=MAX_PER_HOST)
        assert ask(service, HELLO, url=other.url()).status_code == 200
        other.wait_for()
        assert len(endpoint.at("/hang")) == MAX_PER_HOST


# -- webhooks of requests ----------------------------------------------------------------------------------------------


def test_a_request_names_its_own_endpoint_and_its_own_secret(own_service: Start, endpoint: Endpoint) -> None:
    service = own_service(**QUICK, webhook_url=endpoint.url("/status/200"), webhook_allow_private=True)
    job_id = ask(service, HELLO, url=endpoint.url("/own?a=b"), secret=OWN_SECRET).json()["id"]
    [received] = endpoint.wait_for("/own?a=b")
    assert received.unwrap(OWN_SECRET).data.id == job_id
    with pytest.raises(openai.InvalidWebhookSignatureError):
        received.unwrap(SECRET)
    told = wait_for_state(service, job_id, "delivered")
    assert told["url"] == endpoint.url("/own?a=b")
    assert endpoint.at("/status/200") == [], "instead of the deployment's"


def test_the_agent_does_not_see_the_webhook(hooked: Deployment, endpoint: Endpoint) -> None:
    job_id = ask(hooked, HELLO, url=endpoint.url(), secret=OWN_SECRET).json()["id"]
    request: bytes = hooked.redis.get(hooked.keys.request(job_id))  # type: ignore[assignment]  # redis-py types
    assert json.loads(request)["params"] == {}


def test_secrets_are_shown_to_nobody(hooked: Deployment, endpoint: Endpoint) -> None:
    shown = ""
    with hooked.http() as http:
        for path, state in (("/token-in-path", "delivered"), ("/status/500", "given_up")):
            answer = ask(hooked, HELLO, url=endpoint.url(path), secret=OWN_SECRET)
            job_id = answer.json()["id"]
            wait_for_state(hooked, job_id, state)
            hooked.workers[0].wait_for_output(f'"job":"{job_id}","attempt":1,"host"')
            shown += answer.text + http.get(f"/v1/jobs/{job_id}").text + http.get(f"/v1/jobs/{job_id}/webhook").text
        shown += ask(hooked, HELLO, url="https://127.0.0.1/", secret=OWN_SECRET + "?").text
        shown += ask(hooked, HELLO, url="x", secret=OWN_SECRET).text
    logs = hooked.api.output + hooked.workers[0].output
    for secret in (SECRET, OWN_SECRET):
        assert secret.removeprefix("whsec_").rstrip("=") not in shown + logs
    assert "token-in-path" not in logs


def test_a_tenant_sees_only_its_own_webhooks(hooked: Deployment, endpoint: Endpoint) -> None:
    job_id = ask(hooked, HELLO, key="key-of-acme", url=endpoint.url()).json()["id"]
    endpoint.wait_for()
    assert webhook_of(hooked, job_id, key="key-of-acme")["url"] == endpoint.url()
    for key in ("key-of-other", KEY):
        with hooked.http(key=key) as http:
            assert http.get(f"/v1/jobs/{job_id}/webhook").status_code == 404


def test_a_job_without_a_webhook_has_none(service: Deployment) -> None:
    with service.client() as client, service.http() as http:
        job_id = client.chat.completions.create(model="endmark", messages=HELLO).id
        assert http.get(f"/v1/jobs/{job_id}/webhook").status_code == 404


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    """A service that signs with a secret of its own, and sends nowhere by itself."""
    folder = tmp_path_factory.mktemp("plain")
    with deployed(folder, redis_url, f"test-{secrets.token_hex(4)}", webhook_secret=SECRET) as deployment:
        yield deployment


@pytest.mark.parametrize(
    ("webhook", "param"),
    [
        ("https://example.org/", "webhook"),
        ({}, "webhook.url"),
        ({"url": 7}, "webhook.url"),
        ({"url": ""}, "webhook.url"),
        ({"url": "example.org"}, "webhook.url"),
        ({"url": "ftp://example.org/"}, "webhook.url"),
        ({"url": "http://example.org/"}, "webhook.url"),
        ({"url": "https://user:password@example.org/"}, "webhook.url"),
        ({"url": "https://example.org:22/"}, "webhook.url"),
        ({"url": "https://example.org/#a"}, "webhook.url"),
        ({"url": "https://localhost/"}, "webhook.url"),
        ({"url": "https://127.0.0.1/"}, "webhook.url"),
        ({"url": "https://2130706433/"}, "webhook.url"),
        ({"url": "https://0x7f.1/"}, "webhook.url"),
        ({"url": "https://169.254.169.254/latest/meta-data/"}, "webhook.url"),
        ({"url": "https://[::1]/"}, "webhook.url"),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "webhook.url"),
        ({"url": "https://example.org/" + "a" * 2048}, "webhook.url"),
        ({"url": "https://example.org/", "secret": "sesame"}, "webhook.secret"),
        ({"url": "https://example.org/", "secret": "whsec_c2hvcnQ="}, "webhook.secret"),
        ({"url": "https://example.org/", "secret": "whsec_" + "A" * 200}, "webhook.secret"),
        ({"url": "https://example.org/", "secrets": OWN_SECRET}, "webhook.secrets"),
    ],
    ids=repr,
)
def test_a_bad_webhook_is_refused_and_named(plain: Deployment, webhook: Any, param: str) -> None:
    with plain.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": HELLO, "webhook": webhook})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert plain.job_ids() == []


def test_without_a_secret_of_the_deployment_a_request_has_to_bring_one(service: Deployment) -> None:
    answer = ask(service, HELLO, url="https://example.org/")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "webhook.secret")
