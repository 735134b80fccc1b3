"""Webhooks in Redis: due with the end of the job, one worker's at a time, delivered or given up."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from shared.jobs import JobKind, Status, WebhookTarget, new_job_id
from shared.store import Deletion, JobStore
from shared.webhooks import AttemptResult, Delivery, DeliveryState, WebhookRecord, WebhookStore, longest_delivery_ms
from tests.conftest import MakeStore
from tests.jobs import a_submission, a_worker, everything, nobody_listens, record_of, submitted

SECRET = "whsec_" + "A" * 32
TARGET = WebhookTarget(url="https://hooks.example/path", secret=SECRET)
OK = AttemptResult(200, None, 12)
FAILED = AttemptResult(500, None, 12)


def webhooks_of(store: JobStore) -> WebhookStore:
    return WebhookStore(store.redis, store.settings)


async def due(store: JobStore, limit: int = 10) -> list[Delivery]:
    return (await webhooks_of(store).claim(limit, on_their_way={}, max_per_host=5, max_per_tenant=100)).deliveries


async def webhook_of(store: JobStore, job_id: str) -> WebhookRecord:
    record = await webhooks_of(store).record(job_id)
    assert record is not None
    return record


async def cancelled(store: JobStore, *, url: str = TARGET.url) -> str:
    """The id of a job that has ended, with a webhook."""
    job_id = await submitted(store, webhook=WebhookTarget(url=url, secret=SECRET))
    await store.cancel(job_id, "Not wanted.")
    return job_id


async def several(store: JobStore, count: int) -> list[str]:
    """The ids of jobs whose webhooks are due, in this order."""
    ended = [await cancelled(store) for _ in range(count)]
    await store.redis.zadd(store.keys.webhooks, {job_id: number for number, job_id in enumerate(ended)})
    return ended


async def overdue(store: JobStore, job_id: str) -> None:
    """As if the time until the next attempt had passed."""
    assert await store.redis.zadd(store.keys.webhooks, {job_id: 1}, xx=True, ch=True) == 1


# -- due with the end --------------------------------------------------------------------------------------------------


async def ended_ok(store: JobStore) -> str:
    worker = await a_worker(store)
    job_id = await submitted(store, webhook=TARGET)
    attempt = await worker.claim_one()
    await attempt.say(b"a")
    await attempt.finish_ok()
    return job_id


async def ended_by_error(store: JobStore) -> str:
    worker = await a_worker(store)
    job_id = await submitted(store, webhook=TARGET)
    await (await worker.claim_one()).finish_error()
    return job_id


async def ended_by_release(store: JobStore) -> str:
    worker = await a_worker(store)
    job_id = await submitted(store, webhook=TARGET)
    await (await worker.claim_one()).release()
    return job_id


async def ended_by_lost_worker(store: JobStore) -> str:
    worker = await a_worker(store)
    job_id = await submitted(store, webhook=TARGET)
    await (await worker.claim_one()).say(b"a")
    await worker.lapse()
    await store.sweep()
    return job_id


async def ended_by_queue_timeout(store: JobStore) -> str:
    job_id = await submitted(store, webhook=TARGET)
    await store.redis.zadd(store.keys.deadlines, {job_id: 1})
    await store.sweep()
    return job_id


async def ended_by_run_timeout(store: JobStore) -> str:
    worker = await a_worker(store)
    job_id = await submitted(store, webhook=TARGET)
    await worker.claim_one()
    await store.redis.zadd(store.keys.deadlines, {job_id: 1})
    await store.sweep()
    return job_id


async def ended_by_its_clients_leaving(store: JobStore) -> str:
    job_id = await submitted(store, webhook=TARGET, is_waited_for=True)
    await store.leave(job_id, job_id, "The client has gone away.", may_come_back=False)
    return job_id


async def ended_as_unwanted(store: JobStore) -> str:
    job_id = await submitted(store, webhook=TARGET, is_waited_for=True)
    await nobody_listens(store, job_id)
    assert await (await a_worker(store)).claim() == []
    return job_id


@pytest.mark.parametrize(
    ("end", "status", "event"),
    [
        (ended_ok, Status.SUCCEEDED, "completed"),
        (ended_by_error, Status.FAILED, "failed"),
        (ended_by_release, Status.FAILED, "failed"),
        (ended_by_lost_worker, Status.FAILED, "failed"),
        (ended_by_queue_timeout, Status.FAILED, "failed"),
        (ended_by_run_timeout, Status.FAILED, "failed"),
        (cancelled, Status.CANCELLED, "cancelled"),
        (ended_by_its_clients_leaving, Status.CANCELLED, "cancelled"),
        (ended_as_unwanted, Status.CANCELLED, "cancelled"),
    ],
)
async def test_whatever_ends_a_job_makes_its_webhook_due(store: JobStore, end: Any, status: Status, event: str) -> None:
    job_id = await end(store)
    assert (await record_of(store, job_id)).status is status
    [delivery] = await due(store)
    assert (delivery.job_id, delivery.attempt, delivery.status) == (job_id, 1, status)
    assert (delivery.url, delivery.keys) == (TARGET.url, (bytes(24),))
    assert delivery.ended_ms == (await record_of(store, job_id)).finished_ms
    assert json.loads(delivery.body())["type"] == f"chat.completion.{event}"
    assert await due(store) == [], "one event"


async def test_a_job_that_has_not_ended_has_nothing_to_tell(store: JobStore) -> None:
    job_id = await submitted(store, webhook=TARGET)
    assert await due(store) == []
    assert (await webhook_of(store, job_id)).state is DeliveryState.WAITING
    await (await a_worker(store)).claim_one()
    assert await due(store) == []


async def test_a_job_that_is_run_again_has_nothing_to_tell_yet(store: JobStore) -> None:
    worker = await a_worker(store)
    await submitted(store, webhook=TARGET)
    await worker.claim_one()
    await worker.lapse()
    assert [swept.what for swept in await store.sweep()] == ["retried"]
    assert await due(store) == []


async def test_a_job_without_a_webhook_leaves_no_trace_of_one(store: JobStore) -> None:
    job_id = await submitted(store)
    await store.cancel(job_id, "Not wanted.")
    assert not [name for name in await everything(store) if "webhook" in name]
    assert await webhooks_of(store).record(job_id) is None


async def test_a_job_of_a_deployment_with_an_endpoint_has_one_without_asking(make_store: MakeStore) -> None:
    store = make_store(webhook_url="http://app:8000/", webhook_secret=SECRET)
    job_id = new_job_id(JobKind.RESPONSE)
    await store.submit(a_submission(job_id, kind=JobKind.RESPONSE))
    await store.cancel(job_id, "Not wanted.")
    [delivery] = await due(store)
    assert (delivery.url, delivery.keys, delivery.host) == (None, None, "")
    assert json.loads(delivery.body())["type"] == "response.cancelled"


async def test_a_submission_that_is_sent_again_changes_nothing(store: JobStore) -> None:
    job = a_submission(webhook=TARGET)
    await store.submit(job)
    await store.cancel(job.job_id, "Not wanted.")
    before = await everything(store)
    assert not (await store.submit(job)).is_new
    assert await everything(store) == before


# -- one attempt at a time ---------------------------------------------------------------------------------------------


async def test_a_delivered_webhook_is_not_due_again(store: JobStore) -> None:
    job_id = await cancelled(store)
    [delivery] = await due(store)
    assert await webhooks_of(store).settle(delivery, OK, DeliveryState.DELIVERED)
    webhook = await webhook_of(store, job_id)
    assert (webhook.state, webhook.due_ms) == (DeliveryState.DELIVERED, None)
    [attempt] = webhook.attempts
    assert (attempt.attempt, attempt.started_ms, attempt.result) == (1, delivery.started_ms, OK)
    assert await store.redis.zcard(store.keys.webhooks) == 0
    assert not await webhooks_of(store).settle(delivery, FAILED, DeliveryState.PENDING, 0), "it is over"


async def test_a_failed_attempt_is_followed_by_another_after_the_wait(store: JobStore) -> None:
    job_id = await cancelled(store)
    [first] = await due(store)
    await webhooks_of(store).settle(first, FAILED, DeliveryState.PENDING, 60)
    assert await due(store) == []
    webhook = await webhook_of(store, job_id)
    assert webhook.state is DeliveryState.PENDING
    assert webhook.due_ms is not None
    assert webhook.due_ms >= first.started_ms + 60_000
    await overdue(store, job_id)
    [second] = await due(store)
    assert (second.attempt, second.body()) == (2, first.body())


async def test_an_attempt_that_nobody_settles_is_left_to_another_worker(store: JobStore) -> None:
    job_id = await cancelled(store)
    [lost] = await due(store)
    assert await due(store) == []
    await overdue(store, job_id)
    [second] = await due(store)
    assert second.attempt == 2
    assert not await webhooks_of(store).settle(lost, FAILED, DeliveryState.PENDING, 0), "the second decides"
    assert await due(store) == []
    assert await webhooks_of(store).settle(lost, OK, DeliveryState.DELIVERED), "delivered is delivered"
    assert not await webhooks_of(store).settle(second, FAILED, DeliveryState.PENDING, 0)
    assert (await webhook_of(store, job_id)).state is DeliveryState.DELIVERED


async def test_a_webhook_that_kills_every_worker_is_given_up(make_store: MakeStore) -> None:
    store = make_store(webhook_max_attempts=2)
    job_id = await cancelled(store)
    for attempt in (1, 2):
        [delivery] = await due(store)
        assert delivery.attempt == attempt
        await overdue(store, job_id)
    claimed = await webhooks_of(store).claim(10, on_their_way={}, max_per_host=5, max_per_tenant=100)
    assert (claimed.deliveries, claimed.given_up) == ([], [job_id])
    webhook = await webhook_of(store, job_id)
    assert (webhook.state, [attempt.result for attempt in webhook.attempts]) == (DeliveryState.GIVEN_UP, [None, None])
    assert await store.redis.zcard(store.keys.webhooks) == 0


async def test_a_webhook_that_cannot_be_read_takes_no_other_along(store: JobStore) -> None:
    """Such as one of a newer version; it is left to others, as if this worker had died."""
    unreadable, readable = await cancelled(store), await cancelled(store)
    await store.redis.hset(store.keys.webhook(unreadable), "kind", "of tomorrow")  # type: ignore[misc]  # redis-py types both its clients at once
    assert [delivery.job_id for delivery in await due(store)] == [readable]
    await store.redis.hset(store.keys.webhook(unreadable), "kind", "chatcmpl")  # type: ignore[misc]  # as above
    await overdue(store, unreadable)
    assert [delivery.job_id for delivery in await due(store)] == [unreadable]


async def test_a_worker_gets_no_more_than_it_can_send(store: JobStore) -> None:
    ended = await several(store, 3)
    assert [delivery.job_id for delivery in await due(store, 2)] == ended[:2], "those that are due for longest"
    assert [delivery.job_id for delivery in await due(store, 2)] == ended[2:]


async def test_a_host_gets_no_more_than_its_share_and_holds_up_no_other(store: JobStore) -> None:
    busy = await several(store, 10)
    other = await cancelled(store, url="https://other.example/")
    webhooks = webhooks_of(store)
    claimed = await webhooks.claim(100, on_their_way={"hooks.example": 3}, max_per_host=5, max_per_tenant=100)
    assert [delivery.job_id for delivery in claimed.deliveries] == [*busy[:2], other]
    assert claimed.more_are_due
    passed_over = await webhook_of(store, busy[2])
    assert (passed_over.attempts, passed_over.due_ms) == ([], 2), "it keeps its place"
    claimed = await webhooks.claim(100, on_their_way={}, max_per_host=20, max_per_tenant=100)
    assert [delivery.job_id for delivery in claimed.deliveries] == busy[2:]
    assert not claimed.more_are_due


async def test_a_host_with_more_than_can_be_looked_at_holds_up_no_other(store: JobStore) -> None:
    hidden = await cancelled(store, url="https://other.example/")
    busy = await cancelled(store)
    copies = {f"{busy}{number}": number for number in range(1000)}
    async with store.redis.pipeline(transaction=False) as pipe:
        for job_id in copies:
            pipe.hset(store.keys.webhook(job_id), mapping={"state": "pending", "host": "hooks.example"})
            pipe.pexpire(store.keys.webhook(job_id), 60_000)
        await pipe.execute()
    await store.redis.zadd(store.keys.webhooks, copies)
    webhooks = webhooks_of(store)
    claimed = await webhooks.claim(100, on_their_way={"hooks.example": 5}, max_per_host=5, max_per_tenant=100)
    assert (claimed.deliveries, claimed.more_are_due) == ([], True)
    claimed = await webhooks.claim(100, on_their_way={"hooks.example": 5}, max_per_host=5, max_per_tenant=100)
    assert [delivery.job_id for delivery in claimed.deliveries] == [hidden]


# -- no key outlives its purpose ---------------------------------------------------------------------------------------


async def test_a_webhook_is_kept_until_it_is_settled_and_then_for_the_retention(make_store: MakeStore) -> None:
    store = make_store(retention_s=60)
    longest_ms = longest_delivery_ms(store.settings)
    job_id = await submitted(store, webhook=TARGET)
    key = store.keys.webhook(job_id)
    assert await store.redis.pttl(key) > longest_ms
    await store.cancel(job_id, "Not wanted.")
    for name in (key, store.keys.webhooks):
        assert longest_ms - 10_000 < await store.redis.pttl(name) <= longest_ms
    [delivery] = await due(store)
    await webhooks_of(store).settle(delivery, OK, DeliveryState.DELIVERED)
    assert 50_000 < await store.redis.pttl(key) <= 60_000


async def test_a_webhook_that_has_expired_is_forgotten(store: JobStore) -> None:
    job_id = await cancelled(store)
    [delivery] = await due(store)
    await store.redis.delete(store.keys.webhook(job_id))
    assert not await webhooks_of(store).settle(delivery, FAILED, DeliveryState.PENDING, 0)
    await overdue(store, job_id)
    assert await due(store) == []
    assert await store.redis.zcard(store.keys.webhooks) == 0


async def test_a_deleted_job_takes_its_settled_webhook_along_and_a_pending_one_is_still_delivered(
    store: JobStore,
) -> None:
    job_id = await cancelled(store)
    assert await store.delete(job_id) is Deletion.DONE
    [delivery] = await due(store)
    assert delivery.job_id == job_id
    other = await cancelled(store)
    [delivery] = await due(store)
    await webhooks_of(store).settle(delivery, OK, DeliveryState.DELIVERED)
    assert await store.delete(other) is Deletion.DONE
    assert await webhooks_of(store).record(other) is None


async def test_the_record_of_the_job_and_its_request_hold_no_secret(store: JobStore) -> None:
    job_id = await submitted(store, webhook=TARGET)
    holders = [name for name, value in (await everything(store)).items() if SECRET in repr(value)]
    assert holders == [store.keys.webhook(job_id)]
    assert SECRET not in repr(await webhook_of(store, job_id)) + repr(await record_of(store, job_id))


async def test_if_too_many_are_pending_the_one_that_is_due_last_is_given_up(store: JobStore) -> None:
    waiting = await cancelled(store)
    [delivery] = await due(store)
    await webhooks_of(store).settle(delivery, FAILED, DeliveryState.PENDING, 3600)
    await store.redis.zadd(store.keys.webhooks, {f"resp_{number:05}": 10**12 + number for number in range(99_999)})
    job_id = await cancelled(store)
    assert (await webhook_of(store, job_id)).state is DeliveryState.PENDING
    assert (await webhook_of(store, waiting)).state is DeliveryState.GIVEN_UP
    assert await store.redis.zscore(store.keys.webhooks, waiting) is None
    await store.redis.zadd(store.keys.webhooks, {"resp_99998": 10**15})
    await cancelled(store)  # what is due last has no hash any more, and gets none
    assert await store.redis.zcard(store.keys.webhooks) == 100_000
    assert not await store.redis.exists(store.keys.webhook("resp_99998"))


async def test_a_tenant_with_many_hosts_has_its_share_and_no_more(store: JobStore) -> None:
    """Its endpoints may all hang: the others' webhooks are sent all the same."""
    for number in range(6):
        target = WebhookTarget(url=f"https://hooks-{number}.example/", secret=SECRET)
        await store.cancel(await submitted(store, webhook=target, tenant="acme"), "")
    other = await submitted(store, webhook=TARGET, tenant="other")
    await store.cancel(other, "")
    claimed = await webhooks_of(store).claim(100, on_their_way={"tenant acme": 1}, max_per_host=20, max_per_tenant=3)
    assert Counter(delivery.tenant for delivery in claimed.deliveries) == {"acme": 2, "other": 1}
    assert claimed.more_are_due
