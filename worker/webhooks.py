"""Delivers webhooks: each worker takes some of those that are due, beside the jobs that it runs.

Rule 1: an endpoint that hangs holds up nobody else: each attempt has a timeout, and each host its share.
Rule 2: a worker that stops waits only for a moment; what is still on its way goes back into the queue.
Rule 3: neither secrets nor the path of a URL are logged.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress

import structlog

from shared.connection import FAILURES, try_for
from shared.destinations import DestinationError, destination
from shared.settings import Settings
from shared.signing import signature_header
from shared.tasks import end_task
from shared.webhooks import JITTER, SETTLE_S, AttemptResult, Delivery, DeliveryState, WebhookStore, wait_s
from worker.webhook_post import WebhookPoster

log = structlog.get_logger(__name__)

MAX_ON_THEIR_WAY = 200  # webhooks that a worker sends at a time
MAX_PER_HOST = 20  # of them, to one host
MAX_PER_TENANT = 50  # of them, to URLs that one tenant has named: it may name any number of hosts
LOOK_S = 0.5  # how often a worker looks for webhooks that are due
LOOK_AGAIN_S = 0.05  # the same while it has left some behind
STOP_S = 1.0  # what a stopping worker waits for those on their way
_FINAL = frozenset({410})  # the endpoint does not want it, now or ever


class WebhookDeliverer:
    """Delivers webhooks as long as it is entered."""

    def __init__(self, webhooks: WebhookStore, poster: WebhookPoster, worker_id: str) -> None:
        self._webhooks = webhooks
        self._settings: Settings = webhooks.settings
        self._poster = poster
        self._worker_id = worker_id
        self._stopping = asyncio.Event()
        self._on_their_way: dict[asyncio.Task[None], Delivery] = {}

    async def __aenter__(self) -> WebhookDeliverer:
        self._loop_task = asyncio.create_task(self._deliver_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        await asyncio.wait({self._loop_task}, timeout=STOP_S)  # what a claim on its way brings is put back, too
        await end_task(self._loop_task)
        if self._on_their_way:
            await asyncio.wait(self._on_their_way, timeout=STOP_S)
        await asyncio.gather(*(self._put_back(task, delivery) for task, delivery in list(self._on_their_way.items())))
        self._poster.close()

    async def _put_back(self, task: asyncio.Task[None], delivery: Delivery) -> None:
        """Stops an attempt, and leaves the webhook to the others at once."""
        await end_task(task)
        if not task.cancelled():  # it has just come to its end, and is settled
            return
        await self._settle(delivery, AttemptResult(None, "worker_stopped", 0), DeliveryState.PENDING, 0)

    async def _deliver_forever(self) -> None:
        while not self._stopping.is_set():
            pause_s = LOOK_S
            if len(self._on_their_way) < MAX_ON_THEIR_WAY:
                try:
                    pause_s = LOOK_AGAIN_S if await self._start_due() else LOOK_S
                except FAILURES as error:
                    log.warning("webhooks_not_claimed", worker=self._worker_id, reason=str(error))
                except Exception:  # one that cannot be read must not end the delivery of all others
                    log.exception("webhooks_broken", worker=self._worker_id)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s * random.uniform(0.75, 1.25)):  # noqa: S311  # spreads the workers
                    await self._stopping.wait()

    async def _start_due(self) -> bool:
        """Begins to deliver what is due, as far as there is room. Whether more is due."""
        claimed = await self._webhooks.claim(
            MAX_ON_THEIR_WAY - len(self._on_their_way),
            on_their_way=Counter(share for delivery in self._on_their_way.values() for share in delivery.shares),
            max_per_host=MAX_PER_HOST,
            max_per_tenant=MAX_PER_TENANT,
        )
        for job_id in claimed.given_up:
            log.error("webhook_given_up", job=job_id, reason="every worker that tried was lost")
        for delivery in claimed.deliveries:
            task = asyncio.create_task(self._deliver(delivery))
            self._on_their_way[task] = delivery
            task.add_done_callback(self._forget)
        return claimed.more_are_due

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._on_their_way[task]
        if not task.cancelled() and (error := task.exception()):
            log.error("webhook_task_failed", exc_info=error)  # the attempt is tried again when it is nobody's own

    async def _deliver(self, delivery: Delivery) -> None:
        result = await self._attempt(delivery)
        state = self._state_after(delivery, result)
        pause_s = wait_s(delivery.attempt, self._settings.webhook_retry_s) * random.uniform(1, 1 + JITTER)  # noqa: S311
        await self._settle(delivery, result, state, pause_s)

    async def _attempt(self, delivery: Delivery) -> AttemptResult:
        """Sends it once. An endpoint or secret that this worker does not know counts as a failed attempt."""
        url = self._settings.webhook_url if delivery.url is None else delivery.url
        keys = self._settings.webhook_keys if delivery.keys is None else delivery.keys
        if not url or not keys:
            return AttemptResult(None, "not_configured", 0)
        public_only = delivery.url is not None and not self._settings.webhook_allow_private
        try:
            to = destination(url, public_only=public_only)
        except DestinationError:  # the setting was another one when the request was accepted
            return AttemptResult(None, "address_refused", 0)
        body = delivery.body()
        timestamp_s = delivery.started_ms // 1000
        headers = {
            "content-type": "application/json",
            "user-agent": "Endmark",
            "connection": "close",
            "webhook-id": delivery.event_id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": signature_header(keys, delivery.event_id, timestamp_s, body),
        }
        return await self._poster.post(to, headers, body, public_only=public_only)

    def _state_after(self, delivery: Delivery, result: AttemptResult) -> DeliveryState:
        if result.status_code is not None and 200 <= result.status_code < 300:
            return DeliveryState.DELIVERED
        is_last = delivery.attempt >= self._settings.webhook_max_attempts
        if is_last or result.status_code in _FINAL or result.error == "address_refused":
            return DeliveryState.GIVEN_UP
        return DeliveryState.PENDING

    async def _settle(self, delivery: Delivery, result: AttemptResult, state: DeliveryState, pause_s: float) -> None:
        try:
            await try_for(SETTLE_S, lambda: self._webhooks.settle(delivery, result, state, pause_s))
        except FAILURES as error:  # then it is sent again
            log.warning("webhook_not_settled", job=delivery.job_id, attempt=delivery.attempt, reason=str(error))
            return
        (log.info if state is DeliveryState.DELIVERED else log.warning)(
            "webhook_attempted",
            job=delivery.job_id,
            attempt=delivery.attempt,
            host=delivery.host or None,
            state=state.value,
            status_code=result.status_code,
            error=result.error,
            duration_ms=result.duration_ms,
        )
