"""The protocol of queue and stream, case by case, on fakeredis and on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest
from arq.constants import job_key_prefix
from arq.jobs import deserialize_job
from redis.exceptions import ResponseError

import shared.store
from shared.entries import BEGINNING, Entry, EntryId, ErrorMarker, Kind, OkMarker, Usage
from shared.jobs import ARQ_FUNCTION, ErrorCode, Join, Once, Status, new_job_id
from shared.store import Claim, Ending, JobStore, Left, QueueFullError, Swept
from shared.text import json_bytes, parse_json
from tests.conftest import Backend, MakeStore
from tests.jobs import (
    Attempt,
    WorkerSteps,
    a_submission,
    a_worker,
    entries_of,
    everything,
    record_of,
    running,
    status_of,
    submitted,
    the_next_ms,
)
from tests.waiting import async_wait_until

RETENTION_S = 3600  # the default
UNFINISHED_S = 2 * (300 + 600) + RETENTION_S  # all deadlines of all attempts, then the retention


async def sweep_until_something(store: JobStore) -> list[Swept]:
    """What the first sweep that finds something does."""
    return await async_wait_until(store.sweep, timeout=5, description="a sweep that moves something on")


async def bell_tokens(store: JobStore) -> int:
    tokens: Awaitable[int] = store.redis.llen(store.keys.bell)  # type: ignore[assignment]  # redis-py types both at once
    return await tokens


async def kinds_of(store: JobStore, job_id: str) -> list[tuple[str, Kind]]:
    return [(str(entry.id), entry.kind) for entry in await entries_of(store, job_id)]


async def error_of(store: JobStore, job_id: str) -> ErrorMarker:
    """The error that record and marker agree on."""
    *_, marker = await entries_of(store, job_id)
    assert marker.kind is Kind.ERROR
    record = await record_of(store, job_id)
    assert record.error == ErrorMarker.parse(marker.payload)
    return record.error


# -- accepting ---------------------------------------------------------------------------------------------------------


async def test_an_accepted_job_is_queued_and_says_what_was_asked(store: JobStore) -> None:
    job = a_submission(session="api:s", metadata={"k": "v"}, user="u", store=True, request_id="req_1")
    assert (await store.submit(job)).is_new
    record = await record_of(store, job.job_id)
    assert (record.status, record.session, record.model, record.metadata) == (
        Status.QUEUED,
        "api:s",
        "endmark",
        {"k": "v"},
    )
    assert (record.attempt, record.worker, record.started_ms, record.finished_ms) == (0, "", None, None)
    assert record.deadline_ms == record.accepted_ms + 300_000
    assert await entries_of(store, job.job_id) == []
    await store.cancel(job.job_id, "")


async def test_a_job_is_accepted_once(store: JobStore) -> None:
    job_id = await submitted(store)
    before = await everything(store)
    assert not (await store.submit(a_submission(job_id, session="api:other", model="other"))).is_new
    assert await everything(store) == before


async def test_a_finished_job_is_not_accepted_again(store: JobStore) -> None:
    attempt = await running(store)
    await attempt.finish_ok()
    assert not (await store.submit(a_submission(attempt.job_id))).is_new
    assert await status_of(store, attempt.job_id) is Status.SUCCEEDED


@pytest.mark.parametrize("session", ["", "api:s"])
async def test_too_many_unfinished_jobs_refuse_the_next_and_change_nothing(make_store: MakeStore, session: str) -> None:
    """Running ones and turns that wait for their session count, too; what has ended does not."""
    store = make_store(max_unfinished=2)
    attempt = await running(store, session=session)
    await submitted(store, session=session)
    before = await everything(store)
    with pytest.raises(QueueFullError) as refusal:
        await store.submit(a_submission())
    assert not refusal.value.of_session
    assert await everything(store) == before
    await attempt.finish_ok()
    await submitted(store)


async def test_a_full_session_refuses_and_changes_nothing(make_store: MakeStore) -> None:
    store = make_store(max_session_turns=2)
    for _ in range(2):
        await submitted(store, session="api:s")
    before = await everything(store)
    with pytest.raises(QueueFullError) as refusal:
        await store.submit(a_submission(session="api:s"))
    assert refusal.value.of_session
    assert await everything(store) == before
    await submitted(store, session="api:other")


@pytest.mark.parametrize("session", ["", "api:s"])
async def test_a_queued_job_is_kept_as_long_as_it_may_need(store: JobStore, session: str) -> None:
    job_id = await submitted(store, session=session)
    keys = store.keys
    names = [keys.job(job_id), keys.request(job_id), f"{job_key_prefix}{job_id}"]
    names += [keys.turns(session)] if session else [keys.bell]
    for name in names:
        at_most_s = 60 if name == keys.bell else UNFINISHED_S
        assert at_most_s - 10 < await store.redis.ttl(name) <= at_most_s, name


# -- arq ---------------------------------------------------------------------------------------------------------------


async def test_arq_finds_a_job_in_its_own_format(store: JobStore) -> None:
    job_id = await submitted(store)
    stored = await store.redis.get(f"{job_key_prefix}{job_id}")
    job = deserialize_job(stored, deserializer=parse_json)
    assert job.function == ARQ_FUNCTION
    assert not job.args
    assert not job.kwargs
    assert not job.job_try
    accepted_ms = (await record_of(store, job_id)).accepted_ms
    assert abs(job.enqueue_time.timestamp() * 1000 - accepted_ms) < 60_000
    assert await store.redis.zscore(store.keys.queue, job_id) == accepted_ms


async def test_a_claimed_job_is_out_of_arqs_queue_but_can_be_run_by_arq(store: JobStore) -> None:
    attempt = await running(store)
    assert await store.redis.zscore(store.keys.queue, attempt.job_id) is None
    assert await store.redis.exists(f"{job_key_prefix}{attempt.job_id}")


@pytest.mark.parametrize("how", ["finish", "cancel while queued", "cancel while running", "sweep"])
async def test_nothing_of_arq_is_left_after_the_end(make_store: MakeStore, how: str) -> None:
    store = make_store(queue_timeout_s=0.01 if how == "sweep" else 300)
    job_id = await submitted(store)
    worker = await a_worker(store)
    if how in ("finish", "cancel while running"):
        attempt = await worker.claim_one()
    match how:
        case "finish":
            assert await attempt.finish_ok() is Ending.DONE
        case "sweep":
            assert await sweep_until_something(store) == [Swept(job_id, "queue_timeout")]
        case _:
            assert await store.cancel(job_id, "") is Ending.DONE
    assert await store.redis.zscore(store.keys.queue, job_id) is None
    assert await store.redis.exists(f"{job_key_prefix}{job_id}", f"arq:result:{job_id}") == 0


# -- claiming ----------------------------------------------------------------------------------------------------------


async def test_a_claim_opens_the_first_attempt_and_gives_the_request(store: JobStore) -> None:
    job = a_submission(messages=[{"role": "user", "content": "\ud83d half, \x00 and 🙂"}], params={"temperature": 0})
    assert (await store.submit(job)).is_new
    worker = await a_worker(store)
    claim = (await worker.claim_one()).claim
    assert claim.request == job.request_bytes()
    assert parse_json(claim.request)["messages"] == job.messages
    assert claim.attempt == 1
    assert await entries_of(store, job.job_id) == [Entry(EntryId(1, 0), Kind.OPEN, worker.id.encode())]
    record = await record_of(store, job.job_id)
    assert (record.status, record.attempt, record.worker) == (Status.RUNNING, 1, worker.id)
    assert record.started_ms == claim.started_ms
    assert record.deadline_ms == claim.started_ms + 600_000
    assert await worker.jobs() == {job.job_id}


async def test_a_running_job_is_kept_as_long_as_it_may_need(store: JobStore) -> None:
    attempt = await running(store)
    keys, job_id = store.keys, attempt.job_id
    for name in (
        keys.job(job_id),
        keys.request(job_id),
        keys.stream(job_id),
        keys.worker_jobs(attempt.worker_id),
        f"{job_key_prefix}{job_id}",
    ):
        assert UNFINISHED_S - 10 < await store.redis.ttl(name) <= UNFINISHED_S, name


async def test_a_claim_renews_what_would_not_last_long_enough(store: JobStore) -> None:
    """Such as after a change of the timeouts."""
    job_id = await submitted(store, session="s")
    names = [store.keys.job(job_id), store.keys.request(job_id), f"{job_key_prefix}{job_id}", store.keys.turns("s")]
    for name in names:
        await store.redis.expire(name, 60)
    await (await a_worker(store)).claim_one()
    for name in names:
        assert UNFINISHED_S - 10 < await store.redis.ttl(name) <= UNFINISHED_S, name


async def test_who_joins_a_job_and_lets_it_wait_longer_lets_it_be_kept_longer(store: JobStore) -> None:
    once = Once(name="key:k", body_digest="d", join=Join.ALWAYS)
    job_id = await submitted(store, session="s", once=once, is_waited_for=True, patience_ms=1000)
    names = [store.keys.job(job_id), store.keys.request(job_id), f"{job_key_prefix}{job_id}", store.keys.turns("s")]
    for name in names:
        await store.redis.expire(name, 60)
    joined = await store.submit(a_submission(once=once, is_waited_for=True))
    assert (joined.job_id, joined.is_new) == (job_id, False)
    for name in names:
        assert UNFINISHED_S - 10 < await store.redis.ttl(name) <= UNFINISHED_S, name


async def test_a_client_that_leaves_is_counted_once(store: JobStore) -> None:
    """The API says it again if the answer was lost; another client still waits."""
    once = Once(name="key:k", body_digest="d", join=Join.ALWAYS)
    first, second = new_job_id(), new_job_id()
    job_id = await submitted(store, first, once=once, is_waited_for=True)
    assert not (await store.submit(a_submission(second, once=once, is_waited_for=True))).is_new
    for _ in range(2):
        assert await store.leave(job_id, first, "gone", may_come_back=False) is Left.OTHERS_WAIT
    assert await store.leave(job_id, second, "gone", may_come_back=False) is Left.CANCELLED
    assert await store.leave(job_id, second, "gone", may_come_back=False) is Left.ENDED_BEFORE


async def test_jobs_are_claimed_oldest_first(store: JobStore) -> None:
    ids = sorted((new_job_id() for _ in range(6)), reverse=True)  # not in the order of their names
    for job_id in ids:
        await submitted(store, job_id)
        await the_next_ms(store)
    worker = await a_worker(store)
    claimed = [*await worker.claim(2), *await worker.claim(10)]
    assert [attempt.job_id for attempt in claimed] == ids


async def test_a_worker_claims_no_more_than_it_has_slots(store: JobStore) -> None:
    for _ in range(3):
        await submitted(store)
    worker = await a_worker(store)
    assert [len(await worker.claim(2)) for _ in range(3)] == [2, 1, 0]


async def test_no_job_is_claimed_twice(make_store: MakeStore) -> None:
    stores = [make_store() for _ in range(4)]
    ids = [await submitted(stores[0]) for _ in range(40)]
    workers = [await a_worker(store) for store in stores]
    claims = await asyncio.gather(*(worker.claim(3) for worker in workers * 10))
    claimed = [attempt.job_id for attempts in claims for attempt in attempts]
    assert sorted(claimed) == sorted(ids)
    for worker in workers:
        assert await worker.jobs() == {a.job_id for attempts in claims for a in attempts if a.worker_id == worker.id}


async def test_ids_whose_job_is_gone_or_has_ended_are_dropped_from_the_queue(store: JobStore) -> None:
    gone, ended, queued = [await submitted(store) for _ in range(3)]
    await store.redis.delete(store.keys.job(gone))
    await store.cancel(ended, "")
    await store.redis.zadd(store.keys.queue, {ended: 1})
    worker = await a_worker(store)
    assert [attempt.job_id for attempt in await worker.claim(3)] == [queued]
    assert await store.redis.zcard(store.keys.queue) == 0
    await store.redis.zrem(store.keys.deadlines, gone)


async def test_a_job_whose_request_is_gone_is_still_claimed_so_that_it_gets_an_end(store: JobStore) -> None:
    job_id = await submitted(store)
    await store.redis.delete(store.keys.request(job_id))
    claim = (await (await a_worker(store)).claim_one()).claim
    assert (claim.job_id, claim.request) == (job_id, None)


async def test_a_worker_finds_what_it_holds_when_the_answer_to_its_claim_was_lost(store: JobStore) -> None:
    worker = await a_worker(store)
    for _ in range(5):
        await submitted(store)
    executing, speaking, finished, ended, gone = await worker.claim(5)
    await speaking.say(b"a")
    await finished.finish_ok()
    await store.cancel(ended.job_id, "")
    await store.redis.delete(store.keys.job(gone.job_id))
    held = {job.claim.job_id: job for job in await store.held_by(worker.id)}
    assert held.keys() == {executing.job_id, speaking.job_id, ended.job_id, gone.job_id}
    assert held[executing.job_id] == (executing.claim, True, True)
    assert held[speaking.job_id] == (speaking.claim, True, False), "it must not be executed again"
    assert not held[ended.job_id].is_running
    assert not held[gone.job_id].is_running
    assert await store.held_by("nobody") == []
    await store.redis.zrem(store.keys.deadlines, gone.job_id)


# -- the bell ----------------------------------------------------------------------------------------------------------


async def test_a_submission_wakes_exactly_one_of_the_workers_that_wait(make_store: MakeStore) -> None:
    stores = [make_store() for _ in range(3)]
    waiting = [asyncio.create_task(store.wait_for_bell(1)) for store in stores]
    await submitted(make_store())
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert sorted(await asyncio.gather(*waiting)) == [False, False, True]


async def test_a_bell_rung_while_nobody_waited_is_heard_later(store: JobStore) -> None:
    await submitted(store)
    assert await store.wait_for_bell(1)
    await store.ring()
    assert await store.wait_for_bell(1)


async def test_a_worker_that_leaves_jobs_behind_wakes_the_next(store: JobStore) -> None:
    for _ in range(3):
        await submitted(store)
    assert await bell_tokens(store) == 1, "one token, however many jobs"
    assert await store.wait_for_bell(1)
    worker = await a_worker(store)
    await worker.claim(2)
    assert await store.wait_for_bell(1)
    await worker.claim(2)
    assert await bell_tokens(store) == 0, "no token when there is nothing to claim"


@pytest.mark.parametrize("slots", [1, 5])
async def test_no_wake_up_is_lost(make_store: MakeStore, slots: int) -> None:
    jobs, workers = 60, 4
    claimed: list[str] = []

    async def work(store: JobStore) -> None:
        worker = await a_worker(store)
        while len(claimed) < jobs:
            claims = await worker.claim(slots)
            claimed.extend(attempt.job_id for attempt in claims)
            if len(claims) < slots and len(claimed) < jobs:
                await store.wait_for_bell(20)  # far longer than the test may take: only the bell can wake it

    async def submit(store: JobStore) -> list[str]:
        return [await submitted(store) for _ in range(jobs // 2)]

    working = [asyncio.create_task(work(make_store())) for _ in range(workers)]
    try:
        async with asyncio.timeout(10):
            ids = await asyncio.gather(submit(make_store()), submit(make_store()))
            await async_wait_until(lambda: len(claimed) == jobs, timeout=8, description="every job claimed")
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    assert sorted(claimed) == sorted(ids[0] + ids[1])


# -- appending ---------------------------------------------------------------------------------------------------------


async def test_entries_are_stored_under_the_ids_that_they_were_given(store: JobStore) -> None:
    attempt = await running(store)
    said = await attempt.say(b"a", b"b")
    said += await attempt.say(b"c", kind=Kind.REASONING)
    assert (await entries_of(store, attempt.job_id))[1:] == said
    assert [str(entry.id) for entry in said] == ["1-1", "1-2", "1-3"]


async def test_an_entry_that_was_stored_is_refused_a_second_time(store: JobStore) -> None:
    attempt = await running(store)
    (entry,) = await attempt.say(b"a")
    with pytest.raises(ResponseError, match="equal or smaller"):
        await attempt.append(entry)
    assert len(await entries_of(store, attempt.job_id)) == 2


async def test_an_entry_does_not_bring_a_stream_back_that_is_gone(store: JobStore) -> None:
    attempt = await running(store)
    await store.redis.delete(store.keys.stream(attempt.job_id))
    assert await attempt.append(Entry(EntryId(1, 1), Kind.DELTA, b"a")) is None
    assert not await store.redis.exists(store.keys.stream(attempt.job_id))


# -- ending from inside ------------------------------------------------------------------------------------------------


async def test_a_finished_job_has_one_marker_and_keeps_everything_for_the_retention(store: JobStore) -> None:
    attempt = await running(store)
    await attempt.say(b"Hello")
    usage = Usage(3, 4)
    marker = attempt.ok_marker(usage)
    fields: dict[str, str | bytes | int] = {
        "finish_reason": "stop",
        "usage": json_bytes(usage._asdict()),
        "first_token_ms": 17,
    }
    assert await attempt.finish(marker, Status.SUCCEEDED, fields) is Ending.DONE

    assert (await entries_of(store, attempt.job_id))[-1] == marker
    assert OkMarker.parse(marker.payload).usage == usage
    record = await record_of(store, attempt.job_id)
    assert (record.status, record.entries, record.finish_reason, record.usage) == (Status.SUCCEEDED, 1, "stop", usage)
    assert (record.error, record.first_token_ms) == (None, 17)
    assert record.started_ms is not None
    assert record.finished_ms is not None
    assert record.accepted_ms <= record.started_ms <= record.finished_ms
    keys = store.keys
    assert await store.redis.zscore(keys.deadlines, attempt.job_id) is None
    assert await WorkerSteps(store, attempt.worker_id).jobs() == set()
    for name in (keys.job(attempt.job_id), keys.request(attempt.job_id), keys.stream(attempt.job_id)):
        assert RETENTION_S - 10 < await store.redis.ttl(name) <= RETENTION_S, name


async def test_an_error_ends_a_job_at_any_length(store: JobStore) -> None:
    attempt = await running(store)
    await attempt.say(b"Hel")
    assert await attempt.finish_error() is Ending.DONE
    assert await kinds_of(store, attempt.job_id) == [("1-0", Kind.OPEN), ("1-1", Kind.DELTA), ("1-2", Kind.ERROR)]
    assert await status_of(store, attempt.job_id) is Status.FAILED
    assert await error_of(store, attempt.job_id) == ErrorMarker("agent_error", "The agent failed.")


async def test_an_answer_may_be_empty(store: JobStore) -> None:
    attempt = await running(store)
    assert await attempt.finish_ok() is Ending.DONE
    assert await kinds_of(store, attempt.job_id) == [("1-0", Kind.OPEN), ("1-1", Kind.OK)]


@pytest.mark.parametrize("first", ["ok", "error"])
@pytest.mark.parametrize("second", ["ok", "error"])
async def test_a_second_ending_is_refused_and_changes_nothing(store: JobStore, first: str, second: str) -> None:
    attempt = await running(store)
    assert await (attempt.finish_ok() if first == "ok" else attempt.finish_error()) is Ending.DONE
    before = await everything(store)
    assert await (attempt.finish_ok() if second == "ok" else attempt.finish_error()) is Ending.FENCED
    assert await everything(store) == before


@pytest.mark.parametrize("kind", ["ok", "error"])
@pytest.mark.parametrize("who", ["another worker", "an earlier attempt", "a later attempt"])
async def test_only_the_worker_and_the_attempt_that_run_a_job_finish_it(store: JobStore, who: str, kind: str) -> None:
    attempt = await running(store)
    if who == "an earlier attempt":
        await WorkerSteps(store, attempt.worker_id).lapse()
        assert await store.sweep() == [Swept(attempt.job_id, "retried")]
        await (await a_worker(store, attempt.worker_id)).claim_one()  # even on the same worker
        other = attempt
    elif who == "a later attempt":
        other = Attempt(store, attempt.worker_id, attempt.claim._replace(attempt=2))
    else:
        other = Attempt(store, "somebody", attempt.claim)
    before = await everything(store)
    assert await (other.finish_ok() if kind == "ok" else other.finish_error()) is Ending.FENCED
    assert await everything(store) == before


async def test_a_job_that_is_gone_cannot_be_finished(store: JobStore) -> None:
    claim = Claim(new_job_id(), 1, 0, None)
    assert await Attempt(store, "w", claim).finish_ok() is Ending.GONE
    assert await everything(store) == {}


@pytest.mark.parametrize("damage", ["too short", "a hole", "trimmed", "one too many", "gone"])
async def test_an_ok_is_refused_if_the_stream_does_not_hold_the_whole_answer(store: JobStore, damage: str) -> None:
    attempt = await running(store)
    await attempt.say(b"a", b"b", b"c")
    stream = store.keys.stream(attempt.job_id)
    match damage:
        case "too short":
            attempt.tally.add(Kind.DELTA, b"never sent")
        case "a hole":
            assert await store.redis.xdel(stream, "1-2") == 1
        case "trimmed":
            await store.redis.xtrim(stream, maxlen=2, approximate=False)
        case "one too many":
            await attempt.append(Entry(EntryId(1, 4), Kind.DELTA, b"d"))
        case "gone":
            await store.redis.delete(stream)
    before = await everything(store)
    assert await attempt.finish_ok() is Ending.INCOMPLETE
    assert await everything(store) == before

    error = ErrorMarker(ErrorCode.STREAM_INCOMPLETE, "lost")
    assert await store.end(attempt.job_id, Status.FAILED, error) is Ending.DONE
    assert await status_of(store, attempt.job_id) is Status.FAILED


async def test_a_worker_gives_up_only_its_own_attempt(store: JobStore) -> None:
    """It may have been taken for lost since it found out that it cannot go on."""
    attempt = await running(store)
    error = ErrorMarker(ErrorCode.STREAM_INCOMPLETE, "lost")
    before = await everything(store)
    assert await store.give_up(attempt.claim, "another-worker", error) is Ending.FENCED
    assert await everything(store) == before

    await WorkerSteps(store, attempt.worker_id).lapse()
    await store.sweep()
    for claims_again in (False, True):
        if claims_again:  # the same worker, with the next attempt
            next_attempt = await (await a_worker(store, attempt.worker_id)).claim_one()
        before = await everything(store)
        assert await store.give_up(attempt.claim, attempt.worker_id, error) is Ending.FENCED
        assert await everything(store) == before
    assert await store.give_up(next_attempt.claim, attempt.worker_id, error) is Ending.DONE
    assert await store.give_up(next_attempt.claim, attempt.worker_id, error) is Ending.TERMINAL
    assert await status_of(store, attempt.job_id) is Status.FAILED


async def test_an_error_leaves_no_hole_before_it(store: JobStore) -> None:
    """Memory may come free between a refused entry and the marker behind it, in one pipeline."""
    attempt = await running(store)
    await attempt.say(b"a")
    attempt.tally.add(Kind.DELTA, b"refused")
    before = await everything(store)
    assert await attempt.finish_error() is Ending.INCOMPLETE
    assert await everything(store) == before


async def test_an_ok_of_a_second_attempt_counts_only_its_own_entries(store: JobStore) -> None:
    first = await running(store)
    await WorkerSteps(store, first.worker_id).lapse()
    await store.sweep()
    second = await (await a_worker(store)).claim_one()
    await second.say(b"a")
    assert await second.finish_ok() is Ending.DONE
    assert await kinds_of(store, first.job_id) == [
        ("1-0", Kind.OPEN),
        ("2-0", Kind.OPEN),
        ("2-1", Kind.DELTA),
        ("2-2", Kind.OK),
    ]


async def test_the_end_is_published_as_it_is_stored(store: JobStore) -> None:
    attempt = await running(store)
    async with store.redis.pubsub() as pubsub:
        await pubsub.subscribe(store.keys.stream_channel(attempt.job_id))
        assert (await pubsub.get_message(timeout=5))["type"] == "subscribe"
        await attempt.finish_ok()
        message = await pubsub.get_message(timeout=5)
    assert message["data"].startswith(b"1-1 ok {")


# -- ending from outside -----------------------------------------------------------------------------------------------


async def test_cancelling_a_queued_job_ends_it_before_anybody_claims_it(store: JobStore) -> None:
    job_id = await submitted(store)
    assert await store.cancel(job_id, "The client went away.") is Ending.DONE
    assert await kinds_of(store, job_id) == [("1-0", Kind.ERROR)]
    assert await status_of(store, job_id) is Status.CANCELLED
    assert await error_of(store, job_id) == ErrorMarker("cancelled", "The client went away.")
    assert await (await a_worker(store)).claim(1) == []
    assert RETENTION_S - 10 < await store.redis.ttl(store.keys.stream(job_id)) <= RETENTION_S


async def test_cancelling_a_running_job_fences_its_attempt_and_tells_its_worker(store: JobStore) -> None:
    attempt = await running(store)
    await attempt.say(b"a")
    async with store.redis.pubsub() as orders:
        await orders.subscribe(store.keys.worker_channel(attempt.worker_id))
        assert (await orders.get_message(timeout=5))["type"] == "subscribe"
        assert await store.cancel(attempt.job_id, "") is Ending.DONE
        order = await orders.get_message(timeout=5)
    assert order["data"] == f"stop {attempt.job_id}".encode()
    assert (await kinds_of(store, attempt.job_id))[-1] == ("2-0", Kind.ERROR)

    before = await everything(store)
    with pytest.raises(ResponseError, match="equal or smaller"):
        await attempt.append(Entry(EntryId(1, 2), Kind.DELTA, b"b"))
    assert await attempt.finish_ok() is Ending.FENCED
    assert await attempt.finish_error() is Ending.FENCED
    assert await everything(store) == before
    assert await status_of(store, attempt.job_id) is Status.CANCELLED, "what was cancelled never succeeds"


async def test_cancelling_a_retried_job_that_waits_ends_it_behind_all_openings(store: JobStore) -> None:
    attempt = await running(store)
    await WorkerSteps(store, attempt.worker_id).lapse()
    await store.sweep()
    assert await store.cancel(attempt.job_id, "") is Ending.DONE
    assert await kinds_of(store, attempt.job_id) == [("1-0", Kind.OPEN), ("2-0", Kind.OPEN), ("3-0", Kind.ERROR)]


@pytest.mark.parametrize("how", ["ok", "error", "cancelled"])
async def test_a_job_that_has_ended_stays_as_it_ended(store: JobStore, how: str) -> None:
    attempt = await running(store)
    match how:
        case "ok":
            await attempt.finish_ok()
        case "error":
            await attempt.finish_error()
        case _:
            await store.cancel(attempt.job_id, "first")
    before = await everything(store)
    assert await store.cancel(attempt.job_id, "second") is Ending.TERMINAL
    assert await store.end(attempt.job_id, Status.FAILED, ErrorMarker("timeout", "")) is Ending.TERMINAL
    assert await everything(store) == before


async def test_a_job_that_is_gone_cannot_be_ended(store: JobStore) -> None:
    assert await store.cancel(new_job_id(), "") is Ending.GONE
    assert await everything(store) == {}


# -- release -----------------------------------------------------------------------------------------------------------


async def test_a_job_ended_from_outside_is_its_workers_until_it_is_released(store: JobStore) -> None:
    attempt = await running(store)
    worker = WorkerSteps(store, attempt.worker_id)
    await store.cancel(attempt.job_id, "")
    assert await worker.jobs() == {attempt.job_id}
    for _ in range(2):
        await attempt.release()
        assert await worker.jobs() == set()


async def test_a_zombies_release_leaves_the_next_attempt_to_its_worker(store: JobStore) -> None:
    zombie = await running(store, session="api:s")
    await submitted(store, session="api:s")
    await WorkerSteps(store, zombie.worker_id).lapse()
    await store.sweep()
    worker = await a_worker(store)
    await worker.claim_one()
    before = await everything(store)
    await zombie.release()
    assert await everything(store) == before
    assert await worker.jobs() == {zombie.job_id}


async def test_a_zombies_release_leaves_the_next_attempt_to_the_same_worker(store: JobStore) -> None:
    """Its lease lapsed, it came back, and it claimed the next attempt of the job that it still runs."""
    zombie = await running(store)
    await WorkerSteps(store, zombie.worker_id).lapse()
    await store.sweep()
    worker = await a_worker(store, zombie.worker_id)
    second = await worker.claim_one()
    assert second.claim.attempt == 2
    await zombie.release()
    assert await worker.jobs() == {zombie.job_id}, "if it is lost again, the job has to be found"


async def test_a_job_that_its_worker_lets_go_without_a_marker_gets_one(store: JobStore) -> None:
    """Otherwise nobody would recover it, and its session would run two turns at once."""
    attempt = await running(store, session="api:s")
    following = await submitted(store, session="api:s")
    await attempt.release()
    assert (await error_of(store, attempt.job_id)).code == "worker_lost"
    assert await status_of(store, attempt.job_id) is Status.FAILED
    assert [claimed.job_id for claimed in await (await a_worker(store)).claim(10)] == [following]


# -- sessions ----------------------------------------------------------------------------------------------------------


async def test_turns_of_a_session_run_one_at_a_time_in_order(store: JobStore) -> None:
    turns = [await submitted(store, session="api:s") for _ in range(4)]
    worker = await a_worker(store)
    for job_id in turns:
        attempt = await worker.claim_one()
        assert attempt.job_id == job_id
        assert await worker.claim(10) == [], "the next turn waits"
        assert await attempt.finish_ok() is Ending.DONE
    assert not await store.redis.exists(store.keys.turns("api:s"))


async def test_the_next_turn_wakes_a_worker(store: JobStore) -> None:
    attempt = await running(store, session="api:s")
    await submitted(store, session="api:s")
    assert await bell_tokens(store) == 0
    await attempt.finish_error()
    assert await store.wait_for_bell(1)


async def test_sessions_do_not_wait_for_each_other(store: JobStore) -> None:
    for session in ("api:a", "api:a", "api:b", "api:b", ""):
        await submitted(store, session=session)
    claimed = await (await a_worker(store)).claim(10)
    sessions = [(await record_of(store, attempt.job_id)).session for attempt in claimed]
    assert sorted(sessions) == ["", "api:a", "api:b"]


async def test_a_cancelled_waiting_turn_is_skipped(store: JobStore) -> None:
    first, second, third = [await submitted(store, session="api:s") for _ in range(3)]
    worker = await a_worker(store)
    attempt = await worker.claim_one()
    assert await store.cancel(second, "") is Ending.DONE
    assert await worker.claim(10) == []
    await attempt.finish_ok()
    assert attempt.job_id == first
    assert (await worker.claim_one()).job_id == third


async def test_a_cancelled_turn_that_nobody_runs_yet_lets_the_next_one_go(store: JobStore) -> None:
    first, second = [await submitted(store, session="api:s") for _ in range(2)]
    await store.cancel(first, "")
    assert (await (await a_worker(store)).claim_one()).job_id == second


async def test_a_running_turn_ended_from_outside_keeps_its_session_until_it_is_released(store: JobStore) -> None:
    attempt = await running(store, session="api:s")
    second = await submitted(store, session="api:s")
    worker = await a_worker(store)
    await store.cancel(attempt.job_id, "")
    assert await worker.claim(10) == [], "the agent may still be running"
    await attempt.release()
    assert (await worker.claim_one()).job_id == second


async def test_a_turn_ended_from_outside_frees_its_session_when_its_worker_is_lost(store: JobStore) -> None:
    attempt = await running(store, session="api:s")
    second = await submitted(store, session="api:s")
    await store.cancel(attempt.job_id, "")
    await WorkerSteps(store, attempt.worker_id).lapse()
    assert await store.sweep() == []
    assert (await (await a_worker(store)).claim_one()).job_id == second


async def test_a_session_outlives_the_record_of_a_turn_that_was_never_released(store: JobStore) -> None:
    """An agent ignored its cancellation for longer than the retention."""
    attempt = await running(store, session="api:s")
    await store.cancel(attempt.job_id, "")
    await store.redis.delete(*(key(attempt.job_id) for key in (store.keys.job, store.keys.request, store.keys.stream)))
    await attempt.release()
    second = await submitted(store, session="api:s")
    assert [claimed.job_id for claimed in await (await a_worker(store)).claim(10)] == [second]


# -- the state of a session --------------------------------------------------------------------------------------------


async def state_given(store: JobStore, *, session: str = "api:s") -> bytes | None:
    """What the next turn of the session begins with."""
    return await store.session_state(session)


async def test_a_turn_is_given_what_the_last_whole_one_left(make_store: MakeStore) -> None:
    store = make_store(session_ttl_s=60)
    first = await running(store, session="api:s")
    assert await state_given(store) is None, "a new session"
    assert await first.finish_ok(b"\x00 one \xff") is Ending.DONE
    second = await running(store, session="api:s")
    assert await state_given(store) == b"\x00 one \xff"
    await second.finish_ok(b"two")
    assert await state_given(store) == b"two"
    assert await state_given(store, session="api:other") is None


async def test_a_claim_brings_the_state_along_unless_it_is_large(make_store: MakeStore) -> None:
    store = make_store(session_ttl_s=60)
    brought = []
    for left in (b"\x00 one \xff", b"x" * 65_535, b"y" * 65_536, b"two"):
        attempt = await running(store, session="api:s")
        brought.append(attempt.claim.session_state)
        await attempt.finish_ok(left)
    assert brought == [b"", b"\x00 one \xff", b"x" * 65_535, None]
    assert (await running(store)).claim.session_state is None, "it has no session"


async def test_a_turn_that_leaves_no_state_changes_none(make_store: MakeStore) -> None:
    store = make_store(session_ttl_s=60)
    await (await running(store, session="api:s")).finish_ok(b"one")
    for nothing in (None, b""):
        await (await running(store, session="api:s")).finish_ok(nothing)
        assert await state_given(store) == b"one"


async def test_a_turn_that_failed_leaves_no_state(make_store: MakeStore) -> None:
    store = make_store(session_ttl_s=60)
    await (await running(store, session="api:s")).finish_ok(b"one")
    failed = await running(store, session="api:s")
    assert await failed.finish(failed.error_marker(), Status.FAILED, session_state=b"half") is Ending.DONE
    assert await state_given(store) == b"one"


async def test_an_answer_that_is_not_whole_leaves_no_state(store: JobStore) -> None:
    attempt = await running(store, session="api:s")
    attempt.tally.add(Kind.DELTA, b"never stored")
    assert await attempt.finish_ok(b"half") is Ending.INCOMPLETE
    assert not await store.redis.exists(store.keys.session("api:s"))
    await attempt.finish_error()


async def test_a_turn_ended_from_outside_leaves_no_state(store: JobStore) -> None:
    attempt = await running(store, session="api:s")
    await store.cancel(attempt.job_id, "")
    assert await attempt.finish_ok(b"late") is Ending.FENCED
    assert not await store.redis.exists(store.keys.session("api:s"))


async def test_a_zombie_leaves_no_state(make_store: MakeStore) -> None:
    store = make_store(session_ttl_s=60)
    await (await running(store, session="api:s")).finish_ok(b"one")
    zombie = await running(store, session="api:s")
    await WorkerSteps(store, zombie.worker_id).lapse()
    await store.sweep()
    second = await (await a_worker(store)).claim_one()
    assert await state_given(store) == b"one", "the next attempt begins where the last whole turn ended"
    assert await zombie.finish_ok(b"the zombie's") is Ending.FENCED
    await second.finish_ok(b"two")
    assert await zombie.finish_ok(b"the zombie's") is Ending.FENCED
    assert await state_given(store) == b"two"


async def test_a_job_without_a_session_has_no_state(store: JobStore) -> None:
    attempt = await running(store)
    assert await attempt.finish_ok(b"for nobody") is Ending.DONE
    assert [key async for key in store.redis.scan_iter(store.keys.session("*"))] == []


async def test_each_turn_that_leaves_state_renews_its_time_to_live(make_store: MakeStore) -> None:
    key = make_store().keys.session("api:s")
    for ttl_s in (60, 7200):
        store = make_store(session_ttl_s=ttl_s)
        await (await running(store, session="api:s")).finish_ok(b"state")
        assert ttl_s - 5 < await store.redis.ttl(key) <= ttl_s


async def test_a_session_is_remembered_for_ever_unless_a_setting_says_otherwise(make_store: MakeStore) -> None:
    passing, lasting = make_store(session_ttl_s=60), make_store()
    for store in (passing, lasting):
        await (await running(store, session="api:s")).finish_ok(b"state")
    assert await lasting.redis.ttl(lasting.keys.session("api:s")) == -1
    await lasting.redis.delete(lasting.keys.session("api:s"))


# -- deadlines ---------------------------------------------------------------------------------------------------------


async def test_a_job_that_waits_too_long_ends(make_store: MakeStore) -> None:
    store = make_store(queue_timeout_s=0.05)
    job_id = await submitted(store)
    await a_worker(store)
    assert await sweep_until_something(store) == [Swept(job_id, "queue_timeout")]
    assert (await error_of(store, job_id)).code == "queue_timeout"


async def test_without_any_worker_a_waiting_job_says_so(make_store: MakeStore) -> None:
    store = make_store(queue_timeout_s=0.01)
    job_id = await submitted(store)
    assert await sweep_until_something(store) == [Swept(job_id, "no_worker")]
    assert (await error_of(store, job_id)).code == "no_worker"
    assert await kinds_of(store, job_id) == [("1-0", Kind.ERROR)]


async def test_a_turn_that_waits_too_long_for_its_session_ends_and_is_skipped(make_store: MakeStore) -> None:
    patient = make_store()
    first = await running(patient, session="api:s")
    second = await submitted(make_store(queue_timeout_s=0.01), session="api:s")
    third = await submitted(patient, session="api:s")
    assert await sweep_until_something(patient) == [Swept(second, "queue_timeout")]
    await first.finish_ok()
    assert (await (await a_worker(patient)).claim_one()).job_id == third


async def test_a_job_that_runs_too_long_ends_even_if_its_worker_lives(make_store: MakeStore) -> None:
    store = make_store(run_timeout_s=0.01)
    attempt = await running(store)
    assert await sweep_until_something(store) == [Swept(attempt.job_id, "timeout")]
    assert (await error_of(store, attempt.job_id)).code == "timeout"
    assert await kinds_of(store, attempt.job_id) == [("1-0", Kind.OPEN), ("2-0", Kind.ERROR)]
    assert await attempt.finish_ok() is Ending.FENCED
    assert await WorkerSteps(store, attempt.worker_id).jobs() == {attempt.job_id}, "its worker has to release it"


async def test_a_sweep_moves_nothing_on_that_has_time_left(store: JobStore) -> None:
    await running(store, session="api:s")
    await submitted(store, session="api:s")
    await submitted(store)
    before = await everything(store)
    assert await store.sweep() == []
    assert await everything(store) == before


# -- lost workers ------------------------------------------------------------------------------------------------------


async def test_a_beat_keeps_a_lease_and_tells_when_there_was_none(store: JobStore) -> None:
    worker = WorkerSteps(store)
    assert await worker.beat() == 0, "new"
    assert await worker.beat() == 1
    assert await store.live_workers() == 1
    await worker.lapse()
    assert await store.live_workers() == 0
    assert await worker.beat() == 1, "late, but nobody had noticed"
    await worker.lapse()
    await store.sweep()
    assert await worker.beat() == 0, "it was taken for lost"


async def test_a_lease_that_is_not_renewed_lapses(make_store: MakeStore) -> None:
    store = make_store(lease_s=0.51)
    attempt = await running(store)
    assert await store.sweep() == []
    assert await sweep_until_something(store) == [Swept(attempt.job_id, "retried")]
    assert await store.live_workers() == 0


async def test_a_lost_workers_job_runs_again_if_nothing_was_shown(store: JobStore) -> None:
    zombie = await running(store)
    await WorkerSteps(store, zombie.worker_id).lapse()
    assert await store.sweep() == [Swept(zombie.job_id, "retried")]

    assert await kinds_of(store, zombie.job_id) == [("1-0", Kind.OPEN), ("2-0", Kind.OPEN)], "opened before it is run"
    record = await record_of(store, zombie.job_id)
    assert (record.status, record.attempt, record.worker) == (Status.QUEUED, 2, "")
    assert await store.wait_for_bell(1)

    before = await everything(store)
    with pytest.raises(ResponseError, match="equal or smaller"):
        await zombie.append(Entry(EntryId(1, 1), Kind.DELTA, b"late"))
    assert await zombie.finish_ok() is Ending.FENCED
    assert await zombie.finish_error() is Ending.FENCED
    await zombie.release()
    assert await everything(store) == before

    second = await (await a_worker(store)).claim_one()
    assert second.claim.attempt == 2
    assert second.claim.request == zombie.claim.request
    assert await kinds_of(store, zombie.job_id) == [("1-0", Kind.OPEN), ("2-0", Kind.OPEN)], "opened once"
    with pytest.raises(ResponseError, match="equal or smaller"):
        await zombie.append(Entry(EntryId(1, 1), Kind.DELTA, b"later"))
    await second.say(b"Hello")
    assert await second.finish_ok() is Ending.DONE


@pytest.mark.parametrize("kind", [Kind.DELTA, Kind.REASONING, Kind.TOOL, Kind.TOOL_CALL])
async def test_a_lost_workers_job_ends_if_anything_was_shown_or_done(store: JobStore, kind: Kind) -> None:
    zombie = await running(store)
    await zombie.say(b"{}", kind=kind)
    await WorkerSteps(store, zombie.worker_id).lapse()
    assert await store.sweep() == [Swept(zombie.job_id, "worker_lost")]
    assert (await kinds_of(store, zombie.job_id))[-1] == ("2-0", Kind.ERROR)
    assert (await error_of(store, zombie.job_id)).code == "worker_lost"
    with pytest.raises(ResponseError, match="equal or smaller"):
        await zombie.append(Entry(EntryId(1, 2), Kind.DELTA, b"late"))
    assert await zombie.finish_ok() is Ending.FENCED


@pytest.mark.parametrize("max_attempts", [1, 3])
async def test_a_job_is_tried_only_so_often(make_store: MakeStore, max_attempts: int) -> None:
    store = make_store(max_attempts=max_attempts)
    job_id = await submitted(store)
    outcomes = []
    for _ in range(max_attempts):
        worker = await a_worker(store)
        await worker.claim_one()
        await worker.lapse()
        outcomes += await store.sweep()
    assert outcomes == [Swept(job_id, "retried")] * (max_attempts - 1) + [Swept(job_id, "worker_lost")]
    openings = [(f"{attempt}-0", Kind.OPEN) for attempt in range(1, max_attempts + 1)]
    assert await kinds_of(store, job_id) == [*openings, (f"{max_attempts + 1}-0", Kind.ERROR)]


@pytest.mark.parametrize("shown", [False, True])
async def test_a_lost_workers_session_goes_on(store: JobStore, shown: bool) -> None:
    zombie = await running(store, session="api:s")
    second = await submitted(store, session="api:s")
    if shown:
        await zombie.say(b"a")
    await WorkerSteps(store, zombie.worker_id).lapse()
    await store.sweep()
    worker = await a_worker(store)
    attempt = await worker.claim_one()
    if not shown:
        assert attempt.job_id == zombie.job_id, "the turn comes again before the next one"
        assert await worker.claim(10) == []
        await attempt.finish_ok()
        attempt = await worker.claim_one()
    assert attempt.job_id == second


async def test_only_the_lost_workers_jobs_are_recovered(store: JobStore) -> None:
    lost, alive = await running(store), await running(store)
    await WorkerSteps(store, lost.worker_id).lapse()
    assert await store.sweep() == [Swept(lost.job_id, "retried")]
    assert await status_of(store, alive.job_id) is Status.RUNNING
    assert await alive.finish_ok() is Ending.DONE


async def test_a_worker_that_comes_back_may_claim_what_it_lost(store: JobStore) -> None:
    zombie = await running(store)
    worker = WorkerSteps(store, zombie.worker_id)
    await worker.lapse()
    await store.sweep()
    assert await worker.beat() == 0
    second = await worker.claim_one()
    assert (second.job_id, second.claim.attempt) == (zombie.job_id, 2)
    assert await zombie.finish_ok() is Ending.FENCED
    assert await second.finish_ok() is Ending.DONE


async def test_a_worker_whose_lease_was_taken_away_learns_of_it_or_claims_nothing(store: JobStore) -> None:
    """A host that was frozen claims before its first heartbeat. That heartbeat tells it that its jobs are not its own,
    so it must not hold one that nobody else will recover."""
    worker = await a_worker(store)
    await worker.lapse()
    await store.sweep()
    await submitted(store)
    claimed = await worker.claim(1)
    assert await worker.beat() == 1 or not claimed


async def test_a_large_loss_is_recovered_sweep_by_sweep(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.store, "SWEEP_LIMIT", 3)
    worker = await a_worker(store)
    ids = [await submitted(store) for _ in range(7)]
    await worker.claim(7)
    await worker.lapse()
    swept = []
    while found := await store.sweep():
        swept += found
    assert sorted(job_id for job_id, _ in swept) == sorted(ids)
    assert await store.redis.zcard(store.keys.workers) == 0


async def test_a_worker_that_lost_a_part_of_its_jobs_is_told(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep recovers a limited number of jobs: the worker may beat again before it has lost the rest."""
    monkeypatch.setattr(shared.store, "SWEEP_LIMIT", 1)
    worker = await a_worker(store)
    for _ in range(2):
        await submitted(store)
    await worker.claim(2)
    await worker.lapse()
    swept = await store.sweep()
    assert await worker.beat() == 0 or not swept


async def test_a_lost_worker_is_forgotten(store: JobStore) -> None:
    attempt = await running(store)
    await WorkerSteps(store, attempt.worker_id).lapse()
    await store.sweep()
    keys = store.keys
    assert not await store.redis.exists(keys.worker(attempt.worker_id), keys.worker_jobs(attempt.worker_id))
    assert await store.redis.zcard(keys.workers) == 0


async def test_a_worker_that_retires_is_off_the_list_at_once(store: JobStore) -> None:
    worker = await a_worker(store)
    assert await store.redis.ttl(store.keys.worker(worker.id)) > 0
    await store.retire(worker.id)
    assert await store.live_workers() == 0
    assert await everything(store) == {}


async def test_a_worker_that_retires_frees_what_it_held_and_had_ended(store: JobStore) -> None:
    attempt = await running(store, session="api:s")
    second = await submitted(store, session="api:s")
    await store.cancel(attempt.job_id, "")
    await store.retire(attempt.worker_id)
    assert await store.live_workers() == 0
    assert (await (await a_worker(store)).claim_one()).job_id == second


async def test_a_worker_that_retires_with_an_unfinished_job_is_still_lost_in_time(store: JobStore) -> None:
    attempt = await running(store)
    await store.retire(attempt.worker_id)
    await WorkerSteps(store, attempt.worker_id).lapse()
    assert await store.sweep() == [Swept(attempt.job_id, "retried")]


# -- reading -----------------------------------------------------------------------------------------------------------


async def test_a_cursor_gets_what_follows_it_and_what_to_expect(store: JobStore) -> None:
    job_id = new_job_id()
    nothing = await store.read_after(job_id, BEGINNING, 10)
    assert (nothing.entries, nothing.exists, nothing.status) == ([], False, None)
    await submitted(store, job_id)
    queued = await store.read_after(job_id, BEGINNING, 10)
    assert (queued.entries, queued.exists, queued.status) == ([], False, Status.QUEUED)
    attempt = await (await a_worker(store)).claim_one()
    said = await attempt.say(b"a", b"b", b"c")
    read = await store.read_after(job_id, said[0].id, 10)
    assert (read.entries, read.exists, read.status) == (said[1:], True, Status.RUNNING)
    assert (await store.read_after(job_id, BEGINNING, 2)).entries[1:] == said[:1]


async def test_of_many_silent_readers_only_those_with_something_to_read_have_to_look(store: JobStore) -> None:
    gone, queued = new_job_id(), await submitted(store)
    assert await store.stale([]) == set()
    assert await store.stale([(gone, BEGINNING), (queued, BEGINNING)]) == {gone}
    attempt = await (await a_worker(store)).claim_one()
    assert await store.stale([(queued, BEGINNING)]) == {queued}
    assert await store.stale([(queued, EntryId(1, 0))]) == set()
    (said,) = await attempt.say(b"a", publish=False)
    assert await store.stale([(queued, EntryId(1, 0)), (gone, BEGINNING)]) == {queued, gone}
    assert await store.stale([(queued, said.id)]) == set()
    await store.redis.delete(store.keys.stream(queued))
    assert await store.stale([(queued, said.id)]) == {queued}, "it will never go on"


async def test_a_reader_of_a_job_that_has_ended_has_to_look(store: JobStore) -> None:
    attempt = await running(store)
    await attempt.finish_ok()
    marker = (await entries_of(store, attempt.job_id))[-1]
    assert await store.stale([(attempt.job_id, marker.id)]) == {attempt.job_id}


async def test_a_retried_job_that_waits_is_no_reason_to_look(store: JobStore) -> None:
    attempt = await running(store)
    await WorkerSteps(store, attempt.worker_id).lapse()
    assert await store.sweep() == [Swept(attempt.job_id, "retried")]
    assert await store.stale([(attempt.job_id, EntryId(2, 0))]) == set()


async def test_two_deployments_share_a_server(backend: Backend, make_store: MakeStore, prefix: str) -> None:
    ours, theirs = make_store(), make_store(max_unfinished=1)
    theirs.keys = type(theirs.keys)(f"{prefix}-other")
    await submitted(ours)
    await submitted(theirs)
    assert len(await (await a_worker(ours)).claim(10)) == 1
    assert await theirs.redis.zcard(theirs.keys.queue) == 1
    for key in await theirs.redis.keys(f"{prefix}-other:*"):
        await theirs.redis.delete(key)
