"""Clients that went away: Redis is told, at once, or when they have not come back, or when it answers again."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import structlog

from shared.connection import FAILURES, insist
from shared.store import JobStore, Left
from shared.tasks import Errands

log = structlog.get_logger(__name__)


class Departure(NamedTuple):
    """A client that waits no longer."""

    job_id: str
    waiter: str  # the id of the submission by which it waited
    why: str  # for whoever looks at the job


class Departures:
    """Tells Redis of departures until it has heard of them, or this process ends: then deadlines end the jobs."""

    def __init__(self, store: JobStore, errands: Errands) -> None:
        self._store = store
        self._errands = errands
        self._unheard: list[Departure] = []  # told one after the other: there may be as many as there were streams
        self._is_telling = False
        self._stopping = asyncio.Event()

    async def tell(self, departure: Departure, *, comes_back_within_s: float = 0.0) -> None:
        """`comes_back_within_s`: how long a job that runs is left alone, for the client to ask for it again; 0: not."""
        try:
            left = await self._tell(departure, may_come_back=comes_back_within_s > 0)
        except FAILURES as error:
            log.warning("leave_repeated", job=departure.job_id, reason=str(error))
            if not comes_back_within_s:
                self._tell_when_redis_answers(departure)
                return
            left = Left.LATER
        if left is Left.LATER:
            self._errands.start(self._tell_later(departure, comes_back_within_s))

    def stop(self) -> None:
        """Nobody is waited for any longer: this process is about to end."""
        self._stopping.set()

    async def _tell(self, departure: Departure, *, may_come_back: bool) -> Left:
        left = await self._store.leave(*departure, may_come_back=may_come_back)
        log.info("client_left", job=departure.job_id, why=departure.why, job_is=left.value)
        return left

    async def _tell_later(self, departure: Departure, pause_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()
        await self.tell(departure)

    def _tell_when_redis_answers(self, departure: Departure) -> None:
        self._unheard.append(departure)
        if not self._is_telling:
            self._is_telling = True
            self._errands.start(self._insist())

    async def _insist(self) -> None:
        try:
            while self._unheard:
                departure = self._unheard.pop()
                try:
                    await insist(partial(self._tell, departure, may_come_back=False))
                except Exception:  # one that will not pass must not keep the others
                    log.exception("leave_failed", job=departure.job_id)
        finally:
            self._is_telling = False
