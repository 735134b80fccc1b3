"""Clients that went away while Redis did not answer. Their jobs are told as soon as it does."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import structlog

from shared.connection import insist
from shared.store import JobStore, Left
from shared.tasks import Errands

log = structlog.get_logger(__name__)


class Departure(NamedTuple):
    """A client that waits no longer."""

    job_id: str
    waiter: str  # the id of the submission by which it waited
    why: str  # for whoever looks at the job


class Departures:
    """Departures that Redis has not confirmed. One after the other: there may be as many as there were streams."""

    def __init__(self, store: JobStore, errands: Errands) -> None:
        self._store = store
        self._errands = errands
        self._unheard: list[Departure] = []
        self._is_telling = False

    async def tell(self, departure: Departure, *, may_come_back: bool) -> Left:
        """Raises one of FAILURES if Redis does not answer."""
        left = await self._store.leave(*departure, may_come_back=may_come_back)
        log.info("client_left", job=departure.job_id, why=departure.why, job_is=left.value)
        return left

    def tell_later(self, departure: Departure) -> None:
        """Until it is told, or this process ends: then the job's deadline ends it."""
        self._unheard.append(departure)
        if not self._is_telling:
            self._is_telling = True
            self._errands.start(self._tell_all())

    async def _tell_all(self) -> None:
        try:
            while self._unheard:
                await insist(partial(self.tell, self._unheard.pop(), may_come_back=False))
        finally:
            self._is_telling = False
