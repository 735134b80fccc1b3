"""Sends what all attempts of this worker say to their streams.

Rule 1: one flush is on its way at a time. What is said meanwhile goes out in the next one. Nothing lingers but what
        follows an entry of the same attempt within REST_S: so no agent, however fast it speaks, has more entries than
        anybody could read, and those of the others come first.
Rule 2: an entry's id is its idempotency key. After a broken connection the publisher asks of each attempt what has
        landed, before it sends any more of it, so a retried append is never a second entry, and nothing follows a hole.
Rule 3: the marker travels behind the last entries, in one flush; an `ok` on an incomplete stream is refused.
Rule 4: an attempt that finds a later one open, or the job ended, is lost: somebody else has gone on. It says no more.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Mapping, Set
from enum import StrEnum
from types import TracebackType
from typing import Any, NamedTuple

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

from shared import metrics, scripts, timing
from shared.connection import FAILURES, FIRST_RETRY_S, LAST_RETRY_S, passes
from shared.entries import Entry, EntryId, Kind, Tally, entry_to_message, merge
from shared.jobs import Status
from shared.packs import Packer, Row
from shared.store import Claim, Ending, JobStore
from shared.tasks import end_task
from shared.wire import Line, command

log = structlog.get_logger(__name__)

REST_S = 0.004  # after an entry of its own, before an attempt sends the next one
CLOCK_S = 0.001  # the tick of the loop's clock: who has nearly rested, has rested
HIGH_WATER_BYTES = 64 * 1024  # an attempt with more than this unsent has to wait before it says more
_STORED = {bytes}  # what Redis answers to appends that it has taken: ids
_TIMED_ENTRIES = timing.MAX_ENTRIES
KEPT_BYTES, KEPT_ENTRIES = 64 * 1024, 4096  # what an attempt keeps of what it has said, to pack its stream from

_Said = tuple[Kind, bytes]


class Loss(StrEnum):
    """Why an attempt may say no more."""

    FENCED = "fenced"  # a later attempt is open, or the job has ended
    EXPIRED = "expired"  # its stream is gone
    REFUSED = "refused"  # Redis refuses to store it
    FINISHED = "finished"  # its own marker is on the way


class AttemptLostError(Exception):
    """The attempt may say no more; `loss` tells why."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.value)
        self.loss = loss


class _Finish(NamedTuple):
    """A marker on its way."""

    marker: Entry
    status: Status
    fields: Mapping[str, str | bytes | int]
    session_state: bytes | None
    agent_stopped: bool
    ending: asyncio.Future[Ending]


class AttemptLog:
    """What one attempt says, in order. Made by `Publisher.open`.

    An entry is known by its place: the sequence of the n-th is n.
    """

    def __init__(self, publisher: Publisher, claim: Claim, on_lost: Callable[[Loss], None]) -> None:
        self.claim = claim
        self.loss: Loss | None = None
        self.is_over = False  # whether its marker was answered for, or it is lost
        self.known_on = publisher.line_number  # the connection since whose beginning it is known what of it is in Redis
        self.refusals = 0  # in a row, of entries that Redis may take later
        self._publisher = publisher
        self._on_lost = on_lost
        self._keys = publisher.keys_of(claim)
        self._template = b""  # of the commands of an entry, see `append_and_publish`
        self._message_bytes = 0
        self._template_is_for: tuple[Kind, int, int] = (Kind.OPEN, 0, 0)  # a kind, and sequences from, and below
        # What it has said so far; None: too much, or of a later attempt, behind whose opening the stream holds more.
        self._kept: list[_Said] | None = [] if claim.attempt == 1 else None
        self._kept_bytes = 0
        self._stored_marker: Entry | None = None
        self._tally = Tally()
        self._said: list[_Said] = []  # not yet entries
        self._unsent: list[_Said] = []  # the newest entries, on their way or waiting for a retry
        self._confirmed = 0  # the sequence up to which Redis has had everything
        self._finish: _Finish | None = None
        self._finished = False
        self._began_at = time.monotonic()
        self.rests_until = 0.0  # of time.monotonic: what it says before then is sent then
        self._offsets_ms = array("I")  # when each entry was numbered, since then
        self._bytes_waiting = 0
        self.must_wait = False  # whether to wait for `flushed` before more is said
        self.said_at_once = 0  # how often it has said something since the event loop turned
        self._spoke_at = 0  # which turn of the loop that was
        self._awaited: list[tuple[int, asyncio.Future[None]]] = []  # who waits until Redis has how many entries

    @property
    def tally(self) -> Tally:
        """Of everything that has become an entry; of everything said once `flushed` has returned."""
        return self._tally

    def append(self, kind: Kind, payload: bytes) -> None:
        """Says something. Raises AttemptLostError if the attempt may say no more."""
        if self.loss is not None or self._finished:
            raise AttemptLostError(self.loss or Loss.FINISHED)
        publisher = self._publisher
        if not self._said:
            publisher.notice(self)
        if self._spoke_at == publisher.loop_turn:
            self.said_at_once += 1
        else:
            self._spoke_at, self.said_at_once = publisher.loop_turn, 1
            if not publisher.is_loop_turn_counted:
                publisher.count_loop_turn()
        self._said.append((kind, payload))
        self._bytes_waiting += len(payload)
        if self._bytes_waiting > HIGH_WATER_BYTES:
            self.must_wait = True

    def packed_rows(self) -> list[Row] | None:
        """The rows of the packed stream, if this attempt has ended its job; None if not all of them were kept."""
        if self._kept is None or self._stored_marker is None:
            return None
        packer = Packer()
        packer.add(self._publisher.opening_of(self.claim))
        packer.add_all(EntryId(self.claim.attempt, 1), self._kept)
        packer.add(self._stored_marker)
        return packer.all_rows()

    async def flushed(self) -> None:
        """Returns once Redis has everything said so far. Raises AttemptLostError."""
        if self._said or self._unsent:
            if self._said:
                self._number_entries(time.monotonic())
                self._publisher.hurry(self)
            landed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._awaited.append((self._tally.count, landed))
            await landed
        if self.loss is not None:
            raise AttemptLostError(self.loss)

    async def finish(
        self,
        kind: Kind,
        payload: Callable[[Tally], bytes],
        status: Status,
        fields: Mapping[str, str | bytes | int],
        session_state: bytes | None = None,
        *,
        agent_stopped: bool = True,
    ) -> Ending:
        """Appends the marker behind everything said, and ends the job. `payload` gets the tally of all entries.

        The session state, unless it is None, is written together with an `ok`, or not at all. Slot and session are
        released with the end, unless the agent has not stopped. The answer is never TERMINAL. Waits for Redis as long
        as it takes.
        """
        self._finished = True
        self._number_entries(time.monotonic())
        marker = Entry(EntryId(self.claim.attempt, self._tally.count + 1), kind, payload(self._tally))
        ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        if self.loss is not None:
            return Ending.GONE if self.loss is Loss.EXPIRED else Ending.FENCED
        self._finish = _Finish(marker, status, fields, session_state, agent_stopped, ending)
        self._publisher.hurry(self)
        return await ending

    # -- for the publisher ---------------------------------------------------------------------------------------------

    def _number_entries(self, now: float) -> None:
        """`now`: of `time.monotonic`."""
        said = self._said
        if not said:
            return
        self._said = []
        if len(said) > 1:
            said = merge(said)
        tally, offset_ms = self._tally, int((now - self._began_at) * 1000)
        for kind, payload in said:
            tally.add(kind, payload)
            self._kept_bytes += len(payload)
            if tally.count <= _TIMED_ENTRIES:
                self._offsets_ms.append(offset_ms)
        if self._kept is not None:
            self._kept += said
            if self._kept_bytes > KEPT_BYTES or tally.count > KEPT_ENTRIES:
                self._kept = None
        # A new list: the one before may be on its way.
        self._unsent = self._unsent + said if self._unsent else said
        self.rests_until = now + REST_S

    def timing(self) -> bytes:
        """When its entries were said, as it is kept."""
        return timing.encode(self._offsets_ms) if self._offsets_ms else b""

    def take(self, now: float) -> tuple[int, list[_Said], _Finish | None]:
        """Everything that has to be sent now: entries, with the sequence of the first of them, and the marker.

        `now`: of `time.monotonic`.
        """
        self._number_entries(now)
        return self._tally.count - len(self._unsent) + 1, self._unsent, self._finish

    def append_and_publish(self, sequence: int, kind: Kind, payload: bytes) -> bytes:
        """The two commands that an entry costs: `XADD ... NOMKSTREAM` and `PUBLISH`."""
        for_kind, first, behind = self._template_is_for
        if kind is not for_kind or not first <= sequence < behind:
            self._make_template(kind, sequence)
        size = len(payload)
        return self._template % (sequence, size, payload, self._message_bytes + size, sequence, payload)

    def _make_template(self, kind: Kind, sequence: int) -> None:
        """For all entries of a kind whose sequence has as many digits."""
        stream, channel = self._keys
        digits, name, attempt = len(str(sequence)), kind.encode(), b"%d" % self.claim.attempt
        id_bytes = len(attempt) + 1 + digits
        self._message_bytes = id_bytes + len(name) + 2  # beside the payload

        def argument(text: bytes) -> bytes:
            return (b"$%d\r\n%b\r\n" % (len(text), text)).replace(b"%", b"%%")

        entry_id = attempt + b"-%d"
        self._template = b"".join(
            (
                b"*6\r\n",
                *map(argument, (b"XADD", stream, b"NOMKSTREAM")),
                b"$%d\r\n" % id_bytes,
                entry_id,
                b"\r\n",
                argument(name),
                b"$%d\r\n%b\r\n*3\r\n",
                *map(argument, (b"PUBLISH", channel)),
                b"$%d\r\n",
                entry_id,
                b" " + name + b" %b\r\n",
            )
        )
        self._template_is_for = kind, 10 ** (digits - 1), 10**digits

    def landed(self, last: int) -> None:
        """Redis has every entry up to this sequence."""
        if last > self._confirmed:
            self._confirmed = last
        left = self._tally.count - last
        self._unsent = self._unsent[-left:] if left > 0 else []
        if self._unsent or self._said:
            self._bytes_waiting = sum([len(payload) for _, payload in (*self._unsent, *self._said)])
            self.must_wait = self._bytes_waiting > HIGH_WATER_BYTES
        else:
            self._bytes_waiting = 0
            self.must_wait = False
        if self._awaited:
            self._tell_who_waits()

    def _tell_who_waits(self) -> None:
        """That what they wait for is in Redis, or never will be."""
        still = []
        for place, landed in self._awaited:
            if place > self._confirmed and self.loss is None:
                still.append((place, landed))
            elif not landed.done():  # otherwise it was cancelled
                landed.set_result(None)
        self._awaited = still

    def may_go_on_behind(self, last: EntryId) -> bool:
        """Whether a stream that ends with `last` is this attempt's own: nothing is lost, nothing a stranger's."""
        newest = self._tally.count if self._finish is None else self._finish.marker.id.sequence
        return last.attempt == self.claim.attempt and self._confirmed <= last.sequence <= newest

    def landed_up_to(self, last: EntryId) -> None:
        """Redis has every entry up to this one, of which it may be that it is the marker."""
        self.landed(last.sequence)
        if self._finish is not None and last == self._finish.marker.id:
            self.ended(Ending.DONE)

    def ended(self, ending: Ending) -> None:
        """Redis has answered for the marker."""
        if self._finish is not None:
            if ending is Ending.DONE:
                self._stored_marker = self._finish.marker
            if not self._finish.ending.done():
                self._finish.ending.set_result(ending)
            self.is_over = True
        self._finish = None

    def lose(self, loss: Loss) -> None:
        """Redis has refused an entry."""
        if self.loss is not None:
            return
        self.loss, self.is_over = loss, True
        self._said, self._unsent, self._kept = [], [], None
        self._bytes_waiting = 0
        self.must_wait = False
        self._tell_who_waits()
        self.ended(Ending.GONE if loss is Loss.EXPIRED else Ending.FENCED)
        self._on_lost(loss)


class Publisher:
    """The one flusher of a worker; an async context manager that owns its task and its connection."""

    def __init__(self, store: JobStore, worker_id: str) -> None:
        self._store = store
        self._worker_id = worker_id
        self._waiting: dict[AttemptLog, None] = {}  # in the order in which they spoke
        self._alone: list[AttemptLog] = []  # one of them has failed a flush: each gets one of its own
        self._resting: dict[AttemptLog, None] = {}  # what they say waits for the end of their rest
        self._rest: asyncio.TimerHandle | None = None  # until the first of them has rested
        self._rest_until = 0.0  # of time.monotonic
        self._wake = asyncio.Event()
        self.loop_turn = 1  # of the event loop; only those are counted in which somebody speaks
        self.is_loop_turn_counted = False  # whether the number will change when the loop turns
        self._task: asyncio.Task[None] | None = None
        self._script = store.script("finish")
        self._line = Line(store.redis)  # of its own: what is said waits for no other command

    async def __aenter__(self) -> Publisher:
        self._task = asyncio.create_task(self._flush_forever(), name="publisher")
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._rest is not None:
            self._rest.cancel()
        if self._task is not None:
            await end_task(self._task)
        await self._line.aclose()

    def open(self, claim: Claim, on_lost: Callable[[Loss], None]) -> AttemptLog:
        """The log of a claimed attempt. `on_lost` is called at most once, as soon as Redis refuses an entry."""
        return AttemptLog(self, claim, on_lost)

    @property
    def line_number(self) -> int:
        """Which connection takes what is sent next."""
        return self._line.number

    def keys_of(self, claim: Claim) -> tuple[bytes, bytes]:
        """A job's stream and its channel."""
        keys = self._store.keys
        return keys.stream(claim.job_id).encode(), keys.stream_channel(claim.job_id).encode()

    def opening_of(self, claim: Claim) -> Entry:
        """The entry that opens the attempt, as the claim has written it."""
        return Entry(EntryId(claim.attempt, 0), Kind.OPEN, self._worker_id.encode())

    def count_loop_turn(self) -> None:
        """Somebody speaks in this turn of the event loop: another one begins when it has turned."""
        asyncio.get_running_loop().call_soon(self._begin_loop_turn)
        self.is_loop_turn_counted = True

    def _begin_loop_turn(self) -> None:
        self.loop_turn += 1
        self.is_loop_turn_counted = False

    def notice(self, attempt: AttemptLog) -> None:
        """This attempt has something to send, as soon as it has rested."""
        if attempt.rests_until <= time.monotonic():
            self.hurry(attempt)
        else:
            self._let_rest(attempt)

    def hurry(self, attempt: AttemptLog) -> None:
        """This attempt has something to send at once."""
        self._resting.pop(attempt, None)
        self._waiting[attempt] = None
        self._wake.set()

    def _let_rest(self, attempt: AttemptLog) -> None:
        self._resting[attempt] = None
        if self._rest is not None and attempt.rests_until < self._rest_until:
            self._rest.cancel()
            self._rest = None
        if self._rest is None:
            self._rest_until = attempt.rests_until
            rest_s = max(0.0, attempt.rests_until - time.monotonic())
            self._rest = asyncio.get_running_loop().call_later(rest_s, self._end_rest)

    def _end_rest(self) -> None:
        """Of those that have rested; the others are looked at again when the next of them has."""
        self._rest = None
        now = time.monotonic() + CLOCK_S
        for attempt in [attempt for attempt in self._resting if attempt.rests_until <= now]:
            self.hurry(attempt)
        if self._resting:
            self._let_rest(min(self._resting, key=lambda attempt: attempt.rests_until))

    async def _flush_forever(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            await self._wake.wait()
            if self._alone:
                attempts = [self._alone.pop()]
            else:
                attempts, self._waiting = list(self._waiting), {}
                self._wake.clear()
            try:
                await self._send(attempts)
            except FAILURES as error:
                if not passes(error):
                    self._look_for_the_culprit(attempts)
                    continue
                log.warning("publisher_cannot_reach_redis", reason=str(error), attempts=len(attempts))
                for attempt in attempts:
                    self.hurry(attempt)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            except Exception:  # noqa: BLE001 - one attempt's defect must not silence all the others for ever
                self._look_for_the_culprit(attempts)
            else:
                retry_s = FIRST_RETRY_S

    def _look_for_the_culprit(self, attempts: list[AttemptLog]) -> None:
        """Called in an exception handler. One attempt is the culprit; of several, each is tried alone."""
        for attempt in attempts:
            attempt.known_on = 0
        if len(attempts) == 1:
            log.exception("attempt_cannot_be_published", job=attempts[0].claim.job_id)
            attempts[0].lose(Loss.REFUSED)
        else:
            log.warning("flush_failed", attempts=len(attempts), exc_info=True)
            self._alone += attempts
            self._wake.set()

    async def _send(self, attempts: list[AttemptLog]) -> None:
        """Sends all that these attempts have to say. What Redis refuses now is tried again, and holds up nobody else.

        Raises one of FAILURES if it is not known what Redis has got.
        """
        line = self._line.number
        doubtful = {attempt for attempt in attempts if attempt.known_on != line}
        if doubtful:
            await self._ask_what_landed(doubtful, line)
        again = await self._flush(attempts, line, asked=doubtful)
        for attempt in doubtful.difference(again):
            attempt.refusals = 0
        for attempt in again:
            attempt.known_on = 0
            attempt.refusals += 1
            if attempt.refusals == 1:  # mostly since it is there already: that is asked at once
                self.hurry(attempt)
            else:
                again_s = min(FIRST_RETRY_S * 2 ** min(attempt.refusals, 10), LAST_RETRY_S)
                attempt.rests_until = time.monotonic() + again_s
                self._let_rest(attempt)

    async def _flush(self, attempts: list[AttemptLog], line: int, *, asked: Set[AttemptLog]) -> list[AttemptLog]:
        """Sends all that these attempts have to say; returns those that must be sent again.

        `asked`: of which it was asked just before what has landed. An entry of theirs that is refused all the same, and
        not because there is a later one by now, never will be stored.
        """
        sent: list[tuple[AttemptLog, int, int, bool]] = []  # how many entries, the sequence of the last, and a marker
        commands: list[bytes] = []
        count = size = markers = 0
        now = time.monotonic()
        for attempt in attempts:
            sequence, entries, finish = attempt.take(now)
            for kind, payload in entries:
                commands.append(attempt.append_and_publish(sequence, kind, payload))
                size += len(payload)
                sequence += 1
            sent.append((attempt, len(entries), sequence - 1, finish is not None))
            count += len(entries)
            if finish is not None:
                commands.append(self._finish_command(attempt, finish))
                markers += 1
        if not commands:
            return []
        answers = await self._call(commands, 2 * count + markers, line)
        metrics.flushed(count, size)
        if not markers and set(map(type, answers[::2])) <= _STORED:  # an append and its publication answer one each
            for attempt, _, last, _ in sent:
                attempt.landed(last)
            return []

        again: list[AttemptLog] = []
        at = 0
        for attempt, entry_count, last, has_marker in sent:
            behind = at + 2 * entry_count
            stored, ending = answers[at:behind:2], answers[behind] if has_marker else None
            at = behind + has_marker
            if not await self._settle(attempt, last, stored, ending, line, asked=attempt in asked):
                again.append(attempt)
        return again

    async def _settle(
        self, attempt: AttemptLog, last: int, stored: list[Any], ending: Any, line: int, *, asked: bool
    ) -> bool:
        """Tells an attempt what Redis has answered to its entries, up to the last, and to its marker.

        False: send them again.
        """
        if attempt.is_over:  # it was lost meanwhile
            return True
        # A refused append may have been refused for being there.
        refused = next((answer for answer in stored if isinstance(answer, Exception)), None)
        if refused is not None and _leaves_a_hole(stored):
            log.error("entry_refused", job=attempt.claim.job_id, reason=f"{refused}; the next one was stored")
            attempt.lose(Loss.REFUSED)
            return True
        if refused is not None and (passes(refused) or not asked or _came_too_late(refused)):
            return False
        if refused is not None:
            log.error("entry_refused", job=attempt.claim.job_id, reason=str(refused))
            attempt.lose(Loss.REFUSED)
        elif None in stored:  # NOMKSTREAM
            attempt.lose(Loss.EXPIRED)
        elif isinstance(ending, NoScriptError):  # Redis was restarted, or its scripts were flushed
            await self._call([command("SCRIPT", "LOAD", scripts.source("finish"))], 1, line)
            return False
        elif isinstance(ending, Exception) and passes(ending):
            return False
        elif isinstance(ending, Exception):
            log.error("marker_refused", job=attempt.claim.job_id, reason=str(ending))
            attempt.lose(Loss.REFUSED)
        else:
            attempt.landed(last)
            if ending is not None:
                attempt.ended(Ending(ending.decode()))
        return True

    async def _ask_what_landed(self, doubtful: Set[AttemptLog], line: int) -> None:
        """After a refusal, or an answer that never came: what is in Redis already must not be sent twice.

        What has landed is published once more, since nobody knows whether it was: readers drop what they have.
        """
        attempts = [attempt for attempt in doubtful if not attempt.is_over]
        streams = [self._store.keys.stream(attempt.claim.job_id) for attempt in attempts]
        questions = [command("XREVRANGE", key, "+", "-", "COUNT", 1) for key in streams]
        answers = await self._call(questions, len(streams), line)
        if refused := next((answer for answer in answers if isinstance(answer, Exception)), None):
            raise refused
        landed: list[tuple[AttemptLog, EntryId]] = []
        commands: list[bytes] = []
        for attempt, rows in zip(attempts, answers, strict=True):
            if not rows:
                attempt.lose(Loss.EXPIRED)
                continue
            last = EntryId.parse(rows[0][0])
            if last.attempt > attempt.claim.attempt:
                attempt.lose(Loss.FENCED)
                continue
            if not attempt.may_go_on_behind(last):  # a failover may lose what was confirmed
                log.error("confirmed_entries_lost", job=attempt.claim.job_id, last=str(last))
                attempt.lose(Loss.REFUSED)
                continue
            sequence, entries, _ = attempt.take(time.monotonic())
            channel = self._store.keys.stream_channel(attempt.claim.job_id)
            for kind, payload in entries[: last.sequence - sequence + 1]:
                entry = Entry(EntryId(last.attempt, sequence), kind, payload)
                commands.append(command("PUBLISH", channel, entry_to_message(entry)))
                sequence += 1
            landed.append((attempt, last))
        await self._call(commands, len(commands), line)  # if it fails, all of it is asked again
        for attempt, last in landed:
            attempt.landed_up_to(last)
            attempt.known_on = line

    def _finish_command(self, attempt: AttemptLog, finish: _Finish) -> bytes:
        keys, args = self._store.finish_args(
            attempt.claim,
            self._worker_id,
            finish.marker,
            finish.status,
            finish.fields,
            finish.session_state,
            agent_stopped=finish.agent_stopped,
            timing=attempt.timing(),
        )
        return command("EVALSHA", self._script.sha, len(keys), *keys, *args)

    async def _call(self, commands: list[bytes], replies: int, line: int) -> list[Any]:
        """Sends commands in one go and returns their replies, refusals among them. Raises one of FAILURES.

        `line`: the number of the connection for which they are meant; they go on no other.
        """
        if not commands:
            return []
        if self._line.number != line:
            raise RedisConnectionError("the connection has broken")
        return await self._line.call(b"".join(commands), replies)


def _leaves_a_hole(stored: list[Any]) -> bool:
    """Whether Redis had no room for an entry and took one behind it: memory came back in the middle of a flush.

    What is refused for being there already has been stored, and leaves none.
    """
    refused = [at for at, answer in enumerate(stored) if isinstance(answer, Exception) and passes(answer)]
    return bool(refused) and any(isinstance(answer, bytes) for answer in stored[refused[0] :])


def _came_too_late(refused: Exception) -> bool:
    """Whether Redis has that entry or a later one. It got there after it was asked for: a command from before a cut
    connection has arrived only now, or recovery has opened the next attempt. To ask once more tells which."""
    return "equal or smaller" in str(refused)
