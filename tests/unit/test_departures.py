"""api/departures.py: what Redis is told of clients that went away, and when."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from api.departures import Departure, Departures
from shared.store import JobStore, Left
from shared.tasks import Errands
from tests.waiting import async_wait_until

A_LONG_TIME_S = 60.0


class Store:
    """Answers as it is told to, then that the job is cancelled; notes what it was told."""

    def __init__(self, *answers: Exception | Left) -> None:
        self._answers = list(answers)
        self.told: list[tuple[str, bool]] = []  # job id, and whether the client may come back

    async def leave(self, job_id: str, _waiter: str, _why: str, *, may_come_back: bool) -> Left:
        answer = self._answers.pop(0) if self._answers else Left.CANCELLED
        if isinstance(answer, Exception):
            raise answer
        self.told.append((job_id, may_come_back))
        return answer


def departures_to(store: Store) -> tuple[Departures, Errands]:
    errands = Errands()
    return Departures(cast(JobStore, store), errands), errands


def departure(job_id: str = "a") -> Departure:
    return Departure(job_id, job_id, "The client went away.")


async def test_one_that_does_not_come_back_is_told_again() -> None:
    store = Store(Left.LATER)
    departures, errands = departures_to(store)
    await departures.tell(departure(), comes_back_within_s=0.01)
    await errands.finish(within_s=5)
    assert store.told == [("a", True), ("a", False)]


async def test_a_moment_without_redis_shortens_nobodys_pause() -> None:
    """An SDK that sends its request again finds the job still running."""
    store = Store(RedisConnectionError("away"))
    departures, errands = departures_to(store)
    await departures.tell(departure(), comes_back_within_s=A_LONG_TIME_S)
    await errands.finish(within_s=0.05)
    assert store.told == []


async def test_who_waits_for_a_client_to_come_back_stops_waiting_when_the_process_does() -> None:
    store = Store(Left.LATER)
    departures, errands = departures_to(store)
    await departures.tell(departure(), comes_back_within_s=A_LONG_TIME_S)
    departures.stop()
    await errands.finish(within_s=5)
    assert store.told == [("a", True), ("a", False)]


async def test_a_process_that_stops_waits_for_what_redis_does_not_hear_at_once() -> None:
    store = Store(Left.LATER, RedisConnectionError("away"), RedisConnectionError("away"))
    departures, errands = departures_to(store)
    await departures.tell(departure(), comes_back_within_s=A_LONG_TIME_S)
    departures.stop()
    await errands.finish(within_s=5)
    assert store.told == [("a", True), ("a", False)]


@pytest.mark.parametrize("error", [RedisConnectionError("away"), ResponseError("ERR this one will not pass")])
async def test_one_that_redis_does_not_hear_keeps_no_other_from_being_told(error: Exception) -> None:
    away = [RedisConnectionError("away") for _ in range(3)]
    store = Store(*away, error)
    departures, _errands = departures_to(store)
    await asyncio.gather(*(departures.tell(departure(job_id)) for job_id in "abc"))

    def others_told() -> Any:
        return len(store.told) >= 2

    await async_wait_until(others_told, timeout=5, description="the others to be told")
