"""Follows the streams of jobs: every entry once, in order, until the marker.

Rule 1: the stream is the truth. Pub/sub carries the same entries faster, and is believed only where it continues what
        the stream has told.
Rule 2: a reader reads the stream when it begins, after every (re)connection of pub/sub, when an entry does not follow
        the one before, and when nothing has come for a while but the stream has something to tell.
Rule 3: an entry that is missing from the stream itself is an error, never skipped.
Rule 4: a reader that waits may have what it waits for pushed: then an entry reaches it in the very turn of the event
        loop in which it was heard. What cannot be pushed ends the wait, and the reader goes on as rule 2 says.

Errors:
    TailError
    ├── StreamExpiredError        the stream, or the job, is gone
    ├── StreamGapError            the stream does not hold what it should
    └── StreamUnreachableError    Redis did not answer for longer than the patience
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import structlog

from shared import metrics
from shared.connection import FAILURES, passes
from shared.entries import BEGINNING, Entry, EntryId, UnreadableEntryError, entry_from_message
from shared.jobs import TERMINAL, Status
from shared.store import JobStore, StreamRead
from shared.tasks import end_task
from shared.wire import ListenWire, command, open_wire

log = structlog.get_logger(__name__)

PAGE_ENTRIES = 100  # how many entries one read returns at most, but for a pack
PAGE_BYTES = 1024 * 1024  # what one read is to return, as far as the entries before it foretell
QUIET_S = 15.0  # how long a silent stream is trusted to be silent; then one question is asked for all that are
LATE_S = 5.0  # how long after that a reader waits for the answer before it asks for itself
LOOK_STREAMS = 500  # how many silent streams one question is asked for
DEAF_S = 0.25  # the same while pub/sub is not connected
RECONNECT_S = 0.1
GOODBYE_S = 2.0  # how long a stopping process waits for its last readers
HEARD_BYTES = 1024 * 1024  # what a slow reader may have waiting in memory; the rest waits in Redis

Push = Callable[
    [list[Entry]], bool
]  # takes the next entries, at least one; False: no more before `next` is called again


class TailError(Exception):
    """The stream cannot be followed any further."""


class StreamExpiredError(TailError):
    """The stream, or the job, is gone."""


class StreamGapError(TailError):
    """The stream does not hold what it should."""


class StreamUnreachableError(TailError):
    """Redis did not answer for longer than the patience."""


class Tail:
    """One reader of one stream. Made by `Switchboard.follow`; not for concurrent use."""

    def __init__(self, switchboard: Switchboard, job_id: str, cursor: EntryId) -> None:
        self.job_id = job_id
        self.cursor = cursor
        self._switchboard = switchboard
        self._heard: list[Entry] = []
        self._heard_bytes = 0
        self._page_rows = PAGE_ENTRIES
        self._must_read = True
        self._trusted_at = 0.0  # of the loop's clock: when something was last heard or read
        self._interrupted = asyncio.Event()
        self._woken = asyncio.Event()
        self._push: Push | None = None  # set while `next` waits, and its caller wants no waking
        self._push_failed: Exception | None = None

    def hear(self, entry: Entry) -> None:
        """Pub/sub has brought an entry. `heard_all` follows."""
        if self._must_read:
            pass  # the stream tells it too
        elif self._heard_bytes > HEARD_BYTES:
            self._size_pages(self._heard, len(self._heard))
            self.doubt()
        else:
            self._heard.append(entry)
            self._heard_bytes += len(entry.payload)

    def heard_all(self) -> None:
        """All has been heard that came at once: it is pushed, or whoever waits is woken."""
        if self._push is not None and not self._must_read:
            entries = self._take_heard()
            if entries:
                self._passed_on(entries)
                try:
                    wants_more = self._push(entries)
                except Exception as error:  # noqa: BLE001  # it is the reader's, and raised by its `next`
                    self._push_failed, wants_more = error, False
                if not wants_more:
                    self._push = None
            if self._push is not None and not self._must_read:
                return
        self._woken.set()

    def interrupt(self) -> None:
        """Makes `next` return nothing from now on, at once."""
        self._push = None
        self._interrupted.set()
        self._woken.set()

    def doubt(self) -> None:
        """Pub/sub may have missed something, or brings more than is read."""
        self._must_read = True
        self._forget_heard()
        self._woken.set()

    async def next(self, timeout_s: float, push: Push | None = None) -> list[Entry]:
        """The next entries, at least one; none after the timeout or an interruption. Raises TailError.

        While it waits, entries are given to `push` instead, if there is one: not from this task, and it must not wait.
        When `push` wants no more, none are returned; what it raises is raised here. After a marker there is nothing
        more to ask for.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self._interrupted.is_set():
            entries = await self._read() if self._must_read else self._take_heard()
            if entries:
                self._passed_on(entries)
                return entries
            if self._must_read:  # what was heard does not follow the cursor
                continue
            now = loop.time()
            if now >= deadline:
                break
            if push is None:
                await self._wait(now, deadline)
                continue
            self._push = push
            try:
                await self._wait(now, deadline)
                wants_more = self._push is not None
            finally:
                self._push = None
            if self._push_failed is not None:
                raise self._push_failed
            if not wants_more:
                break
        return []

    def _passed_on(self, entries: list[Entry]) -> None:
        self.cursor = entries[-1].id
        self._trusted_at = self._switchboard.now()

    async def _wait(self, now: float, deadline: float) -> None:
        """Until something is heard; after a quiet while the stream has to be read."""
        self._woken.clear()
        if self._heard or self._must_read or self._interrupted.is_set():
            return
        quiet_until = self._trusted_at + self._switchboard.quiet_s + LATE_S * self._switchboard.is_connected
        if quiet_until <= now:
            self._must_read = True
            return
        try:
            async with asyncio.timeout(min(quiet_until, deadline) - now):
                await self._woken.wait()
        except TimeoutError:
            pass  # `next` looks at the clock again

    def is_quiet(self, now: float) -> bool:
        """Whether it has waited so long that something may have been missed."""
        return not self._must_read and now >= self._trusted_at + QUIET_S

    def trust(self, cursor: EntryId, now: float) -> None:
        """At this moment nothing was behind this entry."""
        if cursor == self.cursor:
            self._trusted_at = now

    def _take_heard(self) -> list[Entry]:
        """What was heard, as far as it follows the cursor. Asks for a read where it does not."""
        entries: list[Entry] = []
        cursor = self.cursor
        for entry in self._heard:
            if cursor.is_followed_by(entry.id):
                entries.append(entry)
                cursor = entry.id
            elif entry.id > cursor:
                self._must_read = True
                metrics.gaps.inc()
                break
        self._forget_heard()
        return entries

    def _forget_heard(self) -> None:
        self._heard.clear()
        self._heard_bytes = 0

    async def _read(self) -> list[Entry]:
        """What the stream holds behind the cursor. What is heard meanwhile is kept, and compared with it later."""
        self._must_read = False
        self._forget_heard()
        read = await self._switchboard.read(self.job_id, self.cursor, self._page_rows, self._interrupted)
        if read is None:
            return []
        self._trusted_at = asyncio.get_running_loop().time()
        gone = read.status is None if read.exists else read.status is not Status.QUEUED
        if gone and not read.entries:
            raise StreamExpiredError(self.job_id)
        if not read.entries and read.status in TERMINAL:
            raise StreamGapError(f"{self.job_id} has ended, but its stream has no marker after {self.cursor}")
        cursor = self.cursor
        for entry in read.entries:
            if not cursor.is_followed_by(entry.id):
                raise StreamGapError(f"{self.job_id} has {entry.id} after {cursor}")
            cursor = entry.id
        if read.more:
            self._must_read = True
        if read.entries:
            self._size_pages(read.entries, read.rows)
        return read.entries

    def _size_pages(self, entries: list[Entry], rows: int) -> None:
        """Large rows are read a few at a time: many slow readers must fit into memory."""
        row_bytes = 1 + sum(len(entry.payload) for entry in entries) // rows
        row_entries = 1 + (len(entries) - 1) // rows
        self._page_rows = max(1, min(PAGE_ENTRIES // row_entries, PAGE_BYTES // row_bytes))


class Switchboard:
    """All tails of one API process, on one pub/sub connection. An async context manager that owns its task."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._tails: defaultdict[bytes, list[Tail]] = defaultdict(list)
        self._nobody_follows = asyncio.Event()
        self._nobody_follows.set()
        self._spoken_to: dict[Tail, None] = {}  # who has heard something since the last `heard_all`
        self._wire: ListenWire | None = None  # None while it is not connected
        self._tasks: list[asyncio.Task[None]] = []

    @staticmethod
    def now() -> float:
        """The loop's clock."""
        return asyncio.get_running_loop().time()

    async def __aenter__(self) -> Switchboard:
        for service in (self._listen_forever(), self._look_forever()):
            self._tasks.append(asyncio.create_task(service, name="switchboard"))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Lets readers that were just cancelled say goodbye, then stops listening."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._nobody_follows.wait()
        except TimeoutError:
            log.warning("readers_left_behind", streams=len(self._tails))
        for task in self._tasks:
            await end_task(task)

    @asynccontextmanager
    async def follow(self, job_id: str, after: EntryId = BEGINNING) -> AsyncIterator[Tail]:
        """A reader of a job's stream, behind a cursor."""
        channel = self._store.keys.stream_channel(job_id).encode()
        tail = Tail(self, job_id, after)
        self._tails[channel].append(tail)
        self._nobody_follows.clear()
        try:
            if len(self._tails[channel]) == 1:
                self._tell_redis("SUBSCRIBE", channel)
            yield tail
        finally:
            self._tails[channel].remove(tail)
            if not self._tails[channel]:
                del self._tails[channel]
                if not self._tails:
                    self._nobody_follows.set()
                self._tell_redis("UNSUBSCRIBE", channel)

    def _tell_redis(self, order: str, *channels: str | bytes) -> None:
        """While the connection is down nothing is sent: it subscribes to everything when it is back."""
        if self._wire is not None:
            self._wire.write(command(order, *channels))

    @property
    def is_connected(self) -> bool:
        return self._wire is not None

    @property
    def quiet_s(self) -> float:
        """How long a tail may trust that nothing has happened."""
        return QUIET_S if self.is_connected else DEAF_S

    async def read(self, job_id: str, cursor: EntryId, count: int, interrupted: asyncio.Event) -> StreamRead | None:
        """Reads a stream, trying again while Redis does not answer; None if interrupted. Raises TailError."""
        metrics.catch_ups.inc()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._store.settings.redis_patience_s
        while not interrupted.is_set():
            try:
                return await self._store.read_after(job_id, cursor, count)
            except UnreadableEntryError as error:
                raise StreamGapError(str(error)) from error
            except FAILURES as error:
                if not passes(error):
                    raise StreamGapError(f"the stream of {job_id} cannot be read: {error}") from error
                if loop.time() > deadline:
                    raise StreamUnreachableError(job_id) from error
            with suppress(TimeoutError):
                async with asyncio.timeout(DEAF_S):
                    await interrupted.wait()
        return None

    async def _look_forever(self) -> None:
        """Asks for all tails that have long heard nothing whether there is something to be read."""
        while True:
            await asyncio.sleep(QUIET_S / 15)
            now = self.now()
            quiet = [tail for tails in self._tails.values() for tail in tails if tail.is_quiet(now)]
            for start in range(0, len(quiet), LOOK_STREAMS):
                await self._look(quiet[start : start + LOOK_STREAMS])

    async def _look(self, tails: list[Tail]) -> None:
        if not self.is_connected:
            return  # then each reads for itself, more often
        seen = [(tail, tail.cursor) for tail in tails]
        now = self.now()
        try:
            stale = await self._store.stale([(tail.job_id, cursor) for tail, cursor in seen])
        except FAILURES as error:
            log.warning("quiet_streams_not_looked_at", reason=str(error), streams=len(tails))
            return  # each reads for itself, a little later
        for tail, cursor in seen:
            if tail.job_id in stale:
                tail.doubt()
            else:
                tail.trust(cursor, now)

    async def _listen_forever(self) -> None:
        while True:
            try:
                async with open_wire(self._store.redis, partial(ListenWire, listener=self)) as wire:
                    await self._listen(wire)
            except FAILURES as error:
                log.warning("pubsub_connection_lost", reason=str(error), streams=len(self._tails))
            except Exception:  # a defect of one message must not leave all readers without any for ever
                log.exception("pubsub_connection_dropped", streams=len(self._tails))
            self._doubt_all()
            await asyncio.sleep(RECONNECT_S)

    async def _listen(self, wire: ListenWire) -> None:
        """Until the connection is lost."""
        self._wire = wire  # from here on, whoever begins to follow subscribes for himself
        try:
            # The lobby is a channel on which nothing is ever said: it holds the connection while nobody follows.
            self._tell_redis("SUBSCRIBE", f"{self._store.keys.prefix}:lobby", *self._tails)
            await wire.until_broken()
        finally:
            self._wire = None

    # -- for the wire --------------------------------------------------------------------------------------------------

    def hear(self, response: Any) -> None:
        match response:
            case [b"message", channel, payload]:
                if tails := self._tails.get(channel):
                    self._deliver(tails, payload)
            case [b"subscribe", channel, _]:
                for tail in self._tails.get(channel, ()):
                    tail.doubt()
            case Exception() as refusal:  # such as a missing permission
                raise refusal

    def heard_all(self) -> None:
        spoken_to, self._spoken_to = self._spoken_to, {}
        for tail in spoken_to:
            tail.heard_all()

    def _doubt_all(self) -> None:
        for tails in self._tails.values():
            for tail in tails:
                tail.doubt()

    def _deliver(self, tails: list[Tail], payload: bytes) -> None:
        try:
            entry = entry_from_message(payload)
        except UnreadableEntryError as error:
            log.warning("pubsub_message_unreadable", reason=str(error))
            for tail in tails:
                tail.doubt()
            return
        for tail in tails:
            tail.hear(entry)
            self._spoken_to[tail] = None
