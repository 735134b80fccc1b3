"""The index of the jobs: it holds what there is, in an order that never changes, and pages cost what is on them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

import shared.index
from shared.index import BadCursorError, JobFilter, JobIndex, JobPage, Place, Shelf
from shared.jobs import JobKind, JobRecord, Status, new_job_id
from shared.store import JobStore
from tests.conftest import Backend, MakeStore
from tests.index import actual_index, expected_index, index_keys
from tests.jobs import a_submission, a_worker, record_of, running, submitted, the_next_ms
from tests.waiting import async_wait_until


@pytest.fixture
def index(store: JobStore) -> JobIndex:
    return JobIndex(store)


async def ended(store: JobStore, *, good: bool = True, session: str = "") -> JobRecord:
    attempt = await running(store, session=session)
    await (attempt.finish_ok() if good else attempt.finish_error())
    return await record_of(store, attempt.job_id)


async def pages(index: JobIndex, asked: JobFilter, *, limit: int, newest_first: bool = False) -> AsyncIterator[JobPage]:
    after: Place | None = None
    while True:
        page = await index.page(asked, after=after, limit=limit, newest_first=newest_first)
        yield page
        if page.next is None:
            return
        assert page.next != after, "the list goes on"
        after = page.next


async def listed(index: JobIndex, asked: JobFilter, *, limit: int = 3, newest_first: bool = False) -> list[str]:
    return [
        job.job_id async for page in pages(index, asked, limit=limit, newest_first=newest_first) for job in page.jobs
    ]


async def age(store: JobStore, job_id: str) -> None:
    """The job expires now, as it does by itself at the end of its retention."""
    keys = store.keys
    await store.redis.unlink(keys.job(job_id), keys.request(job_id), keys.stream(job_id))


async def move_on_without_a_record(store: JobStore, job_id: str) -> None:
    """What the sweep and the next claim do with an unfinished job whose record is gone."""
    await store.redis.zadd(store.keys.deadlines, {job_id: 1}, xx=True)
    await store.sweep()
    assert await (await a_worker(store)).claim() == []


# -- what it holds -----------------------------------------------------------------------------------------------------


async def test_a_job_is_where_its_record_says_through_all_its_life(store: JobStore, index: JobIndex) -> None:
    job_id = await submitted(store, session="api:a", tenant="acme", metadata={"env": "prod"}, store=True)
    worker = await a_worker(store)

    async def is_sound(status: Status) -> None:
        record = await record_of(store, job_id)
        assert record.status is status
        assert await actual_index(store) == expected_index(store.keys, [record])
        assert await index.page(JobFilter(statuses=frozenset({status}))) == JobPage([record], None)

    await is_sound(Status.QUEUED)
    attempt = await worker.claim_one()
    await is_sound(Status.RUNNING)
    await worker.lapse()
    assert [what for _, what in await store.sweep()] == ["retried"]
    await is_sound(Status.QUEUED)
    worker = await a_worker(store)
    attempt = await worker.claim_one()
    await attempt.say(b"a")
    await attempt.finish_error()
    await is_sound(Status.FAILED)
    assert await listed(index, JobFilter(worker=worker.id)) == [job_id]
    assert await listed(index, JobFilter(error_code="agent_error")) == [job_id]
    assert (await store.delete(job_id)).value == "done"
    assert await actual_index(store) == {}
    assert await listed(index, JobFilter()) == []


async def test_every_filter_finds_exactly_the_jobs_that_are_like_it(store: JobStore, index: JobIndex) -> None:
    seed = random.Random(7)
    worker = await a_worker(store)
    records: list[JobRecord] = []
    for _ in range(40):
        kind = seed.choice(list(JobKind))
        session = seed.choice(["", "api:a", "api:b"])
        job_id = await submitted(
            store,
            new_job_id(kind),
            session=session,
            kind=kind,
            tenant=seed.choice(["default", "acme"]),
            model=seed.choice(["endmark", "other:model"]),
            store=seed.choice([True, False]),
            metadata=seed.choice([{}, {"env": "prod"}, {"env": "prod", "user": "é \ud83d"}]),
        )
        match seed.choice(["queued", "cancelled", "ok", "error", "running"]):
            case "cancelled":
                await store.cancel(job_id, "not wanted")
            case how if how != "queued" and not session:
                attempts = [attempt for attempt in await worker.claim(40) if attempt.job_id == job_id]
                for attempt in attempts if how != "running" else []:
                    await (attempt.finish_ok() if how == "ok" else attempt.finish_error())
    records = sorted([job async for page in pages(index, JobFilter(), limit=7) for job in page.jobs], key=Place.of)
    assert len(records) == 40
    assert {record.status for record in records} >= {Status.QUEUED, Status.SUCCEEDED, Status.CANCELLED}

    def like(asked: JobFilter) -> list[str]:
        def is_like(job: JobRecord) -> bool:
            return (
                (not asked.statuses or job.status in asked.statuses)
                and asked.tenant in (None, job.tenant)
                and asked.kind in (None, job.kind)
                and asked.stored in (None, job.store)
                and asked.model in (None, job.model)
                and asked.session in (None, job.session)
                and asked.worker in (None, job.worker)
                and asked.error_code in (None, job.error and job.error.code)
                and all(job.metadata.get(key) == value for key, value in asked.metadata.items())
                and (asked.since_ms is None or job.accepted_ms >= asked.since_ms)
                and (asked.until_ms is None or job.accepted_ms <= asked.until_ms)
            )

        return [job.job_id for job in records if is_like(job)]

    middle_ms = records[20].accepted_ms
    single: list[dict[str, Any]] = [
        {"statuses": frozenset({Status.SUCCEEDED})},
        {"statuses": frozenset({Status.QUEUED, Status.CANCELLED})},
        {"tenant": "acme"},
        {"tenant": "nobody"},
        {"kind": JobKind.RESPONSE},
        {"stored": True},
        {"model": "other:model"},
        {"session": "api:a"},
        {"worker": worker.id},
        {"worker": "nobody"},
        {"error_code": "agent_error"},
        {"error_code": "cancelled"},
        {"metadata": {"env": "prod"}},
        {"metadata": {"env": "prod", "user": "é \ud83d"}},
        {"metadata": {"env": "test"}},
        {"since_ms": middle_ms},
        {"until_ms": middle_ms},
        {"since_ms": middle_ms, "until_ms": middle_ms},
    ]
    for one in single:
        for other in single:
            asked = JobFilter(**(one | other))
            expected = like(asked)
            assert await listed(index, asked) == expected, asked
            assert await listed(index, asked, newest_first=True) == expected[::-1], asked


async def test_nothing_is_like_an_empty_value(store: JobStore, index: JobIndex) -> None:
    await submitted(store)
    assert await index.page(JobFilter(session="")) == JobPage([], None)


async def test_the_counts_are_those_of_the_records(store: JobStore, index: JobIndex) -> None:
    good = [await ended(store) for _ in range(3)]
    bad = await ended(store, good=False)
    shelf = Shelf(
        tenant="default",
        kind=JobKind.CHAT,
        stored=False,
        status=Status.SUCCEEDED,
        error_code="",
        model="endmark",
    )
    failed = Shelf(
        tenant="default",
        kind=JobKind.CHAT,
        stored=False,
        status=Status.FAILED,
        error_code="agent_error",
        model="endmark",
    )
    assert await index.counts() == {shelf: 3, failed: 1}
    assert (await index.counts(since_ms=good[0].accepted_ms, until_ms=bad.accepted_ms))[failed] == 1
    assert await index.counts(until_ms=good[0].accepted_ms - 1) == {}


async def test_other_metadata_is_found_and_the_old_is_not(store: JobStore, index: JobIndex) -> None:
    job_id = await submitted(store, metadata={"env": "prod", "team": "a"})
    assert await index.describe(job_id, {"env": "test", "team": "a"})
    assert (await record_of(store, job_id)).metadata == {"env": "test", "team": "a"}
    assert await listed(index, JobFilter(metadata={"env": "prod"})) == []
    assert await listed(index, JobFilter(metadata={"env": "test", "team": "a"})) == [job_id]
    assert await index.describe(job_id, {})
    assert await listed(index, JobFilter(metadata={"team": "a"})) == []
    assert not await index.describe("unknown", {})


# -- expiry ------------------------------------------------------------------------------------------------------------


async def test_what_expires_leaves_the_index_with_the_next_sweep(
    backend: Backend, make_store: MakeStore, prefix: str
) -> None:
    store = make_store(retention_s=1)
    worker = await a_worker(store)
    for metadata in ({}, {"env": "prod"}):
        for number in range(3):
            job_id = await submitted(store, metadata=metadata, session="api:a" if number else "")
            attempt = await worker.claim_one()
            assert attempt.job_id == job_id
            await attempt.finish_ok()
            await JobIndex(store).describe(job_id, metadata | {"number": str(number)})

    with backend.blocking_client() as redis:
        pattern = f"{prefix}:*:job"
        await async_wait_until(lambda: not redis.keys(pattern), timeout=10, description="the records to expire")
    await store.sweep()
    assert await index_keys(store) == []


async def test_a_sweep_takes_out_only_so_many(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.store.EXPIRED_LIMIT", 4)
    for number in range(7):
        await age(store, (await ended(store, session=f"api:{number}")).job_id)
    left = []
    for _ in range(3):
        await store.sweep()
        left.append(sum(len(members) for members in (await actual_index(store)).values()))
    assert left == [6, 0, 0]  # a shelf and a session each
    assert await index_keys(store) == []


async def test_what_is_gone_too_early_is_not_shown_and_soon_forgotten(store: JobStore, index: JobIndex) -> None:
    kept = await ended(store, session="api:a")
    evicted = await ended(store, session="api:a")
    others = [await ended(store) for _ in range(5)]
    lost = await submitted(store, session="api:a")
    for job_id in (evicted.job_id, lost):
        await age(store, job_id)
    assert await listed(index, JobFilter(session="api:a")) == [kept.job_id]
    assert await listed(index, JobFilter()) == [job.job_id for job in sorted((kept, *others), key=Place.of)]
    assert await actual_index(store) == expected_index(store.keys, [kept, *others]), "what was shown in vain is gone"
    await move_on_without_a_record(store, lost)


async def test_an_unfinished_job_without_a_record_is_forgotten_when_its_deadline_has_passed(store: JobStore) -> None:
    queued = await submitted(store)
    await age(store, queued)
    await move_on_without_a_record(store, queued)
    assert await actual_index(store) == {}


async def test_every_key_of_the_index_outlives_what_it_names_and_nothing_else(store: JobStore) -> None:
    await ended(store, good=False)
    await submitted(store, session="api:a", metadata={"env": "prod"})
    unfinished_ms = 2 * 900_000 + 3_600_000
    for key in await index_keys(store):
        left_ms = await store.redis.pttl(key)
        assert 3_600_000 <= left_ms <= 4 * unfinished_ms, key


# -- paging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newest_first", [False, True])
async def test_a_list_is_stable_while_jobs_come_end_and_go(
    store: JobStore, index: JobIndex, newest_first: bool
) -> None:
    before = [await submitted(store) for _ in range(20)]
    worker = await a_worker(store)
    seen: list[str] = []
    gone: set[str] = set()
    async for page in pages(index, JobFilter(), limit=3, newest_first=newest_first):
        seen += [job.job_id for job in page.jobs]
        await the_next_ms(store)  # jobs of one stand in the order of their names, so a later one may come before
        await submitted(store)
        for attempt in await worker.claim(2):
            await attempt.finish_ok()
            if len(gone) < 5:
                gone.add(attempt.job_id)
                await age(store, attempt.job_id)
                await store.sweep()
        if len(seen) > 200:
            break  # the asserts will say it
    assert len(seen) == len(set(seen)), "no job is listed twice"
    assert set(before) - gone <= set(seen), "no job that was there all the time is missed"
    if newest_first:
        assert set(seen) <= set(before), "what came later is not behind the cursor"


async def test_jobs_of_one_instant_have_an_order_too(store: JobStore, index: JobIndex) -> None:
    ids = sorted([(await ended(store)).job_id for _ in range(7)])
    shelf = "default:chatcmpl:0:succeeded::endmark"
    await store.redis.zadd(store.keys.shelf(shelf), dict.fromkeys(ids, 17))
    for job_id in ids:
        await store.redis.hset(store.keys.job(job_id), "accepted_ms", "17")  # type: ignore[misc]  # redis-py types both its clients at once
    for limit in (1, 2, 3, 7, 8):
        assert await listed(index, JobFilter(), limit=limit) == ids
        assert await listed(index, JobFilter(), limit=limit, newest_first=True) == ids[::-1]


async def test_what_is_rare_among_many_costs_pages_that_are_short_but_never_the_end(
    store: JobStore, index: JobIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.index, "LOOKS", 2)
    monkeypatch.setattr(shared.index, "CALLS", 2)
    worker = await a_worker(store)
    for number in range(12):
        job_id = await submitted(store, session="api:a")
        attempt = await worker.claim_one()
        await (attempt.finish_error() if number in (5, 11) else attempt.finish_ok())
    for _ in range(12):
        job_id = await submitted(store)
        attempt = await worker.claim_one()
        await attempt.finish_error()
    asked = JobFilter(session="api:a", error_code="agent_error")
    sizes = [len(page.jobs) async for page in pages(index, asked, limit=5)]
    assert sum(sizes) == 2
    assert 0 in sizes[:-1], "a page that is empty, and not the last"
    assert len(await listed(index, asked)) == 2
    assert job_id not in await listed(index, asked)


async def test_a_page_of_two_hundred_shelves_is_in_order(store: JobStore, index: JobIndex) -> None:
    ids = [await submitted(store, tenant=f"t{number % 97}", store=number % 2 == 0) for number in range(300)]
    records = [await record_of(store, job_id) for job_id in ids]
    assert await listed(index, JobFilter(), limit=100) == [job.job_id for job in sorted(records, key=Place.of)]


# -- cursors -----------------------------------------------------------------------------------------------------------


def test_a_cursor_is_the_place_that_it_was_made_of() -> None:
    place = Place(1_700_000_000_123, new_job_id())
    assert Place.parse(place.cursor()) == place


@pytest.mark.parametrize("text", ["", "x", "é", "AAAA", "A" * 500, "====", "MTcuYQ", "a\x00b"])
def test_what_is_no_cursor_is_said_to_be_none(text: str) -> None:
    with pytest.raises(BadCursorError):
        Place.parse(text)


def test_a_cursor_that_was_changed_is_none() -> None:
    cursor = Place(1_700_000_000_123, new_job_id()).cursor()
    for position in range(len(cursor)):
        changed = cursor[:position] + ("A" if cursor[position] != "A" else "B") + cursor[position + 1 :]
        with pytest.raises(BadCursorError):
            Place.parse(changed)


async def test_a_deleted_and_described_job_leaves_nothing_behind(store: JobStore, index: JobIndex) -> None:
    job = await ended(store, session="api:a")
    await index.describe(job.job_id, {"env": "prod"})
    await store.delete(job.job_id)
    assert await actual_index(store) == {}
    assert await index.place_of_deleted("default", job.job_id) == Place.of(job)
    assert await index.place_of_deleted("acme", job.job_id) is None
    await store.redis.delete(store.keys.deleted("default", job.job_id))
    await store.sweep()
    assert await index_keys(store) == []


async def test_a_submission_is_indexed_once_however_often_it_comes(store: JobStore, index: JobIndex) -> None:
    job = a_submission(metadata={"env": "prod"})
    await store.submit(job)
    await store.submit(job)
    assert await listed(index, JobFilter()) == [job.job_id]
