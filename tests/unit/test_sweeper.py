"""When a process may sweep: not before Redis has taken writes for one whole lease."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from redis.exceptions import ReadOnlyError

from shared import sweeper
from shared.store import JobStore
from shared.sweeper import sweep_forever

LEASE_S = 5.0


class Clock:
    """The loop's time, which passes only while the sweeper sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.until = 0.0
        monkeypatch.setattr(sweeper.asyncio, "sleep", self.sleep)  # type: ignore[attr-defined]  # the module that it uses
        monkeypatch.setattr(sweeper.asyncio, "get_running_loop", lambda: SimpleNamespace(time=lambda: self.now))  # type: ignore[attr-defined]  # as above
        monkeypatch.setattr(sweeper, "address_of_primary", lambda _: None)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self.until:
            raise asyncio.CancelledError


class Server:
    """Notes when it is swept; takes no writes during its outages."""

    def __init__(self, clock: Clock, *outages: tuple[float, float]) -> None:
        self.settings = SimpleNamespace(lease_s=LEASE_S)
        self.redis = None
        self.swept_at: list[float] = []
        self._clock = clock
        self._outages = outages

    async def probe(self) -> None:
        if any(begin <= self._clock.now < end for begin, end in self._outages):
            raise ReadOnlyError("READONLY")

    async def sweep(self, **_: Any) -> list[Any]:
        await self.probe()
        self.swept_at.append(self._clock.now)
        return []


async def swept_at(monkeypatch: pytest.MonkeyPatch, until: float, *outages: tuple[float, float]) -> list[float]:
    clock = Clock(monkeypatch)
    clock.until = until
    server = Server(clock, *outages)
    with pytest.raises(asyncio.CancelledError):
        await sweep_forever(cast(JobStore, server))
    return server.swept_at


async def test_a_sweep_with_a_defect_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.until = 60.0
    server = Server(clock)
    sound, broken = server.sweep, iter([True])

    async def sweep(**options: Any) -> list[Any]:
        if next(broken, False):
            raise ValueError("what nobody foresaw")
        return await sound(**options)

    monkeypatch.setattr(server, "sweep", sweep)
    with pytest.raises(asyncio.CancelledError):
        await sweep_forever(cast(JobStore, server))
    assert len(server.swept_at) > 200


async def test_nothing_is_swept_within_one_lease_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    at = await swept_at(monkeypatch, 60)
    assert LEASE_S <= at[0] <= 1.25 * LEASE_S + 0.5
    assert len(at) > 200


@pytest.mark.parametrize(
    "outage",
    [(20.0, 23.0), (20.0, 20.5), (20.0, 35.0)],
    ids=["shorter than a lease", "over before anybody looks twice", "longer than a lease"],
)
async def test_nothing_is_swept_within_one_lease_of_the_end_of_an_outage(
    monkeypatch: pytest.MonkeyPatch, outage: tuple[float, float]
) -> None:
    """Whenever the outage was noticed. Workers could not beat while it lasted."""
    at = await swept_at(monkeypatch, 60, outage)
    after = [instant for instant in at if instant >= outage[0]]
    assert after[0] >= outage[1] + LEASE_S - sweeper.INTERVAL_S * 1.25
    assert after[0] <= outage[1] + 1.25 * LEASE_S + 0.5


async def test_an_outage_while_it_waits_begins_the_wait_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    at = await swept_at(monkeypatch, 30, (2.0, 4.0))
    assert at[0] >= 4.0 + LEASE_S - sweeper.INTERVAL_S * 1.25
