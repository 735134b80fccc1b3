"""A job that has ended is packed: its readers get the same entries, and nothing else about it changes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ResponseError

import api.tail
import worker.compactor
from api.tail import Switchboard
from shared.connection import FAILURES
from shared.entries import BEGINNING, Entry, EntryId, Kind
from shared.jobs import Status
from shared.packs import PACK, PACK_BYTES, PACK_ENTRIES, Row
from shared.store import Ending, JobStore
from tests.conftest import Backend
from tests.jobs import Attempt, WorkerSteps, a_worker, entries_of, everything, running, status_of
from tests.waiting import async_wait_until
from worker.compactor import Compactor


async def an_answer(store: JobStore, tokens: int = 1000) -> Attempt:
    """A job that has ended well, one token an entry."""
    attempt = await running(store)
    await attempt.say(*(b" %5d" % number for number in range(tokens)), publish=False)
    assert await attempt.finish_ok() is Ending.DONE
    return attempt


async def compact(attempt: Attempt) -> bool:
    return await Compactor(attempt.store, attempt.worker_id).compact(attempt.claim)


async def length(attempt: Attempt) -> int:
    """In rows."""
    return int(await attempt.store.redis.xlen(attempt.store.keys.stream(attempt.job_id)))


async def test_a_packed_answer_has_the_same_entries_in_few_rows(store: JobStore) -> None:
    attempt = await an_answer(store)
    before, entries = await everything(store), await entries_of(store, attempt.job_id)
    assert await compact(attempt)
    assert await length(attempt) == 6  # the opening, 4 packs of up to 256 entries, the marker
    assert await entries_of(store, attempt.job_id) == entries
    after = await everything(store)
    stream = store.keys.stream(attempt.job_id)
    assert {**after, stream: None} == {**before, stream: None}
    names = [list(fields) for _, fields in after[stream]]
    assert names == [[b"open"], *[[PACK.encode()]] * 4, [b"ok"]]


@pytest.mark.parametrize("how", ["ok", "error", "cancelled", "timeout", "second attempt"])
async def test_every_job_whose_attempt_has_ended_can_be_packed(store: JobStore, how: str) -> None:
    attempt = await running(store)
    if how == "second attempt":
        await WorkerSteps(store, attempt.worker_id).lapse()
        await store.sweep()
        attempt = await (await a_worker(store)).claim_one()
    await attempt.say(*[b"x"] * 50)
    match how:
        case "error":
            await attempt.finish_error()
        case "cancelled":
            await store.cancel(attempt.job_id, "")
        case "timeout":
            await store.redis.zadd(store.keys.deadlines, {attempt.job_id: 1})
            await store.sweep()
        case _:
            await attempt.finish_ok()
    await attempt.release()
    entries = await entries_of(store, attempt.job_id)
    assert await compact(attempt)
    assert await length(attempt) == (4 if how == "second attempt" else 3)
    assert await entries_of(store, attempt.job_id) == entries


async def test_a_packed_stream_lives_no_longer_and_no_shorter(store: JobStore) -> None:
    attempt = await an_answer(store)
    stream = store.keys.stream(attempt.job_id)
    await store.redis.pexpire(stream, 1_000_000)
    assert await compact(attempt)
    assert 900_000 < await store.redis.pttl(stream) <= 1_000_000
    assert not await store.redis.exists(store.keys.packing(attempt.job_id))


async def test_any_cursor_in_the_middle_of_a_pack_gets_what_follows_it(store: JobStore) -> None:
    attempt = await an_answer(store, 300)
    entries = await entries_of(store, attempt.job_id)
    assert await compact(attempt)
    for seen in (0, 1, 57, 256, 257, 258, 300, 301):
        read = await store.read_after(attempt.job_id, entries[seen].id, 10_000)
        assert read.entries == entries[seen + 1 :]
        assert not read.more


@pytest.mark.parametrize("count", [1, 2, 100])
async def test_a_page_of_packs_is_bounded_and_says_that_more_follows(store: JobStore, count: int) -> None:
    attempt = await an_answer(store, 3000)
    entries = await entries_of(store, attempt.job_id)
    assert await compact(attempt)
    got: list[Entry] = []
    more = True
    while more:
        read = await store.read_after(attempt.job_id, got[-1].id if got else BEGINNING, count)
        assert len(read.entries) < count + PACK_ENTRIES
        got += read.entries
        more = read.more
    assert got == entries


async def test_a_reader_in_the_middle_of_the_stream_loses_and_doubles_nothing(
    store: JobStore, monkeypatch: Any
) -> None:
    monkeypatch.setattr(api.tail, "PAGE_ENTRIES", 7)
    attempt = await an_answer(store, 600)
    entries = await entries_of(store, attempt.job_id)
    async with Switchboard(store) as switchboard, switchboard.follow(attempt.job_id) as tail:
        got = await tail.next(5) + await tail.next(5)
        assert len(got) == 14
        assert await compact(attempt)
        async with asyncio.timeout(10):
            while not got[-1].is_marker:
                got += await tail.next(5)
    assert got == entries


async def test_a_large_answer_is_brought_in_parts_and_swapped_at_once(store: JobStore, monkeypatch: Any) -> None:
    monkeypatch.setattr(worker.compactor, "BATCH_BYTES", 4096)
    attempt = await running(store)
    for number in range(40):
        await attempt.say(*[b"%2d" % number * 40] * 20, publish=False)
        await attempt.say(b'{"index":0}', kind=Kind.TOOL_CALL, publish=False)
    await attempt.say(b"y" * (PACK_BYTES + 1), publish=False)
    await attempt.finish_ok()
    entries = await entries_of(store, attempt.job_id)
    assert await compact(attempt)
    assert await length(attempt) < 10
    assert await entries_of(store, attempt.job_id) == entries
    assert not await store.redis.exists(store.keys.packing(attempt.job_id))


async def test_rows_that_are_not_followed_by_the_rest_change_nothing_and_expire(store: JobStore) -> None:
    attempt = await an_answer(store, 10)
    entries, packing = await entries_of(store, attempt.job_id), store.keys.packing(attempt.job_id)
    row = Row(EntryId(1, 0), "open", b"")
    assert await store.compact(attempt.claim, attempt.worker_id, [row], before=0, replaces=None)
    assert await entries_of(store, attempt.job_id) == entries
    assert 0 < await store.redis.ttl(packing) <= 60
    assert not await compact(attempt), "what is there is not its own"
    assert await entries_of(store, attempt.job_id) == entries
    await store.redis.delete(packing)
    assert await compact(attempt)
    assert await entries_of(store, attempt.job_id) == entries


@pytest.mark.parametrize("why", ["runs", "queued again", "another worker", "another attempt", "longer", "other end"])
async def test_a_stream_that_is_not_what_was_packed_stays_as_it_is(store: JobStore, why: str) -> None:
    attempt = await running(store)
    await attempt.say(b"a", b"b")
    claim, worker_id, replaces = attempt.claim, attempt.worker_id, (4, EntryId(1, 3))
    if why == "queued again":
        await store.redis.hset(store.keys.job(attempt.job_id), "status", "queued")  # type: ignore[misc]  # redis-py types both
    elif why != "runs":
        await attempt.finish_ok()
    match why:
        case "another worker":
            worker_id = "somebody"
        case "another attempt":
            claim = claim._replace(attempt=2)
        case "longer":
            replaces = (3, EntryId(1, 3))
        case "other end":
            replaces = (4, EntryId(2, 0))
    before = await everything(store)
    rows = [Row(EntryId(1, 0), "open", b"")]
    assert not await store.compact(claim, worker_id, rows, before=0, replaces=replaces)
    if why in ("runs", "queued again"):
        assert not await compact(attempt)
    assert await everything(store) == before
    if why in ("runs", "queued again"):
        await store.redis.hset(store.keys.job(attempt.job_id), "status", "running")  # type: ignore[misc]  # as above
        await attempt.finish_ok()


async def test_a_stream_that_has_expired_does_not_come_back(store: JobStore) -> None:
    attempt = await an_answer(store, 10)
    await store.redis.delete(store.keys.stream(attempt.job_id))
    before = await everything(store)
    rows = [Row(EntryId(1, 0), "open", b"")]
    for replaces in (None, (1, EntryId(1, 0))):
        assert not await store.compact(attempt.claim, attempt.worker_id, rows, before=0, replaces=replaces)
    assert not await compact(attempt)
    assert await everything(store) == before


async def test_a_zombie_is_refused_by_a_packed_stream_as_well(store: JobStore) -> None:
    attempt = await an_answer(store, 50)
    assert await compact(attempt)
    assert await store.sweep() == []  # which takes what is empty off the index
    before = await everything(store)
    for late in (EntryId(1, 20), EntryId(1, 50), EntryId(1, 51)):
        with pytest.raises(ResponseError, match="equal or smaller"):
            await attempt.append(Entry(late, Kind.DELTA, b"late"), publish=False)
    assert await attempt.finish_ok() is Ending.FENCED
    assert await store.cancel(attempt.job_id, "") is Ending.TERMINAL
    await attempt.release()
    assert await store.sweep() == []
    assert await everything(store) == before


async def test_what_is_packed_is_left_alone(store: JobStore) -> None:
    attempt = await an_answer(store)
    assert await compact(attempt)
    before = await everything(store)
    assert not await compact(attempt)
    assert await everything(store) == before


async def test_an_answer_of_a_few_large_entries_is_left_alone(store: JobStore) -> None:
    attempt = await running(store)
    await attempt.say(*[b"x" * 20_000] * 4)
    await attempt.finish_ok()
    before = await everything(store)
    assert not await compact(attempt)
    assert await everything(store) == before


async def test_a_damaged_stream_is_left_to_its_readers(store: JobStore) -> None:
    attempt = await an_answer(store, 10)
    await store.redis.xdel(store.keys.stream(attempt.job_id), "1-11")
    before = await everything(store)
    assert not await compact(attempt)
    assert await everything(store) == before


async def test_what_cannot_be_packed_stops_neither_the_worker_nor_the_next(store: JobStore) -> None:
    unreadable, whole = await an_answer(store, 10), await an_answer(store, 10)
    stream = store.keys.stream(unreadable.job_id)
    await store.redis.xadd(stream, {"gossip": "x"}, id="9-9")
    before = (await everything(store))[stream]
    async with Compactor(store, whole.worker_id) as compactor:
        compactor.offer(unreadable.claim)
        compactor.offer(whole.claim)

        async def is_packed() -> bool:
            return await length(whole) == 3

        _: bool = await async_wait_until(is_packed, timeout=5, description="the second job")
    assert (await everything(store))[stream] == before


async def test_a_worker_that_stops_does_not_wait_for_what_is_not_packed(store: JobStore, monkeypatch: Any) -> None:
    attempt = await an_answer(store, 10)
    monkeypatch.setattr(store, "read_after", lambda *_: asyncio.Event().wait())
    async with asyncio.timeout(5), Compactor(store, attempt.worker_id) as compactor:
        for _ in range(worker.compactor.MAX_WAITING + 10):
            compactor.offer(attempt.claim)
    monkeypatch.undo()
    assert await length(attempt) == 12


@pytest.mark.parametrize("backend", ["valkey"], indirect=True)
async def test_out_of_memory_nothing_changes(store: JobStore, backend: Backend) -> None:
    attempt = await an_answer(store)
    before = await everything(store)
    await store.redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(FAILURES, match="memory"):
            await compact(attempt)
        assert await everything(store) == before
    finally:
        await store.redis.config_set("maxmemory", 0)
    assert await compact(attempt)


@pytest.mark.parametrize("backend", ["valkey"], indirect=True)
async def test_a_packed_answer_takes_little_memory(store: JobStore, backend: Backend) -> None:
    """6,000 bytes of text in entries of 6: one row each costs more than three times as much."""
    attempt = await an_answer(store)
    stream = store.keys.stream(attempt.job_id)
    before: Any = await store.redis.memory_usage(stream, samples=0)
    assert await compact(attempt)
    after: Any = await store.redis.memory_usage(stream, samples=0)
    assert after < 1.5 * 6000 < 3 * 6000 < before
    assert await status_of(store, attempt.job_id) is Status.SUCCEEDED
