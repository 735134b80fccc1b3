"""Packs the streams of jobs that have ended, so that they take little memory until they expire.

Rule 1: nobody waits for it. It begins when a job has been released, and is dropped at once when the worker stops: a
        stream that was not packed is as good as one that was, only larger.
Rule 2: a stream changes in one step and only as a whole, or stays as it is. Its entries never change (shared/packs.py).
Rule 3: what the attempt has kept of a short stream is packed as it is, many jobs at a time; any other stream is read
        once more, one job at a time.
Rule 4: what fails is logged and not tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import TracebackType

import structlog

from shared.connection import FAILURES, LAST_RETRY_S, passes
from shared.entries import BEGINNING, UnreadableEntryError
from shared.jobs import TERMINAL
from shared.packs import Packer, Row
from shared.store import Claim, JobStore
from shared.tasks import end_task

log = structlog.get_logger(__name__)

BATCH_JOBS = 64  # whose kept rows are brought at a time
GATHER_S = 0.05  # how long it waits for more of them: a write for each would wake Redis for each
WAITING_BYTES = 8 * 1024 * 1024  # of kept rows; beyond, a stream is read once more when its turn comes
MAX_WAITING = 1000  # jobs; a worker that ends them faster than it packs them leaves the newest as they are
FIRST_ROWS = 32  # read at first: they may be large
PAGE_ROWS = 256  # read at a time then, so that the event loop is soon free for those that run
BATCH_BYTES = 256 * 1024  # payload of the rows that one script brings
ROW_BYTES = 16  # what a row costs Redis beside its payload
SLACK_BYTES = 2048  # what it keeps free behind the last one, on average
LEAST_GAIN = 0.1  # of the payload; where less is to be gained, the stream is left alone


_Waiting = tuple[Claim, list[Row] | None]


class Compactor:
    """The one that packs for a worker; an async context manager that owns its task."""

    def __init__(self, store: JobStore, worker_id: str) -> None:
        self._store = store
        self._worker_id = worker_id
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue(MAX_WAITING)
        self._waiting_bytes = 0  # of kept rows
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Compactor:
        self._task = asyncio.create_task(self._compact_forever(), name="compactor")
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._task is not None:
            await end_task(self._task)

    def offer(self, claim: Claim, rows: list[Row] | None = None) -> None:
        """This attempt has been released. Returns at once.

        `rows`: what its stream is to become; None if it has to be read for that.
        """
        size = _size(rows)
        if self._waiting_bytes + size > WAITING_BYTES:
            rows, size = None, 0
        try:
            self._waiting.put_nowait((claim, rows))
            self._waiting_bytes += size
        except asyncio.QueueFull:
            log.info("job_not_compacted", job=claim.job_id, reason="too many wait")

    async def _compact_forever(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            if self._waiting.qsize() < BATCH_JOBS:
                await asyncio.sleep(GATHER_S)
            while not self._waiting.empty() and len(batch) < BATCH_JOBS:
                batch.append(self._waiting.get_nowait())
            self._waiting_bytes -= sum(_size(rows) for _, rows in batch)
            kept = [(claim, rows) for claim, rows in batch if rows is not None]
            await asyncio.gather(*(self._try(claim, self.put(claim, rows)) for claim, rows in kept))
            for claim, rows in batch:
                if rows is None:
                    await self._try(claim, self.compact(claim))

    async def _try(self, claim: Claim, work: Awaitable[bool]) -> None:
        try:
            await work
        except (*FAILURES, UnreadableEntryError) as error:
            log.warning("job_not_compacted", job=claim.job_id, reason=str(error))
            if passes(error):
                await asyncio.sleep(LAST_RETRY_S)
        except Exception:
            log.exception("compactor_broken", job=claim.job_id)

    async def put(self, claim: Claim, rows: list[Row]) -> bool:
        """Puts rows in the place of the stream of a job that has ended. False if it stays as it is. Raises FAILURES."""
        last = rows[-1].id
        length = last.sequence + 1  # of the first attempt, from its opening to its marker
        if not _pays(length - len(rows), _size(rows)):
            return False
        return await self._store.compact(claim, self._worker_id, rows, before=0, replaces=(length, last))

    async def compact(self, claim: Claim) -> bool:
        """Packs the stream of a job that has ended. False if it stays as it is.

        Raises FAILURES, UnreadableEntryError.
        """
        packer = Packer()
        rows: list[Row] = []  # not yet brought to Redis
        brought = length = payload_bytes = 0
        cursor, more = BEGINNING, True
        while more:
            page = await self._store.read_after(claim.job_id, cursor, PAGE_ROWS if length else FIRST_ROWS)
            if page.status not in TERMINAL or not page.entries or page.rows != len(page.entries):
                return False  # it runs again elsewhere, or has expired, or is packed already
            cursor, more = page.entries[-1].id, page.more and not page.entries[-1].is_marker
            length += page.rows
            payload_bytes += sum(len(entry.payload) for entry in page.entries)
            for entry in page.entries:
                packer.add(entry)
            rows += packer.rows() if more else packer.all_rows()
            if not more:
                if not page.entries[-1].is_marker:
                    return False  # something of it is gone: readers are to find out
            elif _size(rows) < BATCH_BYTES:
                continue
            if not brought and not _pays(length - len(rows), payload_bytes):
                return False
            shape = None if more else (length, cursor)
            if not await self._store.compact(claim, self._worker_id, rows, before=brought, replaces=shape):
                return False
            brought += len(rows)
            rows = []
        return True


def _size(rows: list[Row] | None) -> int:
    """Bytes of payload."""
    return sum(len(row.payload) for row in rows or ())


def _pays(rows_less: int, payload_bytes: int) -> bool:
    """Whether a stream becomes smaller by as much as is worth the work."""
    return ROW_BYTES * rows_less + SLACK_BYTES >= LEAST_GAIN * payload_bytes
