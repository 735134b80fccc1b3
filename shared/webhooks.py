"""Webhooks: a job's end, told to an endpoint. What is told, and what becomes of telling it in Redis.

Rule 1: a job that was accepted with a webhook ends with one event, whatever ends it. Its id is the job's, so it is the
        same on every attempt to deliver it.
Rule 2: an event becomes due in the step that ends the job. It is delivered at least once, or given up after
        `webhook_max_attempts` attempts.
Rule 3: an attempt belongs to one worker for a while. A worker that dies leaves it to the others.

docs/webhooks.md is what a receiver has to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import structlog
from arq.connections import ArqRedis

from shared import scripts
from shared.destinations import destination
from shared.entries import OkMarker
from shared.jobs import JobKind, Status, Submission
from shared.keys import Keys
from shared.settings import Settings
from shared.signing import signing_key
from shared.text import json_bytes, parse_json

log = structlog.get_logger(__name__)

RETRY_FACTOR = 4.0  # each wait is this many times the one before
LONGEST_WAIT_S = 6 * 3600.0
JITTER = 0.25  # a wait is up to this much longer, so that the webhooks of an endpoint do not come back all at once
SETTLE_S = 5.0  # how long after its timeout an attempt is still its worker's own

_TYPE = {JobKind.CHAT: "chat.completion", JobKind.RESPONSE: "response"}
_CUT_SHORT = frozenset({"length", "content_filter"})  # finish reasons of an answer that is not the whole one


class DeliveryState(StrEnum):
    """What has become of a webhook."""

    WAITING = "waiting"  # the job has not ended
    PENDING = "pending"  # to be delivered, or on its way
    DELIVERED = "delivered"  # the endpoint has answered 2xx
    GIVEN_UP = "given_up"  # it never will be


def wait_s(attempt: int, first_s: float) -> float:
    """How long to wait behind a failed attempt, without the jitter."""
    return min(first_s * RETRY_FACTOR ** (attempt - 1), LONGEST_WAIT_S)


def longest_delivery_ms(settings: Settings) -> int:
    """How long a webhook is kept from its job's end: all attempts, all waits, and then the retention."""
    attempts = range(1, settings.webhook_max_attempts)  # behind the last one nothing is waited for
    waits_s = sum(wait_s(attempt, settings.webhook_retry_s) * (1 + JITTER) for attempt in attempts)
    attempts_s = settings.webhook_max_attempts * (settings.webhook_timeout_s + SETTLE_S)
    return round((waits_s + attempts_s + settings.retention_s) * 1000)


def webhook_fields(job: Submission, settings: Settings) -> dict[str, str | int] | None:
    """What the webhook's hash says from the beginning; None: nobody is to be told."""
    if job.webhook is None and not settings.webhook_url:
        return None
    fields: dict[str, str | int] = {
        "tenant": job.tenant,
        "kind": job.kind.value,
        "host": "",  # the deployment's endpoint
        "keep_ms": longest_delivery_ms(settings),
    }
    if job.webhook is not None:
        fields |= {"url": job.webhook.url, "host": destination(job.webhook.url, public_only=False).host}
        if job.webhook.secret is not None:
            fields["secret"] = job.webhook.secret
    return fields


def event_id(job_id: str) -> str:
    """The event's id: made of the random part of the job's, so that it needs no memory."""
    return f"evt_{job_id.replace('_', '-').rpartition('-')[2]}"


def event_type(kind: JobKind, status: Status, marker: bytes) -> str:
    """OpenAI's name of what has happened to a response, and the like for a chat completion."""
    if status is not Status.SUCCEEDED:
        return f"{_TYPE[kind]}.{status.value}"
    is_whole = OkMarker.parse(marker).finish_reason not in _CUT_SHORT
    return f"{_TYPE[kind]}.{'completed' if is_whole else 'incomplete'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A worker's right to one attempt to deliver a webhook."""

    job_id: str
    attempt: int  # from 1
    started_ms: int  # Redis's clock
    kind: JobKind
    url: str | None  # None: the deployment's endpoint
    keys: tuple[bytes, ...] | None  # what it is signed with; None: with the deployment's
    status: Status
    marker: bytes  # the payload of the job's marker
    ended_ms: int  # Redis's clock
    tenant: str

    @property
    def event_id(self) -> str:
        return event_id(self.job_id)

    @property
    def shares(self) -> tuple[str, ...]:
        """What it takes a place of, among those that a worker may have on their way: its host's, and its tenant's."""
        return (self.host, f"tenant {self.tenant}") if self.host else ("",)

    @property
    def host(self) -> str:
        """As in the hash: empty for the deployment's endpoint."""
        return "" if self.url is None else destination(self.url, public_only=False).host

    def body(self) -> bytes:
        """The event, byte for byte the same on every attempt."""
        return json_bytes(
            {
                "id": self.event_id,
                "object": "event",
                "created_at": self.ended_ms // 1000,
                "type": event_type(self.kind, self.status, self.marker),
                "data": {"id": self.job_id},
            }
        )


class AttemptResult(NamedTuple):
    """What became of one attempt."""

    status_code: int | None  # the endpoint's answer; None: none
    error: str | None  # why there is no answer, or why it does not count
    duration_ms: int


class AttemptRecord(NamedTuple):
    """An attempt, as it can be looked at."""

    attempt: int
    started_ms: int  # Redis's clock
    result: AttemptResult | None  # None: it is on its way, or its worker died


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookRecord:
    """What is known of a job's webhook, without its secret."""

    job_id: str
    tenant: str
    url: str | None  # None: the deployment's endpoint
    state: DeliveryState
    event_type: str | None  # None: the job has not ended
    due_ms: int | None  # when it is tried again, at the latest; None: it is not
    attempts: list[AttemptRecord]


class Claimed(NamedTuple):
    deliveries: list[Delivery]
    more_are_due: bool  # and were left, for want of room or since their hosts are busy
    given_up: list[str]  # ids of the jobs whose last attempt nobody has settled


class WebhookStore:
    """The webhooks of one deployment: one method for each step, one round trip each.

    Raises shared.connection.FAILURES.
    """

    def __init__(self, redis: ArqRedis, settings: Settings) -> None:
        self.settings = settings
        self._redis = redis
        self._keys = Keys(settings.prefix)
        self._claim = redis.register_script(scripts.source("claim_webhooks"))
        self._settle = redis.register_script(scripts.source("settle_webhook"))
        self._retention_ms = round(settings.retention_s * 1000)

    async def claim(
        self, limit: int, *, on_their_way: Mapping[str, int], max_per_host: int, max_per_tenant: int
    ) -> Claimed:
        """Up to `limit` webhooks that are due. `on_their_way`: how many the worker is sending, by `Delivery.shares`."""
        more_are_due, rows, given_up = await self._claim(
            [self._keys.webhooks],
            [
                self._keys.prefix,
                limit,
                max_per_host,
                max_per_tenant,
                round((self.settings.webhook_timeout_s + SETTLE_S) * 1000),
                self.settings.webhook_max_attempts,
                self._retention_ms,
                *(part for pair in on_their_way.items() for part in pair),
            ],
        )
        deliveries = []
        for row in rows:
            try:
                deliveries.append(_delivery(*row))
            except Exception:  # such as of a kind that only a newer version knows: left to other workers
                log.exception("webhook_unreadable", job=row[0].decode(errors="replace"))
        return Claimed(deliveries, more_are_due == 1, [job_id.decode() for job_id in given_up])

    async def settle(self, delivery: Delivery, result: AttemptResult, state: DeliveryState, pause_s: float = 0) -> bool:
        """Notes what became of an attempt. `PENDING`: it is tried again after `pause_s`. Idempotent.

        False if it makes no difference any more.
        """
        after_ms = round(pause_s * 1000) if state is DeliveryState.PENDING else self._retention_ms
        return bool(
            await self._settle(
                [self._keys.webhook(delivery.job_id)],
                [
                    self._keys.prefix,
                    delivery.job_id,
                    delivery.attempt,
                    json_bytes(result._asdict()),
                    state.value,
                    after_ms,
                ],
            )
        )

    async def record(self, job_id: str) -> WebhookRecord | None:
        """What is known of a job's webhook; None if it has none, or none any more."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self._keys.webhook(job_id))
            pipe.zscore(self._keys.webhooks, job_id)
            fields, due_ms = await pipe.execute()
        return _record(job_id, fields, None if due_ms is None else int(due_ms)) if fields else None


def _delivery(
    job_id: bytes,
    attempt: bytes,
    started_ms: bytes,
    kind: bytes,
    url: bytes,
    secret: bytes,
    status: bytes,
    marker: bytes,
    ended_ms: bytes,
    tenant: bytes,
) -> Delivery:
    """A row of the script's answer."""
    return Delivery(
        job_id=job_id.decode(),
        attempt=int(attempt),
        started_ms=int(started_ms),
        kind=JobKind(kind.decode()),
        url=url.decode() or None,
        keys=(signing_key(secret.decode()),) if secret else None,
        status=Status(status.decode()),
        marker=marker,
        ended_ms=int(ended_ms),
        tenant=tenant.decode(),
    )


def _record(job_id: str, fields: Mapping[bytes, bytes], due_ms: int | None) -> WebhookRecord:
    attempts = []
    for attempt in range(1, int(fields.get(b"attempts", 0)) + 1):
        result: dict[str, Any] | None = parse_json(fields.get(b"result:%d" % attempt, b"null"))
        started_ms = int(fields[b"started_ms:%d" % attempt])
        attempts.append(AttemptRecord(attempt, started_ms, AttemptResult(**result) if result else None))
    kind, status = JobKind(fields[b"kind"].decode()), fields.get(b"status")
    return WebhookRecord(
        job_id=job_id,
        tenant=fields[b"tenant"].decode(),
        url=fields[b"url"].decode() if b"url" in fields else None,
        state=DeliveryState(fields.get(b"state", b"waiting").decode()),
        event_type=event_type(kind, Status(status.decode()), fields[b"marker"]) if status else None,
        due_ms=due_ms,
        attempts=attempts,
    )
