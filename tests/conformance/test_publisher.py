"""worker/publisher.py: what an attempt says becomes entries, once and in order, whatever happens to the connection.

On a real server only: the publisher takes the transport of its connection over, and fakeredis has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import hiredis
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError

import worker.publisher
from shared.entries import MAX_ENTRY_BYTES, Entry, EntryId, ErrorMarker, Kind, OkMarker, Tally, entry_to_message
from shared.jobs import Status
from shared.store import Claim, Ending, JobStore
from shared.tasks import end_task
from shared.wire import CallWire, command
from tests.conftest import Backend, MakeStore
from tests.jobs import Attempt, WorkerSteps, a_worker, entries_of, record_of, status_of, submitted
from tests.waiting import async_wait_until
from worker.compactor import Compactor
from worker.publisher import HIGH_WATER_BYTES, KEPT_BYTES, KEPT_ENTRIES, AttemptLog, AttemptLostError, Loss, Publisher

pytestmark = pytest.mark.parametrize("backend", ["valkey"], indirect=True)

WORKER = "worker-under-test"


class Calls:
    """Counts what the publisher sends, and breaks the connection when `plan` says so.

    "before": the connection breaks before anything is sent. "after": when Redis has executed everything, before it has
    answered. A number: when Redis has executed so many commands. A coroutine function is not a break: it is awaited
    just before the pipeline is sent.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan: list[str | int | Callable[[], Awaitable[object]] | None] = []
        self.sent: list[list[str]] = []  # the names of the commands of each call
        self.wires: list[CallWire] = []  # on which each call went
        self.answers: list[Callable[[list[str]], list[Any]]] = []  # of the next calls with appends, in place of Redis
        self.answers_for: dict[
            str, Callable[[list[str]], list[Any]]
        ] = {}  # of all calls with appends to a job's stream
        self.refused = 0  # how many calls were answered so
        original = CallWire.call

        async def call(wire: CallWire, commands: bytes, replies: int) -> list[Any]:
            parsed = _parsed(commands)
            assert len(parsed) == replies
            self.wires.append(wire)
            self.sent.append([parts[0].decode() for parts in parsed])
            if "XADD" in self.sent[-1]:
                made = [answers for job_id, answers in self.answers_for.items() if job_id.encode() in commands]
                if self.answers:
                    made.append(self.answers.pop(0))
                if made:
                    self.refused += 1
                    return made[0](self.sent[-1])
            how = self.plan.pop(0) if self.plan else None
            if callable(how):
                await how()
                how = None
            error = RedisConnectionError(f"broken: {how}")
            if how == "before":
                wire.break_off(error)
            if isinstance(how, int):
                parsed = parsed[:how]
                commands, replies = b"".join(command(*parts) for parts in parsed), len(parsed)
            answers = await original(wire, commands, replies)
            if how is not None:
                wire.break_off(error)
                raise error
            return answers

        monkeypatch.setattr(CallWire, "call", call)


def _parsed(commands: bytes) -> list[list[bytes]]:
    reader = hiredis.Reader(notEnoughData=StopIteration)
    reader.feed(commands)
    return list(iter(reader.gets, StopIteration))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
async def publisher(store: JobStore, calls: Calls) -> AsyncIterator[Publisher]:
    async with Publisher(store, WORKER) as publisher:
        yield publisher


class Spoken:
    """An attempt's log, and what it lost."""

    def __init__(self, publisher: Publisher, claim: Claim) -> None:
        self.losses: list[Loss] = []
        self.job_id = claim.job_id
        self.log: AttemptLog = publisher.open(claim, self.losses.append)

    def say(self, *fragments: bytes, kind: Kind = Kind.DELTA) -> None:
        for fragment in fragments:
            self.log.append(kind, fragment)

    async def finish_ok(self) -> Ending:
        def marker(tally: Tally) -> bytes:
            return OkMarker(tally.count, tally.digest, "stop", None).payload()

        return await self.log.finish(Kind.OK, marker, Status.SUCCEEDED, {"finish_reason": "stop"})

    async def finish_error(self) -> Ending:
        error = ErrorMarker("agent_error", "The agent failed.").payload()
        return await self.log.finish(Kind.ERROR, lambda _: error, Status.FAILED, {})


async def speaking(store: JobStore, publisher: Publisher) -> Spoken:
    """The first attempt of a new job."""
    await submitted(store)
    return Spoken(publisher, (await (await a_worker(store, WORKER)).claim_one()).claim)


@pytest.fixture
async def spoken(store: JobStore, publisher: Publisher) -> Spoken:
    return await speaking(store, publisher)


async def said_in(store: JobStore, job_id: str) -> list[tuple[Kind, bytes]]:
    """Everything between opening and marker, proven to be gap-free."""
    entries = await entries_of(store, job_id)
    for before, after in pairwise(entries):
        assert before.id.is_followed_by(after.id), (before.id, after.id)
    return [(entry.kind, entry.payload) for entry in entries if entry.kind is not Kind.OPEN and not entry.is_marker]


async def assert_whole(store: JobStore, job_id: str) -> None:
    """What a reader computes confirms the marker."""
    *entries, marker = await entries_of(store, job_id)
    tally = Tally()
    for entry in entries[1:]:
        tally.add(entry.kind, entry.payload)
    assert marker.kind is Kind.OK
    assert OkMarker.parse(marker.payload).confirms(tally)
    record = await record_of(store, job_id)
    assert (record.status, record.entries) == (Status.SUCCEEDED, tally.count)


# -- speaking ----------------------------------------------------------------------------------------------------------


async def test_what_is_said_in_one_breath_becomes_one_entry(store: JobStore, spoken: Spoken) -> None:
    fragments = [b"%d " % number for number in range(1000)]
    spoken.say(*fragments)
    await spoken.log.flushed()
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"".join(fragments))]


async def test_what_is_said_while_a_flush_is_on_its_way_goes_out_in_the_next_one(
    store: JobStore, spoken: Spoken, calls: Calls
) -> None:
    fragments = [b"%d " % number for number in range(300)]
    for fragment in fragments:
        spoken.say(fragment)
        await asyncio.sleep(0)
    await spoken.log.flushed()
    said = await said_in(store, spoken.job_id)
    assert b"".join(payload for _, payload in said) == b"".join(fragments)
    assert len(said) <= len(calls.sent) < len(fragments)


LONG_S = 60.0  # a rest that ends in no test


async def test_what_is_said_during_a_rest_becomes_one_entry(
    store: JobStore, spoken: Spoken, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.publisher, "REST_S", LONG_S)
    spoken.say(b"a")
    await spoken.log.flushed()
    calls.sent.clear()
    for _ in range(50):
        spoken.say(b"b")
        await asyncio.sleep(0)
    assert calls.sent == []
    await spoken.log.flushed()
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"a"), (Kind.DELTA, 50 * b"b")]


async def until_said(store: JobStore, job_id: str, payload: bytes) -> None:
    """Until the stream has this entry, and nobody has waited for it to be flushed."""

    async def entries() -> list[bytes]:
        return [said for _, said in await said_in(store, job_id) if said == payload]

    found: list[bytes] = await async_wait_until(entries, timeout=5, description=f"{payload!r} in the stream")
    assert found == [payload]


async def test_a_rest_ends_by_itself(store: JobStore, spoken: Spoken) -> None:
    for fragment in (b"a", b"b", b"c"):
        spoken.say(fragment)
        await until_said(store, spoken.job_id, fragment)


async def test_nobody_else_waits_for_one_that_rests(
    store: JobStore, publisher: Publisher, spoken: Spoken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.publisher, "REST_S", LONG_S)
    spoken.say(b"a")
    await spoken.log.flushed()
    spoken.say(b"b")
    other = await speaking(store, publisher)
    other.say(b"first")
    await until_said(store, other.job_id, b"first")
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"a")]


async def test_a_long_rest_lengthens_nobody_elses(
    store: JobStore, publisher: Publisher, spoken: Spoken, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await speaking(store, publisher)
    for who, rest_s in ((spoken, LONG_S), (other, 0.05)):
        monkeypatch.setattr(worker.publisher, "REST_S", rest_s)
        who.say(b"a")
        await who.log.flushed()
        who.say(b"b")
    await until_said(store, other.job_id, b"b")
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"a")]


@pytest.mark.parametrize("how", ["a marker", "somebody who waits"])
async def test_a_rest_ends_with(store: JobStore, spoken: Spoken, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(worker.publisher, "REST_S", LONG_S)
    spoken.say(b"a")
    await spoken.log.flushed()
    spoken.say(b"b")
    if how == "a marker":
        assert await spoken.finish_ok() is Ending.DONE
        await assert_whole(store, spoken.job_id)
    else:
        await spoken.log.flushed()
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"a"), (Kind.DELTA, b"b")]


async def test_kinds_keep_their_order(store: JobStore, spoken: Spoken) -> None:
    spoken.say(b"think", b"ing", kind=Kind.REASONING)
    spoken.say(b"Hel", b"lo")
    spoken.say(b'{"index":0}', kind=Kind.TOOL_CALL)
    spoken.say(b'{"index":1}', kind=Kind.TOOL_CALL)
    spoken.say(b"!")
    await spoken.log.flushed()
    assert await said_in(store, spoken.job_id) == [
        (Kind.REASONING, b"thinking"),
        (Kind.DELTA, b"Hello"),
        (Kind.TOOL_CALL, b'{"index":0}'),
        (Kind.TOOL_CALL, b'{"index":1}'),
        (Kind.DELTA, b"!"),
    ]


async def test_ids_of_every_length_are_stored_and_published_as_they_are(
    store: JobStore, spoken: Spoken, calls: Calls
) -> None:
    await store.redis.script_load(store.script("finish").script)
    words = [b"%d" % number for number in range(1, 121)]
    async with store.redis.pubsub() as pubsub:
        await pubsub.subscribe(store.keys.stream_channel(spoken.job_id))
        assert (await pubsub.get_message(timeout=5))["type"] == "subscribe"
        for number, word in enumerate(words, start=1):
            spoken.say(word, kind=Kind.REASONING if number % 7 == 0 else Kind.DELTA)
            if number in (9, 99):  # what is sent again then has ids of two lengths
                calls.plan = ["before"]
                await async_wait_until(lambda: not calls.plan, timeout=5, description="a call that breaks")
            else:
                await spoken.log.flushed()
        assert await spoken.finish_ok() is Ending.DONE
        heard: list[bytes] = []
        while not heard or b" ok " not in heard[-1]:
            heard.append((await pubsub.get_message(timeout=5))["data"])
    assert [payload for _, payload in await said_in(store, spoken.job_id)] == words
    assert heard == [entry_to_message(entry) for entry in (await entries_of(store, spoken.job_id))[1:]]
    await assert_whole(store, spoken.job_id)


async def test_much_said_in_one_breath_becomes_entries_of_a_limited_size(store: JobStore, spoken: Spoken) -> None:
    spoken.say(*[b"x" * 1000] * 600)
    spoken.say(b"y" * (MAX_ENTRY_BYTES + 1))
    await spoken.log.flushed()
    *shared, whole = [payload for _, payload in await said_in(store, spoken.job_id)]
    assert b"".join(shared) == b"x" * 600_000
    assert all(len(payload) <= MAX_ENTRY_BYTES for payload in shared)
    assert len(whole) == MAX_ENTRY_BYTES + 1, "one fragment stays whole"


async def test_every_entry_is_published_as_it_is_stored(store: JobStore, spoken: Spoken) -> None:
    await store.redis.script_load(store.script("finish").script)
    async with store.redis.pubsub() as pubsub:
        await pubsub.subscribe(store.keys.stream_channel(spoken.job_id))
        assert (await pubsub.get_message(timeout=5))["type"] == "subscribe"
        spoken.say(b"a b")
        await spoken.finish_ok()
        messages = [(await pubsub.get_message(timeout=5))["data"] for _ in range(2)]
    assert messages[0] == b"1-1 delta a b"
    assert messages[1].startswith(b"1-2 ok {")


async def test_the_tally_is_what_a_reader_computes(store: JobStore, spoken: Spoken) -> None:
    for fragment in (b"a", b"b", b"c"):
        spoken.say(fragment)
        spoken.say(fragment, kind=Kind.TOOL)
        await spoken.log.flushed()
    reader = Tally()
    for kind, payload in await said_in(store, spoken.job_id):
        reader.add(kind, payload)
    assert (spoken.log.tally.count, spoken.log.tally.digest) == (reader.count, reader.digest)


async def test_flushed_means_that_redis_has_everything(store: JobStore, spoken: Spoken) -> None:
    await spoken.log.flushed()
    spoken.say(b"a")
    await asyncio.gather(spoken.log.flushed(), spoken.log.flushed())
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"a")]
    await spoken.log.flushed()


async def test_who_waits_for_redis_does_not_wait_for_what_is_said_later(store: JobStore, spoken: Spoken) -> None:
    """A tool may start although another task of its agent speaks on and on."""

    async def speak_on() -> None:
        while True:
            spoken.say(b"on ")
            await asyncio.sleep(0)

    speaker = asyncio.create_task(speak_on())
    async with asyncio.timeout(10):
        for number in range(5):
            spoken.say(b"%d" % number, kind=Kind.TOOL)
            await spoken.log.flushed()
            assert (Kind.TOOL, b"%d" % number) in await said_in(store, spoken.job_id)
    await end_task(speaker)


async def test_one_that_waits_and_is_cancelled_takes_nobody_along(store: JobStore, spoken: Spoken) -> None:
    spoken.say(b"a")
    gone, stays = (asyncio.create_task(spoken.log.flushed()) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await stays
    assert gone.cancelled()
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"a")]


async def test_who_outruns_redis_has_to_wait(spoken: Spoken) -> None:
    def must_wait() -> bool:
        return spoken.log.must_wait

    spoken.say(b"x" * HIGH_WATER_BYTES)
    assert not must_wait()
    spoken.say(b"x")
    assert must_wait()
    await spoken.log.flushed()
    assert not must_wait()


async def test_many_attempts_share_a_flush(store: JobStore, publisher: Publisher, calls: Calls) -> None:
    attempts = [await speaking(store, publisher) for _ in range(20)]
    calls.sent.clear()
    for attempt in attempts:
        attempt.say(attempt.job_id.encode())
    await asyncio.gather(*(attempt.log.flushed() for attempt in attempts))
    assert len(calls.sent) == 1
    for attempt in attempts:
        assert await said_in(store, attempt.job_id) == [(Kind.DELTA, attempt.job_id.encode())]


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["well", "in an error", "well, after a break"])
async def test_an_ended_stream_is_packed_from_what_its_attempt_has_kept(
    store: JobStore, spoken: Spoken, calls: Calls, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    for number in range(300):
        spoken.say(b"%d " % number, kind=(Kind.REASONING, Kind.DELTA)[number % 2])
    await spoken.log.flushed()
    if ends == "well, after a break":
        calls.plan = ["after"]
    assert await (spoken.finish_error() if ends == "in an error" else spoken.finish_ok()) is Ending.DONE
    before = await entries_of(store, spoken.job_id)
    rows = spoken.log.packed_rows()
    assert rows is not None
    with monkeypatch.context() as patched:
        patched.setattr(store, "read_after", None)  # it is not needed
        assert await Compactor(store, WORKER).put(spoken.log.claim, rows)
    assert await entries_of(store, spoken.job_id) == before
    assert await store.redis.xlen(store.keys.stream(spoken.job_id)) == len(rows) == 4


async def test_what_is_kept_is_put_only_in_the_place_of_what_it_was(store: JobStore, spoken: Spoken) -> None:
    spoken.say(*[b"a"] * 10)
    assert await spoken.finish_ok() is Ending.DONE
    rows = spoken.log.packed_rows()
    assert rows is not None
    stream = store.keys.stream(spoken.job_id)
    await store.redis.xadd(stream, {"gossip": "x"}, id="9-9")
    before = await store.redis.xrange(stream)
    assert not await Compactor(store, WORKER).put(spoken.log.claim, rows)
    assert await store.redis.xrange(stream) == before


@pytest.mark.parametrize(
    ("word", "breaths", "words"),
    [(b"x" * (KEPT_BYTES // 4), 5, 1), (b"x", 5, KEPT_ENTRIES // 4)],
    ids=["many bytes", "many entries"],
)
async def test_of_a_long_answer_nothing_is_kept(spoken: Spoken, word: bytes, breaths: int, words: int) -> None:
    for _ in range(breaths):
        for number in range(words):
            spoken.say(word, kind=(Kind.REASONING, Kind.DELTA)[number % 2])
        await spoken.log.flushed()
    assert await spoken.finish_ok() is Ending.DONE
    assert spoken.log.packed_rows() is None


async def test_before_its_job_has_ended_an_attempt_has_no_rows(store: JobStore, spoken: Spoken) -> None:
    spoken.say(b"a")
    await spoken.log.flushed()
    assert spoken.log.packed_rows() is None
    await store.cancel(spoken.job_id, "Enough.")
    assert await spoken.finish_ok() is Ending.FENCED
    assert spoken.log.packed_rows() is None


async def test_a_later_attempt_keeps_nothing(store: JobStore, publisher: Publisher) -> None:
    await submitted(store)
    await (await a_worker(store, "lost")).claim_one()
    await WorkerSteps(store, "lost").lapse()
    await store.sweep()
    spoken = Spoken(publisher, (await (await a_worker(store, WORKER)).claim_one()).claim)
    assert spoken.log.claim.attempt == 2
    spoken.say(b"a")
    assert await spoken.finish_ok() is Ending.DONE
    assert spoken.log.packed_rows() is None


# -- finishing ---------------------------------------------------------------------------------------------------------


async def test_the_marker_travels_behind_the_last_entries(store: JobStore, spoken: Spoken, calls: Calls) -> None:
    await store.redis.script_load(store.script("finish").script)
    calls.sent.clear()
    spoken.say(b"a")
    assert await spoken.finish_ok() is Ending.DONE
    assert calls.sent == [["XADD", "PUBLISH", "EVALSHA"]]
    await assert_whole(store, spoken.job_id)


async def test_an_empty_answer_is_whole(store: JobStore, spoken: Spoken) -> None:
    assert await spoken.finish_ok() is Ending.DONE
    await assert_whole(store, spoken.job_id)


async def test_an_error_comes_behind_what_was_said(store: JobStore, spoken: Spoken) -> None:
    spoken.say(b"Hel")
    assert await spoken.finish_error() is Ending.DONE
    kinds = [entry.kind for entry in await entries_of(store, spoken.job_id)]
    assert kinds == [Kind.OPEN, Kind.DELTA, Kind.ERROR]
    assert await status_of(store, spoken.job_id) is Status.FAILED


async def test_an_ok_on_a_stream_with_a_hole_is_refused(store: JobStore, spoken: Spoken) -> None:
    spoken.say(b"a")
    await spoken.log.flushed()
    spoken.say(b"b")
    await store.redis.xdel(store.keys.stream(spoken.job_id), "1-1")
    assert await spoken.finish_ok() is Ending.INCOMPLETE
    assert await status_of(store, spoken.job_id) is Status.RUNNING


async def test_a_redis_that_has_forgotten_the_scripts_is_taught_them_again(store: JobStore, spoken: Spoken) -> None:
    await store.redis.script_flush()
    spoken.say(b"a")
    assert await spoken.finish_ok() is Ending.DONE
    await assert_whole(store, spoken.job_id)


# -- a failover that loses what was confirmed --------------------------------------------------------------------------


async def test_an_answer_whose_last_confirmed_entry_is_lost_never_ends_well(store: JobStore, spoken: Spoken) -> None:
    await store.redis.script_load(store.script("finish").script)
    spoken.say(b"a")
    await spoken.log.flushed()
    await store.redis.xdel(store.keys.stream(spoken.job_id), "1-1")
    assert await spoken.finish_ok() is Ending.INCOMPLETE
    assert await status_of(store, spoken.job_id) is Status.RUNNING


async def test_a_confirmed_entry_that_is_lost_with_the_connection_ends_the_attempt_at_once(
    store: JobStore, spoken: Spoken, calls: Calls
) -> None:
    for fragment in (b"a", b"b"):
        spoken.say(fragment)
        await spoken.log.flushed()
    await store.redis.xdel(store.keys.stream(spoken.job_id), "1-2")
    calls.plan = ["before"]
    spoken.say(b"c")
    with pytest.raises(AttemptLostError):
        await spoken.log.flushed()
    assert spoken.losses == [Loss.REFUSED]
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"a")], "nothing follows the hole"
    assert await spoken.finish_ok() is Ending.FENCED


async def whole_and_cut(store: JobStore, publisher: Publisher) -> tuple[Spoken, Spoken]:
    """Two attempts that have said `a` and `b`; of the second, a failover has lost the `b`."""
    whole, cut = await speaking(store, publisher), await speaking(store, publisher)
    for spoken in (whole, cut):
        for fragment in (b"a", b"b"):
            spoken.say(fragment)
            await spoken.log.flushed()
    await store.redis.xdel(store.keys.stream(cut.job_id), "1-2")
    return whole, cut


async def assert_only_the_cut_is_lost(store: JobStore, whole: Spoken, cut: Spoken) -> None:
    """Both speak on, the whole one first."""
    whole.say(b"c")
    await whole.log.flushed()
    cut.say(b"c")
    with pytest.raises(AttemptLostError):
        await cut.log.flushed()
    assert cut.losses == [Loss.REFUSED]
    assert await said_in(store, cut.job_id) == [(Kind.DELTA, b"a")], "nothing follows the hole"
    assert await whole.finish_ok() is Ending.DONE
    await assert_whole(store, whole.job_id)


async def test_a_confirmed_entry_that_is_lost_with_an_idle_connection_ends_the_attempt_with_its_next_word(
    store: JobStore, publisher: Publisher, calls: Calls
) -> None:
    """Whoever speaks first on the new connection."""
    whole, cut = await whole_and_cut(store, publisher)
    calls.wires[-1].break_off(RedisConnectionError("a failover, while nobody speaks"))
    await assert_only_the_cut_is_lost(store, whole, cut)


async def test_a_connection_that_breaks_between_two_tries_is_another_one(
    store: JobStore, publisher: Publisher, calls: Calls
) -> None:
    """A planned failover: the old primary refuses an append, cuts its connections, and has lost a confirmed entry."""
    whole, cut = await whole_and_cut(store, publisher)

    def read_only(commands: list[str]) -> list[Any]:
        asyncio.get_running_loop().call_soon(
            calls.wires[-1].break_off, RedisConnectionError("a primary that is one no longer")
        )
        return [ReadOnlyError("You can't write against a read only replica.")] * len(commands)

    calls.answers = [read_only]
    await assert_only_the_cut_is_lost(store, whole, cut)


async def test_what_redis_refuses_for_now_holds_up_nobody_else(
    store: JobStore, publisher: Publisher, calls: Calls
) -> None:
    await store.redis.script_load(store.script("finish").script)
    refused, other = await speaking(store, publisher), await speaking(store, publisher)

    def no_memory(commands: list[str]) -> list[Any]:
        return [OutOfMemoryError("used memory > 'maxmemory'") if name == "XADD" else 0 for name in commands]

    calls.answers_for[refused.job_id] = no_memory
    refused.say(b"a")
    await async_wait_until(lambda: calls.refused > 3, timeout=5, description="an append that is refused again")
    other.say(b"b")
    async with asyncio.timeout(5):
        assert await other.finish_ok() is Ending.DONE
    await assert_whole(store, other.job_id)
    assert await said_in(store, refused.job_id) == []
    calls.answers_for.clear()
    await until_said(store, refused.job_id, b"a")
    assert await refused.finish_ok() is Ending.DONE
    assert refused.losses == []


async def test_an_attempt_whose_flush_left_a_hole_is_lost_at_once(
    store: JobStore, spoken: Spoken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis had no room for an entry, and for the next one of the same flush it had."""
    original = CallWire.call

    async def call(wire: CallWire, commands: bytes, replies: int) -> list[Any]:
        parsed = _parsed(commands)
        names = [parts[0] for parts in parsed]
        if names.count(b"XADD") != 3:
            return await original(wire, commands, replies)
        without_second = b"".join(command(*parts) for parts in parsed[:2] + parsed[4:])
        answers = await original(wire, without_second, replies - 2)
        return [*answers[:2], OutOfMemoryError("used memory > 'maxmemory'"), 0, *answers[2:]]

    monkeypatch.setattr(CallWire, "call", call)
    spoken.say(b"a")
    spoken.say(b"b", kind=Kind.REASONING)
    spoken.say(b"c")
    await async_wait_until(lambda: spoken.losses, timeout=5, description="the attempt to be lost")
    await assert_lost(spoken, Loss.REFUSED, Ending.FENCED)


async def test_an_attempt_that_has_ended_is_lost_no_more(
    store: JobStore, publisher: Publisher, spoken: Spoken, calls: Calls
) -> None:
    """The marker has landed, its answer is lost, and so is the publication of what has landed."""
    await store.redis.script_load(store.script("finish").script)
    spoken.say(b"a")
    await spoken.log.flushed()
    spoken.say(b"b")
    calls.plan = ["after", None, "before"]
    assert await spoken.finish_ok() is Ending.DONE
    await async_wait_until(lambda: calls.plan == [], timeout=5, description="the last break")
    next_one = await speaking(store, publisher)  # whose first flush comes behind whatever is tried again
    next_one.say(b"c")
    await next_one.log.flushed()
    assert (spoken.losses, spoken.log.packed_rows() is None) == ([], False)
    assert await next_one.finish_ok() is Ending.DONE


async def test_an_entry_of_somebody_else_is_not_taken_for_ones_own(
    store: JobStore, spoken: Spoken, calls: Calls
) -> None:
    """If a failover has lost the claim, another worker may be given the same attempt."""
    for entry_id in ("1-1", "1-2"):
        await store.redis.xadd(store.keys.stream(spoken.job_id), {"delta": b"another"}, id=entry_id)
    calls.plan = ["before"]
    spoken.say(b"mine")
    with pytest.raises(AttemptLostError):
        await spoken.log.flushed()
    assert spoken.losses == [Loss.REFUSED]


# -- a connection that breaks ------------------------------------------------------------------------------------------

BREAKS: list[list[str | int]] = [
    ["before"],
    ["after"],
    ["before", "before", "before"],
    ["after", "before", "after", "before"],  # the question what has landed breaks, too
    ["before", "after"],
    [1],
    [2],
    [3],
    [4],
    [5],
    [6],  # three entries, three messages, then the marker
    [3, "after", 2],
]


@pytest.mark.parametrize("plan", BREAKS, ids=lambda plan: "-".join(map(str, plan)))
async def test_a_broken_connection_loses_no_entry_and_doubles_none(
    store: JobStore, spoken: Spoken, calls: Calls, plan: list[str | int]
) -> None:
    await store.redis.script_load(store.script("finish").script)
    calls.plan = list(plan)
    spoken.say(b"a")
    spoken.say(b"b", kind=Kind.REASONING)
    spoken.say(b"c")
    assert await spoken.finish_ok() is Ending.DONE
    assert calls.plan == [], "everything planned has happened"
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"a"), (Kind.REASONING, b"b"), (Kind.DELTA, b"c")]
    await assert_whole(store, spoken.job_id)
    assert spoken.losses == []


@pytest.mark.parametrize("plan", BREAKS, ids=lambda plan: "-".join(map(str, plan)))
async def test_what_is_said_while_the_connection_is_broken_follows(
    store: JobStore, spoken: Spoken, calls: Calls, plan: list[str | int]
) -> None:
    calls.plan = list(plan)
    spoken.say(b"a")
    spoken.say(b"1", kind=Kind.TOOL)
    spoken.say(b"2", kind=Kind.TOOL)
    await async_wait_until(lambda: len(calls.plan) < len(plan), timeout=5, description="the break")
    spoken.say(b"b")
    await spoken.log.flushed()
    assert await said_in(store, spoken.job_id) == [
        (Kind.DELTA, b"a"),
        (Kind.TOOL, b"1"),
        (Kind.TOOL, b"2"),
        (Kind.DELTA, b"b"),
    ]
    assert await spoken.finish_ok() is Ending.DONE
    await assert_whole(store, spoken.job_id)


@pytest.mark.parametrize("plan", [[1], [3], [5], [5, None, "before"], ["after", None, "after"]], ids=str)
async def test_every_entry_is_published_even_if_the_connection_broke_in_between(
    store: JobStore, spoken: Spoken, calls: Calls, plan: list[str | int | None]
) -> None:
    """Otherwise a reader sees it only with the next entry, or after a quiet while."""
    async with store.redis.pubsub() as pubsub:
        await pubsub.subscribe(store.keys.stream_channel(spoken.job_id))
        assert (await pubsub.get_message(timeout=5))["type"] == "subscribe"
        calls.plan = [*plan]
        for number in range(3):
            spoken.say(b"%d" % number, kind=Kind.TOOL)
        await spoken.log.flushed()
        heard = set()
        while message := await pubsub.get_message(timeout=0.2):
            heard.add(message["data"])
    assert heard == {b"1-1 tool 0", b"1-2 tool 1", b"1-3 tool 2"}


@pytest.mark.parametrize("plan", [["after"], ["before"], [5]], ids=str)
async def test_a_break_does_not_mix_the_attempts_of_a_flush(
    store: JobStore, publisher: Publisher, calls: Calls, plan: list[str | int]
) -> None:
    attempts = [await speaking(store, publisher) for _ in range(4)]
    calls.plan = list(plan)
    for attempt in attempts:
        attempt.say(attempt.job_id.encode())
    assert await asyncio.gather(*(attempt.finish_ok() for attempt in attempts)) == [Ending.DONE] * 4
    for attempt in attempts:
        assert await said_in(store, attempt.job_id) == [(Kind.DELTA, attempt.job_id.encode())]
        await assert_whole(store, attempt.job_id)


async def test_an_answer_survives_that_redis_closes_every_connection_again_and_again(
    store: JobStore, spoken: Spoken, make_store: MakeStore
) -> None:
    killer = make_store().redis
    fragments = [b"%d " % number for number in range(100)]
    for number, fragment in enumerate(fragments):
        spoken.say(fragment)
        if number % 10 == 0:
            await killer.client_kill_filter(_type="normal", skipme=True)
        await asyncio.sleep(0.001)
    assert await spoken.finish_ok() is Ending.DONE
    said = await said_in(store, spoken.job_id)
    assert b"".join(payload for _, payload in said) == b"".join(fragments)
    await assert_whole(store, spoken.job_id)


# -- a lost attempt ----------------------------------------------------------------------------------------------------


async def assert_lost(spoken: Spoken, loss: Loss, ending: Ending) -> None:
    """It says no more, and `on_lost` was called once."""
    assert spoken.losses == [loss]
    for _ in range(2):
        with pytest.raises(AttemptLostError) as caught:
            spoken.say(b"more")
        assert caught.value.loss is loss
    with pytest.raises(AttemptLostError):
        await spoken.log.flushed()
    assert await spoken.finish_ok() is ending
    assert spoken.losses == [loss]
    assert not spoken.log.must_wait


async def test_an_attempt_whose_job_was_ended_is_lost(store: JobStore, spoken: Spoken) -> None:
    spoken.say(b"a")
    await spoken.log.flushed()
    await store.cancel(spoken.job_id, "")
    before = await entries_of(store, spoken.job_id)
    spoken.say(b"b")
    spoken.say(b"1", kind=Kind.TOOL)
    with pytest.raises(AttemptLostError, match="fenced"):
        await spoken.log.flushed()
    await assert_lost(spoken, Loss.FENCED, Ending.FENCED)
    assert await entries_of(store, spoken.job_id) == before


async def test_a_zombie_is_lost_when_the_next_attempt_is_open(store: JobStore, spoken: Spoken) -> None:
    await WorkerSteps(store, WORKER).lapse()
    await store.sweep()
    spoken.say(b"late")
    assert await spoken.finish_ok() is Ending.FENCED
    await assert_lost(spoken, Loss.FENCED, Ending.FENCED)
    assert [str(entry.id) for entry in await entries_of(store, spoken.job_id)] == ["1-0", "2-0"]
    assert await status_of(store, spoken.job_id) is Status.QUEUED


async def test_an_attempt_that_said_nothing_more_learns_at_its_end_that_it_was_fenced(
    store: JobStore, spoken: Spoken
) -> None:
    await store.cancel(spoken.job_id, "")
    assert await spoken.finish_ok() is Ending.FENCED
    assert await status_of(store, spoken.job_id) is Status.CANCELLED


async def test_an_attempt_whose_stream_is_gone_is_lost(store: JobStore, spoken: Spoken) -> None:
    await store.redis.delete(store.keys.stream(spoken.job_id))
    spoken.say(b"a")
    with pytest.raises(AttemptLostError, match="expired"):
        await spoken.log.flushed()
    await assert_lost(spoken, Loss.EXPIRED, Ending.GONE)
    assert await entries_of(store, spoken.job_id) == []


@pytest.mark.parametrize("meanwhile", ["cancelled", "deleted"])
async def test_an_attempt_that_was_lost_while_the_connection_was_broken_learns_it(
    store: JobStore, spoken: Spoken, calls: Calls, meanwhile: str
) -> None:
    calls.plan = ["before"] * 3
    spoken.say(b"a")
    await async_wait_until(lambda: len(calls.plan) < 3, timeout=5, description="the break")
    if meanwhile == "cancelled":
        await store.cancel(spoken.job_id, "")
    else:
        await store.redis.delete(store.keys.stream(spoken.job_id))
    with pytest.raises(AttemptLostError):
        await spoken.log.flushed()
    lost = (Loss.FENCED, Ending.FENCED) if meanwhile == "cancelled" else (Loss.EXPIRED, Ending.GONE)
    await assert_lost(spoken, *lost)


# What may happen between the question what has landed, two calls, and the next flush.


async def test_an_attempt_that_is_recovered_after_it_has_asked_what_landed_is_fenced(
    store: JobStore, spoken: Spoken, calls: Calls
) -> None:
    async def recover() -> None:
        await WorkerSteps(store, WORKER).lapse()
        assert dict(await store.sweep()) == {spoken.job_id: "retried"}

    calls.plan = ["before", None, recover]
    spoken.say(b"late")
    assert await spoken.finish_ok() is Ending.FENCED
    assert spoken.losses == [Loss.FENCED], "not refused: then its worker would end a job that others go on with"
    assert await said_in(store, spoken.job_id) == []


async def test_an_entry_that_arrives_after_it_was_asked_for_is_no_loss(
    store: JobStore, spoken: Spoken, calls: Calls
) -> None:
    """A proxy, or a busy Redis, may still hold commands of a connection that its client has given up."""

    async def arrive() -> None:
        entry = Entry(EntryId(1, 1), Kind.DELTA, b"once")
        await Attempt(store, WORKER, spoken.log.claim).append(entry)

    calls.plan = ["before", None, arrive]
    spoken.say(b"once")
    assert await spoken.finish_ok() is Ending.DONE
    assert await said_in(store, spoken.job_id) == [(Kind.DELTA, b"once")]


async def test_an_attempt_that_redis_has_no_room_for_goes_on_when_there_is(
    store: JobStore, spoken: Spoken, backend: Backend
) -> None:
    await store.redis.config_set("maxmemory", 1)
    try:
        spoken.say(b"a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await spoken.log.flushed()
    finally:
        await store.redis.config_set("maxmemory", 0)
    spoken.say(b"b")
    assert await spoken.finish_ok() is Ending.DONE
    await assert_whole(store, spoken.job_id)


async def test_a_lost_attempt_does_not_disturb_the_others(store: JobStore, publisher: Publisher) -> None:
    lost, alive = await speaking(store, publisher), await speaking(store, publisher)
    await store.cancel(lost.job_id, "")
    lost.say(b"a")
    alive.say(b"b")
    assert await alive.finish_ok() is Ending.DONE
    with pytest.raises(AttemptLostError):
        await lost.log.flushed()
    assert (lost.losses, alive.losses) == ([Loss.FENCED], [])
    await assert_whole(store, alive.job_id)


async def test_a_marker_that_cannot_be_sent_does_not_silence_the_others(store: JobStore, publisher: Publisher) -> None:
    """An agent gave something as its finish reason that Redis has no bytes for."""
    odd, alive = await speaking(store, publisher), await speaking(store, publisher)
    fields: Any = {"finish_reason": None}
    finishing = asyncio.create_task(odd.log.finish(Kind.OK, lambda _: b"{}", Status.SUCCEEDED, fields))
    try:
        await asyncio.sleep(0)
        alive.say(b"b")
        async with asyncio.timeout(20):
            assert await alive.finish_ok() is Ending.DONE
    finally:
        finishing.cancel()
        await asyncio.gather(finishing, return_exceptions=True)
