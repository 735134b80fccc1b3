"""What a webhook says, how it is signed, and when it is said again."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import openai
import pytest

from api.errors import InvalidRequestError
from api.webhook_request import WebhookRequest, webhook_target
from shared.entries import ErrorMarker, OkMarker
from shared.jobs import JobKind, Status, new_job_id
from shared.settings import Settings
from shared.signing import signature_header, signing_key
from shared.webhooks import Delivery, event_id, event_type, longest_delivery_ms, wait_s, webhook_fields
from tests.jobs import a_submission

KEYS = [b"first key of twenty-four.", b"second key, as long as it"]
SECRETS = ["whsec_" + base64.b64encode(key).decode() for key in KEYS]
FAILED = ErrorMarker("agent_error", "The agent failed.").payload()


def ok(finish_reason: str) -> bytes:
    return OkMarker(0, "", finish_reason, None).payload()


@pytest.mark.parametrize(
    ("kind", "status", "marker", "expected"),
    [
        (JobKind.RESPONSE, Status.SUCCEEDED, ok("stop"), "response.completed"),
        (JobKind.RESPONSE, Status.SUCCEEDED, ok("tool_calls"), "response.completed"),
        (JobKind.RESPONSE, Status.SUCCEEDED, ok("length"), "response.incomplete"),
        (JobKind.RESPONSE, Status.SUCCEEDED, ok("content_filter"), "response.incomplete"),
        (JobKind.RESPONSE, Status.FAILED, FAILED, "response.failed"),
        (JobKind.RESPONSE, Status.CANCELLED, FAILED, "response.cancelled"),
        (JobKind.CHAT, Status.SUCCEEDED, ok("stop"), "chat.completion.completed"),
        (JobKind.CHAT, Status.SUCCEEDED, ok("length"), "chat.completion.incomplete"),
        (JobKind.CHAT, Status.FAILED, FAILED, "chat.completion.failed"),
        (JobKind.CHAT, Status.CANCELLED, FAILED, "chat.completion.cancelled"),
    ],
)
def test_an_event_is_named_by_what_has_happened(kind: JobKind, status: Status, marker: bytes, expected: str) -> None:
    assert event_type(kind, status, marker) == expected
    job_id = new_job_id(kind)
    delivery = Delivery(
        job_id=job_id,
        attempt=1,
        started_ms=1_700_000_001_000,
        kind=kind,
        url=None,
        keys=None,
        status=status,
        marker=marker,
        ended_ms=1_700_000_000_999,
        tenant="default",
    )
    assert json.loads(delivery.body()) == {
        "id": event_id(job_id),
        "object": "event",
        "created_at": 1_700_000_000,
        "type": expected,
        "data": {"id": job_id},
    }


@pytest.mark.parametrize("kind", list(JobKind))
def test_the_id_of_an_event_is_made_of_that_of_its_job(kind: JobKind) -> None:
    job_id = new_job_id(kind)
    assert event_id(job_id) == "evt_" + job_id[-32:]


def test_the_sdk_accepts_a_signature_of_any_of_the_secrets() -> None:
    body, timestamp_s = b'{"type":"response.completed","data":{"id":"resp_1"}}', int(time.time())
    headers = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": signature_header([signing_key(secret) for secret in SECRETS], "evt_1", timestamp_s, body),
    }
    with openai.OpenAI(api_key="not-needed") as client:
        for secret in SECRETS:
            event: Any = client.webhooks.unwrap(body, headers, secret=secret)
            assert event.type == "response.completed"
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, headers, secret="whsec_" + base64.b64encode(b"x" * 24).decode())
        for name, value in (("webhook-id", "evt_2"), ("webhook-timestamp", str(timestamp_s - 1))):
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.unwrap(body, headers | {name: value}, secret=SECRETS[0])


@pytest.mark.parametrize(
    "secret",
    [
        *("", "whsec_", "sesame", SECRETS[0].removeprefix("whsec_"), SECRETS[0] + "!", SECRETS[0].rstrip("=")[:-1]),
        "whsec_" + base64.b64encode(b"x" * 23).decode(),
        "whsec_" + base64.b64encode(b"x" * 65).decode(),
    ],
)
def test_what_is_no_secret_is_refused_without_being_repeated(secret: str) -> None:
    with pytest.raises(ValueError, match="must be whsec_ and the base64") as raised:
        signing_key(secret)
    assert len(secret) < 8 or secret not in str(raised.value)


def test_the_waits_grow_up_to_six_hours() -> None:
    assert [wait_s(attempt, 5) for attempt in (1, 2, 3, 4)] == [5, 20, 80, 320]
    assert wait_s(20, 5) == 6 * 3600
    settings = Settings(retention_s=60)
    assert 19 * 3600 < longest_delivery_ms(settings) / 1000 - 60 < 32 * 3600


def test_a_secret_is_not_shown_with_what_holds_it() -> None:
    target = webhook_target(
        WebhookRequest.model_validate({"url": "https://example.org/", "secret": SECRETS[0]}), Settings()
    )
    assert target is not None
    assert target.secret == SECRETS[0]
    job = a_submission(webhook=target)
    settings = Settings(webhook_secret=",".join(SECRETS))
    assert settings.webhook_keys == tuple(KEYS)
    for secret in SECRETS:
        assert secret not in repr(job) + repr(settings)
    assert secret.encode() not in job.request_bytes()
    fields = webhook_fields(job, settings)
    assert fields is not None
    assert (fields["url"], fields["secret"], fields["host"]) == ("https://example.org/", SECRETS[0], "example.org")


def test_a_job_has_a_webhook_if_the_request_or_the_deployment_names_one() -> None:
    assert webhook_fields(a_submission(), Settings()) is None
    fields = webhook_fields(a_submission(), Settings(webhook_url="http://app:8000/hooks", webhook_secret=SECRETS[0]))
    assert fields is not None
    assert "url" not in fields
    assert "secret" not in fields


def test_private_addresses_are_for_deployments_that_allow_them() -> None:
    webhook = WebhookRequest.model_validate({"url": "http://10.0.0.1:80/", "secret": SECRETS[0]})
    with pytest.raises(InvalidRequestError) as raised:
        webhook_target(webhook, Settings())
    assert raised.value.param == "webhook.url"
    assert webhook_target(webhook, Settings(webhook_allow_private=True)) is not None
