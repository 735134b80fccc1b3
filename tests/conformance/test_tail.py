"""api/tail.py: a reader gets every entry once and in order, whatever pub/sub does.

On a real server only: the switchboard takes the transport of its connection over, and fakeredis has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

import api.tail
from api.answer import Answer
from api.observe import AnswerObservation
from api.tail import PAGE_ENTRIES, StreamExpiredError, StreamGapError, StreamUnreachableError, Switchboard, Tail
from shared.connection import connect
from shared.entries import Entry, EntryId, Kind, entry_to_message
from shared.jobs import new_job_id
from shared.settings import Settings
from shared.store import JobStore
from shared.wire import ListenWire, open_wire
from tests.conftest import Backend, MakeStore
from tests.jobs import Attempt, WorkerSteps, a_worker, entries_of, running, submitted
from tests.waiting import async_wait_until

PROMPT_S = 3.0  # far less than the 15 s after which a quiet stream is read in any case
SOON_S = 0.05


@pytest.fixture
async def backend(redis_url: str) -> AsyncIterator[Backend]:
    backend = Backend("valkey", redis_url, None)
    yield backend
    await backend.aclose()


@pytest.fixture
async def switchboard(make_store: MakeStore) -> AsyncIterator[Switchboard]:
    """As in an API process: on a client of its own, its subscription connected."""
    async with Switchboard(make_store()) as switchboard:
        await connected(switchboard)
        yield switchboard


async def connected(switchboard: Switchboard) -> None:
    await async_wait_until(lambda: switchboard.is_connected, timeout=5, description="the pub/sub connection")


async def subscribed(store: JobStore, job_id: str) -> None:
    channel = store.keys.stream_channel(job_id)

    async def count() -> bool:
        ((_, number),) = await store.redis.pubsub_numsub(channel)
        return int(number) > 0

    _: bool = await async_wait_until(count, timeout=5, description="the subscription")


async def rest_of(tail: Tail, *, within_s: float = PROMPT_S) -> list[Entry]:
    """Everything up to the marker."""
    entries: list[Entry] = []
    async with asyncio.timeout(within_s):
        while not entries or not entries[-1].is_marker:
            entries += await tail.next(60)
    return entries


async def next_of(tail: Tail) -> list[Entry]:
    """The next entries, which have to come promptly."""
    entries = await tail.next(PROMPT_S)
    assert entries, f"nothing within {PROMPT_S} s"
    return entries


async def assert_silent(tail: Tail) -> None:
    assert await tail.next(SOON_S) == []


# -- following ---------------------------------------------------------------------------------------------------------


async def test_live_entries_arrive_once_and_in_order(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        reading = asyncio.create_task(rest_of(tail, within_s=10))
        for number in range(200):
            await attempt.say(b"%d" % number)
        await attempt.finish_ok()
        assert await reading == await entries_of(store, attempt.job_id)


async def test_a_live_entry_is_not_read_again(store: JobStore, switchboard: Switchboard, monkeypatch: Any) -> None:
    """The common path costs no command: pub/sub carries the entry itself."""
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        assert len(await next_of(tail)) == 1
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)  # the read that follows the subscription
        monkeypatch.setattr(switchboard, "read", None)
        assert await next_of_task(tail, attempt) == [Entry(EntryId(1, 1), Kind.DELTA, b"a")]


async def next_of_task(tail: Tail, attempt: Attempt) -> list[Entry]:
    reading = asyncio.create_task(next_of(tail))
    await attempt.say(b"a")
    return await reading


async def test_a_reader_that_starts_late_catches_up(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    await attempt.say(b"a", b"b")
    async with switchboard.follow(attempt.job_id) as tail:
        assert [entry.payload for entry in await next_of(tail)][1:] == [b"a", b"b"]
        await attempt.say(b"c")
        assert [entry.payload for entry in await next_of(tail)] == [b"c"]


async def test_a_reader_of_a_finished_job_gets_all_of_it(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    await attempt.say(b"a", b"b")
    await attempt.finish_ok()
    async with switchboard.follow(attempt.job_id) as tail:
        assert await next_of(tail) == await entries_of(store, attempt.job_id)


async def test_a_long_stream_is_read_page_by_page(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    await attempt.say(*[b"x"] * (2 * PAGE_ENTRIES), publish=False)
    await attempt.finish_ok()
    async with switchboard.follow(attempt.job_id) as tail:
        assert await rest_of(tail) == await entries_of(store, attempt.job_id)


async def test_a_reader_follows_from_its_cursor(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    said = await attempt.say(b"a", b"b", b"c")
    async with switchboard.follow(attempt.job_id, after=said[1].id) as tail:
        assert await next_of(tail) == said[2:]
        said = await attempt.say(b"d")
        assert await next_of(tail) == said


async def test_a_reader_may_be_there_before_the_job_is_claimed(store: JobStore, switchboard: Switchboard) -> None:
    job_id = await submitted(store)
    async with switchboard.follow(job_id) as tail:
        await assert_silent(tail)
        reading = asyncio.create_task(rest_of(tail))
        await store.cancel(job_id, "")
        assert [entry.kind for entry in await reading] == [Kind.ERROR]


async def test_the_end_of_a_waiting_job_is_seen_at_once(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await store.cancel(attempt.job_id, "")
        (marker,) = await next_of(tail)
        assert (marker.id, marker.kind) == (EntryId(2, 0), Kind.ERROR)


async def test_many_readers_of_one_job_get_the_same(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)

    async def read(delay_entries: int) -> list[Entry]:
        await async_wait_until(lambda: attempt.tally.count >= delay_entries, timeout=5, description="its turn")
        async with switchboard.follow(attempt.job_id) as tail:
            return await rest_of(tail, within_s=10)

    readers = [asyncio.create_task(read(7 * number)) for number in range(10)]
    for number in range(100):
        await attempt.say(b"%d" % number)
        await asyncio.sleep(0)
    await async_wait_until(lambda: attempt.tally.count == 100, timeout=5, description="everything said")
    await attempt.finish_ok()
    whole = await entries_of(store, attempt.job_id)
    assert await asyncio.gather(*readers) == [whole] * 10


async def test_many_jobs_share_one_connection(store: JobStore, switchboard: Switchboard) -> None:
    attempts = [await running(store) for _ in range(20)]

    async def read(job_id: str) -> list[Entry]:
        async with switchboard.follow(job_id) as tail:
            return await rest_of(tail, within_s=10)

    readers = [asyncio.create_task(read(attempt.job_id)) for attempt in attempts]
    for _ in range(5):
        for attempt in attempts:
            await attempt.say(attempt.job_id.encode())
    for attempt in attempts:
        await attempt.finish_ok()
    for attempt, read_entries in zip(attempts, await asyncio.gather(*readers), strict=True):
        assert read_entries == await entries_of(store, attempt.job_id)


async def test_one_reader_that_leaves_does_not_deafen_the_others(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as staying:
        async with switchboard.follow(attempt.job_id) as leaving:
            await next_of(leaving)
        await next_of(staying)
        await subscribed(store, attempt.job_id)
        said = await attempt.say(b"a")
        assert await next_of(staying) == said


async def test_a_job_that_nobody_follows_any_more_is_forgotten(store: JobStore, switchboard: Switchboard) -> None:
    job_ids = [new_job_id() for _ in range(20)]
    for job_id in job_ids:
        async with switchboard.follow(job_id):
            await subscribed(store, job_id)
    channels = [store.keys.stream_channel(job_id) for job_id in job_ids]

    async def nobody_listens() -> bool:
        return not any(count for _, count in await store.redis.pubsub_numsub(*channels))

    _: bool = await async_wait_until(nobody_listens, timeout=5, description="no subscription")


async def test_a_switchboard_does_not_grow_with_the_jobs_that_it_has_followed(
    store: JobStore, switchboard: Switchboard
) -> None:
    for _ in range(50):
        job_id = new_job_id()
        async with switchboard.follow(job_id):
            await subscribed(store, job_id)
    assert not switchboard._tails, "an API process serves millions of jobs"


# -- pushing -----------------------------------------------------------------------------------------------------------


class Pushed:
    """A reader that has entries pushed, and pulls when it must. Takes `takes` of them at a time, then asks again."""

    def __init__(self, tail: Tail, takes: int = 1_000_000) -> None:
        self.entries: list[Entry] = []
        self.pulls = 0
        self._tail = tail
        self._takes = self._left = takes

    def push(self, entries: list[Entry]) -> bool:
        self.entries += entries
        self._left -= 1
        return self._left > 0 and not entries[-1].is_marker

    async def read_on(self) -> None:
        """Until the marker."""
        async with asyncio.timeout(PROMPT_S):
            while not self.entries or not self.entries[-1].is_marker:
                self.pulls += 1
                self._left = self._takes
                self.entries += await self._tail.next(60, self.push)


async def test_entries_are_pushed_to_whoever_waits_for_them(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)
        reader = Pushed(tail)
        reading = asyncio.create_task(reader.read_on())
        await asyncio.sleep(0)
        for number in range(50):
            await attempt.say(b"%d" % number)
        await attempt.finish_ok()
        await reading
        assert reader.entries == (await entries_of(store, attempt.job_id))[1:]
        assert reader.pulls == 1


@pytest.mark.parametrize("takes", [1, 3])
async def test_a_reader_that_wants_no_more_for_now_misses_nothing(
    store: JobStore, switchboard: Switchboard, takes: int
) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        reader = Pushed(tail, takes)
        reading = asyncio.create_task(reader.read_on())
        await subscribed(store, attempt.job_id)
        for number in range(50):
            await attempt.say(b"%d" % number)
        await attempt.finish_ok()
        await reading
        assert reader.entries == await entries_of(store, attempt.job_id)
        assert reader.pulls > 1


async def test_a_pushed_reader_pulls_what_pub_sub_has_missed(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        reader = Pushed(tail)
        reading = asyncio.create_task(reader.read_on())
        await subscribed(store, attempt.job_id)
        for number in range(30):
            await attempt.say(b"%d" % number, publish=number % 7 != 3)
        await store.redis.publish(store.keys.stream_channel(attempt.job_id), b"nonsense")
        await attempt.finish_ok()
        await reading
        assert reader.entries == await entries_of(store, attempt.job_id)


async def test_what_a_reader_raises_is_raised_to_it(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)

    def push(entries: list[Entry]) -> bool:
        raise OSError("the client is gone")

    async with switchboard.follow(attempt.job_id) as tail, switchboard.follow(attempt.job_id) as other:
        for reader in (tail, other):
            await next_of(reader)
        await subscribed(store, attempt.job_id)
        for reader in (tail, other):
            await assert_silent(reader)
        reading = asyncio.create_task(tail.next(PROMPT_S, push))
        await asyncio.sleep(0)
        said = await attempt.say(b"a")
        with pytest.raises(OSError, match="the client is gone"):
            await reading
        assert await next_of(other) == said


async def test_an_interrupted_reader_is_pushed_nothing_more(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)
        reader = Pushed(tail)
        reading = asyncio.create_task(tail.next(60, reader.push))
        await asyncio.sleep(0)
        tail.interrupt()
        await attempt.say(b"a")
        assert await reading == []
        assert reader.entries == []


# -- a job that is listened to from before its beginning ---------------------------------------------------------------


@asynccontextmanager
async def listening(switchboard: Switchboard, job_id: str) -> AsyncIterator[Tail]:
    """As the API does it: the job is submitted inside of the block."""
    tail = switchboard.follow(job_id)
    tail.begin(before_job=True)
    try:
        yield tail
    finally:
        tail.end()


async def begun(store: JobStore, job_id: str) -> Attempt:
    await submitted(store, job_id)
    return await (await a_worker(store)).claim_one()


async def test_a_job_that_is_listened_to_from_before_its_beginning_is_never_read(
    store: JobStore, switchboard: Switchboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The common case of a request costs no command."""
    monkeypatch.setattr(api.tail, "DEAF_S", 60.0)
    monkeypatch.setattr(switchboard, "read", None)
    async with listening(switchboard, job_id := new_job_id()) as tail:
        attempt = await begun(store, job_id)
        reader = Pushed(tail)
        reading = asyncio.create_task(reader.read_on())
        await attempt.say(b"a")
        await attempt.finish_ok()
        await reading
        assert reader.entries == await entries_of(store, job_id)


@pytest.mark.parametrize("missed", [0, 1, 2])
async def test_a_beginning_that_was_not_heard_is_read(store: JobStore, switchboard: Switchboard, missed: int) -> None:
    """The opening is heard or not, since the channel is listened to before or after it."""
    async with listening(switchboard, job_id := new_job_id()) as tail:
        attempt = await begun(store, job_id)
        for number in range(3):
            await attempt.say(b"%d" % number, publish=number >= missed)
        await attempt.finish_ok()
        assert await rest_of(tail) == await entries_of(store, job_id)


async def test_a_job_that_was_over_before_it_was_listened_to_is_read_soon(
    store: JobStore, switchboard: Switchboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may read the subscription after the submission, whichever was sent first."""
    sent_later: list[tuple[ListenWire, bytes]] = []
    write = ListenWire.write
    monkeypatch.setattr(ListenWire, "write", lambda wire, commands: sent_later.append((wire, commands)))
    async with listening(switchboard, job_id := new_job_id()) as tail:
        attempt = await begun(store, job_id)
        await attempt.say(b"a")
        await attempt.finish_ok()
        monkeypatch.undo()
        for wire, commands in sent_later:
            write(wire, commands)
        await subscribed(store, job_id)
        assert await rest_of(tail) == await entries_of(store, job_id)


async def test_a_reader_whose_subscription_is_lost_reads_again_and_again(
    store: JobStore, switchboard: Switchboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ListenWire, "write", lambda *_: None)
    async with listening(switchboard, job_id := new_job_id()) as tail:
        attempt = await begun(store, job_id)
        assert [entry.kind for entry in await next_of(tail)] == [Kind.OPEN]
        for text in (b"a", b"b"):
            said = await attempt.say(text)
            assert await next_of(tail) == said
        await attempt.finish_ok()
        await next_of(tail)


async def test_a_connection_that_is_lost_before_the_job_begins_loses_nothing(
    store: JobStore, switchboard: Switchboard
) -> None:
    async with listening(switchboard, job_id := new_job_id()) as tail:
        await subscribed(store, job_id)
        await store.redis.client_kill_filter(_type="pubsub")
        attempt = await begun(store, job_id)
        await attempt.say(b"a")
        await connected(switchboard)
        await attempt.finish_ok()
        assert await rest_of(tail) == await entries_of(store, job_id)


async def test_a_job_that_begins_while_nothing_is_connected_is_read(
    store: JobStore, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def never(*_: Any) -> AsyncIterator[ListenWire]:
        await asyncio.Event().wait()
        yield cast("ListenWire", None)

    monkeypatch.setattr(api.tail, "open_wire", never)
    async with Switchboard(make_store()) as switchboard, listening(switchboard, job_id := new_job_id()) as tail:
        attempt = await begun(store, job_id)
        assert [entry.kind for entry in await next_of(tail)] == [Kind.OPEN]
        await attempt.finish_ok()
        await next_of(tail)


# -- what pub/sub misses -----------------------------------------------------------------------------------------------


async def test_an_entry_that_was_not_published_is_read_when_the_next_one_is(
    store: JobStore, switchboard: Switchboard
) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)
        missed = await attempt.say(b"a", publish=False)
        await assert_silent(tail)
        heard = await attempt.say(b"b")
        assert await next_of(tail) == missed + heard


@pytest.mark.parametrize("patience_s", [10.0, 0.05])
async def test_an_entry_that_was_not_published_is_read_after_a_quiet_while(
    store: JobStore, switchboard: Switchboard, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    """However often the caller looks up from its waiting, to send a ping for example."""
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)
        monkeypatch.setattr(api.tail, "QUIET_S", 0.2)
        missed = await attempt.say(b"a", publish=False)
        async with asyncio.timeout(PROMPT_S):
            while not (entries := await tail.next(patience_s)):
                pass
        assert entries == missed


@pytest.mark.parametrize("order", ["published twice", "an old one again", "swapped"])
async def test_what_pub_sub_confuses_the_stream_puts_right(
    store: JobStore, switchboard: Switchboard, order: str
) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)
        first, second, third = await attempt.say(b"a", b"b", b"c", publish=False)
        published = {
            "published twice": [first, first, second, second, third, third],
            "an old one again": [first, second, first, third],
            "swapped": [second, first, third],
        }[order]
        channel = store.keys.stream_channel(attempt.job_id)
        for entry in published:
            await store.redis.publish(channel, entry_to_message(entry))
        await attempt.finish_ok()
        assert (await rest_of(tail))[:-1] == [first, second, third]


async def test_a_message_that_is_no_entry_makes_the_reader_look(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)
        missed = await attempt.say(b"a", publish=False)
        await store.redis.publish(store.keys.stream_channel(attempt.job_id), b"nonsense")
        assert await next_of(tail) == missed


async def test_entries_published_while_the_subscription_is_on_its_way_arrive(
    store: JobStore, switchboard: Switchboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = await running(store)
    sent_later: list[tuple[ListenWire, bytes]] = []
    write = ListenWire.write
    monkeypatch.setattr(ListenWire, "write", lambda wire, commands: sent_later.append((wire, commands)))

    async def follow() -> list[Entry]:
        async with switchboard.follow(attempt.job_id) as tail:
            return await rest_of(tail)

    async def follow_second() -> list[Entry]:
        async with switchboard.follow(attempt.job_id) as tail:  # its first read comes before the subscription
            return await rest_of(tail)

    readers = [asyncio.create_task(follow()), asyncio.create_task(follow_second())]
    await asyncio.sleep(SOON_S)
    await attempt.say(b"a", b"b")
    await attempt.finish_ok()
    monkeypatch.undo()
    for wire, commands in sent_later:
        write(wire, commands)
    whole = await entries_of(store, attempt.job_id)
    assert await asyncio.gather(*readers) == [whole, whole]


async def test_a_reader_that_comes_while_the_connection_is_being_made_is_subscribed(
    store: JobStore, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API process that has just started, or whose pub/sub connection was lost, gets a request."""
    attempt = await running(store)
    own = make_store()
    connect_now, connecting = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def open_slowly(*arguments: Any) -> AsyncIterator[ListenWire]:
        connecting.set()
        await connect_now.wait()
        async with open_wire(*arguments) as wire:
            yield wire

    monkeypatch.setattr(api.tail, "open_wire", open_slowly)
    async with Switchboard(own) as switchboard:
        await connecting.wait()
        async with switchboard.follow(attempt.job_id) as tail:
            await next_of(tail)
            connect_now.set()
            await connected(switchboard)
            await assert_silent(tail)
            said = await attempt.say(b"a")
            assert await next_of(tail) == said


async def test_nothing_is_lost_or_doubled_when_the_pub_sub_connection_is_killed(
    store: JobStore, switchboard: Switchboard
) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        reading = asyncio.create_task(rest_of(tail, within_s=20))
        for number in range(120):
            await attempt.say(b"%d" % number)
            if number % 30 == 10:
                await connected(switchboard)
                await store.redis.client_kill_filter(_type="pubsub")
        await attempt.finish_ok()
        assert await reading == await entries_of(store, attempt.job_id)


async def test_a_killed_pub_sub_connection_is_made_again_with_all_subscriptions(
    store: JobStore, switchboard: Switchboard
) -> None:
    attempts = [await running(store) for _ in range(3)]

    async def read(attempt: Attempt) -> list[Entry]:
        async with switchboard.follow(attempt.job_id) as tail:
            return await rest_of(tail, within_s=10)

    readers = [asyncio.create_task(read(attempt)) for attempt in attempts]
    for attempt in attempts:
        await subscribed(store, attempt.job_id)
    await store.redis.client_kill_filter(_type="pubsub")
    for attempt in attempts:
        await attempt.say(b"said while nobody listens")
    for attempt in attempts:
        await subscribed(store, attempt.job_id)
        await attempt.say(b"said again")
        await attempt.finish_ok()
    for attempt, entries in zip(attempts, await asyncio.gather(*readers), strict=True):
        assert entries == await entries_of(store, attempt.job_id)


# -- attempts ----------------------------------------------------------------------------------------------------------


async def test_what_a_zombie_publishes_is_ignored(store: JobStore, switchboard: Switchboard) -> None:
    zombie = await running(store)
    async with switchboard.follow(zombie.job_id) as tail:
        await next_of(tail)
        await WorkerSteps(store, zombie.worker_id).lapse()
        await store.sweep()
        late = Entry(EntryId(1, 1), Kind.DELTA, b"late")
        await store.redis.publish(store.keys.stream_channel(zombie.job_id), entry_to_message(late))
        second = await (await a_worker(store)).claim_one()
        await second.say(b"a")
        await second.finish_ok()
        assert [str(entry.id) for entry in await rest_of(tail)] == ["2-0", "2-1", "2-2"]


async def test_a_second_attempt_continues_the_first(store: JobStore, switchboard: Switchboard) -> None:
    first = await running(store)
    await WorkerSteps(store, first.worker_id).lapse()
    await store.sweep()
    second = await (await a_worker(store)).claim_one()
    await second.finish_ok()
    async with switchboard.follow(first.job_id) as tail:
        assert await rest_of(tail) == await entries_of(store, first.job_id)


# -- what cannot be followed -------------------------------------------------------------------------------------------


async def test_a_job_that_nobody_knows_cannot_be_followed(switchboard: Switchboard) -> None:
    async with switchboard.follow(new_job_id()) as tail:
        with pytest.raises(StreamExpiredError):
            await tail.next(PROMPT_S)


@pytest.mark.parametrize("state", ["running", "finished"])
async def test_a_stream_that_was_deleted_has_expired(store: JobStore, switchboard: Switchboard, state: str) -> None:
    attempt = await running(store)
    await attempt.say(b"a")
    if state == "finished":
        await attempt.finish_ok()
    await store.redis.delete(store.keys.stream(attempt.job_id))
    async with switchboard.follow(attempt.job_id) as tail:
        with pytest.raises(StreamExpiredError):
            await tail.next(PROMPT_S)


async def test_a_stream_that_is_deleted_under_its_reader_has_expired(
    store: JobStore, switchboard: Switchboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)
        monkeypatch.setattr(api.tail, "QUIET_S", SOON_S)
        await store.redis.delete(store.keys.stream(attempt.job_id))
        with pytest.raises(StreamExpiredError):
            await tail.next(PROMPT_S)


async def test_a_stream_whose_job_is_gone_has_expired(
    store: JobStore, switchboard: Switchboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody will ever end it: neither the sweep nor its worker finds the job."""
    attempt = await running(store)
    await attempt.say(b"a")
    await store.redis.delete(store.keys.job(attempt.job_id))
    await store.redis.zrem(store.keys.deadlines, attempt.job_id)
    monkeypatch.setattr(api.tail, "QUIET_S", SOON_S)
    async with switchboard.follow(attempt.job_id) as tail:
        with pytest.raises(StreamExpiredError):
            while await tail.next(PROMPT_S):
                pass


@pytest.mark.parametrize("missing", ["1-0", "1-1", "1-2", "1-4"])
async def test_a_hole_in_the_stream_is_never_skipped(store: JobStore, switchboard: Switchboard, missing: str) -> None:
    attempt = await running(store)
    await attempt.say(b"a", b"b", b"c")
    assert (await attempt.finish_ok()).value == "done"
    await store.redis.xdel(store.keys.stream(attempt.job_id), missing)
    async with switchboard.follow(attempt.job_id) as tail:
        with pytest.raises(StreamGapError):
            await rest_of(tail)


async def test_a_hole_is_noticed_by_a_live_reader(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        await subscribed(store, attempt.job_id)
        await assert_silent(tail)
        await attempt.say(b"a", publish=False)
        await store.redis.xdel(store.keys.stream(attempt.job_id), "1-1")
        await attempt.say(b"b")
        with pytest.raises(StreamGapError):
            await tail.next(PROMPT_S)


async def test_an_entry_that_is_not_ours_is_no_answer(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    await store.redis.xadd(store.keys.stream(attempt.job_id), {"gossip": "a"}, id="1-1")
    async with switchboard.follow(attempt.job_id) as tail:
        with pytest.raises(StreamGapError):
            await tail.next(PROMPT_S)


async def test_a_stream_key_that_holds_something_else_is_no_answer(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    await store.redis.set(store.keys.stream(attempt.job_id), "not a stream", ex=60)
    async with switchboard.follow(attempt.job_id) as tail:
        with pytest.raises(StreamGapError):
            await tail.next(PROMPT_S)


async def test_a_redis_that_cannot_be_reached_is_given_up_after_the_patience(unused_tcp_port: int, prefix: str) -> None:
    async with unreachable(unused_tcp_port, prefix, patience_s=0.3) as tail:
        started_at = asyncio.get_running_loop().time()
        with pytest.raises(StreamUnreachableError):
            await tail.next(10)
        assert 0.3 <= asyncio.get_running_loop().time() - started_at < 3


@asynccontextmanager
async def unreachable(port: int, prefix: str, *, patience_s: float) -> AsyncIterator[Tail]:
    """A tail on a server that is not there."""
    settings = Settings(redis_url=f"redis://127.0.0.1:{port}/0", prefix=prefix, redis_patience_s=patience_s)
    store = JobStore(connect(settings), settings)
    try:
        async with Switchboard(store) as switchboard, switchboard.follow(new_job_id()) as tail:
            yield tail
    finally:
        await store.redis.aclose(close_connection_pool=True)


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_nothing_comes_after_the_timeout(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        for timeout_s in (0.0, SOON_S):
            assert await tail.next(timeout_s) == []


async def test_a_reader_that_is_interrupted_returns_at_once(store: JobStore, switchboard: Switchboard) -> None:
    attempt = await running(store)
    async with switchboard.follow(attempt.job_id) as tail:
        await next_of(tail)
        reading = asyncio.create_task(tail.next(60))
        await asyncio.sleep(SOON_S)
        tail.interrupt()
        async with asyncio.timeout(1):
            assert await reading == []
            await attempt.say(b"a")
            assert await tail.next(60) == []


async def test_a_reader_that_is_interrupted_does_not_wait_for_redis(unused_tcp_port: int, prefix: str) -> None:
    async with unreachable(unused_tcp_port, prefix, patience_s=30) as tail:
        reading = asyncio.create_task(tail.next(60))
        await asyncio.sleep(SOON_S)
        tail.interrupt()
        try:
            async with asyncio.timeout(2):
                assert await reading == []
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize("when", ["__init__", "end"])
async def test_an_answer_that_cannot_be_observed_is_listened_to_no_longer(
    store: JobStore, switchboard: Switchboard, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """What observes it may be somebody else's, such as a processor of spans."""

    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(AnswerObservation, when, fail)
    services: Any = SimpleNamespace(settings=store.settings, store=store, switchboard=switchboard)
    answer = Answer(services, await submitted(store))
    with pytest.raises(RuntimeError, match="a defect"):
        async with answer.follow({"type": "http"}, AsyncMock(return_value={"type": "http.request"})):
            pass
    assert switchboard._tails == {}
