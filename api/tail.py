"""Follows the streams of jobs: every entry once, in order, until the marker.

Rule 1: the stream is the truth. Pub/sub carries the same entries faster, and is believed only where it continues what
        the stream has told.
Rule 2: a reader reads the stream when it begins, after every (re)connection of pub/sub, when an entry does not follow
        the one before, and when nothing has come for a while.
Rule 3: an entry that is missing from the stream itself is an error, never skipped.

Errors:
    TailError
    ├── StreamExpiredError        the stream, or the job, is gone
    ├── StreamGapError            the stream does not hold what it should
    └── StreamUnreachableError    Redis did not answer for longer than the patience
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from shared.connection import UNREACHABLE
from shared.entries import BEGINNING, Entry, EntryId, UnreadableEntryError, entry_from_message
from shared.jobs import Status
from shared.store import JobStore, StreamRead

log = structlog.get_logger(__name__)

PAGE_ENTRIES = 500  # how many entries one read returns at most
QUIET_S = 15.0  # how long a silent stream is trusted to be silent
DEAF_S = 0.25  # the same while pub/sub is not connected
RECONNECT_S = 0.1
GOODBYE_S = 2.0  # how long a stopping process waits for its last readers
PROBE_S = 10.0  # how long the pub/sub connection may be silent before it is probed

_TERMINAL = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


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
        self._must_read = True
        self._interrupted = False
        self._woken = asyncio.Event()

    def hear(self, entry: Entry) -> None:
        """Pub/sub has brought an entry."""
        self._heard.append(entry)
        self._woken.set()

    def interrupt(self) -> None:
        """Makes `next` return nothing from now on, at once."""
        self._interrupted = True
        self._woken.set()

    def doubt(self) -> None:
        """Pub/sub may have missed something."""
        self._must_read = True
        self._woken.set()

    async def next(self, timeout_s: float) -> list[Entry]:
        """The next entries, at least one; none after the timeout or an interruption. Raises TailError.

        After a marker there is nothing more to ask for.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self._interrupted:
            entries = await self._read() if self._must_read else self._take_heard()
            if entries:
                self.cursor = entries[-1].id
                return entries
            if self._must_read:  # what was heard does not follow the cursor
                continue
            remaining_s = deadline - loop.time()
            if remaining_s <= 0:
                break
            await self._wait(remaining_s)
        return []

    async def _wait(self, remaining_s: float) -> None:
        """Until something is heard; after a quiet while the stream has to be read."""
        self._woken.clear()
        if self._heard or self._must_read or self._interrupted:
            return
        quiet_s = self._switchboard.quiet_s
        try:
            async with asyncio.timeout(min(quiet_s, remaining_s)):
                await self._woken.wait()
        except TimeoutError:
            self._must_read = quiet_s <= remaining_s

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
                break
        self._heard.clear()
        return entries

    async def _read(self) -> list[Entry]:
        self._must_read = False
        job_id = self.job_id
        read = await self._switchboard.read(job_id, self.cursor)
        if read.exists is False and (read.status is None or read.status is not Status.QUEUED):
            raise StreamExpiredError(job_id)
        if not read.entries and read.status in _TERMINAL:
            raise StreamGapError(f"{job_id} has ended, but its stream has no marker after {self.cursor}")
        cursor = self.cursor
        for entry in read.entries:
            if not cursor.is_followed_by(entry.id):
                raise StreamGapError(f"{job_id} has {entry.id} after {cursor}")
            cursor = entry.id
        if len(read.entries) == PAGE_ENTRIES:
            self._must_read = True
        return read.entries


class Switchboard:
    """All tails of one API process, on one pub/sub connection. An async context manager that owns its task."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._tails: defaultdict[bytes, list[Tail]] = defaultdict(list)
        self._nobody_follows = asyncio.Event()
        self._nobody_follows.set()
        self._pubsub: PubSub | None = None  # None while it is not connected
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Switchboard:
        self._task = asyncio.create_task(self._listen_forever(), name="switchboard")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Lets readers that were just cancelled say goodbye, then stops listening."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._nobody_follows.wait()
        except TimeoutError:
            log.warning("readers_left_behind", streams=len(self._tails))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @asynccontextmanager
    async def follow(self, job_id: str, after: EntryId = BEGINNING) -> AsyncIterator[Tail]:
        """A reader of a job's stream, behind a cursor."""
        channel = self._store.keys.stream_channel(job_id).encode()
        tail = Tail(self, job_id, after)
        self._tails[channel].append(tail)
        self._nobody_follows.clear()
        try:
            if len(self._tails[channel]) == 1:
                await self._send("subscribe", channel)
            yield tail
        finally:
            self._tails[channel].remove(tail)
            if not self._tails[channel]:
                del self._tails[channel]
                if not self._tails:
                    self._nobody_follows.set()
                await self._send("unsubscribe", channel)

    @property
    def quiet_s(self) -> float:
        """How long a tail may trust that nothing has happened."""
        return QUIET_S if self._pubsub is not None else DEAF_S

    async def read(self, job_id: str, cursor: EntryId) -> StreamRead:
        """Reads a stream, trying again while Redis does not answer. Raises TailError."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._store.settings.redis_patience_s
        while True:
            try:
                return await self._store.read_after(job_id, cursor, PAGE_ENTRIES)
            except UnreadableEntryError as error:
                raise StreamGapError(str(error)) from error
            except UNREACHABLE as error:
                if loop.time() > deadline:
                    raise StreamUnreachableError(job_id) from error
                await asyncio.sleep(DEAF_S)

    async def _send(self, command: Literal["subscribe", "unsubscribe"], channel: bytes) -> None:
        """While the connection is down nothing is sent: it subscribes to everything when it is back."""
        if self._pubsub is None:
            return
        try:
            await getattr(self._pubsub, command)(channel)
        except (RedisError, OSError):  # the listener finds out for itself, and connects again
            log.debug("pubsub_command_failed", command=command)

    async def _listen_forever(self) -> None:
        while True:
            try:
                async with self._store.redis.pubsub() as pubsub:
                    # The lobby is a channel on which nothing is ever said: a connection needs one to listen to.
                    await pubsub.subscribe(f"{self._store.keys.prefix}:lobby", *self._tails)
                    self._pubsub = pubsub
                    await self._listen(pubsub)
            except (RedisError, OSError) as error:
                log.warning("pubsub_connection_lost", reason=str(error), streams=len(self._tails))
            finally:
                self._pubsub = None
            for tails in self._tails.values():
                for tail in tails:
                    tail.doubt()
            await asyncio.sleep(RECONNECT_S)

    async def _listen(self, pubsub: PubSub) -> None:
        """Hands every message to its tails. redis-py's own message objects cost more than the rest of the way."""
        probed = False
        while True:
            message = await pubsub.parse_response(block=False, timeout=PROBE_S)
            if message is None:
                if probed:
                    raise RedisConnectionError("the pub/sub connection does not answer")
                await pubsub.ping()
                probed = True
                continue
            probed = False
            match message:
                case [b"message", channel, payload]:
                    self._deliver(channel, payload)
                case [b"subscribe", channel, _]:
                    for tail in self._tails.get(channel, ()):
                        tail.doubt()

    def _deliver(self, channel: bytes, payload: bytes) -> None:
        tails = self._tails.get(channel, ())
        try:
            entry = entry_from_message(payload)
        except UnreadableEntryError as error:
            log.warning("pubsub_message_unreadable", reason=str(error))
            for tail in tails:
                tail.doubt()
            return
        for tail in tails:
            tail.hear(entry)
