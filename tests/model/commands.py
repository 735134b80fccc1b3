"""The commands that the product sends, made by the product: `JobStore`'s own methods, with a client that only notes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, cast, get_args

from arq.connections import ArqRedis

from shared import scripts
from shared.entries import Entry, EntryId, ErrorMarker, Kind, OkMarker, Tally, entry_to_message
from shared.jobs import ErrorCode, Status
from shared.settings import Settings
from shared.store import Claim, IdleDeadline, JobStore
from tests.jobs import a_submission
from tests.model.rules import said
from tests.model.server import CLOCK, KEYS, Command, RawCommand

PASSED = 0

P = ParamSpec("P")


class _NotedError(Exception):
    """Not sent, only noted."""

    def __init__(self, script: scripts.ScriptName, keys: list[str], args: list[Any]) -> None:
        super().__init__(script)
        self.script, self.keys, self.args_of_script = script, keys, args


class _Notebook:
    """What JobStore takes for Redis."""

    def register_script(self, text: str) -> Callable[..., Coroutine[Any, Any, None]]:
        (name,) = (name for name in get_args(scripts.ScriptName) if text == scripts.source(name))

        async def note(keys: list[str], args: list[Any]) -> None:
            raise _NotedError(name, keys, args)

        return note


def _once(make: Callable[Concatenate[Commands, P], Command]) -> Callable[Concatenate[Commands, P], Command]:
    """The same arguments give the same object: by that, what it does is known."""

    @wraps(make)
    def made(self: Commands, /, *args: P.args, **kwargs: P.kwargs) -> Command:
        key = (make.__name__, args, *kwargs.values())
        if key not in self.made:
            self.made[key] = make(self, *args, **kwargs)
        return self.made[key]

    return made


class Commands:
    """Each is made once."""

    def __init__(self, shas: Mapping[scripts.ScriptName, str], max_attempts: int) -> None:
        # The timeouts do not matter, see tests/model/server.py.
        settings = Settings(prefix=KEYS.prefix, max_attempts=max_attempts)
        self._shas = shas
        self._store = JobStore(cast(ArqRedis, _Notebook()), settings)
        self.made: dict[Any, Command] = {}

    def _script(self, name: scripts.ScriptName, keys: list[str], args: list[Any]) -> RawCommand:
        return ("EVALSHA", self._shas[name], len(keys), *keys, *args)

    def _sent_by(self, step: Coroutine[Any, Any, Any]) -> tuple[RawCommand]:
        try:
            step.send(None)
        except _NotedError as noted:
            return (self._script(noted.script, noted.keys, noted.args_of_script),)
        raise AssertionError("it has sent nothing")

    # -- API

    @_once
    def submit(self, job: str, session: str) -> Command:
        submission = a_submission(job, session=session)
        return Command("submit", "", job, 0, self._sent_by(self._store.submit(submission)))

    @_once
    def cancel(self, job: str) -> Command:
        return Command("cancel", "", job, 0, self._sent_by(self._store.cancel(job, "The client went away.")))

    # -- a worker

    @_once
    def beat(self, worker: str, silent: tuple[str, int] | None) -> Command:
        """`silent`: a job and its attempt, whose idle deadline is told."""
        idle = [IdleDeadline(*silent, self._store.settings.idle_timeout_s)] if silent else []
        raw = self._script("beat", *self._store.beat_args(worker, {"agent": "model"}, idle))
        return Command("beat", worker, "", 0, (raw,))

    @_once
    def claim(self, worker: str, slots: int) -> Command:
        return Command("claim", worker, "", 0, self._sent_by(self._store.claim(worker, slots)))

    @_once
    def retire(self, worker: str) -> Command:
        return Command("retire", worker, "", 0, self._sent_by(self._store.retire(worker)))

    @_once
    def entry(self, worker: str, job: str, attempt: int, sequence: int) -> Command:
        """An append and its publication: one step, since a publication changes no key."""
        entry = Entry(EntryId(attempt, sequence), Kind.DELTA, said(attempt, sequence))
        append = ("XADD", KEYS.stream(job), "NOMKSTREAM", str(entry.id), entry.kind.value, entry.payload)
        publish = ("PUBLISH", KEYS.stream_channel(job), entry_to_message(entry))
        return Command("append", worker, job, attempt, (append, publish))

    def _finish(
        self, worker: str, job: str, attempt: int, marker: Entry, status: Status, state: str | None, agent_stopped: bool
    ) -> Command:
        keys, args = self._store.finish_args(
            Claim(job, attempt, 0, None),
            worker,
            marker,
            status,
            {"finish_reason": "stop"} if marker.kind is Kind.OK else {},
            None if state is None else state.encode(),
            agent_stopped=agent_stopped,
        )
        name = "finish" if agent_stopped else "abandon"
        return Command(name, worker, job, attempt, (self._script("finish", keys, args),))

    @_once
    def ok(self, worker: str, job: str, attempt: int, entries: int, state: str | None) -> Command:
        """`state`: what the session's turn before has left; this turn adds its job to it."""
        tally = Tally()
        for sequence in range(1, entries + 1):
            tally.add(Kind.DELTA, said(attempt, sequence))
        payload = OkMarker(tally.count, tally.digest, "stop", None).payload()
        marker = Entry(EntryId(attempt, entries + 1), Kind.OK, payload)
        left = None if state is None else state + job
        return self._finish(worker, job, attempt, marker, Status.SUCCEEDED, left, agent_stopped=True)

    @_once
    def failure(self, worker: str, job: str, attempt: int, entries: int, *, agent_stopped: bool) -> Command:
        payload = ErrorMarker(ErrorCode.AGENT_ERROR, "The agent failed.").payload()
        marker = Entry(EntryId(attempt, entries + 1), Kind.ERROR, payload)
        return self._finish(worker, job, attempt, marker, Status.FAILED, None, agent_stopped=agent_stopped)

    @_once
    def release(self, worker: str, job: str, attempt: int) -> Command:
        claim = Claim(job, attempt, 0, None)
        return Command("release", worker, job, attempt, self._sent_by(self._store.release(claim, worker)))

    @_once
    def incomplete(self, worker: str, job: str, attempt: int) -> Command:
        error = ErrorMarker(ErrorCode.STREAM_INCOMPLETE, "A part of the answer could not be stored.")
        return Command(
            "end", worker, job, attempt, self._sent_by(self._store.give_up(Claim(job, attempt, 0, None), worker, error))
        )

    # -- nobody's

    @_once
    def sweep(self) -> Command:
        return Command("sweep", "", "", 0, self._sent_by(self._store.sweep()))

    @_once
    def pass_lease(self, worker: str) -> Command:
        return Command("time", "", "", 0, (("ZADD", KEYS.workers, "XX", PASSED, worker),))

    @_once
    def pass_deadline(self, job: str) -> Command:
        return Command("time", "", job, 0, (("ZADD", KEYS.deadlines, "XX", PASSED, job),))

    @_once
    def settle(self) -> Command:
        """Everything that is known passes, and there is a sweep."""
        later = ("SET", CLOCK, 1000)
        return Command("settle", "", "", 0, (later, *self.sweep().raw))
