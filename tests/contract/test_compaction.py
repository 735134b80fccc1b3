"""A worker packs what it has finished. Nobody who asks over HTTP can tell."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.relay import Relay
from api.tail import Switchboard
from shared.entries import Entry, Kind, OkMarker
from shared.jobs import Status
from shared.packs import PACK, entries_from_row
from tests.deployment import Deployment, Start, script, text_of
from tests.waiting import wait_until

SAID = [f" {number}" for number in range(100)]
ANSWER = {"tools": ["search"] * 150, "say": SAID}  # what tools do is never merged: 300 entries, whatever the pace


def rows_of(service: Deployment, job_id: str) -> list[Any]:
    rows: Any = service.redis.xrange(service.keys.stream(job_id))
    return list(rows)


def wait_until_packed(service: Deployment, job_id: str) -> None:
    def packed() -> bool:
        return any(PACK.encode() in fields for _, fields in rows_of(service, job_id))

    wait_until(packed, timeout=10, description="packs in the stream")


async def read_late(service: Deployment, job_id: str) -> list[Entry]:
    """What a reader gets that comes when all is over."""
    store = service.store()
    entries: list[Entry] = []
    try:
        async with asyncio.timeout(10), Switchboard(store) as switchboard, switchboard.follow(job_id) as tail:
            while not entries or not entries[-1].is_marker:
                entries += await tail.next(5)
    finally:
        await store.redis.aclose(close_connection_pool=True)
    return entries


def test_a_finished_answer_is_packed_and_a_late_reader_gets_all_of_it(own_service: Start) -> None:
    service = own_service()
    with service.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=script(**ANSWER), stream=True)
        first = next(stream)
        text = (first.choices[0].delta.content or "") + text_of(stream)
    assert text == "".join(SAID)
    wait_until_packed(service, first.id)
    service.wait_for_status(first.id, Status.SUCCEEDED)

    rows = rows_of(service, first.id)
    entries = asyncio.run(read_late(service, first.id))
    assert len(rows) < len(entries) / 10 > 30
    assert entries == [entry for raw_id, fields in rows for entry in entries_from_row(raw_id, fields)]
    relay = Relay()
    spoken = [entry.payload for entry in relay.accept(entries) if entry.kind is Kind.DELTA]
    assert b"".join(spoken).decode() == text
    assert isinstance(relay.ending, OkMarker)
    assert service.keys_without_ttl() == []


@pytest.mark.parametrize("ending", ["raise", "hang"])
def test_an_answer_that_broke_off_is_packed_as_well(own_service: Start, ending: str) -> None:
    service = own_service(idle_timeout_s=1)
    with service.client() as client, pytest.raises(Exception, match="agent"):
        for chunk in client.chat.completions.create(
            model="endmark", messages=script(**ANSWER, then=ending), stream=True
        ):
            job_id = chunk.id
    wait_until_packed(service, job_id)
    assert b"error" in rows_of(service, job_id)[-1][1]


def test_a_worker_that_stops_has_packed_what_it_could_and_loses_nothing(own_service: Start) -> None:
    service = own_service()
    with service.client() as client:
        for _ in range(20):
            text_of(client.chat.completions.create(model="endmark", messages=script(say=["a"] * 50), stream=True))
    job_ids = service.job_ids()
    (worker,) = service.workers
    worker.process.terminate()
    assert worker.process.wait(10) == 0
    for job_id in job_ids:
        relay = Relay()
        relay.accept(asyncio.run(read_late(service, job_id)))
        assert isinstance(relay.ending, OkMarker)
