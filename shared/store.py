"""Everything that a job does in Redis: one method for each step of the protocol, one round trip each.

Errors:
    shared.connection.FAILURES    Redis refused, or did not answer: then it may have done it all the same
    QueueFullError                the queue, or the session, holds as many jobs as it may
    OtherBodyError                a request says that it is the same as one before, and is not
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from arq.jobs import serialize_job
from redis.exceptions import NoScriptError

from shared import metrics, scripts, tracing
from shared.entries import BEGINNING, Entry, EntryId, ErrorMarker
from shared.jobs import ARQ_FUNCTION, ErrorCode, JobRecord, Join, Once, Status, Submission
from shared.keys import Keys
from shared.packs import Row, entries_from_row
from shared.settings import Settings
from shared.text import json_bytes, parse_json
from shared.webhooks import longest_delivery_ms, webhook_fields
from shared.wire import Line, command

# Jobs that one claim takes. Half of the default slots: some run while Redis hands out others, which takes it 1 ms.
CLAIM_LIMIT = 25

SWEEP_LIMIT = 100  # passed deadlines that one sweep looks at; the next one goes on where it stopped

EXPIRED_LIMIT = 500  # expired jobs that one sweep takes out of the index: 2,500 in a second


class QueueFullError(Exception):
    """As many jobs are unfinished as may be. `of_session`: in the session, not in all."""

    def __init__(self, *, of_session: bool) -> None:
        super().__init__("the session has too many unfinished turns" if of_session else "the queue is full")
        self.of_session = of_session


class OtherBodyError(Exception):
    """A request says that it is the same as one before, and is not."""


class Accepted(NamedTuple):
    """What became of a submission."""

    job_id: str  # another one than that of the submission if the request has come before
    is_new: bool  # False: the job existed already
    accepted_ms: int  # Redis's clock when the job was accepted

    @property
    def created_s(self) -> int:
        """What the client is told as `created`, in seconds since the epoch."""
        return self.accepted_ms // 1000


class Claim(NamedTuple):
    """A worker's right to execute one attempt of a job."""

    job_id: str
    attempt: int
    started_ms: int  # Redis's clock when the attempt was opened
    request: bytes | None  # what `Submission.request_bytes` made; None if it is gone
    arq_job: bytes | None = None  # arq's own record, which names the function; None if it is gone
    accepted_ms: int = 0  # Redis's clock; 0: nobody knows any more
    trace: Mapping[str, str] = {}  # the span of the request, see shared/tracing.py; empty if there was none
    session_state: bytes | None = None  # b"": there is none; None: to be asked for, see `JobStore.session_state`


class Held(NamedTuple):
    """A job that a worker holds."""

    claim: Claim
    is_running: bool  # False: it has ended, and only has to be released
    nothing_shown: bool  # False: something of this attempt is in the stream, so that it must not execute again


class IdleDeadline(NamedTuple):
    """When an agent that runs will have been silent for too long, unless it says something before."""

    job_id: str
    attempt: int
    left_s: float  # until then; negative if it has passed


class Ending(StrEnum):
    """What became of a try to end a job."""

    DONE = "done"  # this call ended it
    FENCED = "fenced"  # another attempt, another worker or an earlier ending came first
    GONE = "gone"  # there is no such job
    INCOMPLETE = "incomplete"  # an `ok` was refused, since the stream does not hold the whole answer
    TERMINAL = "terminal"  # it had ended before


class Left(StrEnum):
    """What became of a job when a client that waited for it went away."""

    CANCELLED = "done"
    OTHERS_WAIT = "others"  # or nobody has to
    LATER = "later"  # nothing yet, since the client may come back
    ENDED_BEFORE = "ended_before"
    GONE = "gone"


class Deletion(StrEnum):
    """What became of a try to delete a job."""

    DONE = "done"
    GONE = "gone"  # there is no such job
    UNFINISHED = "unfinished"  # it has not ended, or its worker has not stopped


class Swept(NamedTuple):
    """A job that the sweep moved on: `what` is 'retried' or the error code it was ended with."""

    job_id: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRead:
    """What a reader finds behind its cursor."""

    entries: list[Entry]
    rows: int  # how many rows of the stream held them: a pack is one
    more: bool  # whether there may be more behind them already
    exists: bool  # whether the stream is there at all
    status: Status | None  # the job's, read before the entries; None: no record


class JobStore:
    """The jobs of one deployment."""

    def __init__(self, redis: ArqRedis, settings: Settings, line: Line | None = None) -> None:
        """`line`: a connection of this client for what every job needs; without it redis-py's pool serves that, too."""
        self.redis = redis
        self._line = line
        self._bell_line = None if line is None else Line(redis)  # of its own: while it waits, it serves nothing else
        self.settings = settings
        self.keys = Keys(settings.prefix)
        self._scripts: dict[scripts.ScriptName, Any] = {}
        self._retention_ms = round(settings.retention_s * 1000)
        self._queue_timeout_ms = round(settings.queue_timeout_s * 1000)
        self._run_timeout_ms = round(settings.run_timeout_s * 1000)
        # Longer than all deadlines of a job together: the sweep always still finds what it must end.
        self._unfinished_ms = (
            settings.max_attempts * (self._queue_timeout_ms + self._run_timeout_ms) + self._retention_ms
        )

    async def _run(self, name: scripts.ScriptName, key: str, *args: str | bytes | int) -> Any:
        metrics.scripts.labels(name).inc()
        script = self.script(name)
        if self._line is None:
            return await script([key], [self.keys.prefix, *args])
        run = self._eval(name, key, *args)
        (reply,) = await self._line.call(run, 1)
        if isinstance(reply, NoScriptError):  # Redis was restarted, or its scripts were flushed
            _, reply = await self._line.call(command("SCRIPT", "LOAD", scripts.source(name)) + run, 2)
        return _unless_refused([reply])[0]

    def _eval(self, name: scripts.ScriptName, key: str, *args: str | bytes | int) -> bytes:
        return command("EVALSHA", self.script(name).sha, 1, key, self.keys.prefix, *args)

    async def _ask(self, *commands: tuple[str | bytes | int, ...]) -> list[Any]:
        """The answers to commands, in one round trip."""
        if not commands:
            return []
        if self._line is not None:
            run = b"".join([command(*parts) for parts in commands])
            return _unless_refused(await self._line.call(run, len(commands)))
        async with self.redis.pipeline(transaction=False) as pipe:
            for parts in commands:
                pipe.execute_command(*parts)
            answers: list[Any] = await pipe.execute()
            return answers

    async def aclose(self) -> None:
        """Lets go of Redis."""
        for line in (self._line, self._bell_line):
            if line is not None:
                await line.aclose()
        await self.redis.aclose(close_connection_pool=True)

    def script(self, name: scripts.ScriptName) -> Any:
        """A registered script: awaited, or given `client=pipeline` to become one command of a pipeline."""
        if name not in self._scripts:
            self._scripts[name] = self.redis.register_script(scripts.source(name))
        return self._scripts[name]

    # -- accepting ---------------------------------------------------------------------------------------------------

    async def submit(self, job: Submission) -> Accepted:
        """Queues a job, once: one with its id, or of the same request, stays as it is, and is the one to follow.

        Raises QueueFullError or OtherBodyError.
        """
        timeouts_ms = [self._queue_timeout_ms, *([] if job.patience_ms is None else [job.patience_ms])]
        once = job.once or _NOT_TWICE
        answer = await self._run(
            "submit",
            self.keys.job(job.job_id),
            job.job_id,
            job.session,
            serialize_job(ARQ_FUNCTION, (), {}, None, time.time_ns() // 1_000_000, serializer=json_bytes),
            job.request_bytes(),
            min(timeouts_ms),
            self._unfinished_ms,
            self.settings.max_unfinished,
            self.settings.max_session_turns,
            once.name and f"{job.tenant}:{once.name}",
            once.body_digest,
            once.join.value,
            *self._webhook_args(job),
            *_flatten(job.record_fields()),
            *_flatten(tracing.carry()),
        )
        if answer in (b"queue_full", b"session_full"):
            raise QueueFullError(of_session=answer == b"session_full")
        if answer == b"other_body":
            raise OtherBodyError(job.job_id)
        what, job_id, accepted_ms = answer
        return Accepted(job_id.decode(), what == b"accepted", int(accepted_ms))

    def _webhook_args(self, job: Submission) -> list[str | bytes | int]:
        fields = webhook_fields(job, self.settings)
        if fields is None:
            return [0]
        ttl_ms = self._unfinished_ms + longest_delivery_ms(self.settings)
        args: list[str | bytes | int] = [ttl_ms, *_flatten(fields)]
        return [len(args), *args]

    async def forget(self, tenant: str, once: Once, job_id: str) -> None:
        """The request has its answer: the next one that looks the same is another one."""
        await self._run("forget", self.keys.once(f"{tenant}:{once.name}"), job_id)

    # -- a worker's steps --------------------------------------------------------------------------------------------

    async def wait_for_bell(self, timeout_s: int) -> bool:
        """Waits until a job may be claimable; wakes one worker of all that wait. False after the timeout."""
        rung: Awaitable[Any] = self.redis.blpop([self.keys.bell], timeout=timeout_s)  # type: ignore[assignment]  # redis-py types both its clients at once
        return await rung is not None

    async def ring(self) -> None:
        """Wakes one worker, for a bell that was heard in vain."""
        await self.redis.lpush(self.keys.bell, "1")  # type: ignore[misc]  # redis-py types both its clients at once
        await self.redis.pexpire(self.keys.bell, 60_000)

    async def claim(self, worker_id: str, slots: int, *, wait_s: int = 0) -> list[Claim]:
        """Opens an attempt of up to `slots` jobs, and of no more than CLAIM_LIMIT.

        With `wait_s`, as soon as the bell rings, or after that time: for one caller at a time. If the answer is lost
        with the connection, jobs may be claimed all the same: `held_by` finds them.
        """
        args = (
            worker_id,
            min(slots, CLAIM_LIMIT),
            self._run_timeout_ms,
            self._unfinished_ms,
            self._unfinished_ms - self._queue_timeout_ms,  # what the first attempt finds, however long it has waited
            self._retention_ms,
            _UNWANTED.payload(),
        )
        if wait_s and self._bell_line is not None:
            rows = await self._claim_at_bell(self._bell_line, wait_s, args)
        else:
            if wait_s:
                await self.wait_for_bell(wait_s)
            rows = await self._run("claim", self.keys.queue, *args)
        claims: list[Claim] = []
        for job_id, attempt, *rest in rows:
            if int(attempt) == 0:
                metrics.job_ended(Status.CANCELLED, ErrorCode.CANCELLED)
                continue
            started_ms, accepted_ms, *trace, request, arq_job = rest[:6]
            claims.append(
                Claim(
                    job_id=job_id.decode(),
                    attempt=int(attempt),
                    started_ms=int(started_ms),
                    request=request,
                    arq_job=arq_job,
                    accepted_ms=int(accepted_ms),
                    trace=_carrier(trace),
                    session_state=rest[6] if len(rest) > 6 else None,
                )
            )
        return claims

    async def _claim_at_bell(self, line: Line, wait_s: int, args: tuple[str | bytes | int, ...]) -> Any:
        """Sends the claim behind the wait for the bell: Redis runs it when the bell has rung, a round trip earlier."""
        claim = self._eval("claim", self.keys.queue, *args)
        try:
            rang, rows = await line.call(command("BLPOP", self.keys.bell, wait_s) + claim, 2)
        except asyncio.CancelledError:
            await line.aclose()  # Redis would ring for it
            raise
        if isinstance(rows, NoScriptError):
            return await self._run("claim", self.keys.queue, *args)
        _unless_refused([rows] if rows else [rows, rang])
        return rows

    async def stop_waiting(self) -> None:
        """Cuts a claim that waits for the bell. It may have been executed all the same: `held_by` tells."""
        if self._bell_line is not None:
            await self._bell_line.aclose()

    async def held_by(self, worker_id: str, known: Mapping[str, int] | None = None) -> list[Held]:
        """What this worker holds, as far as Redis knows: attempts to execute, and ended ones to release.

        Attempts that are `known`, by their jobs, are left out.
        """
        members: set[bytes] = await self.redis.smembers(self.keys.worker_jobs(worker_id))  # type: ignore[misc]  # as above
        job_ids = sorted(member.decode() for member in members)
        if known:
            attempts = await self._ask(*(("HGET", self.keys.job(job_id), "attempt") for job_id in job_ids))
            job_ids = [
                job_id
                for job_id, attempt in zip(job_ids, attempts, strict=True)
                if attempt is None or known.get(job_id) != int(attempt)
            ]
        held: list[Held] = []
        for job_id in job_ids:
            async with self.redis.pipeline(transaction=False) as pipe:
                pipe.hmget(
                    self.keys.job(job_id),
                    ["status", "worker", "attempt", "started_ms", "accepted_ms", *tracing.CARRIED],
                )
                pipe.mget(self.keys.request(job_id), f"{job_key_prefix}{job_id}")
                pipe.xrevrange(self.keys.stream(job_id), count=1)
                answers = await pipe.execute()
            (status, worker, attempt, started_ms, accepted_ms, *trace), (request, arq_job), last = answers
            if worker is not None and worker != worker_id.encode():
                continue
            claim = Claim(
                job_id,
                int(attempt or 0),
                int(started_ms or 0),
                request,
                arq_job,
                int(accepted_ms or 0),
                _carrier(trace),
            )
            held.append(
                Held(
                    claim,
                    is_running=status == Status.RUNNING.value.encode(),
                    nothing_shown=bool(last) and EntryId.parse(last[0][0]) == EntryId(claim.attempt, 0),
                )
            )
        return held

    async def session_state(self, session: str) -> bytes | None:
        """What the agent left in the session's last whole turn; None: a new session.

        For the turn that runs, if its claim has not brought it. No other turn of its session can change it meanwhile,
        since only that one is not fenced.
        """
        state: bytes | None = (await self._ask(("GET", self.keys.session(session))))[0]
        return state

    def finish_args(
        self,
        claim: Claim,
        worker_id: str,
        marker: Entry,
        status: Status,
        fields: Mapping[str, str | bytes | int],
        session_state: bytes | None,
        *,
        agent_stopped: bool,
        timing: bytes = b"",
    ) -> tuple[list[str], list[str | bytes | int]]:
        """Keys and arguments of the `finish` script, for a pipeline that sends it behind the last entries.

        An agent that has not stopped keeps slot and session until `release`.
        """
        return [self.keys.job(claim.job_id)], [
            self.keys.prefix,
            claim.job_id,
            worker_id,
            claim.attempt,
            marker.id.sequence,
            marker.kind.value,
            marker.payload,
            status.value,
            self._retention_ms,
            "1" if agent_stopped else "0",
            session_state or b"",
            round(self.settings.session_ttl_s * 1000),
            timing,
            "entries",
            marker.id.sequence - 1,
            *_flatten(fields),
        ]

    async def release(self, claim: Claim, worker_id: str) -> None:
        """Tells that an attempt executes no longer. A job that has no marker yet gets one. Idempotent."""
        answer = await self._run(
            "release",
            self.keys.job(claim.job_id),
            claim.job_id,
            worker_id,
            claim.attempt,
            _WORKER_LOST.payload(),
            self._retention_ms,
        )
        if answer == 2:
            metrics.job_ended(Status.FAILED, _WORKER_LOST.code)

    def beat_args(
        self, worker_id: str, fields: Mapping[str, str | int], idle_deadlines: Iterable[IdleDeadline] = ()
    ) -> tuple[list[str], list[str | bytes | int]]:
        """Keys and arguments of the `beat` script, which runs on the heartbeat's own connection."""
        lease_ms = round(self.settings.lease_s * 1000)
        args = [self.keys.prefix, worker_id, lease_ms, 2 * len(fields), *_flatten(fields)]
        for job_id, attempt, left_s in idle_deadlines:
            args += [job_id, attempt, round(left_s * 1000)]
        return [self.keys.workers], args

    async def tell_draining(self, worker_id: str) -> None:
        """For whoever looks at the workers; nothing depends on it."""
        await self.redis.hset(self.keys.worker(worker_id), "draining", "1")  # type: ignore[misc]  # as above
        await self.redis.pexpire(self.keys.worker(worker_id), round(self.settings.lease_s * 10_000))

    async def retire(self, worker_id: str) -> None:
        """Takes a worker that runs nothing any more off the list."""
        await self._run("retire", self.keys.workers, worker_id)

    async def compact(
        self, claim: Claim, worker_id: str, rows: Sequence[Row], *, before: int, replaces: tuple[int, EntryId] | None
    ) -> bool:
        """Brings packed rows of an ended job's stream, behind `before` others that came earlier.

        With the last ones, all together take the place of the stream that they were made of: `replaces` is its length
        and its last id. False if they may not, and nothing has changed: the job has not ended, somebody else has gone
        on with it, or the stream is not what it was.
        """
        length, last = replaces or (0, BEGINNING)
        answer = await self._run(
            "compact",
            self.keys.job(claim.job_id),
            claim.job_id,
            worker_id,
            claim.attempt,
            before,
            length,
            str(last),
            *(part for row in rows for part in (str(row.id), row.name, row.payload)),
        )
        return bool(answer != b"changed")

    # -- ending from outside -----------------------------------------------------------------------------------------

    async def end(self, job_id: str, status: Status, error: ErrorMarker) -> Ending:
        """Ends a job whatever it is doing; its worker is told to stop. A job that has ended stays as it is."""
        return await self._end(job_id, status, error, "", "")

    async def give_up(self, claim: Claim, worker_id: str, error: ErrorMarker) -> Ending:
        """Ends a job because this attempt cannot go on. If another one has begun, or the job has ended, it stays."""
        return await self._end(claim.job_id, Status.FAILED, error, worker_id, claim.attempt)

    async def _end(self, job_id: str, status: Status, error: ErrorMarker, worker_id: str, attempt: int | str) -> Ending:
        key, retention_ms = self.keys.job(job_id), self._retention_ms
        answer = await self._run("end", key, job_id, status.value, error.payload(), retention_ms, worker_id, attempt)
        if answer == b"done":
            metrics.job_ended(status, error.code)
        if answer in (b"done", b"gone", b"fenced"):
            return Ending(answer.decode())
        return Ending.TERMINAL

    async def cancel(self, job_id: str, message: str) -> Ending:
        """Ends a job because nobody wants its answer any more."""
        return await self.end(job_id, Status.CANCELLED, ErrorMarker(ErrorCode.CANCELLED, message))

    async def leave(self, job_id: str, waiter: str, message: str, *, may_come_back: bool) -> Left:
        """A client that waited for a job has gone away; the job of the last one is cancelled. Idempotent.

        `waiter`: the id of the submission by which it waited: the job's own, or one that has joined it.

        `may_come_back`: a job that runs is left alone for now, and the caller asks again after a moment.
        """
        answer = await self._run(
            "leave",
            self.keys.job(job_id),
            job_id,
            waiter,
            ErrorMarker(ErrorCode.CANCELLED, message).payload(),
            self._retention_ms,
            "1" if may_come_back else "0",
        )
        left = Left.ENDED_BEFORE if answer.decode() in _TERMINAL else Left(answer.decode())
        if left is Left.CANCELLED:
            metrics.job_ended(Status.CANCELLED, ErrorCode.CANCELLED)
        return left

    async def delete(self, job_id: str) -> Deletion:
        """Deletes a job that has ended, with all that it said."""
        return Deletion((await self._run("delete", self.keys.job(job_id), job_id)).decode())

    async def sweep(self, *, unless_within_ms: int = 0) -> list[Swept]:
        """Recovers the jobs of lost workers and ends jobs past their deadline. Any process may call it at any time.

        Does nothing if the last such sweep of any process was less than `unless_within_ms` ago.
        """
        rows = await self._run(
            "sweep",
            self.keys.deadlines,
            SWEEP_LIMIT,
            self._retention_ms,
            self._queue_timeout_ms,
            self.settings.max_attempts,
            *(marker.payload() for marker in _SWEEP_MARKERS),
            unless_within_ms,
            EXPIRED_LIMIT,
        )
        return [Swept(job_id.decode(), what.decode()) for job_id, what in rows]

    async def probe(self) -> None:
        """Changes nothing. Raises one of FAILURES unless Redis takes writes."""
        await self.redis.delete(f"{self.keys.prefix}:nothing")

    # -- reading -----------------------------------------------------------------------------------------------------

    async def stale(self, cursors: Sequence[tuple[str, EntryId]]) -> set[str]:
        """The jobs, of pairs of a job and the last entry that a reader has seen, at which the reader has to look.

        There is an entry behind it, or there will never be one. One command instead of `read_after` for each.
        """
        pairs = [part for job_id, cursor in cursors for part in (job_id, str(cursor))]
        return {job_id.decode() for job_id in await self._run("stale", self.keys.deadlines, *pairs)}

    async def read_after(self, job_id: str, cursor: EntryId, count: int) -> StreamRead:
        """The entries of up to `count` rows that follow the cursor, and what there is to expect behind them.

        They are `count` entries at most, unless a pack holds more than was missing. Raises UnreadableEntryError.
        """
        stream = self.keys.stream(job_id)
        status, exists, rows = await self._ask(
            ("HGET", self.keys.job(job_id), "status"),
            ("EXISTS", stream),
            ("XRANGE", stream, f"({cursor}", "+", "COUNT", count),
        )
        entries: list[Entry] = []
        used = 0
        for raw_id, fields in rows:
            if len(entries) >= count:
                break
            # The first pack may have begun before the cursor.
            entries += [entry for entry in entries_from_row(raw_id, fields) if entry.id > cursor]
            used += 1
        return StreamRead(
            entries=entries,
            rows=used,
            more=used < len(rows) or len(rows) == count,
            exists=bool(exists),
            status=Status(status.decode()) if status else None,
        )

    async def record(self, job_id: str) -> JobRecord | None:
        """What Redis knows of a job; None if there is none."""
        fields: dict[bytes, bytes] = await self.redis.hgetall(self.keys.job(job_id))  # type: ignore[misc]  # as above
        return JobRecord.from_hash(job_id, fields) if fields else None

    async def timing(self, job_id: str) -> bytes | None:
        """When the entries of the job's stream were said; None: nobody has noted it. See shared/timing.py."""
        stored: bytes | None = await self.redis.get(self.keys.times(job_id))
        return stored

    async def request(self, job_id: str) -> dict[str, Any] | None:
        """What `Submission.request_bytes` made of the request; None if it is gone."""
        stored: bytes | None = await self.redis.get(self.keys.request(job_id))
        return parse_json(stored) if stored else None

    async def live_workers(self) -> int:
        """How many workers hold a lease."""
        seconds, microseconds = await self.redis.time()
        return int(await self.redis.zcount(self.keys.workers, f"({seconds * 1000 + microseconds // 1000}", "+inf"))


_TERMINAL = frozenset({Status.SUCCEEDED.value, Status.FAILED.value, Status.CANCELLED.value})
_NOT_TWICE = Once(name="", body_digest="", join=Join.NEVER)
_UNWANTED = ErrorMarker(ErrorCode.CANCELLED, "Nobody waits for the answer any more.")
_WORKER_LOST = ErrorMarker(
    ErrorCode.WORKER_LOST, "The worker that ran this request was lost before the answer was complete."
)
_SWEEP_MARKERS = (
    _WORKER_LOST,
    ErrorMarker(ErrorCode.TIMEOUT, "The agent did not finish in time."),
    ErrorMarker(ErrorCode.QUEUE_TIMEOUT, "The request waited too long for its turn."),
    ErrorMarker(ErrorCode.NO_WORKER, "No worker is running that could answer the request."),
)


def _unless_refused(replies: list[Any]) -> list[Any]:
    """Raises the first refusal."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _carrier(values: Sequence[bytes | None]) -> dict[str, str]:
    return {name: value.decode() for name, value in zip(tracing.CARRIED, values, strict=True) if value}


def _flatten(fields: Mapping[str, str | bytes | int]) -> Sequence[str | bytes | int]:
    return [part for pair in fields.items() for part in pair]
