"""Follows the streams of jobs: every entry once, in order, until the marker.

Rule 1: the stream is the truth. Pub/sub carries the same entries faster, and is believed only where it continues what
        the stream has told.
Rule 2: a reader reads the stream when it begins, after every (re)connection of pub/sub, when an entry does not follow
        the one before, and when nothing has come for a while but the stream has something to tell. One that listens
        from before its job exists has missed nothing if it hears the opening: it reads at first only if it soon has
        not heard that.
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
from collections.abc import Callable
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
LATE_S = 5.0  # how long after that a reader waits for the answer before it reads for itself
LOOK_STREAMS = 500  # how many silent streams one question is asked for
DEAF_S = 0.25  # the same while the subscription is not confirmed, or not even the opening of a new job was heard
RECONNECT_S = 0.1
CLOCK_S = 0.001  # the tick of the loop's clock: a timer may be early by a part of one
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
    """One reader of one stream, an async context manager. Made by `Switchboard.follow`; not for concurrent use."""

    __slots__ = (
        "_heard",
        "_heard_bytes",
        "_is_interrupted",
        "_is_new",
        "_is_subscribed",
        "_must_read",
        "_page_rows",
        "_push",
        "_push_failed",
        "_switchboard",
        "_waiter",
        "channel",
        "cursor",
        "job_id",
        "trusted_at",
    )

    def __init__(self, switchboard: Switchboard, job_id: str, channel: bytes, cursor: EntryId) -> None:
        self.job_id = job_id
        self.channel = channel
        self.cursor = cursor
        self.trusted_at = 0.0  # of the loop's clock: when something was last heard or read
        self._switchboard = switchboard
        self._heard: list[Entry] = []
        self._heard_bytes = 0
        self._page_rows = PAGE_ENTRIES
        self._must_read = True
        self._is_new = False  # whether it began before its job, and nothing can have been missed since
        self._is_subscribed = False  # whether Redis has confirmed that it hears
        self._is_interrupted = False
        self._waiter: asyncio.Future[None] | None = None  # of whoever waits
        self._push: Push | None = None  # set while `next` waits, and its caller wants no waking
        self._push_failed: Exception | None = None

    async def __aenter__(self) -> Tail:
        self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end()

    def begin(self, *, before_job: bool = False) -> None:
        """Listens from now on, until `end`.

        `before_job`: the job does not exist yet, and will be submitted only after this. So what is heard is all that
        there is, if it follows from the beginning, and the stream need not be read.
        """
        self._is_subscribed = self._switchboard.listen(self)
        self.trusted_at = self._switchboard.now()
        if before_job and self._switchboard.is_connected:
            self._is_new, self._must_read = True, False

    def end(self) -> None:
        """Listens no longer."""
        self._switchboard.listen_no_longer(self)

    # -- for the switchboard -------------------------------------------------------------------------------------------

    def hear(self, entry: Entry) -> None:
        """Pub/sub has brought an entry. `heard_all` follows."""
        if self._must_read:
            return  # the stream tells it too
        if not self._heard:  # otherwise it is noted already, or its reader looks before it waits again
            self._switchboard.spoken_to.append(self)
        elif self._heard_bytes > HEARD_BYTES:
            self._size_pages(self._heard, len(self._heard))
            self.doubt()
            return
        self._heard.append(entry)
        self._heard_bytes += len(entry.payload)

    def heard_all(self, now: float) -> None:
        """All has been heard that came at once: it is pushed, or whoever waits is woken."""
        push = self._push
        if push is not None and (entries := self._take_heard()):
            self.cursor = entries[-1].id
            self.trusted_at = now
            try:
                wants_more = push(entries)
            except Exception as error:  # noqa: BLE001  # it is the reader's, and raised by its `next`
                self._push_failed, wants_more = error, False
            if not wants_more:
                self._push = None
        if self._push is None or self._must_read:
            self._wake()

    def doubt(self) -> None:
        """Pub/sub may have missed something, or brings more than is read."""
        self._must_read, self._is_new = True, False
        self._forget_heard()
        self._wake()

    def subscribed(self) -> None:
        """From now on it hears; what was said before, it may have missed."""
        self._is_subscribed = True
        if not self._is_new:
            self.doubt()

    def disconnected(self) -> None:
        """It hears nothing until it is subscribed again."""
        self._is_subscribed = False
        self.doubt()

    @property
    def trusts(self) -> bool:
        """Whether it believes that nothing has happened since `trusted_at`."""
        return not self._must_read

    def trust(self, cursor: EntryId, now: float) -> None:
        """At this moment nothing was behind this entry."""
        if cursor == self.cursor:
            self.trusted_at = now

    # -- for the reader ------------------------------------------------------------------------------------------------

    @property
    def is_subscribed(self) -> bool:
        return self._is_subscribed

    @property
    def is_interrupted(self) -> bool:
        return self._is_interrupted

    def interrupt(self) -> None:
        """Makes `next` return nothing from now on, at once."""
        self._push = None
        self._is_interrupted = True
        self._wake()

    async def next(self, timeout_s: float, push: Push | None = None) -> list[Entry]:
        """The next entries, at least one; none after the timeout or an interruption. Raises TailError.

        While it waits, entries are given to `push` instead, if there is one: not from this task, and it must not wait.
        When `push` wants no more, none are returned; what it raises is raised here. After a marker there is nothing
        more to ask for.
        """
        now = self._switchboard.now
        deadline = now() + timeout_s
        while not self.is_interrupted:
            entries = await self._read() if self._must_read else self._take_heard()
            if entries:
                self.cursor = entries[-1].id
                self.trusted_at = now()
                return entries
            if self._must_read or self._heard:  # what was heard does not follow the cursor, or came during the read
                continue
            if self._is_interrupted or now() >= deadline:
                break
            until = deadline
            if self._is_deaf():
                if now() >= self.trusted_at + DEAF_S:
                    self._must_read = True
                    continue
                until = min(until, self.trusted_at + DEAF_S)
            self._push = push
            try:
                await self._wait_until(until)
                wants_more = push is None or self._push is not None
            finally:
                self._push = None
            if self._push_failed is not None:
                raise self._push_failed
            if not wants_more:
                break
        return []

    async def sleep(self, seconds: float) -> None:
        """Returns early if it is interrupted."""
        now = self._switchboard.now
        until = now() + seconds
        while not self._is_interrupted and now() < until:
            await self._wait_until(until)

    async def _wait_until(self, until: float) -> None:
        """Returns then, or when something has happened."""
        loop = self._switchboard.loop
        self._waiter = loop.create_future()
        timer = loop.call_at(until + CLOCK_S, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _is_deaf(self) -> bool:
        """Whether something may be said that it does not hear, and that the switchboard does not look for."""
        return not self._is_subscribed or (self._is_new and self.cursor == BEGINNING)

    def _take_heard(self) -> list[Entry]:
        """What was heard, as far as it follows the cursor. Asks for a read where it does not."""
        heard = self._heard
        if not heard:
            return heard
        self._heard, self._heard_bytes = [], 0
        attempt, sequence = self.cursor
        for entry in heard:
            sequence += 1
            if entry.id != (attempt, sequence):
                return self._following(heard)
        return heard

    def _following(self, heard: list[Entry]) -> list[Entry]:
        """Those of them that follow the cursor."""
        entries: list[Entry] = []
        cursor = self.cursor
        for entry in heard:
            if cursor.is_followed_by(entry.id):
                entries.append(entry)
                cursor = entry.id
            elif entry.id > cursor:
                self._must_read = True
                metrics.gaps.inc()
                break
        return entries

    def _forget_heard(self) -> None:
        self._heard = []
        self._heard_bytes = 0

    async def _read(self) -> list[Entry]:
        """What the stream holds behind the cursor. What is heard meanwhile is kept, and compared with it later."""
        self._must_read = self._is_new = False
        self._forget_heard()
        read = await self._switchboard.read(self, self._page_rows)
        if read is None:
            return []
        self.trusted_at = self._switchboard.now()
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
        self._tails: dict[bytes, list[Tail]] = {}  # by channel
        self._nobody_follows = asyncio.Event()
        self._nobody_follows.set()
        self.spoken_to: list[Tail] = []  # who has heard something since the last `heard_all`
        self._left: list[bytes] = []  # channels that nobody follows any more
        self._wire: ListenWire | None = None  # None while it is not connected
        self._tasks: list[asyncio.Task[None]] = []
        self.loop: asyncio.AbstractEventLoop  # set once, on entry: to ask for the running one is a system call
        self.now: Callable[[], float]  # its clock

    async def __aenter__(self) -> Switchboard:
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time
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

    def follow(self, job_id: str, after: EntryId = BEGINNING) -> Tail:
        """A reader of a job's stream, behind a cursor. Listens while its block lasts."""
        return Tail(self, job_id, self._store.keys.stream_channel(job_id).encode(), after)

    def listen(self, tail: Tail) -> bool:
        """Whether Redis has confirmed before that this process hears the channel."""
        tails = self._tails.setdefault(tail.channel, [])
        tails.append(tail)
        self._nobody_follows.clear()
        if len(tails) == 1:
            self._tell_redis("SUBSCRIBE", tail.channel)
            return False
        return tails[0].is_subscribed

    def listen_no_longer(self, tail: Tail) -> None:
        tails = self._tails[tail.channel]
        tails.remove(tail)
        if not tails:
            del self._tails[tail.channel]
            if not self._tails:
                self._nobody_follows.set()
            self._left.append(tail.channel)

    def _tell_redis(self, order: str, *channels: str | bytes) -> None:
        """While the connection is down nothing is sent: it subscribes to everything when it is back."""
        if self._wire is not None:
            self._wire.write(self._unsubscribe() + command(order, *channels))

    def _unsubscribe(self) -> bytes:
        """From all channels that were left. It has time: on its own for each, it would cost as much as an entry."""
        left, self._left = self._left, []
        return command("UNSUBSCRIBE", *left) if left else b""

    @property
    def is_connected(self) -> bool:
        return self._wire is not None

    async def read(self, tail: Tail, count: int) -> StreamRead | None:
        """Reads a stream, trying again while Redis does not answer; None if interrupted. Raises TailError."""
        metrics.catch_ups.inc()
        deadline = self.now() + self._store.settings.redis_patience_s
        while not tail.is_interrupted:
            try:
                return await self._store.read_after(tail.job_id, tail.cursor, count)
            except UnreadableEntryError as error:
                raise StreamGapError(str(error)) from error
            except FAILURES as error:
                if not passes(error):
                    raise StreamGapError(f"the stream of {tail.job_id} cannot be read: {error}") from error
                if self.now() > deadline:
                    raise StreamUnreachableError(tail.job_id) from error
            await tail.sleep(DEAF_S)
        return None

    async def _look_forever(self) -> None:
        """Asks for all tails that have long heard nothing whether there is something to be read."""
        while True:
            await asyncio.sleep(QUIET_S / 15)
            try:
                await self._look_at_all()
            except Exception:  # a defect must not leave readers that have missed something to wait for ever
                log.exception("quiet_streams_not_looked_at", streams=len(self._tails))

    async def _look_at_all(self) -> None:
        if self._wire is not None and self._left:
            self._wire.write(self._unsubscribe())
        before = self.now() - QUIET_S
        all_tails = [tail for tails in self._tails.values() for tail in tails]
        quiet = [tail for tail in all_tails if tail.trusted_at <= before and tail.trusts]
        for tail in quiet:
            if tail.trusted_at <= before - LATE_S:
                tail.doubt()
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
            return  # those that still wait after LATE_S read for themselves
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
            self._disconnected()
            await asyncio.sleep(RECONNECT_S)

    async def _listen(self, wire: ListenWire) -> None:
        """Until the connection is lost."""
        self._left = []
        self._wire = wire  # from here on, whoever begins to follow subscribes for himself
        try:
            # The lobby is a channel on which nothing is ever said: it holds the connection while nobody follows.
            self._tell_redis("SUBSCRIBE", f"{self._store.keys.prefix}:lobby", *self._tails)
            await wire.until_broken()
        finally:
            self._wire = None

    # -- for the wire --------------------------------------------------------------------------------------------------

    def hear(self, response: Any) -> None:
        if type(response) is list and response[0] == b"message":
            tails = self._tails.get(response[1])
            if tails is None:
                return
            try:
                entry = entry_from_message(response[2])
            except UnreadableEntryError as error:
                log.warning("pubsub_message_unreadable", reason=str(error))
                for tail in tails:
                    tail.doubt()
                return
            for tail in tails:
                tail.hear(entry)
            return
        match response:
            case [b"subscribe", channel, _]:
                for tail in self._tails.get(channel, ()):
                    tail.subscribed()
            case Exception() as refusal:  # such as a missing permission
                raise refusal

    def heard_all(self) -> None:
        if not self.spoken_to:
            return
        now = self.now()
        for tail in self.spoken_to:
            tail.heard_all(now)
        self.spoken_to.clear()

    def _disconnected(self) -> None:
        for tails in self._tails.values():
            for tail in tails:
                tail.disconnected()
