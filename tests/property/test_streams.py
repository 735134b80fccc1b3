"""What holds for any text, any split, any order of steps: streams, readers and the queue."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Awaitable, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import fakeredis
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from openai._streaming import SSEDecoder
from redis.exceptions import ResponseError

import api.tail
from api.chunks import ChunkEncoder, error_frame
from api.relay import Relay
from api.sse import PING
from api.tail import Switchboard
from shared.connection import connect
from shared.entries import (
    BEGINNING,
    Entry,
    EntryId,
    ErrorMarker,
    Kind,
    OkMarker,
    Tally,
    entry_from_message,
    entry_to_message,
    merge,
)
from shared.index import JobFilter, JobIndex, Place
from shared.jobs import JobRecord, Status
from shared.settings import Settings
from shared.store import Ending, JobStore
from shared.text import text_bytes
from tests.conftest import fake_client
from tests.index import actual_index, expected_index
from tests.jobs import Attempt, WorkerSteps, entries_of, running, submitted
from worker.compactor import Compactor

T = TypeVar("T")

OPEN = Entry(EntryId(1, 0), Kind.OPEN, b"worker")


# -- from the agent's mouth to the client's ear ------------------------------------------------------------------------

texts = st.text(alphabet=st.characters()) | st.text(alphabet="\ud83d\ude42\x00🙂é\u2028\x85\r\n\\\"'/ ") | st.text("ab")
long_texts = st.builds(
    lambda text, times: text * times, st.text(st.characters(), min_size=1, max_size=9), st.just(9000)
)
fragments = st.tuples(st.sampled_from([Kind.DELTA, Kind.REASONING]), texts | long_texts)
breaths = st.lists(st.lists(fragments, max_size=6), max_size=6)  # what is said between one flush and the next


def as_a_json_reader_sees_it(text: str) -> str:
    """Halves of a surrogate pair that meet are one character to whoever decodes JSON, and to whoever joins strings."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def split(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The same bytes in pieces, as a network delivers them."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in pairwise(places):
        yield data[start:end]


@settings(max_examples=150)
@given(said=breaths, cuts=st.lists(st.integers(min_value=0, max_value=2**32), max_size=20))
def test_what_an_agent_says_is_what_the_openai_sdk_reads(said: list[list[tuple[Kind, str]]], cuts: list[int]) -> None:
    tally, sequence = Tally(), 0
    relay = Relay()
    encoder = ChunkEncoder(completion_id="chatcmpl-1", created=17, model="endmark", include_usage=False)
    relay.accept([OPEN])
    frames = PING
    for breath in said:
        for kind, payload in merge([(kind, text_bytes(text)) for kind, text in breath]):
            tally.add(kind, payload)
            sequence += 1
            entry = entry_from_message(entry_to_message(Entry(EntryId(1, sequence), kind, payload)))
            frames += encoder.frames(relay.accept([entry]))
        frames += PING + encoder.heartbeat()
    marker = OkMarker(tally.count, tally.digest, "stop", None)
    relay.accept([Entry(EntryId(1, sequence + 1), Kind.OK, marker.payload())])
    assert relay.ending == marker
    frames += encoder.ending(marker)

    *events, done = [event.data for event in SSEDecoder().iter_bytes(split(frames, cuts))]
    assert done == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    for kind, field in ((Kind.DELTA, "content"), (Kind.REASONING, "reasoning_content")):
        spoken = "".join(text for breath in said for said_kind, text in breath if said_kind is kind)
        read = "".join(choice["delta"].get(field, "") for choice in choices)
        assert as_a_json_reader_sees_it(read) == as_a_json_reader_sees_it(spoken)
    assert [choice["delta"]["role"] for choice in choices if "role" in choice["delta"]] == ["assistant"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


@given(message=texts, cuts=st.lists(st.integers(min_value=0, max_value=2**32), max_size=9))
def test_any_error_is_one_event_that_the_openai_sdk_raises(message: str, cuts: list[int]) -> None:
    frame = error_frame(ErrorMarker("agent_error", message))
    (event,) = SSEDecoder().iter_bytes(split(PING + frame, cuts))
    error = json.loads(event.data)
    assert list(error) == ["error"]
    assert as_a_json_reader_sees_it(error["error"]["message"]) == as_a_json_reader_sees_it(message)


# -- what the relay believes -------------------------------------------------------------------------------------------

spoken_entries = st.lists(
    st.tuples(st.sampled_from([Kind.DELTA, Kind.REASONING, Kind.TOOL, Kind.TOOL_CALL]), st.binary(max_size=5)),
    max_size=8,
).map(lambda said: [Entry(EntryId(1, number), kind, payload) for number, (kind, payload) in enumerate(said, start=1)])


def ok_marker(entries: list[Entry]) -> Entry:
    tally = Tally()
    for entry in entries:
        tally.add(entry.kind, entry.payload)
    return Entry(EntryId(1, len(entries) + 1), Kind.OK, OkMarker(tally.count, tally.digest, "stop", None).payload())


@given(entries=spoken_entries, cuts=st.lists(st.integers(min_value=0, max_value=2**32), max_size=5))
def test_an_untouched_stream_ends_well_however_it_arrives(entries: list[Entry], cuts: list[int]) -> None:
    stream = [OPEN, *entries, ok_marker(entries)]
    relay = Relay()
    passed_on: list[Entry] = []
    for start, end in pairwise(sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})):
        passed_on += relay.accept(stream[start:end])
    assert passed_on == [OPEN, *entries]
    assert isinstance(relay.ending, OkMarker)


@given(entries=spoken_entries.filter(bool), data=st.data())
def test_a_damaged_stream_never_ends_well(entries: list[Entry], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(entries) - 1), label="place")
    other = data.draw(st.integers(0, len(entries) - 1), label="other place")
    damaged = list(entries)
    match data.draw(st.sampled_from(["dropped", "doubled", "swapped", "altered", "reopened"]), label="damage"):
        case "dropped":
            del damaged[place]
        case "doubled":
            damaged.insert(other, damaged[place])
        case "swapped":
            damaged[place], damaged[other] = damaged[other], damaged[place]
            assume(b"".join(e.payload for e in damaged) != b"".join(e.payload for e in entries))
        case "altered":
            payload = data.draw(st.binary(max_size=5), label="payload")
            assume(payload != damaged[place].payload)
            damaged[place] = damaged[place]._replace(payload=payload)
        case "reopened":
            damaged.insert(place + 1, OPEN._replace(id=EntryId(2, 0)))
    relay = Relay()
    relay.accept([OPEN, *damaged, ok_marker(entries)])
    assert isinstance(relay.ending, ErrorMarker)


@given(
    entries=spoken_entries,
    after=st.lists(st.sampled_from([OPEN, *[Entry(EntryId(1, 9), kind, b"{}") for kind in Kind]]), min_size=1),
    good=st.booleans(),
)
def test_nothing_is_passed_on_after_a_marker(entries: list[Entry], after: list[Entry], good: bool) -> None:
    marker = ok_marker(entries) if good else Entry(EntryId(2, 0), Kind.ERROR, ErrorMarker("c", "m").payload())
    relay = Relay()
    assert relay.accept([OPEN, *entries, marker, *after]) == [OPEN, *entries]
    ending = relay.ending
    assert isinstance(ending, OkMarker) == good
    assert relay.accept(after) == []
    assert relay.ending is ending


# -- readers -----------------------------------------------------------------------------------------------------------


class Deployment:
    """A store, by default on a fake server, and a loop to run it in: for tests that hypothesis drives step by step."""

    def __init__(self, redis_url: str | None = None) -> None:
        self.runner = asyncio.Runner()
        self.store = self.run(self._make_store(redis_url))

    async def _make_store(self, redis_url: str | None) -> JobStore:
        if redis_url is not None:
            settings = Settings(prefix=f"test-{secrets.token_hex(6)}", redis_url=redis_url)
            return JobStore(connect(settings), settings)
        client = fake_client(fakeredis.FakeServer(version=(7,)))
        return JobStore(client, Settings(prefix="test", max_attempts=2, max_session_turns=5, max_unfinished=20))

    def run(self, step: Any) -> Any:
        return self.runner.run(step)

    def close(self) -> None:
        self.run(self.store.redis.aclose(close_connection_pool=True))
        self.runner.close()


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    deployment = Deployment()
    yield deployment
    deployment.close()


@pytest.fixture(scope="module")
def real_deployment(redis_url: str) -> Iterator[Deployment]:
    deployment = Deployment(redis_url)
    yield deployment
    deployment.close()


async def _said(store: JobStore, count: int) -> Attempt:
    attempt = await running(store)
    await attempt.say(*(b"%d" % number for number in range(count)))
    await attempt.finish_ok()
    return attempt


@settings(max_examples=60)
@given(count=st.integers(0, 12), seen=st.integers(0, 15), page=st.integers(1, 15), packed=st.booleans())
def test_any_cursor_gets_exactly_what_follows_it(
    deployment: Deployment, count: int, seen: int, page: int, packed: bool
) -> None:
    store = deployment.store
    attempt = deployment.run(_said(store, count))
    whole = deployment.run(entries_of(store, attempt.job_id))
    assert len(whole) == count + 2
    if packed:
        assert deployment.run(Compactor(store, attempt.worker_id).compact(attempt.claim))
    cursor = whole[min(seen, len(whole)) - 1].id if seen else BEGINNING
    read = deployment.run(store.read_after(attempt.job_id, cursor, page))
    follows = [entry for entry in whole if entry.id > cursor]
    assert read.entries == follows[: len(read.entries)]
    assert len(read.entries) == min(page, len(follows)) or (packed and len(read.entries) > page)
    assert read.more or read.entries == follows


steps = st.lists(
    st.sampled_from(
        ["say", "say", "say", "append only", "publish an old one", "publish a zombie's", "nonsense", "read"]
    ),
    max_size=14,
)


@settings(max_examples=60)
@given(before=st.integers(0, 8), seen=st.integers(0, 9), steps=steps, pushes=st.booleans())
def test_a_tail_gives_exactly_what_follows_its_cursor_whatever_pub_sub_brings(
    real_deployment: Deployment, before: int, seen: int, steps: list[str], pushes: bool
) -> None:
    async def follow() -> None:
        store = real_deployment.store
        attempt = await running(store)
        channel = store.keys.stream_channel(attempt.job_id)
        await attempt.say(*(b"%d" % number for number in range(before)))
        cursor = EntryId(1, min(seen - 1, before)) if seen else BEGINNING
        got: list[Entry] = []

        def take(entries: list[Entry]) -> bool:
            got.extend(entries)
            return len(got) % 3 != 0 and not entries[-1].is_marker

        push = take if pushes else None
        async with Switchboard(store) as switchboard, switchboard.follow(attempt.job_id, after=cursor) as tail:
            for step in steps:
                match step:
                    case "say":
                        await attempt.say(b"said")
                    case "append only":
                        await attempt.say(b"said", publish=False)
                    case "publish an old one":
                        for entry in await entries_of(store, attempt.job_id):
                            await store.redis.publish(channel, entry_to_message(entry))
                    case "publish a zombie's":
                        await store.redis.publish(channel, b"0-9 delta late")
                    case "nonsense":
                        await store.redis.publish(channel, b"nonsense")
                    case _:
                        got += await tail.next(0.002, push)
            await attempt.finish_ok()
            async with asyncio.timeout(5):
                while not got or not got[-1].is_marker:
                    got += await tail.next(0.5, push)
        assert got == [entry for entry in await entries_of(store, attempt.job_id) if entry.id > cursor]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.tail, "PAGE_ENTRIES", 3)
        patch.setattr(api.tail, "QUIET_S", 0.2)
        real_deployment.run(follow())


# -- the queue ---------------------------------------------------------------------------------------------------------

SESSIONS = ("", "", "api:a", "api:b")
WORKERS = ("w1", "w2")
TENANTS = ("default", "acme")
metadata = st.dictionaries(st.sampled_from("kl"), st.sampled_from("vw"), max_size=2)


class Queue(RuleBasedStateMachine):
    """Any order of steps, the steps of zombies included. What each job was like is remembered and compared."""

    attempts: Bundle[Attempt] = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.deployment = Deployment()
        self.store = self.deployment.store
        self.accepted: list[str] = []
        self.session_of: dict[str, str] = {}
        self.state_of: dict[str, bytes] = {}  # what the last whole turn of each session left
        self.ended: dict[str, tuple[JobRecord, list[Entry]]] = {}  # how the terminal jobs were when they ended
        self.opened: list[Attempt] = []
        self.executing: dict[
            tuple[str, int], str
        ] = {}  # job and attempt: the worker that has neither released nor lost it

    def teardown(self) -> None:
        self.deployment.close()

    def run(self, step: Awaitable[T]) -> T:
        result: T = self.deployment.run(step)
        return result

    def record(self, job_id: str) -> JobRecord:
        record: JobRecord | None = self.run(self.store.record(job_id))
        assert record is not None
        return record

    def is_current(self, attempt: Attempt) -> bool:
        record = self.record(attempt.job_id)
        return (record.status, record.worker, record.attempt) == (
            Status.RUNNING,
            attempt.worker_id,
            attempt.claim.attempt,
        )

    # -- steps

    @initialize(
        target=attempts,
        sessions=st.lists(st.sampled_from(SESSIONS), min_size=1, max_size=4),
        said=st.tuples(*[st.integers(0, 3)] * 3),
    )
    def start(self, sessions: list[str], said: tuple[int, ...]) -> Any:
        """Some jobs are there already, some run and have said something: chance alone seldom gets that far."""
        for worker_id in WORKERS:
            self.run(WorkerSteps(self.store, worker_id).beat())
        for session in sessions:
            self.accept(session)
        claimed = self.claim_some("w1", 3)
        for attempt, count in zip(claimed, said, strict=False):
            self.run(attempt.say(*[b"said"] * count))
        return multiple(*claimed)

    @precondition(lambda self: len(self.accepted) < 12)
    @rule(session=st.sampled_from(SESSIONS), tenant=st.sampled_from(TENANTS), metadata=metadata)
    def submit(self, session: str, tenant: str, metadata: dict[str, str]) -> None:
        turns = sum(1 for other in self.accepted if session and self.session_of[other] == session)
        assume(turns < 5)
        self.accept(session, tenant=tenant, metadata=metadata)

    def accept(self, session: str, **changes: Any) -> None:
        job_id = f"job-{len(self.accepted):02}"
        self.run(submitted(self.store, job_id, session=session, **changes))
        self.accepted.append(job_id)
        self.session_of[job_id] = session

    @rule(target=attempts, worker_id=st.sampled_from(WORKERS), slots=st.integers(1, 3))
    def claim(self, worker_id: str, slots: int) -> Any:
        return multiple(*self.claim_some(worker_id, slots))

    def claim_some(self, worker_id: str, slots: int) -> list[Attempt]:
        worker = WorkerSteps(self.store, worker_id)
        self.run(worker.beat())
        claimed = self.run(worker.claim(slots))
        for attempt in claimed:
            session = self.session_of[attempt.job_id]
            earlier = self.accepted[: self.accepted.index(attempt.job_id)]
            if session:
                assert all(self.record(job).finished_ms for job in earlier if self.session_of[job] == session)
                assert self.run(self.store.session_state(session)) == self.state_of.get(session)
            self.executing[attempt.job_id, attempt.claim.attempt] = worker_id
        self.opened += claimed
        return claimed

    @rule(attempt=attempts, payloads=st.lists(st.binary(max_size=3), min_size=1, max_size=3))
    def say(self, attempt: Attempt, payloads: list[bytes]) -> None:
        if self.is_current(attempt):
            self.run(attempt.say(*payloads))
            return
        late = Entry(EntryId(attempt.claim.attempt, attempt.tally.count + 1), Kind.DELTA, payloads[0])
        with pytest.raises(ResponseError, match="equal or smaller"):
            self.run(attempt.append(late))

    @rule(attempt=attempts, good=st.booleans())
    def finish(self, attempt: Attempt, good: bool) -> None:
        current = self.is_current(attempt)
        state = f"{attempt.job_id} {attempt.claim.attempt}".encode()
        ending = self.run(attempt.finish_ok(state) if good else attempt.finish_error())
        assert ending is (Ending.DONE if current else Ending.FENCED)
        if current and good:
            self.state_of[self.session_of[attempt.job_id]] = state
        if current:
            del self.executing[attempt.job_id, attempt.claim.attempt]

    @rule(attempt=consumes(attempts))
    def release(self, attempt: Attempt) -> None:
        assume(not self.is_current(attempt))
        self.run(attempt.release())
        self.executing.pop((attempt.job_id, attempt.claim.attempt), None)

    @precondition(lambda self: self.opened)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        """By anybody who had an attempt, at any time; the ended jobs first, and those that said something."""
        attempt = data.draw(st.sampled_from(sorted(self.opened, key=self._is_to_be_packed, reverse=True)))
        packed = self.run(Compactor(self.store, attempt.worker_id).compact(attempt.claim))
        assert not packed or attempt.job_id in self.ended

    def _is_to_be_packed(self, attempt: Attempt) -> tuple[bool, int]:
        return attempt.job_id in self.ended, attempt.tally.count

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.accepted))
        ending = self.run(self.store.cancel(job_id, "nobody wants it"))
        assert ending is (Ending.TERMINAL if job_id in self.ended else Ending.DONE)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data(), metadata=metadata)
    def describe(self, data: st.DataObject, metadata: dict[str, str]) -> None:
        job_id = data.draw(st.sampled_from(self.accepted))
        assert self.run(JobIndex(self.store).describe(job_id, metadata))
        if job_id in self.ended:
            self.ended[job_id] = self.record(job_id), self.ended[job_id][1]

    @rule(worker_id=st.sampled_from(WORKERS))
    def lose(self, worker_id: str) -> None:
        self.run(WorkerSteps(self.store, worker_id).lapse())
        before = {job_id: self.record(job_id) for job_id in self.accepted}
        swept = dict(self.run(self.store.sweep()))
        lost = {
            job_id for job_id, record in before.items() if (record.status, record.worker) == (Status.RUNNING, worker_id)
        }
        assert set(swept) == lost
        assert set(swept.values()) <= {"retried", "worker_lost"}
        self.executing = {attempt: worker for attempt, worker in self.executing.items() if worker != worker_id}

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def miss_a_deadline(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.accepted))
        was = self.record(job_id).status
        self.run(self.store.redis.zadd(self.store.keys.deadlines, {job_id: 1}, xx=True))
        expected = {Status.QUEUED: ({"queue_timeout"}, {"no_worker"}), Status.RUNNING: ({"timeout"},)}.get(
            was, (set(),)
        )
        assert set(dict(self.run(self.store.sweep())).values()) in expected
        if job_id in self.ended:  # its worker did not say in time that it stopped
            self.executing = {attempt: worker for attempt, worker in self.executing.items() if attempt[0] != job_id}

    # -- what always holds

    @invariant()
    def every_job_is_sound(self) -> None:
        records = {job_id: self.record(job_id) for job_id in self.accepted}
        for job_id, record in records.items():
            entries = self.run(entries_of(self.store, job_id))
            self.check_stream(entries)
            markers = [entry for entry in entries if entry.is_marker]
            assert len(markers) == (record.finished_ms is not None)
            if not markers:
                assert record.status in (Status.QUEUED, Status.RUNNING)
                continue
            assert markers == entries[-1:], "nothing follows a marker"
            assert (record.status is Status.SUCCEEDED) == (markers[0].kind is Kind.OK)
            assert record.status not in (Status.QUEUED, Status.RUNNING)
            assert self.ended.setdefault(job_id, (record, entries)) == (record, entries), "what has ended never changes"

        busy = Counter(self.session_of[job] for job, record in records.items() if record.status is Status.RUNNING)
        assert all(count == 1 for session, count in busy.items() if session), "one turn of a session at a time"

    @invariant()
    def the_index_is_what_the_records_say(self) -> None:
        records = [self.record(job_id) for job_id in self.accepted]
        assert self.run(actual_index(self.store)) == expected_index(self.store.keys, records)
        page = self.run(JobIndex(self.store).page(JobFilter(), limit=100, newest_first=False))
        assert page.next is None
        assert page.jobs == sorted(records, key=Place.of)

    @staticmethod
    def check_stream(entries: list[Entry]) -> None:
        cursor, shown = BEGINNING, False
        for entry in entries:
            assert cursor.is_followed_by(entry.id)
            assert not (shown and entry.kind is Kind.OPEN), "no attempt opens after something was shown"
            shown = shown or (entry.kind is not Kind.OPEN and not entry.is_marker)
            cursor = entry.id

    @invariant()
    def nothing_is_forgotten(self) -> None:
        async def indices() -> tuple[set[str], set[str]]:
            redis, keys = self.store.redis, self.store.keys
            queue, deadlines = [await redis.zrange(key, 0, -1) for key in (keys.queue, keys.deadlines)]
            return {job.decode() for job in queue}, {job.decode() for job in deadlines}

        queue, deadlines = self.run(indices())
        unfinished = [job for job in self.accepted if job not in self.ended]
        held = {job for job, _ in self.executing if job in self.ended}
        assert deadlines == set(unfinished) | held, "every job has a deadline until it has ended and is released"
        taken = {self.session_of[job] for job in held} - {""}
        for job_id in unfinished:
            session, record = self.session_of[job_id], self.record(job_id)
            if record.status is Status.RUNNING:
                assert job_id not in queue
                assert session not in taken, "an ended turn that still executes keeps its session"
                assert job_id in self.run(WorkerSteps(self.store, record.worker).jobs()), "its worker would be missed"
            else:
                waits = session in taken
                assert (job_id in queue) != waits, "a turn waits for the one before it, and for nothing else"
            if session:
                taken.add(session)


@pytest.mark.timeout(600)  # if it fails, hypothesis takes its time to find the shortest way there
def test_no_order_of_steps_breaks_the_queue() -> None:
    run_state_machine_as_test(Queue, settings=settings(max_examples=50, stateful_step_count=35, deadline=None))
